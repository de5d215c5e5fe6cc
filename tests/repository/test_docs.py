"""The pages: commands and files exist, links lead somewhere, numbers have a source."""

import json
import re
from dataclasses import fields

import mutate
import pytest
from conftest import ROOT
from pages import (
    DOCS,
    FOLDERS,
    PAGES,
    README,
    cells_of,
    commands,
    flags_of,
    flat,
    modules,
    script_of,
    scripts,
    short,
    text_of,
)
from test_readme import last_table

from experiments import figures, tables
from machinery.settings import parse_flags, read_settings
from micro import make
from train import COLUMNS, Config

ALL = "\n".join(PAGES.values())
LINKING = [*PAGES, "results/evidence.md"]

# ---------------------------------------------------------------- commands and files


def test_there_are_commands():
    told = {"train", "eval", "retriever", "micro.make"}
    told |= {"tools.trace", "tools.plot", "tools.start", "bench.card"}
    told |= {"experiments.evidence", "experiments.tables", "experiments.real"}
    told |= {f"lessons.{name}" for name in ("retriever", "rollout", "evaluation")}
    told |= {"lessons.grpo", "lessons.ofsd"}
    assert told <= scripts(ALL)


@pytest.mark.parametrize("words", commands(ALL), ids=" ".join)
def test_a_commands_script_and_flags_exist(words):
    script = script_of(words)
    if script == "mine":  # a file of the reader's own, in the exercises
        return
    if script in modules():
        known = flags_of(script)
        if script == "train":
            known |= {"--" + item.name.replace("_", "-") for item in fields(Config)}
            known |= {"--resume", "--config", "--no-ofsd", "--help"}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        given -= {"--standalone", "--nproc-per-node"} if "torchrun" in words else set()
        assert given <= known, given - known
    else:  # a test, or the mutants: a path and no module
        assert (ROOT / f"{script}.py").is_file()
    folders = tuple(f"{name}/" for name in (*FOLDERS, "tests", "results", "configs"))
    for word in words:
        if word.startswith(folders):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize("words", commands(ALL), ids=" ".join)
def test_settings_in_commands_are_accepted(words, monkeypatch):
    """A call of train.py gives a Config. (N stands for a number of the reader's.)"""
    without_settings = {"--resume", "--help", "N"}
    if script_of(words) == "train" and not without_settings & set(words):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr("sys.argv", words[words.index("train.py") :])
        parse_flags(Config)


def test_every_settings_file_is_accepted():
    for path in ROOT.glob("configs/*.json"):
        assert read_settings(path, Config).model


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_a_page_mentions_exists(name):
    folders = "|".join((*FOLDERS, "tests", "results", "configs", "docs"))
    pattern = rf"(?<![\w./-])((?:{folders})/[\w./*-]*|\w+\.py|[A-Z]+\.md)(?![\w/*-])"
    for path in re.findall(pattern, PAGES[name]):
        if path != "mine.py":  # a file of the reader's own, in the exercises
            assert any(ROOT.glob(path.rstrip("./"))), path


@pytest.mark.parametrize("name", PAGES)
def test_scripts_in_folders_are_run_as_modules(name):
    folders = "|".join(FOLDERS)
    assert not re.search(rf"python3? ({folders}|results)/", PAGES[name])


@pytest.mark.parametrize("name", LINKING)
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(name)):
        assert (ROOT / name).parent.joinpath(target).exists(), target


def test_the_readme_leads_to_every_page():
    for name in PAGES:
        assert name == "README.md" or f"]({name})" in README, name


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{name}.md" for name in DOCS)])
def test_a_page_has_no_long_line_but_in_tables_and_blocks(name):
    text = re.sub(r"^```.*?^```$", "", text_of(name), flags=re.S | re.M)
    for line in text.splitlines():
        assert line.startswith("|") or len(line) <= 100, line


