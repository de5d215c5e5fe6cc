"""docs/: commands and files exist, links lead somewhere, numbers are those of files."""

import json
import re
import runpy
from collections import Counter
from statistics import mean, pstdev

import make
import mutate
import pytest
import tables
from conftest import ROOT
from real import run
from test_readme import (
    README, check_script_and_flags, check_settings, commands, last_table, scripts,
)  # fmt: skip

from eval import interval
from train import COLUMNS

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))}
ALL = "\n".join(PAGES.values())
LINKING = ["README.md", "EXERCISES.md", "CONTRIBUTING.md", "results/README.md"]
LINKING += ["results/evidence.md", *(f"docs/{name}.md" for name in PAGES)]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in text_of(name).splitlines()]


def cells_of(page: str) -> dict[str, list[str]]:
    """A page's rows of tables, by their first cell."""
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


# ---------------------------------------------------------------- commands, files, links


@pytest.mark.parametrize("words", commands(ALL), ids=" ".join)
def test_a_commands_script_and_flags_exist(words):
    check_script_and_flags(words)


def test_settings_in_commands_are_accepted(monkeypatch):
    check_settings(ALL, monkeypatch)
    others = {"micro/make.py", "tests/mutate.py", "results/evidence.py", "results/real/run.py"}
    assert {"train.py", "eval.py", "tools/start.py", "bench/card.py"} | others <= scripts(ALL)


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_a_page_mentions_exists(name):
    folders = "micro|tests|results|bench|configs|tools|docs"
    pattern = rf"(?<![\w./-])((?:{folders})/[\w./*-]*|\w+\.py|[A-Z]+\.md)(?![\w/])"
    found = [path.rstrip(".") for path in re.findall(pattern, PAGES[name])]
    assert all(any(ROOT.glob(path.rstrip("/"))) for path in found), found


@pytest.mark.parametrize("name", LINKING)
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(name)):
        assert (ROOT / name).parent.joinpath(target).exists(), target


def test_the_readme_leads_to_every_page():
    assert all(f"](docs/{name}.md)" in README for name in PAGES)


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{name}.md" for name in PAGES)])
def test_a_page_has_no_long_line_but_in_tables_and_blocks(name):
    text = re.sub(r"^```.*?^```$", "", text_of(name), flags=re.S | re.M)
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 100


def test_the_readme_is_short_and_its_first_test_command_is_the_one_that_ci_runs():
    assert len(README.encode()) <= 12_288
    first = next(line for line in README.splitlines() if "pytest" in line)
    assert first.startswith("python3 -m venv .venv && ") and first.endswith(" -m pytest -q")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_with_what_it_answers(name):
    title, empty, opening, *_ = PAGES[name].splitlines()
    assert title.startswith("# ") and not empty and opening.startswith("This page ")


# ---------------------------------------------------------------- the default run


def step_lines() -> list[dict[str, float]]:
    """All of GRPO's steps in the logs of the default run."""
    lines = "".join(text_of(f"results/default/seed{seed}.log") for seed in range(5))
    rows = re.findall(r"^ +\d+((?: +[-+.\de]+){%d}) +[\d.]+$" % len(COLUMNS), lines, re.M)
    return [dict(zip(COLUMNS, map(float, row.split()))) for row in rows]


def test_every_column_of_a_step_is_explained():
    assert {f"`{name}`" for name in COLUMNS} <= set(cells_of(PAGES["faq"]))


def test_what_is_called_healthy_is_so_in_the_default_run():
    """Where the cell of "healthy" has limits, all steps of all seeds are within them."""
    rows, steps, limited = cells_of(PAGES["faq"]), step_lines(), 0
    assert len(steps) >= 60
    for name in COLUMNS:
        values, healthy = [step[name] for step in steps], rows[f"`{name}`"][1]
        if found := re.match(r"between ([\d.]+) and ([\d.]+)", healthy):
            assert float(found[1]) <= min(values) and max(values) <= float(found[2]), name
        elif found := re.match(r"below ([\d.]+(?:e-\d+)?)", healthy):
            assert max(values) < float(found[1]), name
        limited += bool(found)
    assert limited >= 7


