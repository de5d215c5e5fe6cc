"""Tables and figures from results/evidence/: python results/tables.py writes evidence.md and, with matplotlib, *.png.

The curve of a run is EM against cost at its evaluations, straight lines between them, its last value held;
the area is that under the curve from 0 to the budget, divided by the budget (a mean EM). Runs of the same
seed are compared in pairs: the interval is the mean difference to GRPO +- t(.975, n - 1) standard errors.
"""

import json
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np

HERE = Path(__file__).resolve().parent
T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # t(.975, n - 1) for n
LEVELS = (0.5, 0.6, 0.7)


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
    return float(em_at(rows, rows[0]["arm"]["budget"])) if name == "em" else evaluations(rows)[-1][name]


def searches(rows: list[dict]) -> float:
    return final(rows, "searches")


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and the half width of its 95 % interval."""
    half = T[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return mean(values), half


def row_of(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(header: list[str], rows: list[list]) -> str:
    return "\n".join([row_of(*header), row_of(*["---"] * len(header)), *(row_of(*row) for row in rows)])


def plus_minus(values: list[float], sign: str = "") -> str:
    centre, half = interval(values)
    return f"{centre:{sign}.3f} ± {half:.3f}"


def comparison(part: str, against: str = "grpo") -> str:
    runs = read(part)
    lines = []
    for arm, seeds in runs.items():
        shared = sorted(seeds.keys() & runs[against].keys())
        cells = [arm, len(seeds)]
        for value in (area, final, searches):
            cells.append(plus_minus([value(rows) for rows in seeds.values()]))
            cells.append("" if arm == against else plus_minus([value(seeds[s]) - value(runs[against][s]) for s in shared], "+"))
        for level in LEVELS:
            reached = sorted(cost_of(rows, level) for rows in seeds.values())
            missed = sum(cost == float("inf") for cost in reached)
            cells.append(f"{median(reached) / 1e6:.2f}" + (f" ({missed} never)" if missed else ""))
        cells.append(f"{mean(final(rows, 'leak') for rows in seeds.values()):.3f}")
        lines.append([*cells, f"{mean(rows[-1]['work_s'] for rows in seeds.values()):.0f}"])
    costs = [f"cost of {level}, M" for level in LEVELS]
    to = f"to {against}"
    text = table(["arm", "seeds", "area", to, "final EM", to, "searches", to, *costs, "leak", "seconds"], lines)
    if {"search-e1", "rft"} <= runs.keys():
        ours, theirs = runs["search-e1"], runs["rft"]
        for name, value in (("area", area), ("final EM", final), ("searches", searches)):
            difference = plus_minus([value(ours[s]) - value(theirs[s]) for s in sorted(ours.keys() & theirs.keys())], "+")
            text += f"\n\nsearch-e1 to rft, {name}: {difference}"
    return text


def trials(part: str) -> str:
    keys = "stages grpo_lr ofsd_lr ofsd_questions ofsd_epochs students".split()
    lines = [
        [name, *(f"{mean(map(value, seeds.values())):.3f}" for value in (area, final, searches)), *(seeds[min(seeds)][0]["arm"][key] for key in keys)]
        for name, seeds in read(part).items()
    ]
    return table(["trial", "area", "final EM", "searches", "stages", "GRPO lr", "offline lr", "pool", "passes", "pairs a question"], lines)


def stages(part: str, arm: str) -> str:
    """The stages of OFSD in the runs of an arm: what the teacher was worth, and what the stage did."""
    lines = []
    for seed, rows in read(part)[arm].items():
        tested = {row["stage"]: row for row in evaluations(rows)}
        kinds = {row["stage"]: row for row in rows if row["kind"] == "kinds"}
        for row in (row for row in rows if row["kind"] == "mining"):
            stage, cells = row["stage"], [seed, row["stage"], row["pairs"]]
            cells += [f"{row[name]:+.2f}" if name in row else "" for name in ("edge", "edge_supported")]
            if row["skipped"]:
                lines.append([*cells, "skipped", *[""] * 6])
                continue
            for name, digits in (("em", 3), ("searches", 2), ("leak", 3)):
                cells.append(f"{tested[f'before {stage}'][name]:.{digits}f} → {tested[stage][name]:.{digits}f}")
            for kind in ("think", "search", "answer", "tag"):
                cells.append(" → ".join(f"{kinds[stage][when].get(kind, 0):.3f}" for when in ("before", "after")))
            lines.append(cells)
    header = "seed, stage, pairs, edge, supported edge, EM, searches, leak, KL think, KL query, KL answer, KL tags"
    return table(header.split(", "), lines)


def ablations() -> str:
    """EM after a stage's last pass, less EM before it, by variant: mean over seeds, and each."""
    found: dict[str, list] = {}
    for seeds in read("ablations").values():
        for rows in seeds.values():
            start = [row for row in evaluations(rows) if row["stage"] == "grpo-1"][-1]
            mined = {row["stage"]: row for row in rows if row["kind"] == "mining"}
            last = {row["stage"]: row for row in evaluations(rows)}  # after its last pass
            for variant, counts in mined.items():
                found.setdefault(variant, []).append((last[variant], start, counts))
    lines = []
    for variant, runs in found.items():
        gains = [row["em"] - start["em"] for row, start, _ in runs]
        edges = [mined["edge"] for *_, mined in runs if "edge" in mined]
        lines.append([
            variant, f"{mean(gains):+.3f}", " ".join(f"{gain:+.3f}" for gain in gains), f"{mean(edges):+.2f}" if edges else "",
            *(f"{mean(row[name] - start[name] for row, start, _ in runs):+.{n}f}" for name, n in (("searches", 2), ("leak", 3))),
        ])  # fmt: skip
    return table(["variant", "EM gained", "each seed", "edge", "searches", "leak"], lines)


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
    axes.set(xlabel="cost, million tokens (forward 1, forward and backward 3)", ylabel="exact match, test questions", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(HERE / f"evidence-{part}.png", dpi=110)


def main() -> None:
    sections = [("Trials from the base, one development seed, validation questions", "tune", trials)]
    sections += [("From the base", "loop", comparison)]
    sections += [("Second round of trials, means of two development seeds, validation questions", "tune-2", trials)]
    sections += [("From the base, second round", "loop-2", comparison), ("Trials from the converged policy", "tune-plateau", trials)]
    sections += [("From a policy that GRPO improves no more", "plateau", comparison)]
    sections += [("From there, with a budget in which GRPO follows the stage", "plateau-2", comparison)]
    sections += [("Stages of OFSD in search-e1, from the base", "loop", lambda part: stages(part, "search-e1"))]
    sections += [("Stages of OFSD in search-e1, second round", "loop-2", lambda part: stages(part, "search-e1"))]
    sections += [("Stages of OFSD from the converged policy", "plateau", lambda part: stages(part, "search-e1"))]
    sections += [("Stages of OFSD from the converged policy, second round", "plateau-2", lambda part: stages(part, "search-e1"))]
    sections += [("One stage, one thing changed, validation questions", "ablations", lambda part: ablations())]
    text = "# Tables\n\nWritten by `python results/tables.py` from `results/evidence/`; what they mean: README.md.\n"
    text += "".join(f"\n## {title}\n\n{make(part)}\n" for title, part, make in sections if read(part))
    (HERE / "evidence.md").write_text(text, encoding="utf-8")
    print(text)
    for part, title in (("loop", "From the base model"), ("loop-2", "From the base model, second round"), ("plateau-2", "From a policy that GRPO improves no more")):
        if read(part) and all(len(seeds) > 1 for seeds in read(part).values()):
            figure(part, title)


if __name__ == "__main__":
    main()
