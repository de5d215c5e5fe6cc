"""Each file run alone is a lesson, whose numbers must say what it teaches. (The files themselves
are run by system/test_processes.py.)"""

import re

import pytest
from conftest import line_of, run_main

from eval import load_questions
from micro import lessons
from retriever import words


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
    """The words' scores add up to the passage's. In the question's words five passages are equal
    and a word of the question counts nothing; the corpus's word lifts one above them."""
    text = told(lessons.retriever_lesson)
    tables = []
    for part in text.split("\nQuery: ")[1:]:
        query, heads = part.splitlines()[0], part.splitlines()[2].split()[:-1]
        assert heads == words(query)
        counts = re.search(r"^passages +(.+)", part, re.M)[1].split()
        idf = re.search(r"^idf +(.+)", part, re.M)[1].split()
        rows = re.findall(r"^(p\d+) +([\d. ]+)  (.+)", part, re.M)
        rows = [(id, [*map(float, numbers.split())], text) for id, numbers, text in rows]
        assert len(rows) == 6
        for _, (*scores, total), _ in rows:
            assert sum(scores) == pytest.approx(total, abs=0.004)
        by_word = [dict(zip(heads, map(float, row))) for row in (rows[0][1], counts, idf)]
        tables.append((*by_word, rows))

    best, counts, idf, rows = tables[0]
    assert counts["is"] == 3000 and idf["is"] == 0 == best["is"]
    assert counts["mayor"] == 0 == best["mayor"]
    assert counts["bevor"] < counts["bridge"] and best["bevor"] > best["bridge"] > 0
    assert rows[0][1][-1] == rows[4][1][-1] > rows[5][1][-1]
    assert all("Bevor Bridge is " in text for _, _, text in rows[:5])
    assert "warded" not in "".join(text for _, _, text in rows[:3])  # the right one is not shown

    best, counts, idf, rows = tables[1]
    assert best["mayor"] == 0 < best["warded"]
    assert rows[0][1][-1] > rows[1][1][-1] == rows[4][1][-1]
    asked = load_questions(str(lessons.MICRO / "train.jsonl"))
    word = {dict(zip(row["chain"], row["words"])).get("mayor") for row in asked} - {None}
    assert word == {"warded"} and rows[0][2].startswith("Bevor Bridge is warded by ")
    plain = float(re.search(r"bm25_score, gives ([\d.]+) for " + rows[0][0], text)[1])
    assert plain == pytest.approx(rows[0][1][-1], abs=0.0011)


def test_rollout(told):
    text = told(lessons.rollout_lesson)
    assert text.count("policy> ") == text.count("environment> ") + 1 and "<information>" in text
    listed = told(lessons.rollout_lesson, "--logprobs", "--seed", "0")
    tokens = re.findall(r"^    '.*' +(-?\d+\.\d+|-)$", listed, re.M)
    own, of = map(int, re.search(r"(\d+) of (\d+) tokens", text).groups())
    assert len(tokens) == of and sum(value != "-" for value in tokens) == own


def test_rollout_takes_a_question_and_a_seed(told):
    texts, question = [], "Name the mayor of Bevor Bridge.\033[31m"
    for seed in (0, 0, 1, 2, 3, 4):
        texts.append(told(lessons.rollout_lesson, "--question", question, "--seed", seed))
    assert all("question: Name the mayor of Bevor Bridge.\\x1b[31m" in text for text in texts)
    assert texts[0] == texts[1] and len({*texts}) > 1


def test_grpo(told):
    row = r" +([01]) +(-?[\d.]+) +\d+ +(-?[\d.]+) +(-?[\d.]+) +(-?[\d.]+)   [a-z, ]+$"
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
    assert re.search(r"tokens, mean KL 0\.\d+: the loss", text)
    # The largest divergence stands where the student searched with another word than the reference.
    marked = re.findall(r"(\S+)\{(\d\.\d\d)\}", text)
    word, value = max(marked, key=lambda mark: float(mark[1]))
    assert float(value) >= 0.5 and f" {word}{{{value}}}</search>" in text
    assert f" {word}</search>" not in teacher.split("---- the student's own trajectory")[0]


def test_eval(told):
    text = told(lessons.eval_lesson)
    row = re.search(r"^ *micro +([\d.]+) +([\d.]+)-([\d.]+)", text, re.M)
    em, low, high = map(float, row.groups())
    assert low < em < high and text.count("searched:") == text.count("found with:") == 5
    wrong, strays = map(int, re.search(r"(\d+) are wrong; (\d+) of them", text).groups())
    assert 1 - wrong / 60 == pytest.approx(em, abs=0.001) and 0 < strays <= wrong


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
