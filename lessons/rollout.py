"""One trajectory of micro/model: who wrote what, and how likely the policy found it.

    python -m lessons.rollout
    python -m lessons.rollout --logprobs               # a token a line, with its log pi
    python -m lessons.rollout --seed 2 --question "Who is mayor of Bevor Bridge?"

The code is in rollout.py.
"""

import sys
import time

from lessons.common import World, counted, load_world
from machinery.terminal import Parser, paint, printable, run_script
from machinery.text import decode
from rollout import Trajectory, rollout, spans

QUESTION = "Who or what is the birthplace of the mayor of Bevor Bridge?"
READING_PACE = 0.03  # seconds a token, on a terminal
GREEN = "32"  # the policy's colour
BLUE = "34"  # the environment's


def main() -> None:
    parser = Parser(description="Play one trajectory of micro/model.")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--logprobs", action="store_true", help="a token a line, with its log pi"
    )
    args = parser.parse_args()

    world = load_world()
    trajectory = rollout(
        world.model,
        world.tokenizer,
        world.index,
        [args.question],
        seed=args.seed % 2**32,
    )[0]

    print(f"question: {printable(args.question)}\n")
    print("Sampled by the policy (loss_mask 1), written by the environment (0):\n")
    if args.logprobs:
        list_tokens(world, trajectory)
    else:
        play(world, trajectory)
    show_end(trajectory)


def play(world: World, trajectory: Trajectory) -> None:
    """Print the text, span by span, in the colours of who wrote it."""
    for sampled, ids in spans(trajectory):
        print(speaker(sampled), end="")
        colour = GREEN if sampled else BLUE
        for token in ids:
            text = printable(decode(world.tokenizer, [token]))
            print(paint(text, colour), end="", flush=True)
            if sys.stdout.isatty():
                time.sleep(READING_PACE)
        print()


def list_tokens(world: World, trajectory: Trajectory) -> None:
    """Print a token a line, with its log-probability if the policy sampled it."""
    position = 0
    for sampled, ids in spans(trajectory):
        print(speaker(sampled))
        for token in ids:
            text = printable(decode(world.tokenizer, [token]))
            logprob = "-"
            if sampled:
                logprob = f"{trajectory.logprobs[position]:.3f}"
            print(f"    {text!r:24}{logprob:>8}")
            position += 1


def speaker(sampled: bool) -> str:
    return "policy> " if sampled else "environment> "


def show_end(trajectory: Trajectory) -> None:
    """How many searches and tokens it took, why it ended, and with which answer."""
    sampled = sum(trajectory.loss_mask)
    total = len(trajectory.loss_mask)
    print(f"\n{counted(len(trajectory.queries), 'search')}; ", end="")
    print(f"{sampled} of {total} tokens are the policy's; ", end="")
    print(f"it ended by: {trajectory.finish_reason}; ", end="")
    print(f"answer: {printable(str(trajectory.answer))}")


if __name__ == "__main__":
    run_script(main)
