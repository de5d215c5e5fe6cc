"""What a step of GRPO logs about its trajectories, whatever it learns from them."""

from statistics import fmean as mean


def batch_stats(trajectories: list, rewards) -> dict[str, float]:
    """Means over a batch of Q groups of G trajectories. rewards: a tensor (Q, G).

    reward     mean reward
    zero_var   share of the groups whose rewards are all equal: they teach GRPO nothing
    length     tokens of a response, with what the environment wrote
    searches   searches of a trajectory
    no_answer  share of the trajectories without an answer
    repeats    share of the trajectories that ask the same query twice
    """
    first_rewards = rewards[:, :1]  # (Q, 1)
    equal = (rewards == first_rewards).all(dim=1)  # (Q,)
    lengths = []
    searches = []
    unanswered = []
    repeated = []
    for trajectory in trajectories:
        lengths.append(len(trajectory.response_ids))
        searches.append(len(trajectory.queries))
        unanswered.append(trajectory.answer is None)
        different = {query.lower() for query in trajectory.queries}
        repeated.append(len(different) < len(trajectory.queries))
    return {
        "reward": rewards.mean().item(),
        "zero_var": equal.float().mean().item(),
        "length": mean(lengths),
        "searches": mean(searches),
        "no_answer": mean(unanswered),
        "repeats": mean(repeated),
    }