def test_distillation_ends_repeated_searches():
    """As the README and the FAQ say it: the last step of GRPO before OFSD, and those after it."""
    steps = step_lines()
    runs = [[step["repeats"] for step in steps[i : i + 24]] for i in range(0, len(steps), 24)]
    assert len(runs) == 5 and all(1 / 8 < run[11] < 1 / 2 for run in runs)
    assert max(max(run[12:]) for run in runs) < 0.12 and "it is below .12" in PAGES["faq"]


def test_the_figure_is_drawn_from_the_logs():
    """It holds the numbers that it was drawn from. If not: python results/default/figure.py"""
    drawn = runpy.run_path(str(ROOT / "results/default/figure.py"))["values"]()
    for seed in range(5):
        log = last_table(seed)
        assert [*drawn[f"seed{seed}"]] == [*log]
        for stage, (em, searches) in drawn[f"seed{seed}"].items():
            assert (em, searches) == (float(log[stage][0]), float(log[stage][5]))
    assert json.dumps(drawn).encode() in (ROOT / "results/default/figure.png").read_bytes()


def test_the_mechanism_is_drawn_and_told_as_it_was_measured():
    """If not: python results/mechanism.py"""
    told = json.loads(text_of("results/mechanism.json"))
    assert json.dumps(told).encode() in (ROOT / "results/mechanism.png").read_bytes()
    page, word = re.sub(r"\s+", " ", text_of("results/README.md")), told["kl"]["word searched with"]
    share, part = (f"{100 * word[name]:.0f} %" for name in ("share", "of_tokens"))
    mean_kl = f"{word['mean']:.2f}".removeprefix("0")
    told_so = f"{part} of the policy's tokens and carry {share} of the divergence, {mean_kl} nats"
    assert told_so in page
    assert max(kl["mean"] for kl in told["kl"].values() if kl is not word) < 0.09
    assert len(told["em"]) == 20 and all(before < after for before, after in told["em"].values())


# ---------------------------------------------------------------- numbers of one page


def test_the_search_engines_are_those_of_the_benchmark():
    text, shown = text_of("results/bench/bm25.txt"), cells_of(PAGES["retrieval"])
    names = {"this": "ours", "bm25s, numba": "bm25s numba", "bm25s, numpy": "bm25s numpy"}
    for title, name in (names | {"rank_bm25": "rank_bm25"}).items():
        *_, built = re.findall(rf"^{name} +105960 +([\d.]+) +(\d+)(?: .* ([\d.]+))? *$", text, re.M)
        seconds, peak, posting = built
        speeds = re.search(rf"^{name} +(\d+) +\d+-\d+ +(\d+) +\d+-\d+ +\d", text, re.M)
        cells = [f"{float(seconds):.1f}", f"{int(peak):,} MB", posting]
        assert shown[title] == cells + [f"{int(speed):,}" for speed in speeds.groups()]


def test_the_speeds_are_those_of_the_benchmarks():
    page, text = PAGES["performance"], text_of("results/bench/rollout.txt")
    text += text_of("results/bench/rollout-smollm2.txt")
    shown = re.findall(r"([\d.]+) times as fast", page)
    assert len(shown) == 5 and all(f"{number}x" in text for number in shown)
    parts = re.search(r"time of \(a\): (.*)", text)[1]
    for number in re.findall(r"([\d.]+) % for", page):
        assert f"{float(number)}%" in parts
    losses = re.findall(r"^(\w+ [\w ]+?) +1000 +\d+ +([\d.]+) +[\d.]+ +([\d.]+)",
                        text_of("results/bench/losses.txt"), re.M)  # fmt: skip
    kinds = {"GRPO": r"GRPO's log-prob.*", "OFSD": r"OFSD's divergence.*"}
    for kind, pattern in kinds.items():
        line = re.search(pattern, page)[0]
        ways = [row[1:] for row in losses if row[0].startswith(kind) and "plain" not in row[0]]
        assert len(ways) >= 2
        for number in sum(ways, ()):
            assert re.search(rf"(?<![\d.]){number.removeprefix('0')}\b", line), (kind, number)


