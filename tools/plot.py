"""Curves of runs: EM on the test questions after each stage, and GRPO's reward.

    python tools/plot.py runs/a runs/b    # in the terminal; with matplotlib also runs/a/curves.png

A block of the reward is the mean of five steps.
"""

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from retriever import BadInput, read_jsonl, run_script  # noqa: E402

BLOCKS = " ▁▂▃▄▅▆▇█"


def bars(values: list[float]) -> str:
    """Values of 0 to 1 as a line of blocks.

    >>> bars([0.0, 0.5, 1.0])
    ' ▄█'
    """
    return "".join(BLOCKS[round(value * 8)] for value in values)


def curves(folder: Path) -> tuple[list[tuple[str, float, float]], list[float]]:
    """(stage, minutes, EM) of each evaluation, and GRPO's mean rewards."""
    rows = list(read_jsonl(folder / "metrics.jsonl"))
    rewards = [row["reward"] for row in rows if row["kind"] == "step" and "reward" in row]
    tested = [row for row in rows if row["kind"] == "eval"]
    evaluations = [(row["stage"], row["time_s"] / 60, row["em"]) for row in tested]
    return evaluations, [mean(rewards[i : i + 5]) for i in range(0, len(rewards), 5)]


def figure(runs: dict[Path, tuple], target: Path) -> None:
    from matplotlib import pyplot

    picture, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for folder, (evaluations, _) in runs.items():
        _, minutes, ems = zip(*evaluations)
        axes.plot(minutes, ems, marker="o", label=folder.name)
    axes.set(xlabel="minutes", ylabel="exact match, test questions", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(target, dpi=110)


def main() -> None:
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders or any(not (folder / "metrics.jsonl").is_file() for folder in folders):
        raise BadInput("give folders of runs: python tools/plot.py runs/a runs/b")
    runs = {folder: curves(folder) for folder in folders}
    for folder, (evaluations, rewards) in runs.items():
        stages = "  ".join(f"{stage} {em:.3f}" for stage, _, em in evaluations)
        print(f"{folder}\n  EM      |{bars([em for *_, em in evaluations])}|  {stages}")
        ends = f"|  {rewards[0]:.2f} to {rewards[-1]:.2f}" if rewards else ""
        print(f"  reward  |{bars(rewards)}{ends}" if rewards else "  no step of GRPO")
    try:
        figure(runs, folders[0] / "curves.png")
        print(folders[0] / "curves.png")
    except ImportError:
        print("no picture: matplotlib is not installed (requirements-extra.txt)")


if __name__ == "__main__":
    run_script(main)
