"""What a run keeps to be looked at, token by token.

Of GRPO: how an update moved a trajectory. Of OFSD: what the teacher would rather say.
tools/trace.py shows both. Nothing here changes what a run learns: no gradient is taken,
and no random number is drawn.
"""

from typing import NamedTuple

import torch

from grpo import policy_hidden, policy_logprobs, to_logits
from machinery.text import decode
from ofsd import Pair, divergences_of, read_by_both
from rollout import Trajectory

OBJECTION = 0.05  # nats


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
def sampled_logprobs(model, trajectory: Trajectory) -> torch.Tensor:
    """log pi of each token that was sampled, as the model is now: (M,)."""
    ids = torch.tensor(trajectory.response_ids, device=model.device)  # (T,)
    sampled = torch.tensor(trajectory.loss_mask, device=model.device) == 1  # (T,)
    hidden = policy_hidden(model, [trajectory])  # (M, H)
    return policy_logprobs(model, hidden, ids[sampled])


def token_moves(model, tokenizer, trajectory: Trajectory) -> list[list]:
    """[text, log pi as it was sampled, log pi now] of each token of the policy, and
    [text] of the environment's."""
    now = iter(sampled_logprobs(model, trajectory).tolist())
    moves = []
    for place, token in enumerate(trajectory.response_ids):
        move = [decode(tokenizer, [token])]
        if trajectory.loss_mask[place]:
            move += [round(trajectory.logprobs[place], 4), round(next(now), 4)]
        moves.append(move)
    return moves


def sums_of(tokens: list[list]) -> tuple[float, float]:
    """log pi of a trajectory before and after an update: sums over its token_moves."""
    numbers = [token[1:] for token in tokens if len(token) == 3]
    before = sum(old for old, _ in numbers)
    after = sum(new for _, new in numbers)
    return before, after


class Reading(NamedTuple):
    """What the teacher says about the student's trajectory of a pair."""

    divergences: list[float | None]  # token_divergences
    objections: list[list]


@torch.no_grad()
def reading_of(model, tokenizer, pair: Pair) -> Reading:
    """Divergences, and what the teacher would rather say where D is above OBJECTION.

    An objection is [place in the response, the token that the student wrote, the
    teacher's three most likely ones, in order]. Each token is [text, p_T, p_S].
    """
    student_hidden, teacher_hidden = read_by_both(model, pair)  # (M, H) each
    values = divergences_of(model, pair, student_hidden, teacher_hidden)
    sampled = [place for place, value in enumerate(values) if value is not None]
    objections = []
    for row, place in enumerate(sampled):
        if values[place] <= OBJECTION:
            continue
        p_s = to_logits(model, student_hidden[row]).softmax(-1)  # (V,)
        p_t = to_logits(model, teacher_hidden[row]).softmax(-1)  # (V,)
        written = pair.student.response_ids[place]
        preferred = p_t.topk(3).indices.tolist()
        objection = [place]
        for token in [written, *preferred]:
            text = decode(tokenizer, [token])
            objection.append([text, p_t[token].item(), p_s[token].item()])
        objections.append(objection)
    return Reading(values, objections)
