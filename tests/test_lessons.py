"""Each lesson prints what it promises, and its sentences agree with its tables.

Nothing here depends on a loss, so whoever changes one keeps these tests green. The
numbers that the lessons show, and those of the exercises, are looked at in
system/test_lessons_numbers.py. lessons/plain.py has tests of its own.
"""

import re

import pytest
from conftest import line_of, run_main

import lessons.common
import lessons.evaluation
import lessons.grpo
import lessons.ofsd
import lessons.retriever
import lessons.rollout
from retriever import words

TABLE_LINE = re.compile(
    r"""^.{17}                # the answer
    \ *(?P<reward>-?[\d.]+)
    \ +(?P<advantage>-?[\d.]+)
    \ +(?P<tokens>\d+)
    \ +(?P<weight>-?[\d.]+)
    \ +(?P<before>-?[\d.]+)
    \ +(?P<after>-?[\d.]+)
    \ \ \ [a-z, ]*$           # the words it tried
    """,
    re.MULTILINE | re.VERBOSE,
)


@pytest.fixture
def printed(monkeypatch, capsys):
    """printed(lesson, *arguments): what it prints. It must write no errors."""

    def run(lesson, *arguments):
        run_main(monkeypatch, lesson.main, lesson.__name__, *arguments)
        output, errors = capsys.readouterr()
        assert not errors
        assert "\033" not in output
        return output

    return run


def table_of(text):
    """The lines of the table that lessons.grpo prints, each a dict of numbers."""
    lines = []
    for match in TABLE_LINE.finditer(text):
        numbers = {}
        for name, value in match.groupdict().items():
            numbers[name] = float(value)
        lines.append(numbers)
    assert len(lines) == 5
    return lines


def test_retriever_adds_up_the_words(printed):
    """A table a query, with a column for each word. Each line adds up to its score."""
    text = printed(lessons.retriever)
    tables = text.split("\nQuery: ")[1:]
    assert len(tables) == 2
    for table in tables:
        query, _, heads = table.splitlines()[:3]
        assert heads.split() == [*words(query), "sum"]

        lines = re.findall(r"^p\d+ +([\d. ]+)  \S", table, re.MULTILINE)
        assert len(lines) == 6
        for line in lines:
            *scores, total = [float(number) for number in line.split()]
            assert len(scores) == len(words(query))
            assert sum(scores) == pytest.approx(total, abs=0.004)

        # The words that no passage holds are named below the table.
        counts = re.search(r"^passages +(.+)", table, re.MULTILINE)[1].split()
        pairs = zip(words(query), counts, strict=True)
        absent = [word for word, count in pairs if count == "0"]
        assert f"No passage holds {', '.join(absent)}." in table


def test_rollout_shows_who_wrote_what(printed):
    text = printed(lessons.rollout)
    assert text.count("policy> ") == text.count("environment> ") + 1
    assert "<information>" in text


def test_rollout_lists_log_probabilities_of_the_policys_tokens_only(printed):
    text = printed(lessons.rollout, "--logprobs", "--seed", "0")
    values = re.findall(r"^    (?:'.*'|\".*\") +(-?\d+\.\d+|-)$", text, re.MULTILINE)
    sampled = [value for value in values if value != "-"]
    assert f"{len(sampled)} of {len(values)} tokens are the policy's" in text
    assert 0 < len(sampled) < len(values)


def test_rollout_takes_a_question_and_a_seed(printed):
    question = "Name the mayor of Bevor Bridge.\033[31m"
    texts = []
    for seed in (0, 0, 2):
        text = printed(lessons.rollout, "--question", question, "--seed", seed)
        assert "question: Name the mayor of Bevor Bridge.\\x1b[31m" in text
        texts.append(text)
    assert texts[0] == texts[1] != texts[2]


def test_evaluation_counts_the_mistakes_that_its_table_has(printed):
    text = printed(lessons.evaluation)
    numbers = re.search(r"^ *micro +([\d.]+) +([\d.]+)-([\d.]+)", text, re.MULTILINE)
    em, low, high = (float(number) for number in numbers.groups())
    assert low < em < high
    match = re.search(r"(\d+) answers are wrong. In (\d+) of", text)
    wrong, wrong_words = match.groups()
    assert 1 - int(wrong) / lessons.evaluation.QUESTIONS == pytest.approx(em, abs=0.001)
    assert int(wrong_words) <= int(wrong)
    assert text.count("searched:") == text.count("found with:") == 5


