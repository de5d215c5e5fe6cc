"""results/trace.py and plot.py: a page that escapes everything and needs nothing, curves in text."""

import json
import re
from html.parser import HTMLParser

import plot
import pytest
import trace
from test_train import SMALL, read

from train import replace, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(replace(SMALL, out=str(tmp_path_factory.mktemp("runs") / "small")))


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


def test_a_page_shows_the_run_and_needs_nothing_from_elsewhere(run, command):
    done = command("results/trace.py", run)
    assert done.returncode == 0, done.stderr
    text = (run / "trace.html").read_text(encoding="utf-8")
    check = Check()
    check.feed(text)
    assert not check.open and not {"script", "img", "link", "iframe"} & {tag for tag, _ in check.seen}
    assert "http" not in text and "url(" not in text
    pairs = [row for row in read(run, "trajectories.jsonl") if row["kind"] == "pair"]
    heated = [attributes for tag, attributes in check.seen if "nats" in attributes.get("title", "")]
    assert pairs and len(heated) == sum(kl is not None for row in pairs for _, kl in row["divergence"])
    assert text.count("<b>student</b>") == len(pairs)
    for row in pairs:
        assert len(row["rewards"]) == SMALL.group_size and row["rewards"].count(1.0) >= 1
        assert "".join(text for text, _ in row["divergence"]) == "".join(text for _, text in row["student"]["text"])


def test_everything_is_escaped(run, tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x1b[31m"
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        rows = read(run, name)
        for row in rows:
            for part in (row, row.get("reference", {}), row.get("student", {})):
                part.update({key: evil for key in ("question", "answer", "finish_reason") if key in part})
                if "text" in part:
                    part["text"] = [[0, f"- {evil}"], [1, evil]]
            if "divergence" in row and isinstance(row["divergence"], list):
                row["divergence"] = [[evil, 1.0]]
            if "golden_answers" in row:
                row["golden_answers"] = [evil]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = trace.page(tmp_path)
    assert "&lt;script&gt;" in text and not re.search(r"<script|<img|\u202e|\x1b", text)


def test_curves_in_text(run, command):
    done = command("results/plot.py", run, run)
    assert done.returncode == 0 and "base 0." in done.stdout and "reward  |" in done.stdout
    evaluations, rewards = plot.curves(run)
    assert [stage for stage, *_ in evaluations] == ["base", "grpo-1", "ofsd-1"] and len(rewards) == 1


def test_what_is_no_run_is_refused(refused, tmp_path):
    assert "folders of runs" in refused("results/plot.py", tmp_path)
    assert "no such file" in refused("results/trace.py", tmp_path)
