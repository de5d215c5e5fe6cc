"""Tables and figures of the evidence, from what its runs left in results/evidence/.

    python -m experiments.tables    # writes results/evidence.md and the figures

The figures need matplotlib (requirements-extra.txt). The curve of a run is EM against
cost: straight lines between its tests, and the last value held. The area is the one
under this curve from 0 to the budget, divided by the budget, so it is a mean EM. Runs
of the same seed are compared in pairs. An interval is the mean, plus or minus
t(.975, n - 1) standard errors.

The parts of SECTIONS have tables of their own. Every further folder with runs in
results/evidence/ is a part of yours, and its arms are compared, too.
"""

import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np

from machinery.json_lines import read_jsonl
from machinery.terminal import run_script
from tools.pictures import new_figure

RESULTS = Path(__file__).resolve().parent.parent / "results"
LEVELS = (0.5, 0.6)  # of EM, for the columns that say what reaching them costs
T975 = {  # t(.975, n - 1) by n
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
    11: 2.228,
    12: 2.201,
    13: 2.179,
    14: 2.160,
    15: 2.145,
    16: 2.131,
    17: 2.120,
    18: 2.110,
    19: 2.101,
    20: 2.093,
}

# A run is the rows of its file. The first row says which arm it is, and of which seed.
Run = list[dict]


# ---------------------------------------------------------------------- what a run says


def read_part(part: str) -> dict[str, dict[int, Run]]:
    """The finished runs of a part, by arm and seed."""
    runs: dict[str, dict[int, Run]] = defaultdict(dict)
    for path in sorted((RESULTS / "evidence" / part).glob("*.jsonl.gz")):
        run = list(read_jsonl(path))
        seed = run[0]["seed"]
        arm = path.name.removesuffix(f"-{seed}.jsonl.gz")
        runs[arm][seed] = run
    return runs


def rows_of_kind(run: Run, kind: str) -> list[dict]:
    return [row for row in run if row["kind"] == kind]


def budget_of(run: Run) -> int:
    return run[0]["arm"]["budget"]


def em_at(run: Run, costs) -> np.ndarray:
    """The curve at these costs. While a pool is paid for it is flat: a stage that
    trains has a row "pool" for that, and a skipped one its row of kind "mining"."""
    tested_at = []
    ems = []
    for row in run:
        if row["kind"] == "eval":
            tested_at.append(row["cost"])
            ems.append(row["em"])
        elif row["kind"] == "mining" and row.get("skipped", False):
            tested_at.append(row["cost"])
            ems.append(ems[-1])
    return np.interp(costs, tested_at, ems)


def area(run: Run) -> float:
    costs = np.linspace(0, budget_of(run), 2001)
    return float(em_at(run, costs).mean())


def cost_of(run: Run, level: float) -> float:
    """The cost at which the curve first has this EM; infinite if it never does."""
    costs = np.linspace(0, budget_of(run), 2001)
    reached = np.nonzero(em_at(run, costs) >= level)[0]
    if len(reached) == 0:
        return float("inf")
    return float(costs[reached[0]])


def final_em(run: Run) -> float:
    """By the curve at the budget, which the last test may have overshot."""
    return float(em_at(run, budget_of(run)))


def searches(run: Run) -> float:
    return rows_of_kind(run, "eval")[-1]["searches"]


def leak(run: Run) -> float:
    return rows_of_kind(run, "eval")[-1]["leak"]