def test_the_first_test_command_makes_its_environment():
    first = next(line for line in README.splitlines() if "pytest" in line)
    assert first.startswith("python3 -m venv .venv && ")
    assert first.endswith(" -m pytest -q")


@pytest.mark.parametrize("name", ["system", "repository"])
def test_ci_finds_the_other_test_commands(name):
    commands_in_readme = README.splitlines()
    wanted = f"pytest -q tests/{name}"
    assert sum(line.endswith(wanted) for line in commands_in_readme) == 1
    assert f"'{wanted}$'" in text_of(".ci/run")


@pytest.mark.parametrize("name", DOCS)
def test_a_page_opens_with_what_it_answers(name):
    title, empty, opening, *_ = DOCS[name].splitlines()
    assert title.startswith("# ")
    assert not empty
    assert opening.startswith("This page ")


def test_the_page_of_real_models_is_short():
    assert len(DOCS["real-models"].encode()) <= 9 * 1024


# ---------------------------------------------------------------- the default run


def step_lines() -> list[list[dict[str, float]]]:
    """All steps of GRPO in the logs of the default run, seed by seed."""
    runs = []
    for seed in range(5):
        steps = []
        names = []
        for line in text_of(f"results/default/seed{seed}.log").splitlines():
            words = line.split()
            if words[:1] == ["step"]:
                names = words
            elif "reward" in names and len(words) == len(names) and words[0].isdigit():
                values = [float(word) for word in words]
                steps.append(dict(zip(names, values, strict=True)))
            else:
                names = names if line else []
        runs.append(steps)
    return runs


def test_every_column_of_a_step_is_explained():
    explained = cells_of(DOCS["faq"])
    for name in (*COLUMNS, "kl"):
        assert f"`{name}`" in explained


def test_what_is_called_healthy_is_so_in_the_default_run():
    """Where the cell of "healthy" has limits, all steps are within them."""
    rows = cells_of(DOCS["faq"])
    steps = [step for steps in step_lines() for step in steps]
    assert len(steps) >= 60
    limited = 0
    for name in COLUMNS:
        values = [step[name] for step in steps]
        healthy = rows[f"`{name}`"][1]
        between = re.match(r"between ([\d.]+) and ([\d.]+)", healthy)
        below = re.match(r"below ([\d.]+(?:e-\d+)?)", healthy)
        if between:
            assert float(between[1]) <= min(values), name
            assert max(values) <= float(between[2]), name
            limited += 1
        elif below:
            assert max(values) < float(below[1]), name
            limited += 1
    assert limited >= 6


def test_distillation_ends_repeated_searches():
    """The README and the FAQ: GRPO's last step before OFSD, and all steps after it."""
    for steps in step_lines():
        repeats = [step["repeats"] for step in steps]
        assert len(repeats) == 24
        assert 1 / 8 < repeats[11] < 1 / 2
        assert max(repeats[12:]) < 0.12
    assert "it is below .12" in DOCS["faq"]


def test_the_figures_are_drawn_from_the_logs():
    """It holds its numbers. If they are others: python -m experiments.figures"""
    drawn = figures.final_tables()
    for seed in range(5):
        table = last_table(seed)
        for stage, (em, searches) in drawn[f"seed{seed}"].items():
            assert em == table[stage]["EM"]
            assert searches == table[stage]["searches"]
        assert list(drawn[f"seed{seed}"]) == list(table)
    picture = (ROOT / "results/default/figure.png").read_bytes()
    assert json.dumps(drawn).encode() in picture
    picture = (ROOT / "results/first-model/figure.png").read_bytes()
    assert json.dumps(figures.first_models()).encode() in picture


