"""tools/trace.py and plot.py: a page that escapes everything and needs nothing from
elsewhere, curves in text."""

import csv
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import pytest
from conftest import SMALL, line_of, read, run_main

from machinery.records import OBJECTION, sums_of
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
    for row in pairs:
        assert len(row["rewards"]) == SMALL.group_size
        assert row["rewards"].count(1.0) >= 1
        student = "".join(text for _, text in row["student"]["text"])
        assert "".join(text for text, _ in row["divergence"]) == student
        assert row["reference"]["em"] == row["reference"]["reward"] == 1.0
        assert row["student"]["em"] == row["student"]["reward"]
        large = [value for _, value in row["divergence"] if (value or 0) > OBJECTION]
        assert len(row["objections"]) == len(large)
    shown = trace.spread(pairs, trace.MOST_PAIRS)
    assert text.count("<h5>student: this is corrected</h5>") == len(shown)
    ofsd = text.split('<section id="ofsd">')[1].split("The same text, but")
    numbers = re.findall(r"<sup>([\d.]+)</sup>", ofsd[0])
    values = [value or 0.0 for _, value in shown[0]["divergence"]]
    assert numbers == [f"{value:.2f}" for value in values if value > OBJECTION]
    assert "<title>copy</title>" in text and "<h1>copy</h1>" in text


def test_a_page_shows_a_group_with_its_rewards_and_log_probabilities(run):
    rows = read(run, "trajectories.jsonl")
    (group,) = [row for row in rows if row["kind"] == "group"]
    text = trace.page(run)
    for trajectory in group["trajectories"]:
        assert len(trajectory["tokens"]) >= len(trajectory["text"])
        written = "".join(token[0] for token in trajectory["tokens"])
        assert written == "".join(text for _, text in trajectory["text"])
        before, after = sums_of(trajectory["tokens"])
        assert f"log π {before:.2f} → {after:.2f}" in text
        assert before < 0 and before != after
    assert text.count("<h5>3: reward") == 1  # as many as the group has


def test_the_update_is_said_to_have_done_what_it_did():
    said = trace.what_moved([1.0, -0.5, -0.5], [0.2, -0.1, 0.1])
    assert said.startswith("Of 1 above the mean, 1 became likelier. Of 2 below it, 1 ")
    assert "nothing to learn" in trace.what_moved([0.0, 0.0], [0.2, 0.1])
    moved = trace.move_map([["up", -1.0, -0.5], ["\n"], ["down", -1.0, -3.25]])
    assert "up<sup>▲0.50</sup>" in moved and "down<sup>▼2.25</sup>" in moved
    still = trace.move_map([["nan", -1.0, math.nan], [" little", -1.0, -0.96]])
    assert "<sup>" not in still


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
    states = re.findall(r'<p><span class="(right|wrong)">', text)
    assert states == [
        "right" if side["em"] else "wrong" for side in (reference, student)
    ]
    shown = re.search(r"rewards of the group: ([^<]*)<", text)[1].split(" ")
    assert [float(reward) for reward in shown] == rewards and "-0" not in shown
    assert "-0.000 nats" not in text
    # Below 0 by rounding, a divergence once gave a complex number for a colour.
    assert re.findall(r'class="(m\d)">', text) == ["m2", "m4"]


def evaluated(stage, em=0.5):
    return {
        "kind": "eval",
        "stage": stage,
        "em": em,
        "f1": em,
        "em_by": {},
        "searches": 1.0,
        "answered": 1.0,
        "n": 4,
        "time_s": 60.0,
    }


@pytest.fixture
def tested(tmp_path):
    """tested(stages, answers): the folder of a run. answers: (stage, number, em)."""

    def make(stages, answers, metrics=()):
        rows = []
        for stage, number, em in answers:
            row = attempt(f"{stage} {number}", em, em)
            row["question"] = f"Which {number}?"
            row["golden_answers"] = [f"golden {number}"]
            rows.append({**row, "kind": "eval", "stage": stage, "id": str(number % 2)})
        write(tmp_path / "metrics.jsonl", [*map(evaluated, stages), *metrics])
        write(tmp_path / "trajectories.jsonl", rows)
        return tmp_path

    return make


