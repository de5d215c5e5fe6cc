"""Tables and figures from results/evidence/.

    python results/tables.py    # writes evidence.md and, with matplotlib, *.png

The curve of a run is EM against cost at its evaluations, straight lines between them, its last
value held; the area is that under the curve from 0 to the budget, divided by the budget (a mean
EM). Runs of the same seed are compared in pairs: the interval is the mean difference to GRPO +-
t(.975, n - 1) standard errors.
"""

import json
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np

HERE = Path(__file__).resolve().parent
# t(.975, n - 1) for n from 2 to 20
T = """12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262
2.228 2.201 2.179 2.160 2.145 2.131 2.120 2.110 2.101 2.093"""
T = {n: float(t) for n, t in enumerate(T.split(), start=2)}
LEVELS = (0.5, 0.6)


def read(part: str) -> dict[str, dict[int, list[dict]]]:
    """{arm: {seed: rows}} of the finished runs of a part."""
    runs: dict[str, dict[int, list[dict]]] = {}
    for path in sorted((HERE / "evidence" / part).glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        runs.setdefault(path.stem.removesuffix(f"-{rows[0]['seed']}"), {})[rows[0]["seed"]] = rows
    return runs


def evaluations(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["kind"] == "eval"]


def em_at(rows: list[dict], costs) -> np.ndarray:
    points = evaluations(rows)
    return np.interp(costs, [row["cost"] for row in points], [row["em"] for row in points])


def area(rows: list[dict]) -> float:
    budget = rows[0]["arm"]["budget"]
    return float(em_at(rows, np.linspace(0, budget, 2001)).mean())


def cost_of(rows: list[dict], level: float) -> float:
    """The cost at which the curve first reaches a level of EM; infinite where it does not."""
    costs = np.linspace(0, rows[0]["arm"]["budget"], 2001)
    reached = np.nonzero(em_at(rows, costs) >= level)[0]
    return float(costs[reached[0]]) if len(reached) else float("inf")


def final(rows: list[dict], name: str = "em") -> float:
    """EM by the curve at the budget; anything else as last evaluated."""
    if name == "em":
        return float(em_at(rows, rows[0]["arm"]["budget"]))
    return evaluations(rows)[-1][name]


def searches(rows: list[dict]) -> float:
    return final(rows, "searches")


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and the half width of its 95 % interval."""
    half = T[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return mean(values), half


def row_of(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(header: list[str], rows: list[list]) -> str:
    return "\n".join(row_of(*row) for row in (header, ["---"] * len(header), *rows))


def plus_minus(values: list[float], sign: str = "") -> str:
    centre, half = interval(values)
    return f"{centre:{sign}.3f} ± {half:.3f}"


def comparison(part: str, against: str = "grpo") -> str:
    runs = read(part)
    lines = []
    for arm, seeds in runs.items():
        cells = [arm, len(seeds)]
        for value in (area, final, searches):
            cells.append(plus_minus([value(rows) for rows in seeds.values()]))
            paired = differences(seeds, runs[against], value)
            cells.append("" if arm == against else plus_minus(paired, "+"))
        for level in LEVELS:
            reached = sorted(cost_of(rows, level) for rows in seeds.values())
            missed = sum(cost == float("inf") for cost in reached)
            cells.append(f"{median(reached) / 1e6:.2f}" + (f" ({missed} never)" if missed else ""))
        cells.append(f"{mean(final(rows, 'leak') for rows in seeds.values()):.3f}")
        lines.append([*cells, f"{mean(rows[-1]['work_s'] for rows in seeds.values()):.0f}"])
    to = f"to {against}"
    header = ["arm", "seeds", "area", to, "final EM", to, "searches", to]
    header += [*(f"cost of {level}, M" for level in LEVELS), "leak", "seconds"]
    text = table(header, lines)
    if {"search-e1", "rft"} <= runs.keys():
        for name, value in (("area", area), ("final EM", final), ("searches", searches)):
            paired = differences(runs["search-e1"], runs["rft"], value)
            text += f"\n\nsearch-e1 to rft, {name}: {plus_minus(paired, '+')}"
    return text


def differences(ours: dict, theirs: dict, value) -> list[float]:
    """Of the seeds that both have."""
    return [value(ours[seed]) - value(theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def trials(part: str) -> str:
    keys = "stages grpo_lr ofsd_lr ofsd_questions ofsd_epochs students clip".split()
    lines = []
    for name, seeds in read(part).items():
        means = [mean(map(value, seeds.values())) for value in (area, final, searches)]
        arm = seeds[min(seeds)][0]["arm"]
        cells = [f"{value:.3f}" for value in means]
        lines.append([name, *cells, *(arm.get(key, "none") for key in keys)])
    header = "trial, area, final EM, searches, stages, GRPO lr, offline lr, pool, passes"
    return table([*header.split(", "), "pairs a question", "clip"], lines)


def stages(part: str, arm: str) -> str:
    """The stages of OFSD in the runs of an arm: what the teacher was worth, and what the stage
    did."""
    lines = []
    for seed, rows in read(part)[arm].items():
        tested = {row["stage"]: row for row in evaluations(rows)}
        kinds = {row["stage"]: row for row in rows if row["kind"] == "kinds"}
        for row in (row for row in rows if row["kind"] == "mining"):
            stage, cells = row["stage"], [seed, row["stage"], row["pairs"]]
            edges = "edge", "edge_supported", "edge_control"
            cells += [f"{row[name]:+.2f}" if name in row else "" for name in edges]
            if row["skipped"]:
                lines.append([*cells, "skipped", *[""] * 6])
                continue
            before, after = tested[f"before {stage}"], tested[stage]
            for name, digits in (("em", 3), ("searches", 2), ("leak", 3)):
                cells.append(f"{before[name]:.{digits}f} → {after[name]:.{digits}f}")
            for kind in ("think", "search", "answer", "tag"):
                values = [kinds[stage][when].get(kind, 0) for when in ("before", "after")]
                cells.append(" → ".join(f"{value:.3f}" for value in values))
            lines.append(cells)
    header = "seed, stage, pairs, edge, supported, control, EM, searches, leak"
    header += ", KL think, KL query, KL answer, KL tags"
    return table(header.split(", "), lines)


def first_stages(part: str) -> str:
    """The offline stage that an arm begins with: what its first pass and all passes gained and
    cost, pool and edge aside. Means over seeds."""
    lines = []
    for arm, seeds in read(part).items():
        found = []
        for rows in seeds.values():
            start, *tests = evaluations(rows)
            after = [row for row in tests if row["stage"] in ("ofsd-1", "rft-1")]
            pool = [row["cost"] for row in tests if row["stage"] in ("pool ofsd-1", "pool rft-1")]
            for row in after[:1] + after[-1:]:
                found.append((row["em"] - start["em"], (row["cost"] - pool[0]) / 1000))
        if found:
            means = [mean(column) for part in (found[::2], found[1::2]) for column in zip(*part)]
            formats = "{:+.3f}", "{:.0f}", "{:+.3f}", "{:.0f}"
            lines.append([arm, *(form.format(x) for form, x in zip(formats, means))])
    return table("arm, one pass: EM, tokens (K), all passes: EM, tokens (K)".split(", "), lines)


def ablations() -> str:
    """EM after a stage's last pass, less EM before it, by variant: the mean over seeds, its
    difference to the unchanged stage, paired by seed, and each seed's."""
    found: dict[str, list] = {}
    for seeds in read("ablations").values():
        for rows in seeds.values():
            start = [row for row in evaluations(rows) if row["stage"] == "grpo-1"][-1]
            mined = {row["stage"]: row for row in rows if row["kind"] == "mining"}
            last = {row["stage"]: row for row in evaluations(rows)}  # after its last pass
            for variant, counts in mined.items():
                found.setdefault(variant, []).append((last[variant], start, counts))
    lines, unchanged = [], []
    for variant, runs in found.items():
        gain = lambda name: [row[name] - start[name] for row, start, _ in runs]
        ems, edges = gain("em"), [mined["edge"] for *_, mined in runs if "edge" in mined]
        unchanged = unchanged or ems  # the first variant is search-e1
        paired = [em - other for em, other in zip(ems, unchanged, strict=True)]
        lines.append([
            variant, f"{mean(ems):+.3f}", "" if ems is unchanged else plus_minus(paired, "+"),
            " ".join(f"{em:+.3f}" for em in ems), f"{mean(edges):+.2f}" if edges else "",
            f"{mean(gain('searches')):+.2f}", f"{mean(gain('leak')):+.3f}",
        ])  # fmt: skip
    header = "variant, EM gained, to search-e1, each seed, edge, searches, leak"
    return table(header.split(", "), lines)


def figure(part: str, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for arm, seeds in read(part).items():
        costs = np.linspace(0, next(iter(seeds.values()))[0]["arm"]["budget"], 200)
        curves = np.array([em_at(rows, costs) for rows in seeds.values()])  # (seeds, 200)
        half = T[len(curves)] * curves.std(axis=0, ddof=1) / len(curves) ** 0.5
        line = axes.plot(costs / 1e6, curves.mean(axis=0), label=f"{arm} ({len(curves)} seeds)")[0]
        band = curves.mean(axis=0) - half, curves.mean(axis=0) + half
        axes.fill_between(costs / 1e6, *band, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(title=title, ylim=(0, None), ylabel="exact match, test questions")
    axes.set(xlabel="cost, million tokens (forward 1, forward and backward 3)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(HERE / f"evidence-{part}.png", dpi=110)


def ofsd_stages(part: str) -> str:
    return stages(part, "search-e1")


VALIDATION = "validation questions"
SECTIONS = [
    (f"Trials from the base, one development seed, {VALIDATION}", "tune", trials),
    (f"More trials from the base, the same seed, {VALIDATION}", "tune-2", trials),
    ("From the base", "loop", comparison),
    ("The offline stage that an arm begins with, from the base", "loop", first_stages),
    (f"Trials from the converged policy, one seed, {VALIDATION}", "tune-plateau", trials),
    (f"More trials from there, the same seed, {VALIDATION}", "tune-plateau-2", trials),
    ("From a policy that GRPO improves no more", "plateau", comparison),
    ("The offline stage that an arm begins with, from there", "plateau", first_stages),
    ("Stages of OFSD in search-e1, from the base", "loop", ofsd_stages),
    ("Stages of OFSD in search-e1, from the converged policy", "plateau", ofsd_stages),
    (f"One stage, one thing changed, {VALIDATION}", "ablations", lambda part: ablations()),
]
FIGURES = {
    "loop": "From the base model",
    "plateau": "From a policy that GRPO improves no more",
}


def main() -> None:
    text = "# Tables\n\nWritten by `python results/tables.py` from `results/evidence/`; "
    text += "what they mean: README.md.\n"
    for title, part, make in SECTIONS:
        text += f"\n## {title}\n\n{make(part)}\n" if read(part) else ""
    (HERE / "evidence.md").write_text(text, encoding="utf-8")
    print(text)
    for part, title in FIGURES.items():
        if read(part) and all(len(seeds) > 1 for seeds in read(part).values()):
            figure(part, title)


if __name__ == "__main__":
    main()
