"""Curves of runs: EM on the test questions after each stage, and GRPO's reward.

    python -m tools.plot runs/a runs/b              # in the terminal, and curves.png
    python -m tools.plot runs/a --x tokens --out a.png --csv a.csv

With matplotlib (requirements-extra.txt) it also draws a picture, by default curves.png
in the first folder. In the terminal a block of the reward is the mean of five steps.
"""

import csv
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from machinery.errors import BadInput
from machinery.json_lines import read_jsonl
from machinery.terminal import Parser, printable, run_script
from tools.pictures import new_figure

BLOCKS = " ▁▂▃▄▅▆▇█"
AXES = {  # what --x can be, and what the axis says
    "steps": "steps of GRPO and OFSD",
    "tokens": "tokens sampled in training",
    "minutes": "minutes",
}


class Point(NamedTuple):
    """A test after a stage, or a step of GRPO."""

    kind: str  # test or step
    stage: str
    steps: int  # of all stages so far
    tokens: int | None  # that training has sampled so far; None if it was not counted
    minutes: float
    value: float  # EM, or the mean reward of the step


class Curves(NamedTuple):
    """What is drawn of a run."""

    folder: Path
    tests: list[Point]
    steps: list[Point]


def read_curves(folder: Path) -> Curves:
    """BadInput where the folder is no run's, or its first test is not over."""
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise BadInput(f"{folder} is no run's folder: it has no metrics.jsonl")
    tests = []
    steps = []
    step_count = 0
    tokens = 0
    for row in read_jsonl(log):
        kind = row["kind"]
        if kind == "step":
            step_count += 1
        if kind != "eval":  # what a test samples is no part of training
            sampled = row.get("tokens_sampled")
            if tokens is None or sampled is None:
                tokens = None
            else:
                tokens += sampled
        point = Point(
            kind="step",
            stage=row["stage"],
            steps=step_count,
            tokens=tokens,
            minutes=row.get("time_s", 0.0) / 60,
            value=row.get("reward"),
        )
        if kind == "eval":
            tests.append(point._replace(kind="test", value=row["em"]))
        elif kind == "step" and point.value is not None:
            steps.append(point)
    if not tests:
        raise BadInput(f"{folder} has no test yet: let it run on")
    return Curves(folder, tests, steps)


# ---------------------------------------------------------------- in the terminal


def means_of_five(steps: list[Point]) -> list[float]:
    """The mean reward of each five steps; the last ones may be fewer."""
    rewards = [step.value for step in steps]
    return [mean(rewards[i : i + 5]) for i in range(0, len(rewards), 5)]


def bars(values: list[float]) -> str:
    """Values as a line of blocks, on a scale from 0 to 1, or wider if they are.

    >>> bars([0.0, 0.5, 1.0])
    ' ▄█'
    >>> bars([-1.0, 0.0, 3.0])
    ' ▂█'
    """
    low = min([0.0, *values])
    high = max([1.0, *values])
    line = ""
    for value in values:
        share = (value - low) / (high - low)
        line += BLOCKS[round(share * 8)]
    return line


def print_curves(run: Curves) -> None:
    stages = "  ".join(f"{test.stage} {test.value:.3f}" for test in run.tests)
    print(printable(str(run.folder)))
    print(
        f"  EM      |{bars([test.value for test in run.tests])}|  {printable(stages)}"
    )
    rewards = means_of_five(run.steps)
    if rewards:
        ends = f"{rewards[0]:.2f} to {rewards[-1]:.2f}"
        print(f"  reward  |{bars(rewards)}|  {ends}")
    else:
        print("  no step of GRPO")


# ---------------------------------------------------------------- a picture, a table


def names_of(runs: list[Curves]) -> list[str]:
    """The name of each run's folder; with its path, if several have that name."""
    names = [run.folder.absolute().name for run in runs]
    counts = Counter(names)
    shown = []
    for run, name in zip(runs, names, strict=True):
        shown.append(printable(name if counts[name] == 1 else str(run.folder)))
    return shown


def places_of(points: list[Point], x: str) -> list[float]:
    """Where points stand on the axis x, one of AXES."""
    return [getattr(point, x) for point in points]


def check_axis(runs: list[Curves], x: str) -> None:
    """Raise BadInput for a run that has not counted what the axis shows."""
    for run in runs:
        points = [*run.tests, *run.steps]
        if None in places_of(points, x):
            raise BadInput(f"{run.folder} did not count its {x}: try --x steps")


def draw(runs: list[Curves], x: str, target: Path) -> None:
    """EM above and the reward below, against x. Raises BadInput without matplotlib."""
    with new_figure(8, 6.4) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        lines = []
        for run in runs:
            ems = [test.value for test in run.tests]
            lines += upper.plot(places_of(run.tests, x), ems, marker="o")
            for stage in dict.fromkeys(step.stage for step in run.steps):
                steps = [step for step in run.steps if step.stage == stage]
                rewards = [step.value for step in steps]
                colour = lines[-1].get_color()
                lower.plot(places_of(steps, x), rewards, color=colour, linewidth=1.2)
        upper.set(ylabel="exact match, test questions", ylim=(0, 1.12))
        lower.set(xlabel=AXES[x], ylabel="reward of a GRPO step")
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
        name_stages(upper, runs[0].tests, x)
        # By itself a legend leaves out names that begin with "_".
        names = names_of(runs)
        columns = min(4, 60 // max(map(len, names)))
        above = (0, 1)
        upper.legend(
            lines, names, ncols=max(columns, 1), loc="lower left", bbox_to_anchor=above
        )
        try:
            figure.savefig(target, dpi=110)
        except ValueError as error:
            raise BadInput(f"cannot draw {target}: {error}") from error


def name_stages(axes, tests: list[Point], x: str) -> None:
    """The names of a run's stages at the top. If they are many, some are left out."""
    every = -(-len(tests) // 8)
    for test in tests[::every]:
        place = (getattr(test, x), 1.03)
        axes.annotate(printable(test.stage), place, ha="center", fontsize=9)
        axes.axvline(place[0], color="black", alpha=0.2, linewidth=0.8, ymax=0.9)


def write_csv(runs: list[Curves], target: Path) -> None:
    """All points of all runs, a line each."""
    with target.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["run", *Point._fields])
        for run, name in zip(runs, names_of(runs), strict=True):
            for point in [*run.tests, *run.steps]:
                table.writerow([name, *point])


def main() -> None:
    parser = Parser(description="Draw the curves of runs.")
    parser.add_argument("folders", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--x", choices=AXES, default="steps", help="the axis")
    parser.add_argument(
        "--out", type=Path, help="the picture (default: curves.png in the first folder)"
    )
    parser.add_argument("--csv", type=Path, help="a table of all points")
    args = parser.parse_args()
    runs = [read_curves(folder) for folder in args.folders]
    check_axis(runs, args.x)
    for run in runs:
        print_curves(run)
    if args.csv:
        write_csv(runs, args.csv)
        print(args.csv)
    target = args.out or args.folders[0] / "curves.png"
    try:
        draw(runs, args.x, target)
    except BadInput as error:
        if args.out:  # it was asked for
            raise
        print(f"no picture: {error}")
    else:
        print(target)


if __name__ == "__main__":
    run_script(main)