# --------------------------------------------------------------------------- statistics


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval: NaN for a single value."""
    if len(values) == 1:
        return values[0], float("nan")
    standard_error = stdev(values) / len(values) ** 0.5
    # Of more than 20 values, the last one of the table is a little too wide.
    return mean(values), T975[min(len(values), max(T975))] * standard_error


def plus_minus(values: list[float], sign: str = "") -> str:
    """The mean and half its interval. A single value has none; no value is empty."""
    if not values:
        return ""
    centre, half = interval(values)
    if len(values) == 1:
        return f"{centre:{sign}.3f}"
    return f"{centre:{sign}.3f} ± {half:.3f}"


def mean_of(measure, seeds: dict[int, Run]) -> float:
    return mean(measure(run) for run in seeds.values())


def differences(ours: dict[int, Run], theirs: dict[int, Run], measure) -> list[float]:
    """Ours minus theirs, seed by seed, for the seeds that both have."""
    shared = [seed for seed in sorted(ours) if seed in theirs]
    return [measure(ours[seed]) - measure(theirs[seed]) for seed in shared]


# ------------------------------------------------------------------------------- tables


def table_line(cells: list) -> str:
    texts = [str(cell) for cell in cells]
    return "| " + " | ".join(texts) + " |"


def table(header: list[str], lines: list[list]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(table_line(cells) for cells in [header, rule, *lines])


def comparison(part: str) -> str:
    """The arms of a part, and their differences to GRPO alone, by seed."""
    return compare(read_part(part))


def priced_comparison(part: str) -> str:
    """The same, where an agent's references cost what sampling them would cost."""
    runs = {}
    for arm, seeds in read_part(part).items():
        runs[arm] = {seed: with_price(run) for seed, run in seeds.items()}
    return compare(runs)


def with_price(run: Run) -> Run:
    """The run, in which what follows an agent's references also costs their price."""
    price = 0
    rows = []
    for row in run:
        if row["kind"] == "mining":
            price += row.get("price", 0)
        priced = dict(row)
        priced["cost"] += price
        rows.append(priced)
    return rows


def compare(runs: dict[str, dict[int, Run]]) -> str:
    """Arms without one of the name grpo are compared with the first one."""
    baseline = "grpo" if "grpo" in runs else min(runs)
    header = ["arm", "seeds"]
    for name in ("area", "final EM", "searches"):
        header.append(name)
        header.append(f"to {baseline}")
    header += [f"cost of {level}, M" for level in LEVELS]
    header += ["leak", "seconds"]

    lines = []
    for arm, seeds in runs.items():
        cells = [arm, len(seeds)]
        for measure in (area, final_em, searches):
            values = [measure(run) for run in seeds.values()]
            cells.append(plus_minus(values))
            if arm == baseline:
                cells.append("")
            else:
                gains = differences(seeds, runs[baseline], measure)
                cells.append(plus_minus(gains, "+"))
        cells += [median_cost(seeds, level) for level in LEVELS]
        cells.append(f"{mean_of(leak, seeds):.3f}")
        cells.append(f"{mean_of(work_s, seeds):.0f}")
        lines.append(cells)
    text = table(header, lines)
    if "search-e1" in runs and "rft" in runs:
        text += against_rft(runs["search-e1"], runs["rft"])
    return text


def median_cost(seeds: dict[int, Run], level: float) -> str:
    """The median over seeds of the cost of a level, and how many never reach it."""
    costs = [cost_of(run, level) for run in seeds.values()]
    text = f"{median(costs) / 1e6:.2f}"
    missed = costs.count(float("inf"))
    if missed > 0:
        text += f" ({missed} never)"
    return text


def work_s(run: Run) -> float:
    return run[-1]["work_s"]


def against_rft(search_e1: dict[int, Run], rft: dict[int, Run]) -> str:
    measures = {"area": area, "final EM": final_em, "searches": searches}
    text = ""
    for name, measure in measures.items():
        gains = differences(search_e1, rft, measure)
        text += f"\n\nsearch-e1 to rft, {name}: {plus_minus(gains, '+')}"
    return text


# What is asked of references by an agent (the plan: arms.py). A question of the second
# kind is about the change of EM on relations that were not trained.
AGENT_QUESTIONS = (
    ("search-e1-expert", "grpo"),
    ("rft-expert", "grpo"),
    ("search-e1-expert", "rft-expert"),
    ("search-e1-foreign", "grpo"),
    ("rft-foreign", "grpo"),
    ("search-e1-foreign", "rft-foreign"),
    ("search-e1-foreign", "search-e1-expert"),
    ("rft-foreign", "rft-expert"),
)
RETENTION_QUESTIONS = (("search-e1", "rft"), ("search-e1-foreign", "rft-foreign"))
OFFLINE_STAGE = re.compile(r"(ofsd|rft)-\d+")
NEAR_ZERO = 0.03  # a difference whose interval lies within it is a no