def test_the_mechanism_is_drawn_and_told_as_it_was_measured():
    """If it is not: python -m experiments.mechanism"""
    measured = json.loads(text_of("results/mechanism.json"))
    picture = (ROOT / "results/mechanism.png").read_bytes()
    assert json.dumps(measured).encode() in picture
    kinds = measured["kl"]
    query_word = kinds.pop("word searched with")
    said = f"{100 * query_word['of_tokens']:.0f} % of the policy's tokens and carry "
    said += f"{100 * query_word['share']:.0f} % of the divergence, "
    said += f"{query_word['mean']:.2f} nats".removeprefix("0")
    assert said in flat(text_of("results/README.md"))
    assert max(kind["mean"] for kind in kinds.values()) < 0.09
    assert len(measured["em"]) == 20
    for before, after in measured["em"].values():
        assert before < after


# ---------------------------------------------------------------- numbers of one page


def test_the_search_engines_are_those_of_the_benchmark():
    log = text_of("results/bench/bm25.txt")
    shown = cells_of(DOCS["retrieval"])
    names = {
        "this": "ours",
        "bm25s, numba": "bm25s numba",
        "bm25s, numpy": "bm25s numpy",
        "rank_bm25": "rank_bm25",
    }
    for title, name in names.items():
        building = rf"^{name} +105960 +([\d.]+) +(\d+)(?: .* ([\d.]+))? *$"
        seconds, peak, posting = re.search(building, log, re.M).groups(default="")
        querying = rf"^{name} +(\d+) +\d+-\d+ +(\d+) +\d+-\d+ +\d"
        alone, in_batches = re.search(querying, log, re.M).groups()
        assert shown[title] == [
            f"{float(seconds):.1f}",
            f"{int(peak):,} MB",
            posting,
            f"{int(alone):,}",
            f"{int(in_batches):,}",
        ]


def test_the_speed_of_sampling_is_that_of_the_benchmarks():
    page = DOCS["reliability"]
    log = text_of("results/bench/rollout.txt")
    log += text_of("results/bench/rollout-smollm2.txt")
    factors = re.findall(r"([\d.]+) times as fast", page)
    assert len(factors) == 5
    for factor in factors:
        assert f"{factor}x" in log
    parts = re.search(r"time of \(a\): (.*)", log)[1]
    shares = re.findall(r"([\d.]+) % for", page)
    assert len(shares) == 4
    for share in shares:
        assert f"{float(share)}%" in parts


@pytest.mark.parametrize(
    ("kind", "title"),
    [("GRPO", r"GRPO's log-prob.*"), ("OFSD", r"OFSD's divergence.*")],
)
def test_the_speed_of_the_losses_is_that_of_the_benchmarks(kind, title):
    line = re.search(title, DOCS["reliability"])[0]
    row = rf"^{kind} ([\w ]+?) +1000 +\d+ +([\d.]+) +[\d.]+ +([\d.]+)"
    ways = re.findall(row, text_of("results/bench/losses.txt"), re.M)
    assert len(ways) >= 3
    for way, memory, seconds in ways:
        if way != "plain":
            for number in (memory, seconds):
                assert re.search(rf"(?<![\d.]){number.removeprefix('0')}\b", line), way


def test_the_mutants_are_counted():
    assert f"in {len(mutate.MUTANTS)} small ways" in flat(DOCS["reliability"])
    for mutant in mutate.MUTANTS:
        assert mutant.file in mutate.FILES
        assert mutant.text in text_of(mutant.file), mutant.mistake


def test_the_micro_world_is_as_it_is_told():
    page = flat(DOCS["micro-world"])
    lines = {}
    for name in ("corpus", "train", "validation", "test"):
        lines[name] = text_of(f"micro/{name}.jsonl").splitlines()
    titles = {json.loads(line)["title"] for line in lines["corpus"]}
    assert f"{len(titles)} invented" in page
    assert f"{len(lines['corpus']):,} in all" in page
    said = f"{len(lines['train']):,} to train on, {len(lines['validation'])} for "
    said += f"validation, and {len(lines['test'])} to test"
    assert said in page
    (sentence,) = re.findall(r'"(\w+ \w+ is [^"]*)"', page)
    assert sentence in text_of("micro/corpus.jsonl")
    assert sentence in flat(make.__doc__)


