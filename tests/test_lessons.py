"""Each file run alone is a lesson: it ends, and says what its numbers must say."""

import os
import pty
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_train import line_of, run_main

from micro import lessons


@pytest.fixture
def lesson(command, monkeypatch):
    """lesson(file, ...): what the file prints."""
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments):
        done = command(*arguments)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert "\033" not in done.stdout
        return done.stdout

    return run


def test_retriever(lesson):
    """The words' scores add up to the passage's, and a rarer word weighs more."""
    text = lesson("retriever.py")
    table = [line.split() for line in text.splitlines() if re.match(r"\w+ +\d+ +\d+ +\d", line)]
    total = text.split("\nsum")[1].split("\n")[0].split()
    for column in (4, 5, 6):
        summed = sum(float(row[column]) for row in table)
        assert summed == pytest.approx(float(total[column - 4]), abs=0.005)
    weights = {row[0]: float(row[4]) for row in table}
    assert weights["hunik"] > weights["labs"] > weights["a"] >= 0 and weights["company"] == 0
    plain = float(re.search(r"bm25_score, gives ([\d.]+) for passage", text)[1])
    assert plain == pytest.approx(float(total[0]), abs=0.0011)


def test_rollout(lesson):
    text = lesson("rollout.py")
    assert text.count("policy> ") == text.count("environment> ") + 1 and "<information>" in text
    listed = lesson("rollout.py", "--logprobs", "--seed", "0")
    tokens = re.findall(r"^    '.*' +(-?\d+\.\d+|-)$", listed, re.M)
    own, of = map(int, re.search(r"(\d+) of (\d+) tokens", text).groups())
    assert len(tokens) == of and sum(value != "-" for value in tokens) == own


def test_rollout_takes_a_question_and_a_seed(monkeypatch, capsys):
    told = []
    for seed in (0, 0, 1, 2, 3, 4):
        flags = "--question", "Who governs Stobor Bridge?\033[31m", "--seed", seed
        run_main(monkeypatch, lessons.rollout_lesson, "rollout.py", *flags)
        told.append(capsys.readouterr().out)
    assert all("question: Who governs Stobor Bridge?\\x1b[31m" in text for text in told)
    assert not any("\033" in text for text in told)
    assert told[0] == told[1] and len({*told}) > 1


def test_grpo(lesson):
    row = r" +([01]) +(-?[\d.]+) +\d+ +(-?[\d.]+) +(-?[\d.]+) +(-?[\d.]+)$"
    rows = re.findall(row, lesson("grpo.py"), re.M)
    assert len(rows) == 5
    assert sum(float(row[1]) for row in rows) == pytest.approx(0, abs=0.01)
    for reward, *numbers in rows:
        advantage, weight, before, after = map(float, numbers)
        assert (advantage > 0) == (reward == "1") == (weight > 0) == (after > before)


def test_ofsd(lesson):
    text = lesson("ofsd.py")
    student, teacher = text.split("---- the teacher's prompt")
    assert "An expert answered" in teacher and "An expert answered" not in student
    assert re.search(r"\{\d\.\d\}", text)
    assert re.search(r"tokens, mean KL 0\.\d+: the loss", text)


def test_eval(lesson):
    text = lesson("eval.py")
    row = re.search(r"^ *micro +([\d.]+) +([\d.]+)-([\d.]+)", text, re.M)
    em, low, high = map(float, row.groups())
    assert low < em < high and text.count("searched:") == 5


def test_a_terminal_gets_colours():
    """By a pseudo-terminal, as one has it."""
    parent, child = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    how = dict(cwd=ROOT, stdout=child, env=environment)
    process = subprocess.Popen([sys.executable, "ofsd.py"], **how)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 10_000)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait(timeout=60) == 0
    os.close(parent)
    assert b"\033[1m---- the student's prompt" in shown and b"\033[31m" in shown


@pytest.mark.parametrize(
    ("script", "lesson"),
    [
        ("rollout.py", lessons.rollout_lesson),
        ("grpo.py", lessons.grpo_lesson),
        ("ofsd.py", lessons.ofsd_lesson),
    ],
)
def test_a_lesson_refuses_a_flag_that_it_does_not_know(script, lesson, monkeypatch, capsys):
    run_main(monkeypatch, lesson, script, "--frobnicate", status=2)
    told = line_of(capsys)
    assert script in told and "--frobnicate" in told
