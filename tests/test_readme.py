"""The README's commands exist, and its numbers are those of the files they come from.

test_docs.py does the same for docs/, with the helpers of this file.
"""

import ast
import re
import shlex
import sys
from dataclasses import fields

import pytest
import tables
from conftest import ROOT

from train import Config, parse_flags, read_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = "EXERCISES.md", "CONTRIBUTING.md"
OTHERS = "".join((ROOT / name).read_text(encoding="utf-8") for name in PAGES)


def commands(text: str) -> list[list[str]]:
    """Every call of one of our scripts, in blocks and in the text."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines() if not line.startswith("#")]
    lines = [part for line in lines for part in line.split("&&")]
    lines += re.findall(r"`([^`\n]*python[^`\n]*)`", text)
    calls = map(shlex.split, lines)
    return [words for words in calls if any(word.endswith(".py") for word in words)]


def scripts(text: str) -> set[str]:
    return {next(word for word in words if word.endswith(".py")) for words in commands(text)}


def test_there_are_commands():
    others = {"tools/trace.py", "tools/plot.py"}
    assert {"train.py", "eval.py", "retriever.py"} | others <= scripts(README)


def check_script_and_flags(words: list[str]) -> None:
    start = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, flags = words[start], {word for word in words[start:] if word.startswith("--")}
    assert (ROOT / script).is_file(), script
    if script == "train.py":
        known = {"--" + item.name.replace("_", "-") for item in fields(Config)}
        known |= {"--resume", "--config", "--no-ofsd", "--help"}
    else:
        known = set(re.findall(r"--[a-z-]+", (ROOT / script).read_text(encoding="utf-8")))
    assert flags <= known, flags - known
    for word in words[start + 1 :]:
        if word.startswith(("micro/", "tests/", "results/", "bench/", "configs/", "tools/")):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("words", commands(README + OTHERS), ids=" ".join)
def test_a_commands_script_and_flags_exist(words):
    check_script_and_flags(words)


def check_settings(text: str, monkeypatch) -> None:
    """Every call of train.py gives a Config."""
    monkeypatch.chdir(ROOT)
    for words in commands(text):
        if "train.py" in words and "--resume" not in words and "N" not in words:
            monkeypatch.setattr(sys, "argv", words[words.index("train.py") :])
            parse_flags()


def test_settings_in_commands_are_accepted(monkeypatch):
    check_settings(README + OTHERS, monkeypatch)
    assert all(read_settings(path).model for path in (ROOT / "configs").glob("*.json"))


def test_the_tree_of_imports_is_that_of_the_code():
    files = ["retriever", "rollout", "eval", "grpo", "ofsd", "train"]
    lines = []
    for name in files:
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        needs = ", ".join(other for other in files if other in imported)
        lines.append(f"{name:10}<- {needs}" if needs else name)
    assert "```\n" + "\n".join(lines) + "\n```" in README


def test_the_six_files_keep_to_the_card():
    """At most 2,000 lines together, none over 100 columns, and no import that is not listed."""
    names = "retriever", "rollout", "eval", "grpo", "ofsd", "train"
    files = [ROOT / f"{name}.py" for name in names]
    assert sorted(files) == sorted(ROOT.glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in files]
    assert sum(len(text.splitlines()) for text in texts) <= 2000
    assert max(len(line) for text in texts for line in text.splitlines()) <= 100
    listed = {"torch", "transformers", "datasets", "numpy", "tqdm", "safetensors", "micro"}
    for text in texts:
        nodes = list(ast.walk(ast.parse(text)))
        plain = [node for node in nodes if isinstance(node, ast.Import)]
        modules = {alias.name for node in plain for alias in node.names}
        modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        roots = {module.split(".")[0] for module in modules}
        assert roots <= listed | sys.stdlib_module_names | {path.stem for path in files}


def last_table(seed: int) -> dict[str, list[str]]:
    log = (ROOT / f"results/default/seed{seed}.log").read_text(encoding="utf-8")
    table = log[log.index(" test questions") :]
    rows = re.findall(r"^ *(base|grpo-\d|ofsd-\d) +(.*)$", table, re.M)
    return {stage: cells.split() for stage, cells in rows}


@pytest.mark.parametrize("seed", range(5))
def test_the_default_runs_are_those_of_the_logs(seed):
    log = last_table(seed)
    row = re.search(rf"^\| {seed} \| (.*) \|$", README, re.M)[1].split(" | ")
    stages = "base", "grpo-1", "ofsd-1", "grpo-2", "ofsd-2"
    assert row == [log[stage][0].removeprefix("0") for stage in stages]


def test_what_is_said_of_the_stages_is_what_the_logs_say():
    """The README's ranges over five seeds, and each cell of the table in results/README.md."""
    logs = [last_table(seed) for seed in range(5)]
    of = lambda stage, column: [float(log[stage][column]) for log in logs]  # noqa: E731
    gains = {
        number: [b - a for a, b in zip(of(f"grpo-{number}", 0), of(f"ofsd-{number}", 0))]
        for number in (1, 2)
    }
    assert min(b - a for a, b in zip(of("base", 0), of("ofsd-2", 0))) > 0.30
    span = [f"{100 * end:.0f}" for end in (min(gains[1]), max(gains[1]), max(gains[2]))]
    text = re.sub(r"\s+", " ", README)
    assert "first by {} to {} points, the second by up to {}.".format(*span) in text
    assert min(gains[2]) >= 0
    assert all(round(n, 1) == 2 for stage in logs[0] if stage != "base" for n in of(stage, 5))
    better, worse = of("ofsd-1", 7), [-control for control in of("ofsd-1", 9)]
    for values, end in ((better, "better than the student"), (worse, "worse")):
        assert f".{100 * min(values):.0f} to .{100 * max(values):.0f} {end}" in text
    assert better == of("ofsd-1", 8) and of("ofsd-2", 7) == of("ofsd-2", 8)  # all is supported
    page = (ROOT / "results/README.md").read_text(encoding="utf-8")
    short = lambda cell: cell.replace("0.", ".", 1)  # noqa: E731
    for seed, log in enumerate(logs):
        cells = [short(log["base"][0])]
        for number in "12":
            before, after = log[f"grpo-{number}"], log[f"ofsd-{number}"]
            cells.append(f"{short(after[7])}, {short(after[9])}")
            cells.append(f"{short(before[0])}, {short(after[0])}")
        assert f"| {seed} | {' | '.join(cells)} |" in page
    means = (sum(gains[number]) / 5 for number in (1, 2))
    assert "by {:.3f} on the mean, the second by {:.3f}".format(*means).replace("0.", ".") in page


def test_the_output_shown_is_that_of_seed_0():
    log = (ROOT / "results/default/seed0.log").read_text(encoding="utf-8").splitlines()
    shown = re.search(r"## What the command prints\n+```\n(.*?)```", README, re.S)[1].splitlines()
    assert len(shown) > 12
    for line in shown:
        assert not line.strip() or line == "  ..." or line in log, line


def test_the_evidence_is_that_of_the_tables():
    """The row of each arm in results/README.md, cell by cell."""
    text = tables.comparison("loop")
    page = (ROOT / "results/README.md").read_text(encoding="utf-8")
    for arm in ("grpo", "ofsd", "rft", "search-e1"):
        lines = text.splitlines()
        cells = next(line for line in lines if line.startswith(f"| {arm} ")).split("|")
        rows = [line for line in page.splitlines() if line.startswith("| ")]
        shown = next(line for line in rows if f"`{arm}`" in line).split("|")
        assert [cell.strip() for cell in shown[2:9]] == [cell.strip() for cell in cells[2:9]]
