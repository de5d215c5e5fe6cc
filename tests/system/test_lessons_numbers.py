"""The numbers that the lessons show, and those that lessons/exercises.md quotes.

Each exercise is done in a copy of the repository, by its own text, and its numbers are
looked for both in the page and in what the command prints. Whoever changes a loss, or
the search, makes these tests fail. Those of tests/test_lessons.py stay green.
"""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_main

import lessons.common
import lessons.evaluation
import lessons.grpo
import lessons.ofsd
import lessons.retriever
import lessons.rollout
from lessons.common import load_world, relation_words, sample_groups

COPIED = ["experiments", "lessons", "machinery", "micro", "tests", "tools"]
SEPARATORS = r"^### (\d+)\. "


# ------------------------------------------------------------------ the lessons


@pytest.fixture
def printed(monkeypatch, capsys):
    """printed(lesson, *arguments): what it prints."""

    def run(lesson, *arguments):
        run_main(monkeypatch, lesson.main, lesson.__name__, *arguments)
        return capsys.readouterr().out

    return run


def test_retriever(printed):
    """In the question's words five passages are equal, and the right one is not among
    the three that a policy is shown. The corpus's word lifts it to the top."""
    text = printed(lessons.retriever)
    first, second = text.split("\nQuery: ")[1:]
    assert "5 passages share the best score" in first
    assert "No passage holds who, mayor, of." in first
    passages = re.findall(r"^p\d+ .*", first, re.MULTILINE)
    assert len(passages) == 6
    assert "warded" not in "".join(passages[:3])

    assert "One passage is better" in second
    assert relation_words()["mayor"] == "warded"
    best = re.search(r"^(p\d+) .*", second, re.MULTILINE)
    assert "Bevor Bridge is warded by " in best[0]
    scores = re.search(r"For (p\d+) the index says (.+) in.*\s.*says (.+)\.", text)
    assert scores[1] == best[1]
    assert scores[2] == scores[3]


def test_grpo(printed):
    text = printed(lessons.grpo)
    assert "2 of 2 became more likely" in text
    assert "3 of 3 became less likely" in text
    loss, mean = re.search(r"loss was (\S+)\. .* is (\S+)\.", text).groups()
    assert loss == mean


def test_ofsd_objects_to_the_word_that_the_student_searched_with(printed):
    text = printed(lessons.ofsd, "--top", "1")
    _, teacher = text.split("---- the teacher's prompt")
    marks = re.findall(r"(\S+)\{(\d\.\d\d)\}", teacher)
    word, value = max(marks, key=lambda mark: float(mark[1]))
    assert float(value) >= 0.5
    assert f" {word}{{{value}}}</search>" in teacher
    # The teacher would have used the word that its reference used.
    wanted = re.search(r"^at .*\n    teacher:  ' (\w+)'", teacher, re.MULTILINE)[1]
    assert f" {wanted}</search>" in teacher
    assert wanted != word


def test_evaluation(printed):
    text = printed(lessons.evaluation)
    wrong, words = re.search(r"(\d+) answers are wrong. In (\d+) of", text).groups()
    assert int(wrong) / 2 < int(words) <= int(wrong)


def test_log_probabilities_are_those_of_sampling():
    """The column log pi is the sum of what the policy noted while it sampled."""
    world = load_world()
    group = next(sample_groups(world, hops=1, size=3))
    values = lessons.grpo.log_probabilities(world, group.trajectories)
    noted = [sum(trajectory.logprobs) for trajectory in group.trajectories]
    assert torch.allclose(torch.tensor(values), torch.tensor(noted), atol=1e-3)


# ---------------------------------------------------------------- the exercises


def sections():
    """{number: text} of the exercises."""
    page = (ROOT / "lessons/exercises.md").read_text(encoding="utf-8")
    parts = re.split(SEPARATORS, page, flags=re.MULTILINE)
    numbers = [int(number) for number in parts[1::2]]
    assert numbers == list(range(1, len(numbers) + 1))
    return dict(zip(numbers, parts[2::2], strict=True))


def code_of(number):
    """The code that an exercise shows."""
    return re.search(r"```python\n(.*?)```", sections()[number], re.DOTALL)[1]


@pytest.fixture(scope="module")
def whole_copy(tmp_path_factory):
    """A copy of the repository as it is. Change nothing in it."""
    folder = tmp_path_factory.mktemp("exercises") / "copy"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in COPIED:
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    return folder


