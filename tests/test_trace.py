"""tools/trace.py and plot.py: a page that escapes everything and needs nothing from
elsewhere, curves in text."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import SMALL, line_of, read, run_main

from tools import plot, trace


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory):
    """A copy of the run: both scripts write into its folder."""
    return shutil.copytree(small_run, tmp_path_factory.mktemp("runs") / "copy")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Check(HTMLParser):
    """Every tag that opens closes in order; collects the tags."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.seen = []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_shows_the_run_and_needs_nothing_from_elsewhere(
    run, monkeypatch, capsys
):
    run_main(monkeypatch, trace.main, "trace.py", run)
    assert capsys.readouterr().out == f"{run / 'trace.html'}\n"
    text = (run / "trace.html").read_text(encoding="utf-8")
    check = Check()
    check.feed(text)
    assert not check.open
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in check.seen}
    assert "http" not in text and "url(" not in text

    pairs = [row for row in read(run, "trajectories.jsonl") if row["kind"] == "pair"]
    assert pairs
    measured = 0
    for row in pairs:
        assert len(row["rewards"]) == SMALL.group_size
        assert row["rewards"].count(1.0) >= 1
        student = "".join(text for _, text in row["student"]["text"])
        assert "".join(text for text, _ in row["divergence"]) == student
        assert row["reference"]["em"] == row["reference"]["reward"] == 1.0
        assert row["student"]["em"] == row["student"]["reward"]
        measured += sum(divergence is not None for _, divergence in row["divergence"])
    coloured = [its for _, its in check.seen if "nats" in its.get("title", "")]
    assert len(coloured) == measured
    assert text.count("<b>student</b>") == len(pairs)


def attempt(answer, em, reward):
    return {
        "question": "Who?",
        "answer": answer,
        "queries": [],
        "finish_reason": "answer",
        "text": [[1, f"<answer> {answer} </answer>"]],
        "em": em,
        "reward": reward,
    }


def pair(rewards, reference, student):
    return {
        "kind": "pair",
        "stage": "ofsd-1",
        "id": "7",
        "rewards": rewards,
        "reference": reference,
        "student": student,
        "divergence": [["<answer> ", -1e-9], ["it", 0.25], [" </answer>", 3.0]],
    }


@pytest.mark.parametrize(
    ("rewards", "reference", "student", "lines"),
    [
        (
            [1.0, 0.0, 0.0, 0.0, 0.0],
            attempt("Ada", 1.0, 1.0),
            attempt("Bo", 0.0, 0.0),
            ["reward 1, advantage +1.79", "reward 0, advantage -0.45"],
        ),
        (  # a bonus for a search, and a cost: a wrong answer may have a good reward
            [1.1, 0.1, 0.1, -0.1],
            attempt("Ada", 1.0, 1.1),
            attempt("Bo", 0.0, -0.1),
            ["reward 1.1, advantage +1.48", "reward -0.1, advantage -0.74"],
        ),
        (  # both are right, and the slower one has a little less
            [1.0, 0.9, 0.9, 0.9],
            attempt("Ada", 1.0, 1.0),
            attempt("Ada", 1.0, 0.9),
            ["reward 1, advantage +1.50", "reward 0.9, advantage -0.50"],
        ),
        (  # near the mean, but not at it
            [1.0, 0.501, 0.0, 0.5],
            attempt("Ada", 1.0, 0.501),
            attempt("Bo", 0.0, 0.5),
            ["reward 0.501, advantage +0.002", "reward 0.5, advantage -0.0006"],
        ),
        (  # equal rewards
            [-0.0, 0.0],
            attempt("Ada", 1.0, -0.0),
            attempt("Ada", 1.0, 0.0),
            ["reward 0, advantage 0", "reward 0, advantage 0"],
        ),
    ],
)
def test_a_pair_shows_its_own_rewards_and_advantages(
    rewards, reference, student, lines
):
    text = "".join(trace.pair_parts(pair(rewards, reference, student)))
    assert re.findall(r"reward [-.\d]+, advantage [-+.\d]+", text) == lines
    states = re.findall(r'<p class="(\w+)">', text)
    assert states == [
        "right" if side["em"] else "wrong" for side in (reference, student)
    ]
    shown = re.search(r"rewards of the group: ([^<]*)<", text)[1].split(" ")
    assert [float(reward) for reward in shown] == rewards and "-0" not in shown
    assert "-0.000 nats" not in text
    # Below 0 by rounding, a divergence once gave a complex number for a colour.
    colours = re.findall(r"rgba\(214, 40, 30, ([^)]*)\)", text)
    assert colours == ["0.00", "0.50", "1.00"]


