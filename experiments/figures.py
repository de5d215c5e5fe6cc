"""The figures of the default run and of the first pretrained model, stage by stage.

    python -m experiments.figures

It writes results/default/figure.png from the logs seed*.log (EM and searches), and
results/first-model/figure.png from seed*/metrics.jsonl (EM by samples, and greedy). It
needs matplotlib (requirements-extra.txt).
"""

import json
import re
from pathlib import Path

from machinery.json_lines import read_jsonl
from machinery.terminal import run_script
from tools.pictures import new_figure

RESULTS = Path(__file__).resolve().parent.parent / "results"
DEFAULT = RESULTS / "default"
FIRST_MODEL = RESULTS / "first-model"


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


def first_models(folder: Path = FIRST_MODEL) -> dict[str, dict[str, list[float]]]:
    """{seed: {stage: [EM by samples, greedy EM]}} of tools/first_model.py's runs."""
    seeds = {}
    for path in sorted(folder.glob("seed*/metrics.jsonl")):
        stages = {}
        for row in read_jsonl(path):
            if row["kind"] == "eval":
                stages[row["stage"]] = [row["em_sampled"], row["em"]]
        seeds[path.parent.name] = stages
    return seeds


def draw(
    tables: dict[str, dict[str, list[float]]],
    left_title: str,
    right_title: str,
    right_top: float,
    target: Path,
) -> None:
    """Two panels with a line for each seed. tables: two numbers a stage, by seed."""
    with new_figure(8, 3, spines=False) as figure:
        left, right = figure.subplots(1, 2)
        for seed, stages in tables.items():
            label = seed.replace("seed", "seed ")
            names = list(stages)
            lefts = [number for number, _ in stages.values()]
            rights = [number for _, number in stages.values()]
            left.plot(names, lefts, marker="o", label=label)
            right.plot(names, rights, marker="o", label=label)
        left.set_title(left_title)
        left.set_ylim(0, 1)
        left.legend(loc="lower right")
        right.set_title(right_title)
        right.set_ylim(0, right_top)
        for axes in (left, right):
            axes.grid(axis="y", alpha=0.3)

        # A test reads what was drawn, and compares it with the logs.
        drawn = {"Description": json.dumps(tables)}
        figure.savefig(target, dpi=120, metadata=drawn)


def main() -> None:
    draw(
        final_tables(),
        left_title="exact match on test questions",
        right_title="searches a question",
        right_top=4,
        target=DEFAULT / "figure.png",
    )
    draw(
        first_models(),
        left_title="exact match of samples",
        right_title="exact match, greedy",
        right_top=1,
        target=FIRST_MODEL / "figure.png",
    )


if __name__ == "__main__":
    run_script(main)
