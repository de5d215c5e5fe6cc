"""Evidence: does distillation between stages of GRPO pay, at equal cost, and why?

    python -m experiments.evidence base-1     # trials of every arm
    python -m experiments.evidence base-2     # more trials, after what the first showed
    python -m experiments.evidence loop       # the arms from the base model
    python -m experiments.evidence converge   # a policy that GRPO improves no more
    python -m experiments.evidence plateau-1  # trials from there
    python -m experiments.evidence plateau-2  # more trials, with larger pools
    python -m experiments.evidence plateau    # the arms from there
    python -m experiments.evidence ablations  # a stage of OFSD, changed in one thing
    python -m experiments.evidence agent-1    # trials with an agent's references
    python -m experiments.evidence agent-2    # more of them, with a foreign agent's
    python -m experiments.evidence agent      # the arms, also with such references
    python -m experiments.evidence retention  # the same, trained on half the relations
    python -m experiments.tables              # tables and figures of what these leave

Trials and ablations are tested on validation questions, and the arms on test questions:
each part has its own, and each is used once. arms.py says what the arms are, stages.py
what they do and how their cost is counted.

Run it from the repository's root. Stop it and start it again at will: a finished run is
a file in results/evidence/ and is not run again; an unfinished one is a folder in
runs/evidence/ and begins anew. To use two cores start it twice, with OMP_NUM_THREADS=1,
once with --worker 1 --workers 2, and once with --worker 2 --workers 2. With --arm NAME
it runs only this arm of the part: docs/teaching.md says what that is good for.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from experiments.ablations import run_ablations
from experiments.arms import (
    ABLATED,
    AGENT,
    AGENT_TRIALS,
    AGENT_TRIALS_2,
    ARMS,
    BASE_1,
    BASE_2,
    CONVERGE,
    CONVERGED,
    PLATEAU,
    PLATEAU_1,
    PLATEAU_2,
    RETENTION,
    Arm,
)
from experiments.stages import result_of, run_arm
from machinery.models import save_model
from machinery.terminal import Parser, run_script


class Job(NamedTuple):
    """One run, and what does it: work(name, arm, seed, split)."""

    name: str  # of the result, results/evidence/NAME.jsonl.gz
    arm: Arm
    seed: int
    split: str  # of the questions that test it, micro/evidence-SPLIT.jsonl
    work: Callable

    def arm_name(self) -> str:
        """As the name of the result has it: "grpo" of loop/grpo-10."""
        return Path(self.name).name.removesuffix(f"-{self.seed}")


def converge(name: str, arm: Arm, seed: int, split: str) -> None:
    """Run the arm, and keep its policy: the plateau's arms begin with it."""
    run = run_arm(name, arm, seed, split)
    save_model(run.model, run.tokenizer, Path(CONVERGED))


def is_done(job: Job) -> bool:
    """Its result is there; of `converge` also its policy, which git does not keep."""
    if job.work is converge and not Path(CONVERGED).exists():
        return False
    return result_of(job.name).exists()


def trials(part: str, arms: dict[str, dict[str, Arm]], seed: int) -> list[Job]:
    """A run of every trial, on validation questions."""
    jobs = []
    for kind, arms_of_kind in arms.items():
        for trial, arm in arms_of_kind.items():
            name = f"trials/{part}/{kind}-{trial}-{seed}"
            jobs.append(Job(name, arm, seed, "validation", run_arm))
    return jobs


def comparison(
    part: str, arms: dict[str, Arm], seeds: Iterable[int], split: str
) -> list[Job]:
    """A run of every arm with every seed."""
    jobs = []
    for seed in seeds:
        for kind, arm in arms.items():
            jobs.append(Job(f"{part}/{kind}-{seed}", arm, seed, split, run_arm))
    return jobs


def ablations(seeds: Iterable[int]) -> list[Job]:
    return [
        Job(f"ablations/{seed}", ABLATED, seed, "validation", run_ablations)
        for seed in seeds
    ]


PARTS = {
    "base-1": trials("base-1", BASE_1, seed=100),
    "base-2": trials("base-2", BASE_2, seed=100),
    "loop": comparison("loop", ARMS, range(10, 30), split="test"),
    "converge": [Job("converge", CONVERGE, 102, "validation", converge)],
    "plateau-1": trials("plateau-1", PLATEAU_1, seed=103),
    "plateau-2": trials("plateau-2", PLATEAU_2, seed=103),
    "plateau": comparison("plateau", PLATEAU, range(40, 50), split="test-2"),
    "ablations": ablations(range(200, 205)),
    "agent-1": trials("agent-1", AGENT_TRIALS, seed=104),
    "agent-2": trials("agent-2", AGENT_TRIALS_2, seed=104),
    "agent": comparison("agent", AGENT, range(60, 70), split="test-3"),
    "retention": comparison("retention", RETENTION, range(70, 80), split="retention"),
}


def main() -> None:
    parser = Parser(description="The runs of the evidence, those that are missing.")
    parser.add_argument("part", choices=list(PARTS), help="which runs")
    parser.add_argument("--arm", help="only the runs of this arm")
    parser.add_argument("--worker", type=int, default=1, help="number of this process")
    parser.add_argument("--workers", type=int, default=1, help="processes in all")
    args = parser.parse_args()
    if not 1 <= args.worker <= args.workers:
        parser.error("--worker is a number from 1 to --workers")
    jobs = PARTS[args.part]
    if args.arm is not None:
        jobs = [job for job in jobs if job.arm_name() == args.arm]
        if not jobs:
            parser.error(f"{args.part} has no arm of the name {args.arm}")
    for job in jobs[args.worker - 1 :: args.workers]:
        if not is_done(job):
            print(job.name, time.strftime("%H:%M:%S"), flush=True)
            job.work(job.name, job.arm, job.seed, job.split)


if __name__ == "__main__":
    run_script(main)