def verdict_of_area(areas: list[float], finals: list[float]) -> str:
    """By the plan: yes, no or open."""
    centre, half = interval(areas)
    final_centre, final_half = interval(finals)
    if centre - half > 0 and final_centre + final_half >= 0:
        return "yes"
    return "no" if is_no(centre, half) else "open"


def verdict_of_change(changes: list[float]) -> str:
    """By the plan for retention: yes, no or open."""
    centre, half = interval(changes)
    if centre - half > 0:
        return "yes"
    return "no" if is_no(centre, half) else "open"


def is_no(centre: float, half: float) -> bool:
    low = centre - half
    high = centre + half
    return high < 0 or (low > -NEAR_ZERO and high < NEAR_ZERO)


def agent_verdicts(part: str) -> str:
    """Each question of the plan whose arms have run: the verdict, and why."""
    runs = read_part(part)
    lines = []
    for ours, theirs in AGENT_QUESTIONS:
        if ours not in runs or theirs not in runs:
            continue
        areas = differences(runs[ours], runs[theirs], area)
        finals = differences(runs[ours], runs[theirs], final_em)
        cells = [f"{ours} to {theirs}", plus_minus(areas, "+"), plus_minus(finals, "+")]
        lines.append([*cells, verdict_of_area(areas, finals)])
    return table(["question", "area", "final EM", "verdict"], lines)


def forms(part: str) -> str:
    """What samples say about each arm's policy: after its offline stage, and at the
    end. right: the share of the students' tokens after a right prefix."""
    header = ["arm", "when", "EM sampled", "best of 5", "answered", "own thoughts"]
    header += ["foreign queries", "KL to the start", "right", "final EM's deviation"]
    names = ["em_sampled", "em_best", "answered", "own_thoughts", "foreign_queries"]
    names.append("kl_to_start")
    lines = []
    for arm, seeds in read_part(part).items():
        shares = []
        for run in seeds.values():
            minings = rows_of_kind(run, "mining")
            shares += [row["right_share"] for row in minings if "right_share" in row]
        right = f"{mean(shares):.3f}" if shares else ""
        finals = [final_em(run) for run in seeds.values()]
        deviation = f"{stdev(finals):.3f}" if len(finals) > 1 else ""
        moments = {"end": -1}
        if arm != "grpo":
            moments = {"after the stage": 0, "end": -1}
        for when, place in moments.items():
            rows = [rows_of_kind(run, "form")[place] for run in seeds.values()]
            measured = [plus_minus([row[name] for row in rows]) for name in names]
            lines.append([arm, when, *measured, right, deviation])
    return table(header, lines)


def retention(part: str) -> str:
    """EM on the trained relations and on the others: how much it changed since the
    start, after the offline stage and at the end."""
    header = ["arm", "half", "start", "after the stage", "end"]
    runs = read_part(part)
    lines = []
    for arm, seeds in runs.items():
        for half in ("trained", "others"):
            starts = [half_em(run, half, "base") for run in seeds.values()]
            cells = [arm, half, f"{mean(starts):.3f}"]
            for when in ("stage", "end"):
                changes = [half_change(run, half, when) for run in seeds.values()]
                has_stage = when == "end" or arm != "grpo"
                cells.append(plus_minus(changes, "+") if has_stage else "")
            lines.append(cells)
    text = table(header, lines)
    for ours, theirs in RETENTION_QUESTIONS:
        if ours not in runs or theirs not in runs:
            continue
        for when in ("stage", "end"):
            change = partial(half_change, half="others", when=when)
            changes = differences(runs[ours], runs[theirs], change)
            verdict = verdict_of_change(changes)
            text += f"\n\n{ours} to {theirs}, change on the others, {when}: "
            text += f"{plus_minus(changes, '+')}: {verdict}"
    return text