class Copy:
    """A copy of the repository, to do an exercise in."""

    def __init__(self, folder):
        self.folder = folder

    def edit(self, name, old, new):
        """Change a place that stands once in a file."""
        path = self.folder / name
        source = path.read_text(encoding="utf-8")
        assert source.count(old) == 1, f"{name}: {old}"
        path.write_text(source.replace(old, new), encoding="utf-8")

    def run(self, *arguments):
        """What `python arguments` prints, in the copy."""
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout


@pytest.fixture
def copy(whole_copy, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole_copy, folder)
    return Copy(folder)


def assert_quoted(number, output, quoted):
    """Each quoted number stands in the exercise, and is printed, with more digits."""
    numbers = re.findall(r"(?<![\w.])[-+]?\d+(?:\.\d+)?", output)
    values = [float(value) for value in numbers]
    for text in quoted.split():
        assert text in sections()[number], text
        digits = len(text.partition(".")[2])
        half = 0.5 * 10**-digits + 1e-9
        near = [value for value in values if abs(value - float(text)) <= half]
        assert near, f"{text} is not printed:\n{output}"


def test_exercise_1(copy):
    before = copy.run("-m", "lessons.retriever")
    copy.edit("retriever.py", "corpus, k1: float = 0.9", "corpus, k1: float = 0.0")
    output = copy.run("-m", "lessons.retriever")
    assert "11 passages share" in output
    assert_quoted(1, output, "6.737 9.952 6.338")
    copy.edit("retriever.py", "corpus, k1: float = 0.0", "corpus, k1: float = 0.9")
    copy.edit("retriever.py", "b: float = 0.4, source", "b: float = 1.0, source")
    assert copy.run("-m", "lessons.retriever") == before


def test_exercise_2(printed):
    rows = re.findall(
        r'^\| (\d) \| " (\w+)", (-[\d.]+) \|', sections()[2], re.MULTILINE
    )
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    for seed, token, logprob in rows:
        text = printed(lessons.rollout, "--logprobs", "--seed", seed)
        tokens = re.findall(r"^    ' (\w+)' +(-\d+\.\d+)$", text, re.MULTILINE)
        lowest, value = min(tokens, key=lambda pair: float(pair[1]))
        assert lowest == token
        assert float(value) == pytest.approx(float(logprob), abs=0.0051)


def test_exercise_3(copy):
    old = "self.loss_mask += [0] * len(ids)"
    copy.edit("rollout.py", old, "self.loss_mask += [1] * len(ids)")
    output = copy.run("-m", "lessons.grpo")
    assert_quoted(3, output, "145 -470 .0014 +.082 -.086")
    assert "0 of 3 became less likely" in output
    output = copy.run("-m", "pytest", "-q", "-x", "tests/test_rollout.py")
    assert first_failure(output) in sections()[3]


def first_failure(output):
    """The name of the test at which `pytest -x` stopped."""
    return re.search(r"^FAILED \S+::(\w+)", output, re.MULTILINE)[1]


def test_exercise_4(copy):
    before = copy.run("-m", "lessons.grpo")
    assert_quoted(4, before, "1.095 -.730 .223")
    old = "advantages = centred / (variance.sqrt() + eps)"
    copy.edit("grpo.py", old, "advantages = centred")
    output = copy.run("-m", "lessons.grpo")
    assert_quoted(4, output, ".600 -.400 .122")
    assert columns_after(output) == columns_after(before)


def columns_after(output):
    """The columns log pi and after, of lessons.grpo."""
    return re.findall(r" (-\d+\.\d{3} +-\d+\.\d{3})   [a-z]", output)


def test_exercise_5(copy):
    copy.edit("grpo.py", "loss = -torch.minimum(", "loss = torch.minimum(")
    output = copy.run("-m", "lessons.grpo")
    assert_quoted(5, output, "-1.72 -1.91 -5.83 -5.32 +.062 -.062")
    assert "0 of 2 became more likely" in output
    assert "0 of 3 became less likely" in output
    output = copy.run("-m", "pytest", "-q", "-x", "tests/test_grpo.py")
    assert first_failure(output) in sections()[5]