def test_the_micro_model_was_made_as_it_is_told():
    page = flat(DOCS["micro-world"])
    count = sum(phase.count for phase in make.PHASES)
    privileged = sum(phase.count * phase.privileged for phase in make.PHASES)
    assert f"on {count:,} demonstrations" in page
    assert 0.62 < privileged / count < 2 / 3
    size = (ROOT / "micro/model/model.safetensors").stat().st_size
    assert f"{size / 4e6:.1f} million parameters" in page  # four bytes each


def test_the_micro_model_can_do_what_the_page_says():
    check = json.loads(text_of("results/default/check.json"))
    own = check["own_reference"]["em"]
    standard = check["standard"]["em"]
    others = check["anothers_reference"]["em"]
    ems = {
        "greedily": check["greedy"],
        "sampled": check["sampled"],
        "sampled, on the questions that have a pair": standard,
        "the same, with its own reference in the privileged prompt": own,
        "with another question's": others,
        "with another's that shares no relation": check["anothers_sharing_no_relation"][
            "em"
        ],
        "with a retriever that finds nothing": check["nothing_found"],
    }
    shown = cells_of(DOCS["micro-world"])
    for title, em in ems.items():
        assert shown[title] == [short(em)]
    page = flat(DOCS["micro-world"])
    assert f"edge is thus {short(own - standard)}" in page
    assert f"another question's reference it is {short(others - standard)}" in page
    assert f"of which {check['pairs']} gave a pair" in page
    assert check["nothing_found"] < 0.05


# ---------------------------------------------------------------- the evidence


def sections_of_evidence() -> dict[str, str]:
    """The sections of results/evidence.md, by title."""
    sections = {}
    for section in text_of("results/evidence.md").split("\n## "):
        title, _, text = section.partition("\n")
        sections[title] = text
    return sections


def first_numbers(row: list[str]) -> list[str]:
    """.574 of a cell such as "0.574 ± 0.009"."""
    return [cell.split(" ")[0].removeprefix("0") for cell in row]


@pytest.fixture(scope="module")
def trials() -> dict[str, list[str]]:
    """The trials from the base: area, final EM, ..."""
    text = ""
    for title, section in sections_of_evidence().items():
        if "rials from the base" in title:
            text += section
    return {name: first_numbers(row) for name, row in cells_of(text).items()}


@pytest.fixture(scope="module")
def loop() -> dict[str, list[str]]:
    """The arms on their twenty seeds: seeds, area, its difference, final EM, ..."""
    rows = cells_of(sections_of_evidence()["From the base"])
    return {name: first_numbers(row) for name, row in rows.items()}


def test_what_is_said_of_learning_rates_is_what_the_evidence_says(trials, loop):
    page = flat(DOCS["faq"])
    for trial, rate in (("0.0003", "3e-4"), ("0.0006", "6e-4"), ("0.0013", "1.3e-3")):
        assert f"{trials[f'grpo-lr{trial}'][1]} with {rate}" in page
    assert f"mean of {loop['grpo'][3]} with 6e-4" in page


def test_what_is_said_of_chosen_settings_is_what_the_evidence_says(trials, loop):
    page = flat(DOCS["teaching"])
    assert f"ended at {trials['search-e1-first-40'][1]} on the seed" in page
    assert f"mean of {loop['search-e1'][3]} on twenty" in page


def test_the_verdicts_on_an_agents_references_are_those_of_the_evidence():
    section = sections_of_evidence()["References by an agent: verdicts"]
    page = flat(text_of("results/README.md"))
    questions = [cells for cells in cells_of(section).values() if "±" in cells[0]]
    assert len(questions) == 8
    for cells in questions:
        row = f"| {' | '.join(cells)} |"
        assert re.sub(r"([+-]|± )0[.]", r"\1.", row) in page
    evidence = text_of("results/evidence.md")
    changes = re.findall(r"change on the others, \w+: (.*)", evidence)
    assert len(changes) == 4
    for change in changes:
        assert re.sub(r"([+-]|± )0[.]", r"\1.", change) in page


