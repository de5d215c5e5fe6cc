"""Each file run alone is a lesson, whose numbers must say what it teaches. (The files themselves
are run by system/test_processes.py.)"""

import re

import pytest
from conftest import line_of, run_main

from micro import lessons


@pytest.fixture
def told(monkeypatch, capsys):
    """told(lesson, *arguments): what the lesson prints. It must say nothing on standard error."""

    def run(lesson, *arguments):
        run_main(monkeypatch, lesson, "the lesson's file", *arguments)
        printed, said = capsys.readouterr()
        assert not said and "\033" not in printed
        return printed

    return run


def test_retriever(told):
    """The words' scores add up to the passage's, and a rarer word weighs more."""
    text = told(lessons.retriever_lesson)
    table = [line.split() for line in text.splitlines() if re.match(r"\w+ +\d+ +\d+ +\d", line)]
    total = text.split("\nsum")[1].split("\n")[0].split()
    for column in (4, 5, 6):
        summed = sum(float(row[column]) for row in table)
        assert summed == pytest.approx(float(total[column - 4]), abs=0.005)
    weights = {row[0]: float(row[4]) for row in table}
    assert weights["hunik"] > weights["labs"] > weights["a"] >= 0 and weights["company"] == 0
    plain = float(re.search(r"bm25_score, gives ([\d.]+) for passage", text)[1])
    assert plain == pytest.approx(float(total[0]), abs=0.0011)


def test_rollout(told):
    text = told(lessons.rollout_lesson)
    assert text.count("policy> ") == text.count("environment> ") + 1 and "<information>" in text
    listed = told(lessons.rollout_lesson, "--logprobs", "--seed", "0")
    tokens = re.findall(r"^    '.*' +(-?\d+\.\d+|-)$", listed, re.M)
    own, of = map(int, re.search(r"(\d+) of (\d+) tokens", text).groups())
    assert len(tokens) == of and sum(value != "-" for value in tokens) == own


def test_rollout_takes_a_question_and_a_seed(told):
    texts, question = [], "Who governs Stobor Bridge?\033[31m"
    for seed in (0, 0, 1, 2, 3, 4):
        texts.append(told(lessons.rollout_lesson, "--question", question, "--seed", seed))
    assert all("question: Who governs Stobor Bridge?\\x1b[31m" in text for text in texts)
    assert texts[0] == texts[1] and len({*texts}) > 1


def test_grpo(told):
    row = r" +([01]) +(-?[\d.]+) +\d+ +(-?[\d.]+) +(-?[\d.]+) +(-?[\d.]+)$"
    rows = re.findall(row, told(lessons.grpo_lesson), re.M)
    assert len(rows) == 5
    assert sum(float(row[1]) for row in rows) == pytest.approx(0, abs=0.01)
    for reward, *numbers in rows:
        advantage, weight, before, after = map(float, numbers)
        assert (advantage > 0) == (reward == "1") == (weight > 0) == (after > before)


def test_ofsd(told):
    text = told(lessons.ofsd_lesson)
    student, teacher = text.split("---- the teacher's prompt")
    assert "An expert answered" in teacher and "An expert answered" not in student
    assert re.search(r"\{\d\.\d\}", text)
    assert re.search(r"tokens, mean KL 0\.\d+: the loss", text)


def test_eval(told):
    text = told(lessons.eval_lesson)
    row = re.search(r"^ *micro +([\d.]+) +([\d.]+)-([\d.]+)", text, re.M)
    em, low, high = map(float, row.groups())
    assert low < em < high and text.count("searched:") == 5


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
