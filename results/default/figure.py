"""The default run's EM and searches after each stage, five seeds: figure.png, from seed*.log.

    python results/default/figure.py    # it wants matplotlib (requirements-extra.txt)
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent


def final_table(log: Path) -> dict[str, list[float]]:
    """stage -> [EM, searches], from the table that a run prints at its end."""
    head, *lines = log.read_text(encoding="utf-8").split(" test questions;")[1].splitlines()[1:]
    names = re.split(r" {2,}", head.strip())
    rows = [line.split() for line in lines[: lines.index("")]]
    return {row[0]: [float(row[names.index(name)]) for name in ("EM", "searches")] for row in rows}


def values() -> dict[str, dict[str, list[float]]]:
    return {log.stem: final_table(log) for log in sorted(HERE.glob("seed*.log"))}


def main() -> None:
    from matplotlib import pyplot

    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    picture, sides = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for seed, table in values().items():
        for number, axes in enumerate(sides):
            points = [row[number] for row in table.values()]
            axes.plot(list(table), points, marker="o", label=seed.replace("seed", "seed "))
    for axes, title in zip(sides, ("exact match on test questions", "searches a question")):
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.3)
    sides[0].set_ylim(0, 1)
    sides[1].set_ylim(0, 4)
    sides[0].legend(loc="lower right")
    # A test reads what was drawn, and compares it with the logs.
    picture.savefig(HERE / "figure.png", dpi=120, metadata={"Description": json.dumps(values())})


if __name__ == "__main__":
    main()
