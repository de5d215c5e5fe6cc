"""What results/real/README.md tells of a pretrained model is what the logs say."""

import json
import re
from collections import Counter
from statistics import mean, pstdev

import pytest
from conftest import ROOT
from pages import DOCS, README, REAL, flat, rows_of, short, text_of

from experiments import real
from machinery.tables import interval

PAGE = flat(REAL)
FOLDER = "results/real"


def logged(folder: str, kind: str) -> list[dict]:
    """The rows of this kind in a run's metrics."""
    rows = rows_of(f"{FOLDER}/{folder}/metrics.jsonl")
    return [row for row in rows if row["kind"] == kind]


def evaluations(folder: str) -> list[dict]:
    return real.tests_of(ROOT / FOLDER / folder)


def by_model(name: str) -> dict[str, dict]:
    """The tests on all questions, by the name of the model."""
    return {row["model"]: row for row in rows_of(f"{FOLDER}/{name}.jsonl")}


def with_interval(row: dict) -> str:
    low, high = interval(row["em"], row["n"])
    return f"{short(row['em'])} ({short(low)}-{short(high)})"


def answers_by_stage(folder: str) -> dict[str, dict[str, dict]]:
    """{stage: {question's id: what is known of its answer}}."""
    stages = {}
    for row in rows_of(f"{FOLDER}/{folder}/answers.jsonl"):
        stages.setdefault(row["stage"], {})[row["id"]] = row
    return stages


def table_line(row: dict) -> str:
    """A test's line in a table of the page, without its first cell."""
    low, high = row["interval"]
    names = ("edge", "edge_supported", "edge_control")
    edges = [short(row[name], "+") for name in names if name in row]
    cells = [
        short(row["em"]),
        f"{short(low)}-{short(high)}",
        short(row["f1"]),
        f"{row['searches']:.2f}",
        short(row["answered"]),
        ", ".join(edges),
        f"{row['tokens']:.0f} K",
    ]
    return f"| {' | '.join(cells)} |"


def change_told(stages: dict[str, dict[str, dict]]) -> str:
    """How the page tells a run's gain, from its first test to its last."""
    first, *_, last = stages.values()
    changes = [last[key]["em"] - row["em"] for key, row in first.items()]
    reach = 1.96 * pstdev(changes) / len(changes) ** 0.5
    low = mean(changes) - reach
    high = mean(changes) + reach
    return (
        f"{changes.count(1)} of the 200 questions became right and "
        f"{changes.count(-1)} wrong: {short(mean(changes), '+')}, with a paired 95 % "
        f"interval of {short(low)} to {short(high)}"
    )


def ems_where_read(stages: dict[str, dict[str, dict]]) -> list[list[float]]:
    """For each stage the EMs of the questions whose answer stood in what was read."""
    ems = {stage: [] for stage in stages}
    for stage, answers in stages.items():
        ems[stage] += [row["em"] for row in answers.values() if row["found"]]
    return list(ems.values())


@pytest.mark.parametrize("name", ["cpu", "cpu-longer"])
def test_the_table_has_every_test_of_the_logs(name):
    rows = evaluations(f"{name}/search-e1-0") + evaluations(f"{name}/grpo-0")[1:]
    for row in rows:
        assert table_line(row) in REAL


# ---------------------------------------------------------------- four stages


def test_the_gain_of_four_stages_is_told_as_it_went():
    stages = answers_by_stage("cpu/search-e1-0")
    assert f"first to last, {change_told(stages)}" in PAGE
    ems = ems_where_read(stages)
    counts = [len(part) for part in ems]
    assert f"read for {min(counts)} to {max(counts)} of the 200" in PAGE
    first, *others, last = [short(mean(part)) for part in ems]
    said = f"model answers {first} right, and the policies after the four stages "
    said += f"{', '.join(others)} and {last}"
    assert said in PAGE


def test_the_edges_of_four_stages_are_told_as_they_were():
    first, second = logged("cpu/search-e1-0", "mining")
    edge = short(first["edge_supported"], "+")
    assert f"{edge} over {first['pairs']} pairs before the first" in PAGE
    edge = short(second["edge_supported"], "+")
    assert f"{edge} over {second['pairs']} before the second" in PAGE


def test_the_test_on_all_questions_is_told_as_it_was():
    models = by_model("cpu/tested-test")
    start = models["start"]
    ours = models["search-e1-0"]
    alone = models["grpo-0"]
    said = f"the warm-started model has {with_interval(start)} and the last policy "
    assert said + with_interval(ours) in PAGE
    assert f"GRPO alone ends at {with_interval(alone)}" in PAGE
    said = f"brought it to {short(ours['em'])} (GRPO alone, at two thirds of the tokens"
    assert f"{said}: {short(alone['em'])})" in PAGE


def test_the_start_that_failed_is_told_as_it_went():
    (base,) = logged("start-24", "eval")
    assert f"had {short(base['em'])} of {base['n']} test questions" in PAGE
    assert [row["reward"] for row in logged("start-24", "step")] == [0, 0]