def test_grpo_says_what_its_table_shows(printed):
    text = printed(lessons.grpo)
    better = []
    worse = []
    for line in table_of(text):
        if line["advantage"] > 0:
            better.append(line["after"] > line["before"])
        if line["advantage"] < 0:
            worse.append(line["after"] < line["before"])
    assert f"{sum(better)} of {len(better)} became more likely" in text
    assert f"{sum(worse)} of {len(worse)} became less likely" in text


def test_grpo_says_the_contrary_of_a_wrong_update(capsys):
    """The last sentence is computed. An advantage of 0 counts on neither side."""
    lessons.grpo.show_moves(
        advantages=[1.1, 0.0, -0.7, -0.7],
        before=[-3.0, -3.0, -3.0, -3.0],
        after=[-4.0, -2.0, -2.0, -3.5],
    )
    text = capsys.readouterr().out
    assert "0 of 1 became more likely" in text
    assert "1 of 2 became less likely" in text


def test_grpo_prints_any_reward(printed, monkeypatch):
    def charge_searches(questions, trajectories):
        return [0.5 - 0.1 * (number + 5) for number in range(len(trajectories))]

    monkeypatch.setattr(lessons.common, "rewards_of", charge_searches)
    rewards = [line["reward"] for line in table_of(printed(lessons.grpo))]
    assert rewards == pytest.approx([0.0, -0.1, -0.2, -0.3, -0.4], abs=1e-6)


def test_ofsd_shows_both_prompts_and_the_sum(printed):
    text = printed(lessons.ofsd)
    student, teacher = text.split("---- the teacher's prompt")
    assert "An expert answered" in teacher
    assert "An expert answered" not in student
    marks = [float(mark) for mark in re.findall(r"\{(-?\d+\.\d\d)\}", text)]
    tokens, mean = re.search(r"(\d+) tokens, mean divergence (-?[\d.]+)", text).groups()
    total, marked = re.search(
        r"Their sum is (-?[\d.]+) nats. \d+ tokens? with a number: (-?[\d.]+)", text
    ).groups()
    assert float(total) == pytest.approx(int(tokens) * float(mean), abs=0.03)
    assert float(marked) == pytest.approx(sum(marks), abs=0.03)


def test_ofsd_shows_the_most_likely_tokens_at_its_marks(printed):
    text = printed(lessons.ofsd, "--top", "3")
    marks = re.findall(r"\{(-?\d+\.\d\d)\}", text)
    assert marks == re.findall(r"^at .*, (-?\d+\.\d\d) nats$", text, re.MULTILINE)
    for reader in ("teacher", "student"):
        lines = re.findall(rf"^    {reader}:(.+)$", text, re.MULTILINE)
        assert len(lines) == len(marks)
        for line in lines:
            shown = [float(number) for number in re.findall(r" (\d\.\d{3})", line)]
            assert len(shown) == 3
            assert sorted(shown, reverse=True) == shown
            assert sum(shown) <= 1.002


@pytest.mark.parametrize(
    "lesson",
    [
        lessons.retriever,
        lessons.rollout,
        lessons.evaluation,
        lessons.grpo,
        lessons.ofsd,
    ],
)
def test_a_lesson_refuses_a_flag_that_it_does_not_know(lesson, monkeypatch, capsys):
    run_main(monkeypatch, lesson.main, lesson.__name__, "--frobnicate", status=2)
    line = line_of(capsys)
    assert lesson.__name__ in line
    assert "--frobnicate" in line


def test_ofsd_refuses_a_negative_number(monkeypatch, capsys):
    run_main(monkeypatch, lessons.ofsd.main, "lessons.ofsd", "--top", "-1", status=2)
    assert "--top" in line_of(capsys)


def test_where_no_group_is_fit_for_a_lesson_one_line_says_so(monkeypatch, capsys):
    """Somebody may have changed the reward, or the mining, so that nothing is left."""
    for lesson in (lessons.grpo, lessons.ofsd):
        monkeypatch.setattr(lesson, "load_world", lambda: None)
        monkeypatch.setattr(lesson, "sample_groups", lambda world, hops: [])
        run_main(monkeypatch, lesson.main, lesson.__name__, status=2)
        assert "no group" in line_of(capsys)