def test_exercise_6(copy):
    line = "    pair = choose_pair(world)\n"
    new = "    pair = pair._replace(prompt=pair.student.prompt_ids)\n"
    assert new.strip() in sections()[6]
    copy.edit("lessons/ofsd.py", line, line + new)
    assert "mean divergence 0.000" in copy.run("-m", "lessons.ofsd")


def test_exercise_7(copy):
    before = copy.run("-m", "lessons.ofsd", "--top", "3")
    assert_quoted(7, before, ".81 .030")
    change_divergence(copy, 7, 'clip="entry"')
    output = copy.run("-m", "lessons.ofsd", "--top", "3")
    assert_quoted(7, output, "-.09 .938 .342 .461 .040 -.002")
    total, marked = re.search(r"sum is (\S+) nats.*number: (\S+) nats", output).groups()
    assert "+.03" in sections()[7]
    assert float(total) - float(marked) == pytest.approx(0.03, abs=0.01)


def test_exercise_8(copy):
    before = copy.run("-m", "lessons.ofsd")
    assert_quoted(8, before, ".81 .15 .07 .030")
    change_divergence(copy, 8, 'kind="reverse_kl"')
    output = copy.run("-m", "lessons.ofsd", "--top", "3")
    assert_quoted(8, output, "1.23 .31 .10 .047 .461 .040")


def change_divergence(copy, number, argument):
    """Give the call in token_divergences another argument, as an exercise says."""
    old = "divergences(student_logits, teacher_logits)"
    new = f"divergences(student_logits, teacher_logits, {argument})"
    assert new in sections()[number]
    copy.edit("ofsd.py", f"{old}.tolist()", f"{new}.tolist()")


@pytest.mark.slow
def test_exercise_9(copy):
    text = (copy.folder / "machinery/text.py").read_text(encoding="utf-8")
    begin = text.index("def neutralise")
    body = text.index('"""', text.index('"""', begin) + 3) + 3
    text = f"{text[:body]}\n    return text\n{text[body:]}"
    (copy.folder / "machinery/text.py").write_text(text, encoding="utf-8")
    output = copy.run("-m", "pytest", "-q", "tests/system/test_hostile.py")
    failed = re.findall(r"^FAILED .*?::(\S+)", output, re.MULTILINE)
    assert len(failed) == 4
    assert "Four fail" in sections()[9]


def test_exercise_10(copy):
    nothing = """
class Nothing:
    def search(self, queries, k):
        return [[] for _ in queries]


def main()"""
    copy.edit("lessons/evaluation.py", "\ndef main()", nothing)
    copy.edit("lessons/evaluation.py", "world.index, texts", "Nothing(), texts")
    output = copy.run("-m", "lessons.evaluation")
    assert_quoted(10, output, ".000 3.083 .050")


def test_exercise_11(copy):
    before = copy.run("-m", "lessons.evaluation")
    assert_quoted(11, before, ".483 31")
    name = "lessons/evaluation.py"
    copy.edit(name, "\ndef main()", f"\n{code_of(11)}\n\ndef main()")
    copy.edit(name, "world.index, texts", "Mending(world.index), texts")
    output = copy.run("-m", "lessons.evaluation")
    assert_quoted(11, output, ".883 1.000 .731")
    assert "7 answers are wrong. In 1 of them" in output

    copy.edit(name, "Mending(world.index), texts", "world.index, texts, k=5")
    output = copy.run("-m", "lessons.evaluation")
    assert re.search(r"^micro  0\.000", output, re.MULTILINE)


@pytest.mark.slow
def test_exercise_12(copy):
    """At 3e-3 the policy collapses, at 6e-4 it does not. Digits are the machine's."""
    command = re.search(r"^python (train.py .*) 6e-4$", sections()[12], re.MULTILINE)[1]
    ends = []
    for rate in ("6e-4", "3e-3"):
        output = copy.run(*command.split(), rate, "--out", f"runs/{rate}")
        ends.append(float(re.search(r"^grpo-1: EM ([\d.]+)", output, re.MULTILINE)[1]))
    quoted = re.search(r"^\| 6e-4 \| ([\d.]+)", sections()[12], re.MULTILINE)[1]
    assert ends[0] == pytest.approx(float(quoted), abs=0.06)
    assert ends[1] < 0.1