def test_questions_with_the_same_id_stay_apart():
    """Before and after are paired by their order: all tests ask the same questions."""
    logged = []
    for stage in ("base", "grpo-1", "ofsd-1"):
        for number in range(4):
            row = attempt(f"{stage} {number}", em=1.0, reward=1.0)
            row["question"] = f"Which {number}?"
            row["golden_answers"] = [f"golden {number}"]
            ids = {"kind": "eval", "stage": stage, "id": str(number % 2)}
            logged.append({**row, **ids})
    parts = trace.test_section(logged, "base", "ofsd-1")
    assert parts[0].startswith("<h2>4 of 4 test questions")
    text = "".join(parts)
    for number in range(4):
        section = text.split(f"Which {number}?")[1].split("<h3>")[0]
        for said in ("golden", "base", "ofsd-1"):
            assert f"{said} {number}" in section
    # While the last test is being logged, some of its answers are not there yet.
    parts = trace.test_section(logged[:-1], "base", "ofsd-1")
    assert parts[0].startswith("<h2>3 of 3 test questions")


def test_what_changed_comes_first_and_then_the_most_searches():
    logged = []
    for stage, ems in (("base", (0, 0, 1, 1)), ("ofsd-1", (0, 0, 1, 0))):
        for number, em in enumerate(ems):
            row = attempt("x", em, em)
            row["question"] = f"Which {number}?"
            row["queries"] = ["q"] * number
            row["golden_answers"] = ["x"]
            logged.append({**row, "kind": "eval", "stage": stage, "id": str(number)})
    text = "".join(trace.test_section(logged, "base", "ofsd-1"))
    assert re.findall(r"Which (\d)", text) == ["3", "2", "1", "0"]


def test_everything_is_escaped(run, tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x1b[31m"
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        rows = read(run, name)
        for row in rows:
            for part in (row, row.get("reference", {}), row.get("student", {})):
                for key in ("question", "answer", "finish_reason"):
                    if key in part:
                        part[key] = evil
                if "text" in part:
                    part["text"] = [[0, f"- {evil}"], [1, evil]]
            if isinstance(row.get("divergence"), list):
                row["divergence"] = [[evil, 1.0]]
            if "golden_answers" in row:
                row["golden_answers"] = [evil]
        write(tmp_path / name, rows)
    text = trace.page(tmp_path)
    assert "&lt;script&gt;" in text and not re.search(r"<script|<img|\u202e|\x1b", text)


def test_curves_in_text(run, monkeypatch, capsys):
    run_main(monkeypatch, plot.main, "plot.py", run, run)
    printed = capsys.readouterr().out
    assert "base 0." in printed and "reward  |" in printed
    curves = plot.read_curves(run)
    assert [test.stage for test in curves.tests] == ["base", "grpo-1", "ofsd-1"]
    assert len(curves.rewards) == 1


def test_curves_of_any_reward():
    assert plot.bars([0.0, 0.5, 1.0]) == " ▄█"
    assert plot.bars([-1.0, 1.0]) == " █" and plot.bars([0.5, 2.0]) == "▂█"


def test_curves_of_a_run_without_grpo(run, tmp_path, monkeypatch, capsys):
    rows = [row for row in read(run, "metrics.jsonl") if row["stage"] == "base"]
    write(tmp_path / "metrics.jsonl", rows)
    run_main(monkeypatch, plot.main, "plot.py", tmp_path)
    assert "no step of GRPO" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path, monkeypatch, capsys):
    for script, main, message in (
        ("plot.py", plot.main, "no run's folder"),
        ("trace.py", trace.main, "No such file"),
    ):
        run_main(monkeypatch, main, script, tmp_path, status=2)
        assert message in line_of(capsys)
    for arguments, message in (
        ((), "required: folder"),
        (("--frobnicate",), "required: folder"),
        ((tmp_path, tmp_path), "unrecognized arguments"),
    ):
        run_main(monkeypatch, trace.main, "trace.py", *arguments, status=2)
        assert message in line_of(capsys)
    assert not [*tmp_path.iterdir()]


def test_a_run_without_a_test_is_one_line(tmp_path, monkeypatch, capsys):
    write(
        tmp_path / "metrics.jsonl", [{"kind": "step", "stage": "grpo-1", "reward": 1}]
    )
    write(tmp_path / "trajectories.jsonl", [{"kind": "eval", "stage": "base"}])
    for script, main, message in (
        ("plot.py", plot.main, "no test yet"),
        ("trace.py", trace.main, "no two evaluations"),
    ):
        run_main(monkeypatch, main, script, tmp_path, status=2)
        assert message in line_of(capsys)
