"""Each file run alone is a lesson: it ends, and says what its numbers must say."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def lesson():
    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"NO_COLOR": "1"})
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert "\033" not in done.stdout
        return done.stdout

    return run


def test_retriever(lesson):
    """The words' scores add up to the passage's, and a rarer word weighs more."""
    table = [line.split() for line in lesson("retriever.py").splitlines() if re.match(r"\w+ +\d+ +\d+ +\d", line)]
    total = lesson("retriever.py").split("\nsum")[1].split("\n")[0].split()
    for column in (4, 5, 6):
        assert sum(float(row[column]) for row in table) == pytest.approx(float(total[column - 4]), abs=0.005)
    weights = {row[0]: float(row[4]) for row in table}
    assert weights["hunik"] > weights["labs"] > weights["a"] >= 0 and weights["company"] == 0


def test_rollout(lesson):
    text = lesson("rollout.py")
    assert text.count("policy> ") == text.count("environment> ") + 1 and "<information>" in text
    listed = lesson("rollout.py", "--logprobs", "--seed", "0")
    tokens = re.findall(r"^    '.*' +(-?\d+\.\d+|-)$", listed, re.M)
    own, of = map(int, re.search(r"(\d+) of (\d+) tokens", text).groups())
    assert len(tokens) == of and sum(value != "-" for value in tokens) == own


def test_grpo(lesson):
    rows = re.findall(r" +([01]) +(-?[\d.]+) +\d+ +(-?[\d.]+) +(-?[\d.]+) +(-?[\d.]+)$", lesson("grpo.py"), re.M)
    assert len(rows) == 5 and sum(float(row[1]) for row in rows) == pytest.approx(0, abs=0.01)
    for reward, advantage, weight, before, after in rows:
        assert (float(advantage) > 0) == (reward == "1") == (float(weight) > 0) == (float(after) > float(before))


def test_ofsd(lesson):
    text = lesson("ofsd.py")
    student, teacher = text.split("---- the teacher's prompt")
    assert "An expert answered" in teacher and "An expert answered" not in student
    assert re.search(r"\{\d\.\d\}", text) and re.search(r"tokens, mean KL 0\.\d+: the loss", text)


def test_eval(lesson):
    text = lesson("eval.py")
    em, low, high = map(float, re.search(r"^micro +([\d.]+) +([\d.]+)-([\d.]+)", text, re.M).groups())
    assert low < em < high and text.count("searched:") == 5


def test_a_terminal_gets_colours():
    """By a pseudo-terminal, as one has it."""
    import pty

    parent, child = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen([sys.executable, "retriever.py", "--corpus", "micro/corpus.jsonl", "Hunik"], cwd=ROOT, stdout=child, env=environment)
    process.wait(timeout=60)
    assert b"\033[1mHunik\033[0m" in os.read(parent, 10_000)


@pytest.mark.parametrize("file", ["rollout.py", "grpo.py", "ofsd.py"])
def test_a_lesson_refuses_a_flag_that_it_does_not_know(file, refused):
    assert "--frobnicate" in refused(file, "--frobnicate")