@pytest.mark.slow
def test_exercise_13(copy):
    command = re.search(r"^python (train.py .*)$", sections()[13], re.MULTILINE)[1]
    old = "rewards.append(reward)"
    prices = [
        ("reward", ".50 .533 1.98"),
        ("reward - 0.1 * len(trajectory.queries)", ".00 .367 1.73"),
        ("reward * (1 - 0.1 * len(trajectory.queries))", ".44 .517 1.97"),
    ]
    for number, (price, quoted) in enumerate(prices):
        new = f"rewards.append({price})"
        copy.edit("eval.py", old, new)
        old = new
        arguments = command.replace("runs/charged", f"runs/{number}").split()
        output = copy.run(*arguments)
        # One digit of EM: which of 60 answers turns is a matter of the machine.
        zero_var, em, searches = quoted.split()
        assert f"{zero_var} | {em} | {searches} |" in sections()[13]
        step = re.search(r"^ +1 +\S+ +(\S+)", output, re.MULTILINE)[1]
        assert float(step) == pytest.approx(float(zero_var), abs=0.07)
        test = re.search(r"^grpo-1: EM (\S+), (\S+) searches", output, re.MULTILINE)
        assert float(test[1]) == pytest.approx(float(em), abs=0.1)
        assert float(test[2]) == pytest.approx(float(searches), abs=0.1)


@pytest.mark.slow
def test_exercise_14(copy):
    """Imitation gains more than OFSD, on the same pairs."""
    imitate = code_of(14)
    step = "imitation_step(model, optimizer, references, micro_batch=16)"
    distil = "ofsd_step(model, teacher, optimizer, batch, micro_batch=16)"
    ems = {}
    for name, code in (("imitation", imitate), ("OFSD", imitate.replace(step, distil))):
        (copy.folder / "mine.py").write_text(code, encoding="utf-8")
        output = copy.run("mine.py")
        assert output.startswith("111 ")
        ems[name] = float(re.search(r"'em': ([\d.]+)", output)[1])
        row = re.search(rf"^\| {name} \| ([\d.]+)", sections()[14], re.MULTILINE)
        assert ems[name] == pytest.approx(float(row[1]), abs=0.06)
    assert ems["imitation"] > ems["OFSD"] > 0.42


@pytest.mark.parametrize(
    ("relation", "quoted"),
    [
        ("residence", ".962 .90 15.34 11.21"),
        ("employer", ".904 2.44 5.67 2.95"),
        ("seat", "7.86 7.59"),
    ],
)
def test_exercise_15(copy, relation, quoted):
    name = "lessons/ofsd.py"
    copy.edit(
        name, "import Pair, mine_pairs", "import Pair, privileged_prompt, mine_pairs"
    )
    copy.edit(name, "\nif __name__", f"\n{code_of(15)}\n\nif __name__")
    line = "    pair = choose_pair(world)\n"
    new = f'    pair = with_reference_of(world, pair, "{relation}")\n'
    copy.edit(name, line, line + new)
    output = copy.run("-m", "lessons.ofsd", "--top", "3")
    assert_quoted(15, output, quoted)


def test_exercise_16(copy):
    (copy.folder / "mine.py").write_text(code_of(16), encoding="utf-8")
    assert_quoted(16, copy.run("mine.py"), ".265 .694 .385 .230")


def test_exercise_17(copy):
    (copy.folder / "mine.py").write_text(code_of(17), encoding="utf-8")
    output = copy.run("mine.py")
    assert "at 1.0 0 of 300" in output
    assert_quoted(17, output, "18 72 74 -38.5 -138.8 28.75 3.78")


def test_exercise_19(copy):
    (copy.folder / "mine.py").write_text(code_of(19), encoding="utf-8")
    output = copy.run("mine.py")
    assert_quoted(19, output, ".81 1.06 10.31 10.62 .16")
    assert "<search> guided residence of Fadar Miller</search>" in output


@pytest.mark.slow
def test_exercise_18(copy):
    """Three students have more pairs than one, and the stage gains more."""
    commands = re.findall(r"^python (train.py .*)$", sections()[18], re.MULTILINE)
    assert len(commands) == 2
    pairs = []
    ems = []
    for command in commands:
        output = copy.run(*command.split())
        pairs.append(int(re.search(r"(\d+) pairs", output)[1]))
        ems.append(float(re.search(r"^ofsd-1: EM (\S+),", output, re.MULTILINE)[1]))
    assert pairs == [116, 327]
    assert 0.5 < ems[0] < ems[1]
