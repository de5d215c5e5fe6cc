"""tools/trace.py and plot.py: a page that escapes everything and needs nothing, curves in text."""

import json
import re
import shutil
from html.parser import HTMLParser

import plot
import pytest
import trace
from conftest import SMALL, line_of, read, run_main


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory):
    """A copy of the run: both scripts write into its folder."""
    return shutil.copytree(small_run, tmp_path_factory.mktemp("runs") / "copy")


class Check(HTMLParser):
    """Every tag that opens closes in order; collects the tags."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_page_shows_the_run_and_needs_nothing_from_elsewhere(run, monkeypatch, capsys):
    run_main(monkeypatch, trace.main, "trace.py", run)
    assert capsys.readouterr().out == f"{run / 'trace.html'}\n"
    text = (run / "trace.html").read_text(encoding="utf-8")
    check = Check()
    check.feed(text)
    assert not check.open
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in check.seen}
    assert "http" not in text and "url(" not in text
    pairs = [row for row in read(run, "trajectories.jsonl") if row["kind"] == "pair"]
    heated = [given for _, given in check.seen if "nats" in given.get("title", "")]
    assert pairs
    assert len(heated) == sum(kl is not None for row in pairs for _, kl in row["divergence"])
    assert text.count("<b>student</b>") == len(pairs)
    for row in pairs:
        assert len(row["rewards"]) == SMALL.group_size and row["rewards"].count(1.0) >= 1
        student = "".join(text for _, text in row["student"]["text"])
        assert "".join(text for text, _ in row["divergence"]) == student


def test_everything_is_escaped(run, tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x1b[31m"
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        rows = read(run, name)
        for row in rows:
            for part in (row, row.get("reference", {}), row.get("student", {})):
                foreign = [key for key in ("question", "answer", "finish_reason") if key in part]
                part.update(dict.fromkeys(foreign, evil))
                if "text" in part:
                    part["text"] = [[0, f"- {evil}"], [1, evil]]
            if "divergence" in row and isinstance(row["divergence"], list):
                row["divergence"] = [[evil, 1.0]]
            if "golden_answers" in row:
                row["golden_answers"] = [evil]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = trace.page(tmp_path)
    assert "&lt;script&gt;" in text and not re.search(r"<script|<img|\u202e|\x1b", text)


def test_curves_in_text(run, monkeypatch, capsys):
    run_main(monkeypatch, plot.main, "plot.py", run, run)
    printed = capsys.readouterr().out
    assert "base 0." in printed and "reward  |" in printed
    evaluations, rewards = plot.curves(run)
    assert [stage for stage, *_ in evaluations] == ["base", "grpo-1", "ofsd-1"]
    assert len(rewards) == 1


def test_curves_of_a_run_without_grpo(run, tmp_path, monkeypatch, capsys):
    rows = [row for row in read(run, "metrics.jsonl") if row["stage"] == "base"]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_main(monkeypatch, plot.main, "plot.py", tmp_path)
    assert "no step of GRPO" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path, monkeypatch, capsys):
    for script, main, message in (
        ("plot.py", plot.main, "folders of runs"),
        ("trace.py", trace.main, "No such file"),
    ):
        run_main(monkeypatch, main, script, tmp_path, status=2)
        assert message in line_of(capsys)
    for arguments in ((), ("--frobnicate",), (tmp_path, tmp_path)):
        run_main(monkeypatch, trace.main, "trace.py", *arguments, status=2)
        assert "give one run's folder" in line_of(capsys)
    assert not [*tmp_path.iterdir()]