def test_the_mutants_are_counted():
    assert f"in {len(mutate.MUTANTS)} small ways" in re.sub(r"\s+", " ", PAGES["reliability"])


def test_the_micro_world_is_as_it_is_told():
    page = re.sub(r"\s+", " ", PAGES["micro-world"])
    sets = "corpus", "train", "validation", "test"
    lines = {name: text_of(f"micro/{name}.jsonl").splitlines() for name in sets}
    corpus, train, validation, test = map(len, lines.values())
    titles = {json.loads(line)["title"] for line in lines["corpus"]}
    assert f"{len(titles)} invented" in page and f"{corpus:,} in all" in page
    assert f"{train:,} to train on, {validation} for validation, and {test} to test" in page
    (sentence,) = re.findall(r'"(\w+ \w+ is [^"]*)"', page)
    assert sentence in text_of("micro/corpus.jsonl") and sentence in make.__doc__.replace("\n", " ")
    count = sum(phase.count for phase in make.PHASES)
    privileged = sum(phase.count * phase.privileged for phase in make.PHASES)
    assert f"on {count:,} demonstrations" in page and 0.62 < privileged / count < 2 / 3
    parameters = (ROOT / "micro/model/model.safetensors").stat().st_size / 4e6  # float32
    assert f"{parameters:.1f} million parameters" in page


def test_the_micro_model_can_do_what_the_page_says():
    check = json.loads(text_of("results/default/check.json"))
    ems = {
        "greedily": check["greedy"],
        "sampled": check["sampled"],
        "sampled, on the questions that have a pair": check["standard"]["em"],
        "the same, with its own reference in the privileged prompt": check["own_reference"]["em"],
        "with another question's": check["anothers_reference"]["em"],
        "with another's that shares no relation": check["anothers_sharing_no_relation"]["em"],
        "with a retriever that finds nothing": check["nothing_found"],
    }
    shown = [(name, cells) for name, cells in cells_of(PAGES["micro-world"]).items()]
    written = [(name, [f"{em:.3f}".removeprefix("0")]) for name, em in ems.items()]
    assert shown[2:] == written  # after the head of the table
    edge = f"{check['own_reference']['em'] - check['standard']['em']:.3f}".removeprefix("0")
    page = re.sub(r"\s+", " ", PAGES["micro-world"])
    assert f"edge is thus {edge}" in page and f"of which {check['pairs']} gave a pair" in page
    assert check["nothing_found"] < 0.05


def test_what_was_seen_of_a_real_model_is_what_the_logs_say():
    page = re.sub(r"\s+", " ", PAGES["real-models"])
    names = "search-e1", "grpo"
    both = {name: rows_of(f"results/real/gpu/{name}-0/metrics.jsonl") for name in names}
    base, after = [row["em"] for row in both["search-e1"] if row["kind"] == "eval"]
    assert f"an EM of {base:.3f}".replace("0.", ".") in page
    assert f"EM was {after:.3f}".replace("0.", ".") in page
    steps = {name: [row for row in rows if row["kind"] == "step"] for name, rows in both.items()}
    assert f"After {len(steps['search-e1'])} steps" in page
    assert f"to {len(steps['grpo'])} steps" in page
    for part, words in ((steps["grpo"][:5], "in the first"), (steps["grpo"][-5:], "in the last")):
        value = f"{mean(row['reward'] for row in part):.2f}".removeprefix("0")
        assert f"{value} {words} five" in page
    seconds = [mean(row["step_s"] for row in part) for part in steps.values()]
    sampling = mean(mean(row["rollout_s"] for row in part) for part in steps.values())
    assert sorted(map(round, seconds)) == [14, 15] and round(sampling) == 13
    kl = [row["kl"] for row in steps["grpo"]]
    assert kl[2] < 0.01 and kl[3] > 0.2 and min(kl[4:]) > 0.2
    cost = rows_of("results/real/gpu/grpo-0/cost.jsonl")
    assert {row["trajectories"] for row in cost if row["for"] == "rollout"} == {512}