def half_em(run: Run, half: str, when: str) -> float:
    """EM on one half of the relations: at the base, after the stage, or at the end."""
    tests = rows_of_kind(run, "eval")
    if when == "base":
        test = tests[0]
    elif when == "end":
        test = tests[-1]
    else:
        offline = [test for test in tests if OFFLINE_STAGE.fullmatch(test["stage"])]
        test = offline[-1] if offline else tests[0]  # a skipped stage changes nothing
    return test["em_by_half"][half]


def half_change(run: Run, half: str, when: str) -> float:
    return half_em(run, half, when) - half_em(run, half, "base")


def trials(part: str) -> str:
    """What each trial reached, and with which settings."""
    header = ["trial", "area", "final EM", "searches", "stages", "GRPO lr"]
    header += ["offline lr", "pool", "passes", "pairs a question", "clip"]
    lines = []
    for name, seeds in read_part(part).items():
        cells = [
            name,
            f"{mean_of(area, seeds):.3f}",
            f"{mean_of(final_em, seeds):.3f}",
            f"{mean_of(searches, seeds):.3f}",
        ]
        first_seed = min(seeds)
        arm = seeds[first_seed][0]["arm"]
        cells += [arm["stages"], arm["grpo_lr"], arm["ofsd_lr"]]
        cells += [arm["ofsd_questions"], arm["ofsd_epochs"], arm["students"]]
        cells.append(arm.get("clip", "none"))  # the first trials had no such setting
        lines.append(cells)
    return table(header, lines)


def ofsd_stages(part: str) -> str:
    """The stages of OFSD in Search-E1: what the teacher was worth, what it changed."""
    header = ["seed", "stage", "pairs", "edge", "supported", "control"]
    header += ["EM", "searches", "leak"]
    header += ["KL think", "KL query", "KL answer", "KL tags"]
    lines = []
    for seed, run in read_part(part)["search-e1"].items():
        tests = {test["stage"]: test for test in rows_of_kind(run, "eval")}
        kinds = {row["stage"]: row for row in rows_of_kind(run, "kinds")}
        for mined in rows_of_kind(run, "mining"):
            stage = mined["stage"]
            cells = [seed, stage, mined["pairs"], *edges_of(mined)]
            if mined["skipped"]:
                cells += ["skipped", "", "", "", "", "", ""]
            else:
                cells += changes_of_score(tests[f"before {stage}"], tests[stage])
                cells += changes_of_kl(kinds[stage]["before"], kinds[stage]["after"])
            lines.append(cells)
    return table(header, lines)


def edges_of(mined: dict) -> list[str]:
    """The teacher's edges; empty where there was no pair to measure them on."""
    if "edge" not in mined:
        return ["", "", ""]
    return [
        f"{mined['edge']:+.2f}",
        f"{mined['edge_supported']:+.2f}",
        f"{mined['edge_control']:+.2f}",
    ]


def changes_of_score(before: dict, after: dict) -> list[str]:
    return [
        f"{before['em']:.3f} → {after['em']:.3f}",
        f"{before['searches']:.2f} → {after['searches']:.2f}",
        f"{before['leak']:.3f} → {after['leak']:.3f}",
    ]


def changes_of_kl(before: dict, after: dict) -> list[str]:
    return [
        f"{before.get(kind, 0):.3f} → {after.get(kind, 0):.3f}"
        for kind in ("think", "search", "answer", "tag")
    ]


def first_stages(part: str) -> str:
    """The offline stage that an arm begins with, means over seeds: what the first pass
    and all passes gained, and what they cost, pool and edge aside."""
    header = ["arm", "one pass: EM", "tokens (K)", "all passes: EM", "tokens (K)"]
    lines = []
    for arm, seeds in read_part(part).items():
        first_passes = []
        all_passes = []
        for run in seeds.values():
            passes = passes_of_first_stage(run)
            if passes:
                first_passes.append(passes[0])
                all_passes.append(passes[-1])
        if first_passes:
            cells = [arm]
            for gains_and_costs in (first_passes, all_passes):
                gains, costs = zip(*gains_and_costs, strict=True)
                cells.append(f"{mean(gains):+.3f}")
                cells.append(f"{mean(costs):.0f}")
            lines.append(cells)
    return table(header, lines)