def test_the_times_are_those_of_the_logs():
    """The table of machines in docs/real-models.md, and results/real/README.md."""
    page = flat(DOCS["real-models"])
    ours = evaluations("cpu/search-e1-0")
    alone = evaluations("cpu/grpo-0")
    minutes = f"{ours[-1]['time_s'] / 60:.0f}"
    assert f"all {minutes} (" in page
    said = f"took {minutes} minutes and GRPO alone {alone[-1]['time_s'] / 60:.0f}"
    assert said in PAGE
    for folder, minutes in (("cpu", 1), ("no-references", 2)):
        steps = logged(f"{folder}/search-e1-0", "step")
        times = [row["step_s"] for row in steps if row["stage"].startswith("grpo")]
        assert round(mean(times) / 60) == minutes
    assert "a step of 48 trajectories 1 minute" in page
    assert "a step 2 minutes" in page


# ---------------------------------------------------------------- the longer run


def test_the_gain_of_the_longer_run_is_told_as_it_went():
    stages = answers_by_stage("cpu-longer/search-e1-0")
    assert f"the end of Search-E1, {change_told(stages)}" in PAGE
    last = ems_where_read(stages)[-1]
    assert f"{short(mean(last))} are right at the end" in PAGE
    thought = 0
    for row in stages["grpo-1"].values():
        thought += row["turns"][1:] == [["think", "answer"]]
    assert f"run {thought} of the 200 tests thought and then answered before" in PAGE


def test_the_cost_of_the_longer_run_is_told_as_it_was():
    _, grpo, ofsd, last = evaluations("cpu-longer/search-e1-0")
    alone = evaluations("cpu-longer/grpo-0")[-1]
    assert f"took {last['time_s'] / 60:.0f} minutes" in PAGE
    assert round(ofsd["em"] - grpo["em"], 3) == 0.025
    assert round(alone["em"] - grpo["em"], 3) == 0.03
    ours = ofsd["tokens"] - grpo["tokens"]
    theirs = alone["tokens"] - grpo["tokens"]
    assert 0.45 < ours / theirs < 0.55
    assert "adds .025, for half the tokens" in PAGE
    assert "for its next .030" in PAGE
    assert 0.75 < alone["tokens"] / last["tokens"] < 0.85
    assert "at four fifths" in PAGE


def test_the_longer_run_on_all_questions_is_told_as_it_was():
    start = by_model("cpu/tested-test")["start"]
    models = by_model("cpu-longer/tested-test")
    ours = models["search-e1-0"]
    alone = models["grpo-0"]
    said = f"Search-E1 ends at {with_interval(ours)} and GRPO alone at "
    said += f"{with_interval(alone)}; the warm-started model has {with_interval(start)}"
    assert said in PAGE
    assert f"gained {100 * (ours['em'] - start['em']):.1f} points" in PAGE
    assert interval(start["em"], 400)[1] < interval(ours["em"], 400)[0]
    ends = f"went from {short(start['em'])} to {short(ours['em'])}"
    for page in (README, DOCS["real-models"]):
        assert ends in flat(page)
        assert short(alone["em"]) in page


def test_the_questions_asked_only_at_the_end_are_told_as_they_went():
    """All 400 without the 200 of the tables."""
    first, *_, last = evaluations("cpu-longer/search-e1-0")
    start = by_model("cpu/tested-test")["start"]
    ours = by_model("cpu-longer/tested-test")["search-e1-0"]
    before = short(2 * start["em"] - first["em"])
    after = short(2 * ours["em"] - last["em"])
    said = f"EM is {before} for the warm-started model and {after} for Search-E1"
    assert said in PAGE


def test_questions_of_several_hops_are_told_as_they_went():
    models = by_model("cpu-longer/tested-hops")
    start = models["start"]
    ours = models["search-e1-0"]
    said = f"have {short(start['em'])} for the warm-started model and "
    assert f"{said}{short(ours['em'])} for Search-E1" in PAGE
    start_supported = short(start["em_supported"])
    ours_supported = short(ours["em_supported"])
    assert f"supports are {start_supported} and {ours_supported}" in PAGE


# ---------------------------------------------------------------- what did harm


def second_turns(folder: str) -> dict[str, Counter]:
    """For each stage, what the tests did in their second turn, and other counts."""
    stages = {}
    for stage, answers in answers_by_stage(folder).items():
        counts = Counter()
        for row in answers.values():
            second = row["turns"][1] if len(row["turns"]) > 1 else []
            counts[" ".join(second)] += 1
            counts["repeats"] += row["queries"] > row["different"]
            counts["answered"] += row["answered"]
        stages[stage] = counts
    return stages


def test_a_stage_that_did_harm_is_told_as_it_went():
    folder = "asks-again/search-e1-0"
    start, grpo, ofsd = [short(row["em"]) for row in evaluations(folder)]
    said = f"EM went {start} to {grpo} by GRPO and to {ofsd} by the first OFSD"
    assert said in PAGE
    (mined,) = logged(folder, "mining")
    edge = short(mined["edge_supported"], "+")
    assert f"been {edge}, over {mined['pairs']} pairs" in PAGE