def short(value, sign=""):
    return f"{value:{sign}.3f}".replace("0.", ".", 1)


def with_interval(row):
    return "{} ({}-{})".format(*map(short, (row["em"], *interval(row["em"], row["n"]))))


def cells_of_test(row):
    """The cells of a test of a real model, as the page has them."""
    low, high = map(short, row["interval"])
    cells = [short(row["em"]), f"{low}-{high}", short(row["f1"]), f"{row['searches']:.2f}"]
    edges = [row[name] for name in ("edge", "edge_supported", "edge_control") if name in row]
    cells += [short(row["answered"]), ", ".join(short(edge, "+") for edge in edges)]
    return f"| {' | '.join(cells)} | {row['tokens']:.0f} K |"


@pytest.mark.parametrize("name", ["cpu", "cpu-longer"])
def test_the_table_of_a_real_model_has_every_test_of_its_logs(name):
    page, folder = PAGES["real-models"], ROOT / "results/real" / name
    both, alone = (run.tests_of(folder / f"{arm}-0") for arm in ("search-e1", "grpo"))
    for row in both + alone[1:]:
        assert cells_of_test(row) in page


def test_a_stage_that_did_harm_is_told_as_it_went():
    page, folder = re.sub(r"\s+", " ", PAGES["real-models"]), "results/real/asks-again/search-e1-0"
    ems = [short(row["em"]) for row in run.tests_of(ROOT / folder)]
    assert "EM went {} to {} by GRPO and to {} by the first OFSD".format(*ems) in page
    mined = next(row for row in rows_of(f"{folder}/metrics.jsonl") if row["kind"] == "mining")
    assert f"been {short(mined['edge_supported'], '+')}, over {mined['pairs']} pairs" in page
    rows, second = rows_of(f"{folder}/answers.jsonl"), {}
    for row in rows:
        counts = second.setdefault(row["stage"], Counter())
        counts[" ".join(row["turns"][1]) if row["turns"][1:] else ""] += 1
        counts["repeats"] += row["queries"] > row["different"]
        counts["answered"] += row["answered"]
    before, after = second["grpo-1"], second["ofsd-1"]
    told = "{answer} of the 200 tests answered at once when they had read, {think answer} thought"
    assert told.format_map(before) in page
    assert f"and {before['think search']} thought and then searched again" in page
    assert after["answer"] == 0 and after["repeats"] == 90
    told = "{think answer} thought and answered, and {think search} thought and searched again"
    assert told.format_map(after) in page
    shares = [short(counts["answered"] / 200) for counts in (before, after)]
    assert "an answer fell from {} to {}".format(*shares) in page


def gains_of(name):
    """A run's gain from its first test to its last, as the page tells it; and for each stage the EM
    of the questions whose answer was read."""
    stages = {}
    for row in rows_of(f"results/real/{name}/answers.jsonl"):
        stages.setdefault(row["stage"], {})[row["id"]] = row
    first, *_, last = stages.values()
    changes = [last[key]["em"] - row["em"] for key, row in first.items()]
    reach = 1.96 * pstdev(changes) / len(changes) ** 0.5
    ends = [short(mean(changes) + sign * reach) for sign in (-1, 1)]
    told = (
        f"{changes.count(1)} of the 200 questions became right and {changes.count(-1)} wrong: "
        f"{short(mean(changes), '+')}, with a paired 95 % interval of {ends[0]} to {ends[1]}"
    )
    return told, [[row["em"] for row in rows.values() if row["found"]] for rows in stages.values()]


