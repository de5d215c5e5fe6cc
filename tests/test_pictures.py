"""tools/pictures.py and who draws with it: any backend, any name, no matplotlib."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, line_of, run_main

from experiments import figures, mechanism, real, tables
from experiments import pictures as run_pictures
from machinery.errors import BadInput
from machinery.terminal import printable
from tools import pictures, plot


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(folder: Path, ems: tuple[float, ...] = (0.0, 1.0)) -> Path:
    """The logs of a run: tests with these EMs, of so many questions that the bounds of
    Wilson's interval are not exact."""
    tests = []
    costs = []
    for number, em in enumerate(ems):
        test = {"kind": "eval", "stage": f"grpo-${number}$", "em": em, "searches": 1.0}
        tests.append({**test, "time_s": 60.0 * number, "n": 135})
        costs += [
            {"for": f"test {test['stage']}", "tokens": 100},
            {"for": "grpo", "tokens": 1000},
        ]
    write(folder / "metrics.jsonl", tests)
    write(folder / "cost.jsonl", costs)
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    saved = []
    plain = Figure.savefig

    def savefig(figure, *args, **keywords):
        plain(figure, *args, **keywords)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def names_in(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


# A leading "_" hides a line from a legend, and a "$" begins a formula.
NAMES = [
    "_a",
    r"$\bar$",
    r"\$x$",
    "$x",
    "$^$ {",
    "plain",
    "\x1b[31m\u202e",
    "new\nline",
]


def test_every_name_stands_in_the_legend_as_it_is(tmp_path, monkeypatch, capsys, drawn):
    folders = [make_run(tmp_path / name) for name in NAMES]
    run_main(monkeypatch, plot.main, "plot.py", *folders)
    expected = [printable(name) for name in NAMES]
    assert names_in(drawn[0].axes[0]) == expected
    assert "\x1b" not in capsys.readouterr().out
    out = tmp_path / "real.png"
    run_main(monkeypatch, real.main, "real.py", "figure", out, *folders)
    assert [names_in(axes) for axes in drawn[1].axes] == [expected, expected]
    assert out.read_bytes().startswith(b"\x89PNG")


def test_folders_of_one_name_have_their_paths_in_the_legend(
    tmp_path, monkeypatch, drawn
):
    folders = [make_run(tmp_path / f"{part}/run") for part in "ab"]
    run_main(monkeypatch, plot.main, "plot.py", *folders)
    upper, lower = drawn[0].axes
    assert names_in(upper) == [str(folder) for folder in folders]
    assert [text.get_text() for text in upper.texts] == ["grpo-$0$", "grpo-$1$"]
    assert lower.get_xlabel() == "steps of GRPO and OFSD"


def test_the_folder_in_which_one_stands_has_its_name(tmp_path, monkeypatch, drawn):
    monkeypatch.chdir(make_run(tmp_path / "here"))
    run_main(monkeypatch, plot.main, "plot.py", ".")
    assert names_in(drawn[0].axes[0]) == ["here"]


def test_what_cannot_be_the_name_of_a_picture_is_refused(
    tmp_path, monkeypatch, capsys, drawn
):
    folder = make_run(tmp_path / "run")
    for out, message in (("a.xyz", "xyz"), ("no/a.png", "No such file")):
        out = tmp_path / out
        run_main(monkeypatch, real.main, "real.py", "figure", out, folder, status=2)
        said = line_of(capsys)
        assert str(out) in said and message in said
        run_main(monkeypatch, plot.main, "plot.py", folder, "--out", out, status=2)
        said = line_of(capsys)
        assert str(out) in said and message in said


@pytest.mark.parametrize(
    "backend", ["module://matplotlib_inline.backend_inline", "nonsense", "tkagg"]
)
def test_a_picture_needs_no_backend(tmp_path, backend):
    """A notebook's is in the environment of all that is started from there."""
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "tools.plot", run],
        cwd=ROOT,
        env={**os.environ, "MPLBACKEND": backend},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")  # which is put back afterwards
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


HOW_TO_GET_IT = "pip install -r requirements-extra.txt"


def test_without_matplotlib_curves_are_in_the_terminal(
    tmp_path, monkeypatch, capsys, no_matplotlib
):
    run_main(monkeypatch, plot.main, "plot.py", make_run(tmp_path / "run"))
    *curves, last = capsys.readouterr().out.splitlines()
    assert len(curves) == 3 and last.startswith("no picture: ")
    assert last.endswith(HOW_TO_GET_IT)
    assert not (tmp_path / "run/curves.png").exists()


