"""An assignment: a copy of the project in which ten functions are left to write.

    python -m lessons.assignment FOLDER

Each of them keeps its signature and its docstring. TASKS says in which order to write
them, and each has its own tests in tests/test_tasks.py. These call no other
function that is left to write, so the tasks can also be done in another order.
"""

import ast
import shutil
from pathlib import Path
from typing import NamedTuple

from machinery.errors import BadInput
from machinery.terminal import Parser, printable, run_script

ROOT = Path(__file__).resolve().parent.parent

# What is copied. The folder of results is not: no function needs it.
FILES = [
    "retriever.py",
    "rollout.py",
    "eval.py",
    "grpo.py",
    "ofsd.py",
    "train.py",
    "README.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "pyproject.toml",
    "requirements.txt",
    "requirements-extra.txt",
    ".gitignore",
]
FOLDERS = [
    "machinery",
    "micro",
    "lessons",
    "tools",
    "bench",
    "experiments",
    "configs",
    "docs",
    "tests",
]


class Task(NamedTuple):
    """A function that is left to write."""

    number: int
    file: str
    function: str  # with its class, if it is a method
    what: str  # to write, in one sentence
    tests: str  # pytest's -k, which selects the tests that grade it

    @property
    def command(self) -> str:
        """What runs the tests that grade it."""
        return f"python -m pytest -q tests/test_tasks.py -k {self.tests}"


TASKS = [
    Task(
        1,
        "retriever.py",
        "bm25_score",
        "Add up the formula of BM25 over the words of the query.",
        tests="bm25_score",
    ),
    Task(
        2,
        "rollout.py",
        "parse_turn",
        "Find the query or the answer that ends a turn.",
        tests="parse_turn",
    ),
    Task(
        3,
        "rollout.py",
        "Trajectory.extend",
        "Append tokens, and record who wrote them in the mask.",
        tests="extend",
    ),
    Task(
        4,
        "eval.py",
        "exact_match",
        "Compare an answer with the golden ones, all normalized.",
        tests="exact_match",
    ),
    Task(
        5,
        "grpo.py",
        "group_advantages",
        "Compare each reward with those of its group.",
        tests="group_advantages",
    ),
    Task(
        6,
        "grpo.py",
        "token_weights",
        "Say how much each token counts in the loss, by each of three norms.",
        tests="token_weights",
    ),
    Task(
        7,
        "grpo.py",
        "token_losses",
        "Compute the clipped loss of each token, and the penalty for leaving pi_ref.",
        tests="token_losses",
    ),
    Task(
        8,
        "ofsd.py",
        "mine_group",
        "Choose the reference of a group, and the trajectories to be corrected.",
        tests="mine_group",
    ),
    Task(
        9,
        "ofsd.py",
        "divergences",
        "Compare the teacher with the student at each token: three kinds, two clips.",
        tests="divergences",
    ),
    Task(
        10,
        "train.py",
        "teacher_edge",
        "Sample as student, teacher and control (its progress), and compare scores.",
        tests="teacher_edge",
    ),
]

OPENING = """\
# The assignment

Ten functions of this copy are left to write. Each still has its signature, and a
docstring that says what it gives. The equations are at the top of its file. Write them
in this order, and run the tests of each. The README says how to install what they need.
"""

CLOSING = """\
When all are written, `python -m pytest -q` tests the whole project, and
`python train.py` trains a model with what you wrote.
"""


def main() -> None:
    parser = Parser(description="Copy the project, with ten functions left to write.")
    parser.add_argument("folder", type=Path, help="a new folder for the copy")
    folder = parser.parse_args().folder
    write_assignment(folder)
    print(page())
    print(f"This is also in {printable(str(folder / 'ASSIGNMENT.md'))}")


def write_assignment(folder: Path) -> None:
    """Write the copy, and its page. Raises BadInput if the folder exists."""
    files = project_files()  # listed first, since the copy may be within one of FOLDERS
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise BadInput(f"{folder} exists already: name a new folder") from error
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    for task in TASKS:
        path = folder / task.file
        source = path.read_text(encoding="utf-8")
        path.write_text(blanked(source, task.function), encoding="utf-8")
    (folder / "ASSIGNMENT.md").write_text(page(), encoding="utf-8")


def project_files() -> list[Path]:
    """The files that are copied, relative to the project: no caches, no saved index."""
    files = [Path(name) for name in FILES]
    for folder in FOLDERS:
        for path in sorted(ROOT.glob(f"{folder}/**/*")):
            name = path.relative_to(ROOT)
            if path.is_file() and not any(is_cache(part) for part in name.parts):
                files.append(name)
    return files


def is_cache(part: str) -> bool:
    """Is this part of a path the name of a cache, or of something hidden?"""
    return part.startswith(".") or part == "__pycache__" or part.endswith(".bm25")


def blanked(source: str, function: str) -> str:
    """A file's text without the body of a function, whose docstring stays.

    The function, or method, must have a docstring.

    >>> print(blanked('def f(x):\\n    "Double."\\n    return 2 * x\\n', "f"), end="")
    def f(x):
        "Double."
        raise NotImplementedError
    """
    node = ast.parse(source)
    for name in function.split("."):
        (node,) = [child for child in node.body if getattr(child, "name", "") == name]
    docstring = node.body[0]
    indent = " " * docstring.col_offset
    lines = source.splitlines(keepends=True)
    before = lines[: docstring.end_lineno]
    after = lines[node.end_lineno :]
    return "".join([*before, f"{indent}raise NotImplementedError\n", *after])


def page() -> str:
    """The tasks, and how each is graded: Markdown that can be read in a terminal."""
    parts = [OPENING]
    for task in TASKS:
        title = f"{task.number}. `{task.function}` in {task.file}"
        indent = " " * len(f"{task.number}. ")
        parts.append(f"{title}\n{indent}{task.what}\n{indent}`{task.command}`\n")
    parts.append(CLOSING)
    return "\n".join(parts)


if __name__ == "__main__":
    run_script(main)