def test_the_longer_run_of_a_real_model_is_told_as_it_went():
    page = re.sub(r"\s+", " ", PAGES["real-models"])
    told, found = gains_of("cpu-longer/search-e1-0")
    assert f"the last line of Search-E1, {told}" in page
    assert f"{short(mean(found[-1]))} are right at the end" in page
    rows = rows_of("results/real/cpu-longer/search-e1-0/answers.jsonl")
    before = [row["turns"][1:] == [["think", "answer"]] for row in rows if row["stage"] == "grpo-1"]
    assert f"run {sum(before)} of the 200 tests thought and then answered before" in page
    folder = ROOT / "results/real/cpu-longer"
    both = [run.tests_of(folder / f"{arm}-0") for arm in ("search-e1", "grpo")]
    (_, grpo, ofsd, last), (*_, alone) = both
    assert f"took {last['time_s'] / 60:.0f} minutes" in page
    assert round(ofsd["em"] - grpo["em"], 3) == 0.025 and round(alone["em"] - grpo["em"], 3) == 0.03
    share = (ofsd["tokens"] - grpo["tokens"]) / (alone["tokens"] - grpo["tokens"])
    assert 0.45 < share < 0.55 and "for half the tokens" in page
    assert 0.75 < alone["tokens"] / last["tokens"] < 0.85 and "at four fifths" in page
    files = "cpu/tested-test", "cpu-longer/tested-test", "cpu-longer/tested-hops"
    start, ends, hops = (
        {row["model"]: row for row in rows_of(f"results/real/{name}.jsonl")} for name in files
    )
    start, end = start["start"], ends["search-e1-0"]
    assert f"Search-E1 ends at {with_interval(end)} and GRPO alone at" in page
    assert f"alone at {with_interval(ends['grpo-0'])}; the start has {with_interval(start)}" in page
    assert f"gained {100 * (end['em'] - start['em']):.1f} points" in page
    assert interval(start["em"], 400)[1] < interval(end["em"], 400)[0]
    # The 200 questions that were asked only at the end: all 400 without those of the table.
    unseen = [short(2 * whole["em"] - first["em"])
              for whole, first in ((start, both[0][0]), (end, last))]  # fmt: skip
    assert "EM is {} for the start and {} for Search-E1".format(*unseen) in page
    hops = [hops[name] for name in ("start", "search-e1-0")]
    told = "have {} for the start and {} for Search-E1"
    assert told.format(*(short(row["em"]) for row in hops)) in page
    told = "supports are {} and {}".format(*(short(row["em_supported"]) for row in hops))
    assert told in page


def test_the_run_of_a_real_model_on_a_cpu_is_told_as_it_went():
    page = re.sub(r"\s+", " ", PAGES["real-models"])
    told, found = gains_of("cpu/search-e1-0")
    assert f"start to the end {told}" in page
    assert f"read for {min(map(len, found))} to {max(map(len, found))} of the 200" in page
    read = [short(mean(part)) for part in found]
    assert "start answers {} right, and the policies after the four stages".format(read[0]) in page
    assert "{}, {}, {} and {}".format(*read[1:]) in page
    metrics = rows_of("results/real/cpu/search-e1-0/metrics.jsonl")
    mined = [row for row in metrics if row["kind"] == "mining"]
    edges = [(short(row["edge_supported"], "+"), row["pairs"]) for row in mined]
    assert "{} over {} pairs before the first".format(*edges[0]) in page
    assert "{} over {} before the second".format(*edges[1]) in page
    whole = {row["model"]: row for row in rows_of("results/real/cpu/tested-test.jsonl")}
    ends = {name: with_interval(row) for name, row in whole.items()}
    assert f"all 400 test questions the start has {ends['start']} and the last policy" in page
    assert ends["search-e1-0"] in page and f"GRPO alone ends at {ends['grpo-0']}" in page
    base, *steps = rows_of("results/real/start-24/metrics.jsonl")
    assert f"had {short(base['em'])} of {base['n']} test questions" in page
    assert [row["reward"] for row in steps] == [0, 0]