def test_without_matplotlib_a_figure_is_refused_in_one_line(
    tmp_path, monkeypatch, capsys, no_matplotlib
):
    """And before the minutes that some take."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "all_tables", lambda: "")
    monkeypatch.setattr(mechanism, "measure", None)
    folder = make_run(tmp_path / "run")
    for main, arguments in (
        (figures.main, ()),
        (tables.main, ()),
        (mechanism.main, ()),
        (run_pictures.main, (folder,)),
        (real.main, ("figure", tmp_path / "real.png", folder)),
    ):
        run_main(monkeypatch, main, "script.py", *arguments, status=2)
        assert line_of(capsys).endswith(HOW_TO_GET_IT)


def test_nothing_else_imports_matplotlib():
    """What is drawn by other means would have all these faults again."""
    folders = ("experiments", "tools", "bench", "lessons", "micro", "machinery")
    for folder in folders:
        for path in ROOT.glob(f"{folder}/**/*.py"):
            if path != Path(pictures.__file__):
                text = path.read_text(encoding="utf-8")
                assert not re.search(r"^\s*(from|import) matplotlib", text, re.M), path


# ---------------------------------------------------------- the pictures to project

MARKED = "$x$ </answer> \x1b[31m"  # no formula, and no escape for a terminal


def attempt_of(answer: str, em: float, queries: list[str]) -> dict:
    text = [[1, "<think> $y$</think>\n"], [0, "- passage"], [1, f"<answer>{answer}"]]
    return {
        "question": "What is $x$?",
        "answer": answer,
        "em": em,
        "queries": queries,
        "text": text,
    }


def pair_row(queries: list[str], em: float = 0.0, divergence=None) -> dict:
    return {
        "kind": "pair",
        "reference": attempt_of("$a$", 1.0, ["one"]),
        "student": attempt_of("$b$", em, queries),
        "divergence": divergence,
    }


TOKENS = [["<think>", 0.01], [" a", 0.7], ["\n", None], [MARKED, 0.06]]


def test_the_picture_of_ofsd_has_every_token_and_the_large_numbers(tmp_path, drawn):
    rows = [
        {"kind": "eval"},
        pair_row(["one", "two"], divergence=TOKENS),
        pair_row([], em=1.0, divergence=TOKENS),  # the student is right
        pair_row([]),  # not logged token by token
        pair_row(["one"], divergence=TOKENS),
    ]
    write(tmp_path / "trajectories.jsonl", rows)
    pair = run_pictures.pair_of(tmp_path)
    assert pair == rows[-1]
    run_pictures.draw_ofsd(pair, tmp_path / "ofsd.png")
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert printable(MARKED) in texts
    assert texts.count("0.70") == texts.count("0.06") == 1
    assert "0.01" not in texts
    write(tmp_path / "trajectories.jsonl", rows[:1])
    with pytest.raises(BadInput, match="no pair"):
        run_pictures.pair_of(tmp_path)


def test_a_long_text_ends_within_the_picture():
    tokens = [run_pictures.Token("ab\n", written=True)] * 100
    placed = run_pictures.lay_out(tokens, columns=10)
    assert run_pictures.lines_in(placed) == run_pictures.MOST_LINES + 1
    assert placed[-1].text == "…"


def test_the_picture_of_grpo_has_a_row_for_each_trajectory(tmp_path, drawn):
    right = attempt_of("$a$", 1.0, ["$q$"])
    right["question"] = "$?$"
    right["tokens"] = [["<search>", -1.0, -0.75], [" q", -0.5, -0.25], ["passage"]]
    wrong = attempt_of(None, 0.0, ["$q$"] * 5)
    wrong["tokens"] = [["<search>", -1.0, -1.2]]
    group = {
        "kind": "group",
        "golden_answers": ["$a$"],
        "rewards": [1.0, 0.0],
        "trajectories": [right, wrong],
    }
    alike = {**group, "rewards": [1.0, 1.0]}
    write(tmp_path / "trajectories.jsonl", [{"kind": "eval"}, alike, group])
    assert run_pictures.group_of(tmp_path) == group
    run_pictures.draw_grpo(group, tmp_path / "grpo.png")
    texts = [text.get_text() for axes in drawn[0].axes for text in axes.texts]
    assert "search: $q$\nsearch: $q$\nsearch: $q$  (+ 2)\nanswer: none" in texts
    for text in (" +0.707 ", " -0.707 ", " +0.50 ", " -0.20 ", "▲", "▼"):
        assert texts.count(text) == 1
    write(tmp_path / "trajectories.jsonl", [alike])
    with pytest.raises(BadInput, match="no group"):
        run_pictures.group_of(tmp_path)


def test_the_committed_pictures_are_small():
    for name in ("grpo", "ofsd"):
        assert (ROOT / f"results/default/{name}.png").stat().st_size < 80_000