def test_questions_with_the_same_id_stay_apart(tested):
    """Before and after are paired by their order: all tests ask the same questions."""
    stages = ("base", "grpo-1", "ofsd-1")
    answers = [(stage, number, 1.0) for stage in stages for number in range(4)]
    text = trace.page(tested(stages, answers))
    assert "<b>4</b> stayed right" in text and ": grpo-1 0 <" not in text
    for number in range(4):
        section = text.split(f"Which {number}?")[1].split("<h4>")[0]
        for said in ("golden", "base", "ofsd-1"):
            assert f"{said} {number}" in section
    # While the last test is being logged, some of its answers are not there yet.
    assert "<b>3</b> stayed right" in trace.page(tested(stages, answers[:-1]))


def test_the_four_counts_are_of_all_questions_and_each_kind_shows_some(tested):
    """The choice is by a rule that says nothing of how a question looks."""
    befores = [0, 0, 1, 1] * 9
    afters = [1, 0, 1, 0] * 9
    answers = [("base", number, em) for number, em in enumerate(befores)]
    answers += [("grpo-1", number, em) for number, em in enumerate(afters[:-1])]
    folder = tested(("base", "grpo-1"), answers)
    metrics = [evaluated("base", 0.5), evaluated("grpo-1", 0.375)]
    write(folder / "metrics.jsonl", metrics)
    text = trace.page(folder)
    assert "50.0% at base, and 37.5% at grpo-1." in text
    assert "by stage: grpo-1 -12.5." in text
    for count, kind in ((9, "became right"), (8, "became wrong"), (9, "stayed right")):
        assert f"<li><b>{count}</b> {kind}</li>" in text
        assert f"<h3>{kind}: 4 of {count}</h3>" in text
    section = text.split("<h3>became right")[1].split("<h3>")[0]
    assert re.findall(r"Which (\d+)", section) == ["0", "8", "16", "24"]


def test_a_run_with_one_test_shows_right_and_wrong(tested):
    folder = tested(("base",), [("base", 0, 1.0), ("base", 1, 0.0), ("base", 2, 0.0)])
    text = trace.page(folder)
    assert "<b>1</b> right" in text and "<b>2</b> wrong" in text
    assert "the only test so far" in text and "became right" not in text
    for said in ("kept no group", "no OFSD stage", "All are the defaults"):
        assert said in text


