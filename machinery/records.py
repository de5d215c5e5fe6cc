"""What a run keeps of GRPO to be looked at: a group, before and after an update.

tools/trace.py shows it. Nothing here changes what a run learns: no gradient is taken,
and no random number is drawn.
"""

import torch

from grpo import policy_hidden, policy_logprobs
from machinery.text import decode
from rollout import Trajectory


def first_varied(rewards: list[list[float]]) -> int:
    """The number of the first group whose rewards differ, or of the first one.

    >>> first_varied([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    1
    """
    for number, group_rewards in enumerate(rewards):
        if len(set(group_rewards)) > 1:
            return number
    return 0


@torch.no_grad()
def token_moves(model, tokenizer, trajectory: Trajectory) -> list[list]:
    """[text, log pi as it was sampled, log pi now] of each token of the policy, and
    [text] of the environment's."""
    ids = torch.tensor(trajectory.response_ids, device=model.device)  # (T,)
    sampled = torch.tensor(trajectory.loss_mask, device=model.device) == 1  # (T,)
    hidden = policy_hidden(model, [trajectory])  # (M, H)
    now = iter(policy_logprobs(model, hidden, ids[sampled]).tolist())
    moves = []
    for place, token in enumerate(trajectory.response_ids):
        move = [decode(tokenizer, [token])]
        if trajectory.loss_mask[place]:
            move += [round(trajectory.logprobs[place], 4), round(next(now), 4)]
        moves.append(move)
    return moves