def test_the_habit_that_changed_is_told_as_it_was():
    stages = second_turns("asks-again/search-e1-0")
    before = stages["grpo-1"]
    after = stages["ofsd-1"]
    said = f"{before['answer']} of the 200 tests answered at once when they had read, "
    said += f"{before['think answer']} thought first and then answered, and "
    said += f"{before['think search']} thought and then searched again"
    assert said in PAGE
    assert after["answer"] == 0
    said = f"{after['think answer']} thought and answered, and "
    said += f"{after['think search']} thought and searched again: "
    said += f"{after['repeats']} of them"
    assert said in PAGE
    shares = [short(counts["answered"] / 200) for counts in (before, after)]
    assert f"an answer fell from {shares[0]} to {shares[1]}" in PAGE


def test_the_run_without_references_is_told_as_it_went():
    folder = "no-references"
    ems = [short(row["em"]) for row in evaluations(f"{folder}/search-e1-0")]
    said = f"EM went {ems[0]} to {ems[1]} by GRPO, {ems[2]} by OFSD, "
    assert f"{said}{ems[3]} and {ems[4]}" in PAGE
    first, second = logged(f"{folder}/search-e1-0", "mining")
    for name in ("edge", "edge_supported"):
        assert f"{short(first[name], '+')} and {short(second[name], '+')}" in PAGE

    last = {}
    for name in ("grpo-0", "start-96", "as-it-comes"):
        last[name] = short(rows_of(f"{FOLDER}/{folder}/{name}/metrics.jsonl")[-1]["em"])
    assert f"GRPO alone ended at {last['grpo-0']}" in PAGE
    assert f"96 such demonstrations alone give {last['start-96']}" in PAGE
    assert f"untrained the model has {last['as-it-comes']}" in PAGE
    ems = [row["em"] for row in logged(f"{folder}/pilot-slow-ofsd", "eval")]
    assert ems == [0.28, 0.28, 0.29]
    assert "from .280 to .290" in PAGE


def test_the_habits_without_references_are_told_as_they_were():
    stages = answers_by_stage("no-references/search-e1-0")
    answers = stages["ofsd-1"].values()
    repeats = mean(row["queries"] > row["different"] for row in answers)
    assert f"stage {short(repeats)} of the test" in PAGE
    answers = stages["ofsd-2"].values()
    unread = mean(row["answered"] and not row["queries"] for row in answers)
    assert f"second {short(unread)} answer without" in PAGE


# ---------------------------------------------------------------- other machines


def test_what_was_seen_on_a_gpu_is_what_the_logs_say():
    base, after = logged("gpu/search-e1-0", "eval")
    assert f"an EM of {short(base['em'])}" in PAGE
    assert f"EM was {short(after['em'])}" in PAGE
    ours = logged("gpu/search-e1-0", "step")
    alone = logged("gpu/grpo-0", "step")
    assert f"After {len(ours)} steps" in PAGE
    assert f"to {len(alone)} steps" in PAGE
    first = mean(row["reward"] for row in alone[:5])
    last = mean(row["reward"] for row in alone[-5:])
    said = f"was .{100 * first:.0f} in the first five and .{100 * last:.0f} in the last"
    assert said in PAGE
    kl = [row["kl"] for row in alone]
    assert kl[2] < 0.01
    assert min(kl[3:]) > 0.2


def test_the_seconds_on_a_gpu_are_those_of_the_logs():
    ours = logged("gpu/search-e1-0", "step")
    alone = logged("gpu/grpo-0", "step")
    means = [mean(row["step_s"] for row in steps) for steps in (ours, alone)]
    assert sorted(round(seconds) for seconds in means) == [14, 15]
    sampling = [mean(row["rollout_s"] for row in steps) for steps in (ours, alone)]
    assert round(mean(sampling)) == 13
    sampled = set()
    for row in rows_of(f"{FOLDER}/gpu/grpo-0/cost.jsonl"):
        if row["for"] == "rollout":
            sampled.add(row["trajectories"])
    assert sampled == {512}


def test_what_was_seen_before_is_what_the_files_say():
    found = []
    for name in ("base", "started"):
        file = json.loads(text_of(f"results/smollm2/{name}.json"))
        found.append(file["results"]["my/test.jsonl"])
    before, started = found
    assert before["answered"] == before["searches"] == 0
    assert before["n"] == 50
    assert started["searches"] == 1
    assert started["em"] * 50 == 2
    low, high = [short(end) for end in started["em_interval"]]
    assert f"of {low} to {high}" in PAGE


def test_the_small_run_before_is_told_as_it_went():
    log = text_of("results/smollm2/train.log")
    steps = re.findall(r"^ +\d+ +([\d.]+) +[\d.]+ +.* ([\d.]+)$", log, re.M)
    rewards = []
    for reward, _ in steps:
        if float(reward) > 0:
            rewards.append(f"{float(reward):.2f}".removeprefix("0"))
    said = f"rewards of {', '.join(rewards[:3])} and {rewards[3]}"
    assert said in PAGE
    seconds = round(mean(float(seconds) for _, seconds in steps[:4]))
    assert f"{seconds} seconds a step" in PAGE
    assert "teacher's edge +0.667 EM, supported +0.000" in log
    assert "edge of +.667" in PAGE
