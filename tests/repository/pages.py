"""Shared by the tests of this folder: pages, their commands, tables and numbers."""

import ast
import json
import re
import shlex
from functools import cache
from pathlib import Path

from conftest import ROOT

SIX = ("retriever", "rollout", "eval", "grpo", "ofsd", "train")
FOLDERS = ("machinery", "lessons", "tools", "experiments", "bench", "micro")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def flat(text: str) -> str:
    """The text as one line, so that a sentence is found wherever its lines end."""
    return re.sub(r"\s+", " ", text)


def rows_of(name: str) -> list[dict]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in text_of(name).splitlines()]


def cells_of(page: str) -> dict[str, list[str]]:
    """The rows of a page's tables: the first cell, and the cells after it."""
    rows = {}
    for line in page.splitlines():
        if line.startswith("|"):
            first, *others = line.strip("|").split("|")
            rows[first.strip()] = [cell.strip() for cell in others]
    return rows


def short(value: float, sign: str = "") -> str:
    """A number as the pages write it.

    >>> short(0.25), short(-0.5), short(0.25, "+")
    ('.250', '-.500', '+.250')
    """
    return f"{value:{sign}.3f}".replace("0.", ".", 1)


README = text_of("README.md")
DOCS = {path.stem: text_of(f"docs/{path.name}") for path in ROOT.glob("docs/*.md")}
REAL = text_of("results/real/README.md")
PAGES = {
    "README.md": README,
    "CONTRIBUTING.md": text_of("CONTRIBUTING.md"),
    "lessons/exercises.md": text_of("lessons/exercises.md"),
    "results/README.md": text_of("results/README.md"),
    "results/real/README.md": REAL,
}
for stem, page in sorted(DOCS.items()):
    PAGES[f"docs/{stem}.md"] = page


# ---------------------------------------------------------------- modules and imports


def modules() -> dict[str, Path]:
    """All Python files but the tests, by the names under which they are imported."""
    files = {path.stem: path for path in ROOT.glob("*.py")}
    for folder in FOLDERS:
        for path in ROOT.glob(f"{folder}/*.py"):
            files[f"{folder}.{path.stem}"] = path
    return files


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(path: Path) -> set[str]:
    """Each module that the file names in an import, also within a function."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: an import is relative"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports() -> dict[str, set[str]]:
    """For each of our modules, those of ours that it imports."""
    files = modules()
    return {name: imported_names(path) & files.keys() for name, path in files.items()}


# ---------------------------------------------------------------- commands


def commands(text: str) -> list[list[str]]:
    """The words of every call of Python, in blocks and in the text."""
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.splitlines():
            if not line.startswith("#"):
                lines += line.split("&&")
    lines += re.findall(r"`!?([^`\n]*python[^`\n]*)`", text)
    calls = [shlex.split(line) for line in lines]
    return [words for words in calls if script_of(words)]


def script_of(words: list[str]) -> str:
    """Which of our scripts a call starts, by the name of its module; "" if none.

    >>> script_of(["python", "-m", "tools.trace", "runs/NAME"])
    'tools.trace'
    >>> script_of(["python", "train.py", "--no-ofsd"])
    'train'
    """
    for number, word in enumerate(words):
        if word == "-m" and number + 1 < len(words):
            folder, _, name = words[number + 1].partition(".")
            return words[number + 1] if name and folder in FOLDERS else ""
        if word.endswith(".py"):
            return word.removesuffix(".py")
    return ""


def scripts(text: str) -> set[str]:
    return {script_of(words) for words in commands(text)}


def flags_of(script: str) -> set[str]:
    """The flags that a script's file has, and those of our modules that it imports."""
    files = modules()
    text = ""
    for name in (script, *imports()[script]):
        text += files[name].read_text(encoding="utf-8")
    return set(re.findall(r"--[a-z][a-z-]*", text))
