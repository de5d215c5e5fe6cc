"""One pair of micro/model: both prompts, and where the teacher disagrees.

    python -m lessons.ofsd
    python -m lessons.ofsd --top 3    # and the most likely tokens of both there

The code is in ofsd.py.
"""

from dataclasses import replace

import torch

from eval import exact_match
from grpo import response_logits
from lessons.common import Group, World, counted, load_world, sample_groups
from machinery.errors import BadInput
from machinery.terminal import Parser, paint, run_script
from machinery.text import decode
from ofsd import Pair, mine_pairs, token_divergences

MARKED = 0.05  # nats from which on a token is marked
LARGE = 0.5
BOLD = "1"
PLAIN = "0"
YELLOW = "33"
RED = "31"
BLUE = "34"
MAX_PROMPT = 400  # tokens of a privileged prompt


def main() -> None:
    parser = Parser(description="One pair of micro/model, and its divergences.")
    parser.add_argument(
        "--top",
        type=int,
        default=0,
        metavar="N",
        help="the N most likely tokens of both at each marked token",
    )
    args = parser.parse_args()
    if args.top < 0:
        parser.error("--top is at least 0")
    world = load_world()
    pair = choose_pair(world)

    show_prompt(world, "student", pair.student.prompt_ids)
    show_prompt(world, "teacher", pair.prompt)
    values = token_divergences(world.model, pair)  # one a token, None where mask 0
    show_divergences(world, pair, values)
    show_sum(values)
    if args.top:
        show_alternatives(world, pair, values, args.top)


def choose_pair(world: World) -> Pair:
    """The first pair whose group mostly went wrong, and whose student searched once.

    Where most go wrong, the reason is a word that the policy likes. In a trajectory of
    one search it is easily seen.
    """
    for group in sample_groups(world, hops=1):
        pairs, _ = mine_pairs(
            world.model,
            world.tokenizer,
            [group.question],
            group.trajectories,
            group.rewards,
            MAX_PROMPT,
        )
        if pairs and count_correct(group) <= 2 and len(pairs[0].student.queries) == 1:
            return pairs[0]
    raise BadInput("no group of the training questions gives such a pair")


def count_correct(group: Group) -> int:
    golden_answers = group.question["golden_answers"]
    correct = 0
    for trajectory in group.trajectories:
        if exact_match(trajectory.answer, golden_answers):
            correct += 1
    return correct


def show_prompt(world: World, reader: str, ids: list[int]) -> None:
    print(paint(f"---- the {reader}'s prompt ({len(ids)} tokens)", BOLD))
    print(decode(world.tokenizer, ids).strip() + "\n")


def show_divergences(world: World, pair: Pair, values: list[float | None]) -> None:
    """The student's trajectory, with the divergence behind each token that has one."""
    title = paint("---- the student's own trajectory", BOLD)
    answer = pair.question["golden_answers"][0]
    print(f"{title}, wrong: {pair.student.answer}, not {answer}.")
    print("A number in braces is the divergence from the teacher at that token, in")
    print(f"nats. It is shown from {MARKED} on.")
    print("The environment's tokens have none.\n")
    for token, value in zip(pair.student.response_ids, values, strict=True):
        mark = ""
        if is_marked(value):
            mark = f"{{{value:.2f}}}"
        text = decode(world.tokenizer, [token])
        print(paint(text, colour_of(value)) + mark, end="")
    print()


def is_marked(value: float | None) -> bool:
    """A divergence is never below 0. What exercise 7 puts in its place can be."""
    return value is not None and abs(value) >= MARKED


def colour_of(value: float | None) -> str:
    if value is None:  # the environment wrote it
        return BLUE
    if not is_marked(value):
        return PLAIN
    if abs(value) < LARGE:
        return YELLOW
    return RED


def show_sum(values: list[float | None]) -> None:
    """The mean divergence, and how much of the sum the marked tokens have."""
    sampled = [value for value in values if value is not None]
    marked = [value for value in sampled if is_marked(value)]
    mean = sum(sampled) / len(sampled)
    print(f"\n{counted(len(sampled), 'token')}, mean divergence {mean:.3f}: the loss.")
    print(
        f"Their sum is {sum(sampled):.2f} nats. {counted(len(marked), 'token')} ",
        end="",
    )
    print(f"with a number: {sum(marked):.2f} nats.")


def show_alternatives(
    world: World, pair: Pair, values: list[float | None], top: int
) -> None:
    """At each marked token, what the teacher and the student find most likely."""
    # The same response stands behind both prompts.
    as_read_by_teacher = replace(pair.student, prompt_ids=pair.prompt)
    with torch.no_grad():
        student_logits = response_logits(world.model, pair.student)  # (T, V)
        teacher_logits = response_logits(world.model, as_read_by_teacher)  # (T, V)

    for position, value in enumerate(values):
        if is_marked(value):
            token = pair.student.response_ids[position]
            text = decode(world.tokenizer, [token])
            print(f"\nat {text!r}, {value:.2f} nats")
            show_likeliest(world, "teacher", teacher_logits[position], top)
            show_likeliest(world, "student", student_logits[position], top)


def show_likeliest(world: World, name: str, logits: torch.Tensor, top: int) -> None:
    """The tokens with the highest probabilities by logits (V,)."""
    best = logits.softmax(-1).topk(min(top, len(logits)))
    print(f"    {name}:", end="")
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    for token, probability in pairs:
        print(f"  {decode(world.tokenizer, [token])!r} {probability:.3f}", end="")
    print()


if __name__ == "__main__":
    run_script(main)