def test_the_run_without_references_is_told_as_it_went():
    page, folder = re.sub(r"\s+", " ", PAGES["real-models"]), "results/real/no-references"
    ems = [short(row["em"]) for row in run.tests_of(ROOT / folder / "search-e1-0")]
    assert "EM went {} to {} by GRPO, {} by OFSD, {} and {}".format(*ems) in page
    mined = [row for row in rows_of(f"{folder}/search-e1-0/metrics.jsonl") if "pairs" in row]
    for name in "edge", "edge_supported":
        assert " and ".join(short(row[name], "+") for row in mined) in page
    last = {name: rows_of(f"{folder}/{name}/metrics.jsonl")[-1]["em"]
            for name in ("grpo-0", "start-96", "as-it-comes")}  # fmt: skip
    assert f"GRPO alone ended at {short(last['grpo-0'])}" in page
    assert f"96 such demonstrations alone give {short(last['start-96'])}" in page
    assert f"as it comes the model has {short(last['as-it-comes'])}" in page
    rows = rows_of(f"{folder}/search-e1-0/answers.jsonl")
    repeats = [row["queries"] > row["different"] for row in rows if row["stage"] == "ofsd-1"]
    unread = [row["answered"] and not row["queries"] for row in rows if row["stage"] == "ofsd-2"]
    assert f"stage {short(mean(repeats))} of the test" in page
    assert f"second {short(mean(unread))} answer without" in page
    ems = [row["em"] for row in rows_of(f"{folder}/pilot-slow-ofsd/metrics.jsonl")
           if row["kind"] == "eval"]  # fmt: skip
    assert ems == [0.28, 0.28, 0.29] and "from .280 to .290" in page


def test_what_was_seen_of_smollm2_on_a_cpu_is_what_the_files_say():
    page = re.sub(r"\s+", " ", PAGES["real-models"])
    before, started = (
        json.loads(text_of(f"results/smollm2/{name}.json"))["results"]["my/test.jsonl"]
        for name in ("base", "started")
    )
    assert before["answered"] == before["searches"] == 0 and started["searches"] == 1
    assert (started["em"] * 50, before["n"]) == (2, 50)
    low, high = (f"{end:.3f}".removeprefix("0") for end in started["em_interval"])
    assert f"of {low} to {high}" in page
    log = text_of("results/smollm2/train.log")
    steps = re.findall(r"^ +\d+ +([\d.]+) +[\d.]+ +.* ([\d.]+)$", log, re.M)
    rewards = [f"{float(reward):.2f}".removeprefix("0") for reward, _ in steps if float(reward) > 0]
    assert f"rewards of {', '.join(rewards[:3])} and {rewards[3]}" in page
    assert round(mean(float(seconds) for _, seconds in steps[:4])) == 42
    assert "teacher's edge +0.667 EM, supported +0.000" in log and "edge of +.667" in page


def test_what_is_said_of_the_trials_is_what_the_evidence_says():
    """Trials on one seed; and what their best gave on the seeds of the comparison."""
    sections = {part.split("\n")[0]: part for part in text_of("results/evidence.md").split("\n## ")}
    of_base = [text for title, text in sections.items() if "rials from the base" in title]
    trials = cells_of("".join(of_base))
    loop = cells_of(sections["From the base"])
    short = lambda cell: cell.split()[0].removeprefix("0")  # noqa: E731
    pages = {name: re.sub(r"\s+", " ", PAGES[name]) for name in ("faq", "teaching")}
    for trial, rate in (("0.0003", "3e-4"), ("0.0006", "6e-4"), ("0.0013", "1.3e-3")):
        assert f"{short(trials[f'grpo-lr{trial}'][1])} with {rate}" in pages["faq"]
    assert f"mean of {short(loop['grpo'][3])} with 6e-4" in pages["faq"]
    assert f"ended at {short(trials['search-e1-first-40'][1])} on the seed" in pages["teaching"]
    assert f"mean of {short(loop['search-e1'][3])} on twenty" in pages["teaching"]
    page = re.sub(r"\s+", " ", text_of("EXERCISES.md"))
    rates = ("3e-4", "6e-4", "7e-4", "9e-4", "1.3e-3")
    rows = [trials[f"grpo-lr{float(rate):g}"] for rate in rates]
    areas = [f"{short(row[0])} ({rate})" for row, rate in zip(rows, rates)]
    finals = [short(row[1]) for row in rows]
    for cells in (areas, finals):
        assert f"{', '.join(cells[:-1])} and {cells[-1]}" in page
    ends = sorted(f"{tables.final(rows):.3f}" for rows in tables.read("loop")["grpo"].values())
    assert f"between {short(ends[0])} and {short(ends[-1])}" in page