def test_the_seconds_of_a_run_are_those_of_the_evidence():
    seconds = []
    for section in sections_of_evidence().values():
        rows = cells_of(section)
        if rows.get("arm", [""])[-1] == "seconds":
            seconds += [int(rows[arm][-1]) for arm in ("grpo", "rft", "search-e1")]
    assert len(seconds) == 12
    said = f"{min(seconds)} to {max(seconds)} seconds a run"
    assert said in flat(DOCS["teaching"])


def test_three_students_gain_what_the_evidence_says():
    """The README, the FAQ and results/README.md say what three gain on one."""
    (row,) = re.findall(r"^\| three .*$", tables.ablations("ablations"), re.M)
    assert "0.170 ± 0.068" in row
    for page in (README, DOCS["faq"], text_of("results/README.md")):
        assert ".170 ± .068 more" in flat(page)


def test_the_exercise_on_rates_says_what_the_evidence_says():
    page = flat(text_of("lessons/exercises.md"))
    ends = [tables.final_em(run) for run in tables.read_part("loop")["grpo"].values()]
    assert f"between {short(min(ends))} and {short(max(ends))}" in page


# ---------------------------------------------------------------- a card, and the paper


def test_what_fits_on_a_card_is_what_the_bench_printed():
    log = text_of("results/bench/card.txt")
    rows = cells_of(DOCS["real-models"])
    titles = {
        r"at rest ([\d.]+) GB": "at rest",
        r"sampling, .* ([\d.]+) GB": "peak of sampling",
        r"GRPO, .* ([\d.]+) GB": "peak of a GRPO step",
        r"OFSD, .* ([\d.]+) GB": "peak of an OFSD step",
    }
    for pattern, title in titles.items():
        printed = re.findall(pattern, log)
        assert len(printed) == 2
        (row,) = [cells for name, cells in rows.items() if name.startswith(title)]
        for number, cell in zip(printed, row[:2], strict=True):
            assert f"**measured {number}**" in cell


def test_the_trajectories_of_the_paper_are_counted():
    config = read_settings(ROOT / "configs/paper.json", Config)
    steps = config.rounds * config.grpo_steps
    grpo = steps * config.questions_per_step * config.group_size
    pool = config.rounds * config.ofsd_questions * config.group_size
    edge = config.rounds * config.ofsd_questions * 3  # student, teacher, control
    page = flat(DOCS["real-models"])
    assert f"it samples {grpo + pool:,} trajectories" in page
    assert f"at most {grpo + pool + edge:,}" in page
    hours = (grpo + pool + edge) * 640 / 3000 / 3600
    assert round(hours, -1) == 50


def test_the_operations_of_a_decoding_step_are_those_of_the_bench():
    log = text_of("results/bench/decode-ops.txt")
    now, before = log.split("$ the same script")
    said = "{} operations in bfloat16, where this code once took {}, and {} in float32"
    said += ", of {}"
    numbers = []
    for kind in ("bfloat16", "float32"):
        for part in (now, before):
            found = re.search(rf"^{kind} +([\d.]+)", part, re.M)[1]
            numbers.append(f"{round(float(found)):,}")
    assert said.format(*numbers) in flat(DOCS["reliability"])


def test_the_growth_of_the_search_is_that_of_the_bench():
    log = text_of("results/bench/bm25-large.txt")
    shown = cells_of(DOCS["retrieval"])
    for size in ("100000", "500000", "2000000"):
        line = re.search(rf"^{size} +(.*)", log, re.M)[1]
        build, peak, query, per_million, _ = line.split()
        assert shown[f"{int(size):,}"] == [
            f"{float(build):.0f} µs",
            f"{float(peak):.1f} KB",
            f"{float(query):.1f} ms",
            f"{float(per_million):.1f} ms",
        ]
