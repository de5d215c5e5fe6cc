"""The figure of the default run: EM and searches after each stage, by seed.

    python -m experiments.figures    # writes results/default/figure.png from seed*.log

It needs matplotlib (requirements-extra.txt).
"""

import json
import re
from pathlib import Path

from machinery.terminal import run_script
from tools.pictures import new_figure

DEFAULT = Path(__file__).resolve().parent.parent / "results/default"


def final_table(log: Path) -> dict[str, list[float]]:
    """{stage: [EM, searches]}, from the table that a run prints at its end."""
    text = log.read_text(encoding="utf-8")
    table = text.split(" test questions. edge:")[1]
    header, *lines = table.splitlines()[2:]  # the first two explain the columns
    columns = re.split(r" {2,}", header.strip())
    em_column = columns.index("EM")
    searches_column = columns.index("searches")
    stages = {}
    for line in lines:
        if not line:
            break
        cells = line.split()
        stage = cells[0]
        em = float(cells[em_column])
        searches = float(cells[searches_column])
        stages[stage] = [em, searches]
    return stages


def final_tables() -> dict[str, dict[str, list[float]]]:
    """final_table of each seed."""
    return {log.stem: final_table(log) for log in sorted(DEFAULT.glob("seed*.log"))}


def draw(tables: dict[str, dict[str, list[float]]]) -> None:
    with new_figure(8, 3, spines=False) as figure:
        left, right = figure.subplots(1, 2)
        for seed, stages in tables.items():
            label = seed.replace("seed", "seed ")
            names = list(stages)
            ems = [em for em, _ in stages.values()]
            searches = [count for _, count in stages.values()]
            left.plot(names, ems, marker="o", label=label)
            right.plot(names, searches, marker="o", label=label)
        left.set_title("exact match on test questions")
        left.set_ylim(0, 1)
        left.legend(loc="lower right")
        right.set_title("searches a question")
        right.set_ylim(0, 4)
        for axes in (left, right):
            axes.grid(axis="y", alpha=0.3)

        # A test reads what was drawn, and compares it with the logs.
        drawn = {"Description": json.dumps(tables)}
        figure.savefig(DEFAULT / "figure.png", dpi=120, metadata=drawn)


def main() -> None:
    draw(final_tables())


if __name__ == "__main__":
    run_script(main)
