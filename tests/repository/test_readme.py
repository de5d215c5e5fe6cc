"""The README's numbers are those of the files they come from."""

import re
from statistics import mean

import pytest
from pages import DOCS, README, SIX, cells_of, flat, imports, short, text_of

from experiments import figures, tables

SEEDS = range(5)
RESULTS = text_of("results/README.md")


def last_table(seed: int) -> dict[str, dict[str, float]]:
    """{stage: {column: value}} of the table that a default run prints at its end."""
    log = text_of(f"results/default/seed{seed}.log")
    # Two lines explain the columns.
    _, _, header, *lines = log[log.index(" test questions. edge:") :].splitlines()
    columns = re.split(" {2,}", header.strip())
    stages = {}
    for line in lines:
        if not line:
            break
        stage, *cells = re.split(" +", line.strip())
        if len(cells) < len(columns) - 1:  # the base has no edges
            cells[-1:] = ["nan"] * (len(columns) - 1 - len(cells)) + cells[-1:]
        values = [float(cell) for cell in cells]
        stages[stage] = dict(zip(columns[1:], values, strict=True))
    return stages


@pytest.fixture(scope="module")
def runs() -> list[dict[str, dict[str, float]]]:
    """The last tables of all five seeds."""
    return [last_table(seed) for seed in SEEDS]


def gains(runs: list[dict], number: int) -> list[float]:
    """What this stage of OFSD adds to EM, seed by seed."""
    pairs = [(run[f"grpo-{number}"], run[f"ofsd-{number}"]) for run in runs]
    return [after["EM"] - before["EM"] for before, after in pairs]


# ---------------------------------------------------------------- the default run


@pytest.mark.parametrize("seed", SEEDS)
def test_the_table_of_the_default_runs_is_that_of_the_logs(runs, seed):
    stages = ("base", "grpo-1", "ofsd-1", "grpo-2", "ofsd-2")
    row = [short(runs[seed][stage]["EM"]) for stage in stages]
    assert cells_of(README)[str(seed)] == row


def test_what_is_said_of_the_gains_is_what_the_logs_say(runs):
    assert min(run["ofsd-2"]["EM"] - run["base"]["EM"] for run in runs) > 0.30
    first = gains(runs, 1)
    second = gains(runs, 2)
    said = f"first by {100 * min(first):.0f} to {100 * max(first):.0f} points, the"
    said += f" second by up to {100 * max(second):.0f}."
    assert said in flat(README)
    assert min(second) >= 0
    page = flat(RESULTS)
    said = f"by {short(mean(first))} on the mean, the second by {short(mean(second))}"
    assert said in page


def test_what_is_said_of_the_edges_is_what_the_logs_say(runs):
    edges = [run["ofsd-1"]["edge"] for run in runs]
    losses = [-run["ofsd-1"]["control"] for run in runs]
    said = f".{100 * min(edges):.0f} to .{100 * max(edges):.0f} better than the student"
    assert said in flat(README)
    said = f".{100 * min(losses):.0f} to .{100 * max(losses):.0f} worse"
    assert said in flat(README)


def test_all_answers_are_supported_and_searches_stay_at_two(runs):
    """README and FAQ say so."""
    for run in runs:
        for stage in ("ofsd-1", "ofsd-2"):
            assert run[stage]["edge"] == run[stage]["supported"]
        for stage, row in run.items():
            assert stage == "base" or round(row["searches"], 1) == 2
    assert "`supported` equals `edge`" in flat(DOCS["faq"])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_table_of_the_edges_is_that_of_the_logs(runs, seed):
    run = runs[seed]
    cells = [short(run["base"]["EM"])]
    for number in (1, 2):
        before = run[f"grpo-{number}"]
        after = run[f"ofsd-{number}"]
        cells.append(f"{short(after['edge'], '+')}, {short(after['control'], '+')}")
        cells.append(f"{short(before['EM'])}, {short(after['EM'])}")
    assert cells_of(RESULTS)[str(seed)] == cells


def test_the_output_shown_is_that_of_seed_0():
    log = text_of("results/default/seed0.log").splitlines()
    section = README.split("## What the command prints\n")[1]
    shown = section.split("```\n")[1].splitlines()
    assert len(shown) > 12
    for line in shown:
        assert not line.strip() or line == "  ..." or line in log, line


# ---------------------------------------------------------------- the first model


def first_model(seed: int, folder: str = "") -> tuple[list[str], list[str]]:
    """EM by samples, and greedy, of each test: as the pages write them."""
    stages = figures.first_models(figures.FIRST_MODEL / folder)[f"seed{seed}"]
    sampled = [short(em) for em, _ in stages.values()]
    greedy = [short(em) for _, em in stages.values()]
    return sampled, greedy


@pytest.mark.parametrize("seed", [0, 1])
def test_the_table_of_the_first_model_is_that_of_its_logs(seed):
    sampled, greedy = first_model(seed)
    assert cells_of(README)[f"seed {seed}, sampled"] == sampled
    assert cells_of(README)[f"seed {seed}, greedy"] == greedy


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("test", "folder"), [("", ""), ("second test, ", "second")])
def test_the_results_of_the_first_model_are_those_of_its_logs(seed, test, folder):
    sampled, _ = first_model(seed, folder)
    row = cells_of(RESULTS)[f"{test}seed {seed}: EM of samples"]
    assert row[:5] == sampled


# ---------------------------------------------------------------- the evidence


def test_the_evidence_is_that_of_the_tables():
    """The row of each arm in results/README.md, cell by cell."""
    counted = cells_of(tables.comparison("loop"))
    for title, cells in cells_of(RESULTS).items():
        arm = re.search(r"\(`([\w-]+)`\)", title)
        if arm is not None:
            assert cells == counted[arm[1]][: len(cells)]
    for arm in ("grpo", "ofsd", "rft", "search-e1"):
        assert f"(`{arm}`)" in RESULTS


def differences(part: str) -> str:
    """How the README and results/README.md write Search-E1's gains on GRPO alone."""
    cells = cells_of(tables.comparison(part))["search-e1"]
    return [cell.replace("0.", ".") for cell in (cells[2], cells[4])]


def test_what_is_said_of_the_comparison_is_what_the_tables_say():
    page = flat(README)
    for part in ("loop", "plateau"):
        for difference in differences(part):
            assert difference.removeprefix("+") in page
            assert difference in flat(RESULTS)


def test_the_edge_of_the_converged_policy_is_that_of_its_runs():
    edges = []
    for run in tables.read_part("plateau")["search-e1"].values():
        edges += [row["edge"] for row in run if row.get("kind") == "mining"]
    assert len(edges) == 10
    assert f"teacher's edge is {short(mean(edges))} on average there" in flat(RESULTS)


# ---------------------------------------------------------------- the files


def test_the_tree_of_imports_is_that_of_the_code():
    needs = imports()
    lines = []
    for name in SIX:
        needed = [other for other in SIX if other in needs[name]]
        lines.append(f"{name:10}<- {', '.join(needed)}" if needed else name)
    assert "```\n" + "\n".join(lines) + "\n```" in README


def test_every_module_of_machinery_is_named():
    tree = README.split("\nmachinery/ ")[1].split("```")[0]
    for name in imports():
        folder, _, module = name.partition(".")
        if folder == "machinery" and module != "__init__":
            assert re.search(rf"\b{module}\b", tree), module


def test_the_readme_is_not_long():
    assert len(README.encode()) <= 14_336
