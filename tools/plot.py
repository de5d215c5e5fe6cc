"""Curves of runs: EM on the test questions after each stage, and GRPO's reward.

    python -m tools.plot runs/a runs/b    # in the terminal

With matplotlib (requirements-extra.txt) it also draws a picture, curves.png in the
first folder. A block of the reward is the mean of five steps.
"""

from pathlib import Path
from statistics import mean
from typing import NamedTuple

from machinery.errors import BadInput
from machinery.json_lines import read_jsonl
from machinery.terminal import Parser, printable, run_script
from tools.pictures import new_figure

BLOCKS = " ▁▂▃▄▅▆▇█"


class Evaluation(NamedTuple):
    """The test after a stage."""

    stage: str
    minutes: float
    em: float


class Curves(NamedTuple):
    """What is drawn of a run."""

    folder: Path
    tests: list[Evaluation]
    rewards: list[float]  # GRPO's mean rewards, each of up to five steps


def read_curves(folder: Path) -> Curves:
    """BadInput where the folder is no run's, or its first test is not over."""
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise BadInput(f"{folder} is no run's folder: it has no metrics.jsonl")
    tests = []
    rewards = []
    for row in read_jsonl(log):
        if row["kind"] == "eval":
            tests.append(Evaluation(row["stage"], row["time_s"] / 60, row["em"]))
        elif row["kind"] == "step" and row.get("reward") is not None:
            rewards.append(row["reward"])
    if not tests:
        raise BadInput(f"{folder} has no test yet: let it run on")
    means = [mean(rewards[i : i + 5]) for i in range(0, len(rewards), 5)]
    return Curves(folder, tests, means)


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
    stages = "  ".join(f"{test.stage} {test.em:.3f}" for test in run.tests)
    print(printable(str(run.folder)))
    print(f"  EM      |{bars([test.em for test in run.tests])}|  {printable(stages)}")
    if run.rewards:
        ends = f"{run.rewards[0]:.2f} to {run.rewards[-1]:.2f}"
        print(f"  reward  |{bars(run.rewards)}|  {ends}")
    else:
        print("  no step of GRPO")


def draw(runs: list[Curves], target: Path) -> None:
    """EM against minutes as a picture. Raises BadInput without matplotlib."""
    with new_figure(7, 4) as figure:
        axes = figure.subplots()
        lines = []
        names = []
        for run in runs:
            minutes = [test.minutes for test in run.tests]
            ems = [test.em for test in run.tests]
            lines += axes.plot(minutes, ems, marker="o")
            names.append(printable(run.folder.absolute().name))
        axes.set(xlabel="minutes", ylabel="exact match, test questions", ylim=(0, 1))
        axes.grid(alpha=0.3)
        # By itself a legend leaves out names that begin with "_".
        axes.legend(lines, names)
        figure.savefig(target, dpi=110)


def main() -> None:
    parser = Parser(description="Draw the curves of runs.")
    parser.add_argument("folders", type=Path, nargs="+", help="folders of runs")
    folders = parser.parse_args().folders
    runs = [read_curves(folder) for folder in folders]
    for run in runs:
        print_curves(run)
    target = folders[0] / "curves.png"
    try:
        draw(runs, target)
    except BadInput as error:
        print(f"no picture: {error}")
    else:
        print(target)


if __name__ == "__main__":
    run_script(main)
