"""One group of micro/model: rewards, advantages, weights, and what one update moves.

    python -m lessons.grpo

The code is in grpo.py.
"""

import torch

from grpo import group_advantages, grpo_step
from lessons.common import Group, World, load_world, sample_groups, words_tried
from machinery.errors import BadInput
from machinery.records import sampled_logprobs
from machinery.terminal import Parser, run_script
from rollout import Trajectory


def main() -> None:
    parser = Parser(description="One group of micro/model, and one update on it.")
    parser.parse_args()
    world = load_world()
    group = choose_group(world)
    rewards = torch.tensor([group.rewards])  # (1, G): one question

    before = log_probabilities(world, group.trajectories)
    optimizer = torch.optim.AdamW(world.model.parameters(), lr=1e-4, weight_decay=0.0)
    stats = grpo_step(
        world.model, optimizer, group.trajectories, rewards, micro_batch=5
    )
    after = log_probabilities(world, group.trajectories)

    answer = group.question["golden_answers"][0]
    print(f"question: {group.question['question']}  (answer: {answer})\n")
    advantages = group_advantages(rewards)[0].tolist()
    show_table(group, advantages, before, after)
    show_update(group.trajectories, advantages, stats)
    show_moves(advantages, before, after)


def choose_group(world: World) -> Group:
    """The first group of two hops whose rewards differ: equal ones teach nothing."""
    for group in sample_groups(world, hops=2):
        if len(set(group.rewards)) > 1:
            return group
    raise BadInput("no group of the training questions has two different rewards")


def log_probabilities(world: World, trajectories: list[Trajectory]) -> list[float]:
    """log pi of each whole trajectory: the sum over the tokens with mask 1."""
    sums = []
    for trajectory in trajectories:
        logprobs = sampled_logprobs(world.model, trajectory)  # (M,)
        sums.append(logprobs.sum().item())
    return sums


def show_table(
    group: Group, advantages: list[float], before: list[float], after: list[float]
) -> None:
    """A line a trajectory. "A w" is its advantage times the weight of a token in the
    loss, which is 1 / the number of all tokens."""
    num_tokens = sum(sum(trajectory.loss_mask) for trajectory in group.trajectories)
    print(f"{'answer':17}{'reward':>7}{'advantage':>10}{'tokens':>7}", end="")
    print(f"{'A w of a token':>16}{'log pi':>10}{'after':>10}   words it tried")
    for i, trajectory in enumerate(group.trajectories):
        print(f"{trajectory.answer!s:17}{group.rewards[i]:7g}", end="")
        print(f"{advantages[i]:10.3f}{sum(trajectory.loss_mask):7d}", end="")
        print(f"{advantages[i] / num_tokens:16.5f}", end="")
        print(f"{before[i]:10.3f}{after[i]:10.3f}", end="")
        print(f"   {', '.join(words_tried(trajectory))}")


def show_update(
    trajectories: list[Trajectory], advantages: list[float], stats: dict
) -> None:
    """The loss beside what it should be, and the norm of the gradient."""
    total = 0.0
    num_tokens = 0
    for trajectory, advantage in zip(trajectories, advantages, strict=True):
        total += advantage * sum(trajectory.loss_mask)
        num_tokens += sum(trajectory.loss_mask)
    print(f"\nThe loss was {stats['loss']:+.3f}. ", end="")
    print(f"Minus the mean advantage of all tokens is {-total / num_tokens:+.3f}.")
    print(f"The norm of the gradient was {stats['grad_norm']:.3f}.")


def show_moves(
    advantages: list[float], before: list[float], after: list[float]
) -> None:
    """Say what the update moved where: up or down, above and below the group's mean."""
    better = 0
    better_up = 0
    worse = 0
    worse_down = 0
    for advantage, old, new in zip(advantages, before, after, strict=True):
        if advantage > 0:
            better += 1
            if new > old:
                better_up += 1
        if advantage < 0:
            worse += 1
            if new < old:
                worse_down += 1
    print("One update moved log pi as the columns say. Of the trajectories better than")
    print(f"their group's mean, {better_up} of {better} became more likely;", end=" ")
    print(f"of those worse, {worse_down} of {worse} became less likely.")


if __name__ == "__main__":
    run_script(main)