def passes_of_first_stage(run: Run) -> list[tuple[float, float]]:
    """After each pass: EM gained since the start, and thousands of tokens since the
    pool. Empty for an arm that begins with GRPO, and for a stage that was skipped."""
    start, *tests = rows_of_kind(run, "eval")
    pool_cost = 0
    passes = []
    for test in tests:
        if test["stage"] in ("pool ofsd-1", "pool rft-1"):
            pool_cost = test["cost"]
        if test["stage"] in ("ofsd-1", "rft-1"):
            gain = test["em"] - start["em"]
            cost = (test["cost"] - pool_cost) / 1000
            passes.append((gain, cost))
    return passes


def ablations(part: str) -> str:
    """By variant: EM after the stage less EM before it, the mean over seeds; the
    difference to the unchanged stage, paired by seed; and each seed."""
    header = ["variant", "EM gained", "to search-e1", "each seed"]
    header += ["edge", "searches", "leak"]
    gains, edges = gains_of_variants(part)
    unchanged = gains["search-e1"]["em"]
    lines = []
    for variant, gained in gains.items():
        cells = [variant, f"{mean(gained['em']):+.3f}"]
        if variant == "search-e1":
            cells.append("")
        else:
            pairs = zip(gained["em"], unchanged, strict=True)
            paired = [ours - theirs for ours, theirs in pairs]
            cells.append(plus_minus(paired, "+"))
        cells.append(" ".join(f"{gain:+.3f}" for gain in gained["em"]))
        cells.append(f"{mean(edges[variant]):+.2f}" if variant in edges else "")
        cells.append(f"{mean(gained['searches']):+.2f}")
        cells.append(f"{mean(gained['leak']):+.3f}")
        lines.append(cells)
    return table(header, lines)


def gains_of_variants(part: str) -> tuple[dict, dict]:
    """{variant: {"em", "searches", "leak": a gain for each seed}}, and {variant: an
    edge for each seed} of those that have a teacher."""
    gains: dict[str, dict[str, list[float]]] = {}
    edges: dict[str, list[float]] = {}
    for seeds in read_part(part).values():
        for run in seeds.values():
            # The last test of a stage is the one after its last pass.
            last = {test["stage"]: test for test in rows_of_kind(run, "eval")}
            before = last["grpo-1"]
            for mined in rows_of_kind(run, "mining"):
                variant = mined["stage"]
                gained = gains.setdefault(
                    variant, {"em": [], "searches": [], "leak": []}
                )
                for name, values in gained.items():
                    values.append(last[variant][name] - before[name])
                if "edge" in mined:
                    edges.setdefault(variant, []).append(mined["edge"])
    return gains, edges


# ------------------------------------------------------------------------------ figures


def draw(part: str, title: str) -> None:
    """The mean curve of each arm, with its 95 % interval."""
    with new_figure(7, 4) as figure:
        axes = figure.subplots()
        for arm, seeds in read_part(part).items():
            runs = list(seeds.values())
            costs = np.linspace(0, budget_of(runs[0]), 200)
            curves = np.array([em_at(run, costs) for run in runs])  # (seeds, 200)
            intervals = [interval(ems.tolist()) for ems in curves.T]
            middle, half = np.array(intervals).T  # (200,) each
            millions = costs / 1e6
            (line,) = axes.plot(millions, middle, label=f"{arm} ({len(runs)} seeds)")
            axes.fill_between(
                millions,
                middle - half,
                middle + half,
                color=line.get_color(),
                alpha=0.15,
                linewidth=0,
            )
        axes.set_title(title)
        axes.set_xlabel("cost, million tokens (forward 1, forward and backward 3)")
        axes.set_ylabel("exact match, test questions")
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(RESULTS / f"evidence-{part}.png", dpi=110)


