"""The size and the style of the code, and who may import whom. Only CI asks for this.

A syntax node is a statement or an expression, imports and docstrings aside. Formatting
does not change their number. An inline expression is a comprehension, a conditional
expression or a lambda. A line of code is one that is neither blank, nor a comment, nor
part of an import or a docstring.
"""

import ast
import importlib.util
import re
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT
from pages import FOLDERS, SIX, imported_names, imports, modules, tree_of

INLINE = (
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.IfExp,
    ast.Lambda,
)
IMPORTS = (ast.Import, ast.ImportFrom)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
HOLDERS = (ast.Module, ast.ClassDef, *FUNCTIONS)
LIBRARIES = {"torch", "transformers", "datasets", "numpy", "tqdm", "safetensors"}
TOP = [ROOT / f"{name}.py" for name in SIX]
MACHINERY = sorted(ROOT.glob("machinery/*.py"))
READ = [*TOP, *MACHINERY, *sorted(ROOT.glob("lessons/*.py"))]
EXEMPTION = re.compile(r"#\s*(noqa|fmt:|isort:|ruff:|type:\s*ignore|pyright:|pylint:)")


@dataclass
class Size:
    """What the tests below compare with their limits."""

    nodes: int  # statements and expressions
    lines: int  # of code
    inline: int  # comprehensions, conditional expressions, lambdas
    longest: int  # lines of the longest function, its docstring aside


def lines_of(node: ast.stmt) -> set[int]:
    return set(range(node.lineno, node.end_lineno + 1))


def docstring_of(node: ast.AST) -> ast.stmt | None:
    """The statement that is the docstring of a module, a class or a function."""
    if isinstance(node, HOLDERS) and ast.get_docstring(node) is not None:
        return node.body[0]
    return None


def size_of(source: str) -> Size:
    """Count a file.

    >>> size_of('import os\\n\\ndef f(x):\\n    "Double."\\n    return 2 * x\\n')
    Size(nodes=5, lines=2, inline=0, longest=2)
    """
    tree = ast.parse(source)
    left_out = set()  # statements that are not counted, with all that is in them
    aside = set()  # the numbers of lines that are no code
    longest = 0
    for node in ast.walk(tree):
        docstring = docstring_of(node)
        if docstring is not None:
            left_out |= {docstring, docstring.value}
            aside |= lines_of(docstring)
        if isinstance(node, IMPORTS):
            left_out.add(node)
            aside |= lines_of(node)
        if isinstance(node, FUNCTIONS):
            length = len(lines_of(node))
            if docstring is not None:
                length -= len(lines_of(docstring))
            longest = max(longest, length)

    code = 0
    for number, line in enumerate(source.splitlines(), start=1):
        text = line.strip()
        if number not in aside and text and not text.startswith("#"):
            code += 1

    nodes = 0
    inline = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr) and node not in left_out:
            nodes += 1
            if isinstance(node, INLINE):
                inline += 1
    return Size(nodes, code, inline, longest)


def size_of_file(path: Path) -> Size:
    return size_of(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("path", TOP, ids=name_of)
def test_each_of_the_six_can_be_read(path):
    size = size_of_file(path)
    assert size.nodes <= 1700
    assert size.nodes <= 7.0 * size.lines
    assert 100 * size.inline <= 10 * size.lines
    assert size.longest <= 60


def test_the_six_together_can_be_read():
    assert sum(size_of_file(path).nodes for path in TOP) <= 7640


@pytest.mark.parametrize("path", MACHINERY, ids=name_of)
def test_each_module_of_machinery_can_be_read(path):
    size = size_of_file(path)
    assert size.nodes <= 7.0 * max(size.lines, 1)
    assert size.longest <= 60


def test_the_machinery_stays_small():
    assert sum(size_of_file(path).nodes for path in MACHINERY) <= 8200


# ---------------------------------------------------------------- layout and imports


def test_only_the_six_stand_at_the_top():
    assert sorted(ROOT.glob("*.py")) == sorted(TOP)


def test_results_hold_no_code():
    assert not list(ROOT.glob("results/**/*.py"))


def test_the_imports_have_no_circle():
    """Imports within functions count. A circle would raise graphlib.CycleError."""
    order = list(TopologicalSorter(imports()).static_order())
    assert len(order) == len(modules())


def needed_by(name: str) -> set[str]:
    """All modules of ours that this one needs, directly or not."""
    needs = imports()
    found = set()
    waiting = [name]
    while waiting:
        for other in needs[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return found


def test_what_is_below_needs_nothing_above():
    """Of the six only train.py and eval.py import machinery that needs one of them."""
    scripts = set(FOLDERS) - {"machinery"}
    for name in modules():
        if name in SIX or name.startswith("machinery."):
            folders = {other.partition(".")[0] for other in imports()[name]}
            assert not folders & scripts, name
    for name in ("retriever", "rollout", "grpo", "ofsd"):
        for other in imports()[name]:
            if other.startswith("machinery."):
                assert not needed_by(other) & set(SIX), f"{name} imports {other}"


def test_the_six_import_only_what_is_listed():
    ours = {*SIX, "machinery"}
    for path in TOP:
        roots = {module.partition(".")[0] for module in imported_names(path)}
        assert roots <= LIBRARIES | ours | sys.stdlib_module_names, path


# ---------------------------------------------------------------- style


def python_files() -> list[Path]:
    return [*modules().values(), *sorted(ROOT.glob("tests/**/*.py"))]


def is_packed(node: ast.AST) -> bool:
    """`a, b = 1, 2`: two assignments in one. A swap is none, nor is unpacking."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    values = {ast.unparse(value) for value in node.value.elts}
    for target in node.targets:
        if isinstance(target, ast.Tuple):
            return {ast.unparse(name) for name in target.elts} != values
    return False


@pytest.mark.parametrize("path", READ, ids=name_of)
def test_an_assignment_assigns_one_thing(path):
    packed = [node for node in ast.walk(tree_of(path)) if is_packed(node)]
    assert not packed, [ast.unparse(node) for node in packed]


@pytest.mark.parametrize("path", python_files(), ids=name_of)
def test_no_comment_exempts_a_line(path):
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                assert not EXEMPTION.match(token.string), token.line


@pytest.mark.parametrize("path", python_files(), ids=name_of)
def test_no_file_edits_the_path_of_imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path")
        if isinstance(node, ast.ImportFrom) and node.module == "sys":
            assert "path" not in {alias.name for alias in node.names}


@pytest.mark.parametrize(
    "words", [["format", "--check"], ["check", "--output-format=concise"]], ids=" ".join
)
def test_ruff_has_nothing_to_say(words):
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed (requirements-extra.txt)")
    call = [sys.executable, "-m", "ruff", *words, "."]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
