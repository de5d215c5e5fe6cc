"""The README's commands exist, and its numbers are those of the files they come from."""

import re
import shlex
from dataclasses import fields

import pytest
import tables
from conftest import ROOT

from train import Config

README = (ROOT / "README.md").read_text(encoding="utf-8")
OTHERS = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("EXERCISES.md", "CONTRIBUTING.md"))


def commands() -> list[list[str]]:
    """Every call of one of our scripts, in blocks and in the text."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [part for block in blocks for line in block.splitlines() if not line.startswith("#") for part in line.split("&&")]
    lines += re.findall(r"`([^`\n]*python[^`\n]*)`", README + OTHERS)
    return [words for words in map(shlex.split, lines) if any(word.endswith(".py") for word in words)]


def test_there_are_commands():
    found = {next(word for word in words if word.endswith(".py")) for words in commands()}
    assert {"train.py", "eval.py", "retriever.py", "micro/make.py", "results/trace.py", "results/plot.py"} <= found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_commands_script_and_flags_exist(words, command):
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, flags = words[start], {word for word in words[start:] if word.startswith("--")}
    assert (ROOT / script).is_file(), script
    if script == "train.py":
        known = {"--" + item.name.replace("_", "-") for item in fields(Config)} | {"--resume", "--help"}
    else:
        known = set(re.findall(r"--[a-z-]+", (ROOT / script).read_text(encoding="utf-8")))
    assert flags <= known, flags - known
    for word in words[start + 1 :]:
        if word.startswith(("micro/", "tests/", "results/", "bench/")):
            assert (ROOT / word).exists(), word


def test_settings_in_commands_are_accepted():
    """Every call of train.py gives a Config."""
    kinds = {item.name: item.type for item in fields(Config)}
    for words in commands():
        if "train.py" not in words or "--resume" in words:
            continue
        given, rest = {}, words[words.index("train.py") + 1 :]
        for flag, value in zip(rest, [*rest[1:], ""]):
            name = flag[2:].replace("-", "_")
            if flag.startswith("--") and name in kinds and value not in ("L", "N"):
                given[name] = True if kinds[name] is bool else kinds[name](value)
        Config(**given)


def last_table(seed: int) -> dict[str, list[str]]:
    log = (ROOT / f"results/default/seed{seed}.log").read_text(encoding="utf-8")
    rows = re.findall(r"^(base|grpo-\d|ofsd-\d) +(.*)$", log[log.index("test questions, greedy") :], re.M)
    return {stage: cells.split() for stage, cells in rows}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_runs_are_those_of_the_logs(seed):
    log = last_table(seed)
    row = re.search(rf"^\| {seed} \| (.*) \|$", README, re.M)[1].split(" | ")
    assert row[:5] == [log[stage][0].removeprefix("0") for stage in ("base", "grpo-1", "ofsd-1", "grpo-2", "ofsd-2")]
    assert row[5] == f"{log['grpo-1'][5]}, {log['ofsd-2'][5]}" and row[6] == log["ofsd-2"][-1]


def test_the_output_shown_is_that_of_seed_0():
    log = (ROOT / "results/default/seed0.log").read_text(encoding="utf-8").splitlines()
    shown = re.search(r"## What the command prints\n+```\n(.*?)```", README, re.S)[1].splitlines()
    assert len(shown) > 12
    for line in shown:
        assert not line.strip() or line == "  ..." or line in log, line


def test_the_evidence_is_that_of_the_tables():
    """The README's row of each arm, cell by cell."""
    text = tables.comparison("loop-2")
    for arm in ("grpo", "rft", "search-e1"):
        cells = next(line for line in text.splitlines() if line.startswith(f"| {arm} ")).split("|")
        shown = next(line for line in README.splitlines() if line.startswith("| ") and f"`{arm}`" in line).split("|")
        assert [cell.strip() for cell in shown[2:9]] == [cell.strip() for cell in cells[2:9]]


def test_the_benchmarks_are_those_of_the_files():
    bm25 = (ROOT / "results/bench/bm25.txt").read_text(encoding="utf-8")
    for number in ("3,980", "3,863", "5.4", "310"):
        assert number in README and number.replace(",", "") in bm25.replace(",", "")