def draw_retention(part: str) -> None:
    """Each arm's way from the start, after its offline stage, to the end: EM on the
    others against EM on the trained relations."""
    with new_figure(7, 5) as figure:
        axes = figure.subplots()
        for arm, seeds in read_part(part).items():
            runs = list(seeds.values())
            moments = ("base", "end") if arm == "grpo" else ("base", "stage", "end")
            places = []
            for when in moments:
                trained = mean(half_em(run, "trained", when) for run in runs)
                others = mean(half_em(run, "others", when) for run in runs)
                places.append((trained, others))
            xs, ys = zip(*places, strict=True)
            (line,) = axes.plot(xs, ys, marker="o", label=f"{arm} ({len(runs)} seeds)")
            _, x_half = interval([half_em(run, "trained", "end") for run in runs])
            _, y_half = interval([half_em(run, "others", "end") for run in runs])
            axes.errorbar(
                xs[-1], ys[-1], xerr=x_half, yerr=y_half, color=line.get_color()
            )
        axes.plot(xs[0], ys[0], marker="s", color="black", label="start")
        axes.set_title("From the start, after the offline stage, to the end")
        axes.set_xlabel("EM on questions of the trained relations")
        axes.set_ylabel("EM on questions of the others")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(RESULTS / f"evidence-{part}.png", dpi=110)


# --------------------------------------------------------------------------------- main

SECTIONS = [  # a title, the part that it reads, and what makes the table
    (
        "Trials from the base, one development seed, validation questions",
        "trials/base-1",
        trials,
    ),
    (
        "More trials from the base, the same seed, validation questions",
        "trials/base-2",
        trials,
    ),
    ("From the base", "loop", comparison),
    ("The offline stage that an arm begins with, from the base", "loop", first_stages),
    (
        "Trials from the converged policy, one seed, validation questions",
        "trials/plateau-1",
        trials,
    ),
    (
        "More trials from there, the same seed, validation questions",
        "trials/plateau-2",
        trials,
    ),
    ("From a policy that GRPO improves no more", "plateau", comparison),
    ("The offline stage that an arm begins with, from there", "plateau", first_stages),
    ("Stages of OFSD in search-e1, from the base", "loop", ofsd_stages),
    ("Stages of OFSD in search-e1, from the converged policy", "plateau", ofsd_stages),
    ("One stage, one thing changed, validation questions", "ablations", ablations),
    (
        "Trials with an agent's references, one seed, validation questions",
        "trials/agent-1",
        trials,
    ),
    (
        "More trials with a foreigner's, the same seed, validation questions",
        "trials/agent-2",
        trials,
    ),
    ("References by an agent", "agent", comparison),
    ("The same, with the price of writing them", "agent", priced_comparison),
    ("References by an agent: verdicts", "agent", agent_verdicts),
    ("The form of the policies, references by an agent", "agent", forms),
    ("Half of the relations trained: what it does to both", "retention", retention),
    ("The form of the policies, half of the relations trained", "retention", forms),
]


def other_parts() -> list[str]:
    """Folders with runs in results/evidence/ that no section reads, by name."""
    evidence = RESULTS / "evidence"
    parts = set()
    for path in evidence.rglob("*.jsonl.gz"):
        if path.parent != evidence:  # converge is there: a run, and no part
            parts.add(path.parent.relative_to(evidence).as_posix())
    return sorted(parts - {part for _, part, _ in SECTIONS})


def all_tables() -> str:
    """The text of results/evidence.md."""
    text = "# Tables\n\n"
    text += "Written by `python -m experiments.tables` from `results/evidence/`; "
    text += "what they mean: README.md.\n"
    for title, part, make in SECTIONS:
        if read_part(part):
            text += f"\n## {title}\n\n{make(part)}\n"
    for part in other_parts():
        text += f"\n## {part}\n\n{comparison(part)}\n"
    return text


def main() -> None:
    text = all_tables()
    (RESULTS / "evidence.md").write_text(text, encoding="utf-8")
    print(text)
    draw("loop", "From the base model")
    draw("plateau", "From a policy that GRPO improves no more")
    draw("agent", "With references of its own, and by an agent")
    draw_retention("retention")


if __name__ == "__main__":
    run_script(main)