def test_a_run_that_goes_on_says_so_and_settings_are_compared(tested):
    folder = tested(("base",), [("base", 0, 1.0)])
    settings = {"rounds": 2, "ofsd": False, "seed": 7, "date": "x", "<b>new</b>": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    text = trace.page(folder)
    assert "The run is not over: 1 of 3 tests" in text
    section = text.split('<section id="settings">')[1]
    changed, everything = section.split("all settings of this run")
    rows = re.findall(r"<td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", changed)
    assert rows == [
        ("ofsd", "False", "True"),
        ("seed", "7", "0"),
        ("&lt;b&gt;new&lt;/b&gt;", "1", "None"),
    ]
    assert "<td>rounds</td><td>2</td>" in everything
    assert everything.count("<td>") == 2 * len(settings)


def test_a_skipped_stage_says_why_and_any_reward_has_a_curve(tested):
    mining = {"kind": "mining", "stage": "ofsd-1", "pairs": 2, "no_correct": 3}
    mining |= {"no_contrast": 4, "too_long": 0, "edge": -0.25, "skipped": True}
    mining |= {"edge_supported": -0.5, "edge_control": 0.0}
    step = {"kind": "step", "stage": "grpo-1"}
    steps = [{**step, "reward": reward} for reward in (-3.0, None, 5.5)]
    stages = ("base", "grpo-1", "ofsd-1")
    answers = [(stage, 0, 1.0) for stage in stages]
    text = trace.page(tested(stages, answers, [*steps, mining]))
    assert "<b>The stage was skipped.</b>" in text and "edge was -0.250" in text
    assert "ofsd-1: 0 of 0 pairs" in text
    assert ">5.5</text>" in text and ">-3</text>" in text
    assert "grpo-1 from -3.00 to 5.50" in text


def test_a_pair_of_an_older_run_has_no_table_and_no_control():
    older = pair([1.0, 0.0], attempt("Ada", 1.0, 1.0), attempt("Bo", 0.0, 0.0))
    text = "".join(trace.pair_parts(older))
    assert "<table" not in text and "The same text, but" not in text
    it = ["it", 0.01, 0.9]
    feed = ["\n", 0.9, 0.1]
    newer = older | {
        "objections": [
            [1, it, [" she", 0.75, 0.02], it, [" he", 0.004, 0.0]],
            [2, feed, feed, ["  ", 0.00001, 1.0], [" he", 0.0, 0.0]],
        ],
        "control": {"question": "Where?", "divergence": [0.0, 2.0, None]},
    }
    text = "".join(trace.pair_parts(newer))
    assert "<b>she</b> <small>teacher .75, student .02</small>" in text
    assert "<b>↵</b>" in text and "<b>␣</b>" in text
    assert text.count("<i>the same token</i>") == 2
    assert "It read about: Where?" in text
    assert "together are 2.00 nats here, and 3.25 with" in text


@pytest.fixture
def hostile(run, tmp_path):
    """The folder of a run in which every text is hostile."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x1b[31m"
    evil += "</pre></details></section><style>* { display: none }</style>"
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        rows = read(run, name)
        for row in rows:
            for part in (row, row.get("reference", {}), row.get("student", {})):
                for key in ("question", "answer", "finish_reason"):
                    if key in part:
                        part[key] = evil
                if "text" in part:
                    part["text"] = [[0, f"- {evil}"], [1, evil]]
            if row["kind"] == "pair":
                row["divergence"] = [[evil, 1.0], [evil, 0.0]]
                row["objections"] = [[0, *[[evil, 0.5, 0.1]] * 4]]
                row["control"] = {"question": evil, "divergence": [1.0, 0.0]}
            for trajectory in row.get("trajectories", []):
                for key in ("question", "answer", "finish_reason"):
                    trajectory[key] = evil
                trajectory["tokens"] = [[evil, -1.0, -0.1], [evil], [evil, 0.0, 0.0]]
            if "golden_answers" in row:
                row["golden_answers"] = [evil]
            if "stage" in row:
                row["stage"] = row["stage"] + evil
            if "em_by" in row:
                row["em_by"] = {evil: 1.0}
        write(tmp_path / name, rows)
    (tmp_path / "config.json").write_text(json.dumps({"model": evil, evil: evil}))
    return tmp_path


def test_everything_is_escaped(hostile):
    text = trace.page(hostile)
    assert "&lt;script&gt;" in text and not re.search(r"<script|<img|\u202e|\x1b", text)
    assert text.count("<style>") == 1
    check = Check()
    check.feed(text)
    assert not check.open


def test_curves_in_text(run, monkeypatch, capsys):
    run_main(monkeypatch, plot.main, "plot.py", run, run)
    printed = capsys.readouterr().out
    assert "base 0." in printed and "reward  |" in printed
    curves = plot.read_curves(run)
    assert [test.stage for test in curves.tests] == ["base", "grpo-1", "ofsd-1"]
    assert len(curves.steps) == 2 and len(plot.means_of_five(curves.steps)) == 1


def test_a_curve_has_steps_tokens_and_minutes(run, tmp_path, monkeypatch, capsys):
    """What the tests sample does not count: training did not pay for it."""
    table = tmp_path / "curves.csv"
    run_main(monkeypatch, plot.main, "plot.py", run, "--x", "tokens", "--csv", table)
    assert str(table) in capsys.readouterr().out.splitlines()
    rows = read(run, "metrics.jsonl")
    paid = [row["tokens_sampled"] for row in rows if row["kind"] != "eval"]
    updates = [row for row in rows if row["kind"] == "step"]
    with table.open(newline="") as file:
        points = list(csv.DictReader(file))
    assert [point["stage"] for point in points[:3]] == ["base", "grpo-1", "ofsd-1"]
    assert points[0]["steps"] == points[0]["tokens"] == "0"
    assert points[2]["tokens"] == str(sum(paid))
    assert points[2]["steps"] == str(len(updates))
    assert [point["kind"] for point in points[3:]] == ["step", "step"]
    assert float(points[3]["value"]) == updates[0]["reward"]


def test_a_run_that_counted_no_tokens_has_no_such_axis(tested, monkeypatch, capsys):
    older = {"kind": "step", "stage": "grpo-1", "reward": 1.0, "time_s": 1.0}
    folder = tested(("base", "grpo-1"), [("base", 0, 1.0)], [older])
    write(folder / "metrics.jsonl", [evaluated("base"), older, evaluated("grpo-1")])
    run_main(monkeypatch, plot.main, "plot.py", folder, "--x", "tokens", status=2)
    assert "did not count its tokens" in line_of(capsys)


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
        ("trace.py", trace.main, "no test yet"),
    ):
        run_main(monkeypatch, main, script, tmp_path, status=2)
        assert message in line_of(capsys)


# ---------------------------------------------------------------- in a browser


def browser(*arguments):
    """What chromium prints that opens a page without a window."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no chromium here")
    call = [program, "--headless", "--no-sandbox", "--disable-gpu", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    return done.stdout


def test_a_browser_runs_nothing_of_a_hostile_page(hostile):
    """And it finds one title, five sections, and no element of others."""
    target = hostile / "trace.html"
    target.write_text(trace.page(hostile), encoding="utf-8")
    dom = browser("--dump-dom", target.as_uri())
    check = Check()
    check.feed(dom)
    tags = Counter(tag for tag, _ in check.seen)
    assert (tags["h1"], tags["section"], tags["style"]) == (1, 5, 1)
    assert not {"script", "img"} & tags.keys()
    assert not [its for _, its in check.seen if any(name[:2] == "on" for name in its)]


PROBE = """<!doctype html><iframe style="width: 390px; height: 800px; border: 0"
src="trace.html"></iframe><script>onload = () => {
  const page = document.querySelector("iframe").contentDocument;
  const folded = page.querySelectorAll("details");
  folded.forEach(details => details.open = true);
  document.title = page.documentElement.scrollWidth + " " + folded.length;
}</script>"""


@pytest.mark.parametrize("kind", ["run", "hostile"])
def test_a_phone_does_not_scroll_sideways(kind, request, tmp_path):
    """The page is 390 pixels wide, with all that can be folded unfolded."""
    text = trace.page(request.getfixturevalue(kind))
    assert len(text.encode()) < 1_000_000
    (tmp_path / "trace.html").write_text(text, encoding="utf-8")
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE)
    dom = browser("--allow-file-access-from-files", "--dump-dom", probe.as_uri())
    width, folded = re.search(r"<title>(\d+) (\d+)</title>", dom).groups()
    assert int(width) <= 390
    assert int(folded) == text.count("<details")


def test_a_printed_page_is_no_book(run, tmp_path):
    target = tmp_path / "trace.html"
    target.write_text(trace.page(run), encoding="utf-8")
    pdf = tmp_path / "trace.pdf"
    browser(f"--print-to-pdf={pdf}", target.as_uri())
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) <= 10
