"""Supervised training: a model imitates demonstrations, token by token.

Three trainings share this one update: the start of a real model (tools/start.py),
the warm start of the micro model (micro/make.py), and fine-tuning on references, which
OFSD is compared with (experiments/stages.py).
"""

import math
from dataclasses import replace

import torch

from grpo import (
    micro_batches,
    padded,
    policy_hidden,
    to_logits,
    token_chunks,
    token_logprobs,
)
from machinery.passages import Passage
from machinery.ranks import gather, my_share, sum_gradients
from machinery.text import encode
from rollout import Trajectory, observation_ids


def imitation_step(
    model,
    optimizer,
    trajectories: list[Trajectory],
    *,
    micro_batch: int,
    max_grad_norm: float = 1.0,
    weights: list[list[float]] | None = None,
) -> dict[str, float]:
    """One update: make the tokens of these trajectories likelier.

        loss = -sum_it w_it log pi_theta(y_it) / sum_it w_it      over the whole batch

    weights: a list for each trajectory, with a weight w_it for each response token, at
    least 0. By default they are the loss masks: all tokens of the policy weigh 1, and
    those of the environment 0. A token of weight 0 costs no logits. micro_batch: the
    number of sequences a forward pass; no gradient depends on it.

    Returns "loss", in nats a token, and "grad_norm" before it is clipped.
    """
    # 1. Tokens and their weights. Where a weight is above 0 the token is learned.
    if weights is None:
        weights = [trajectory.loss_mask for trajectory in trajectories]
    weights = padded(weights, torch.float32)  # (B, T)
    ids = padded([t.response_ids for t in trajectories], torch.long)  # (B, T)
    learned = weights > 0  # (B, T)
    weights = weights / weights.sum()  # (B, T)
    examples = []
    lengths = []
    for trajectory, mask in zip(trajectories, learned.int().tolist(), strict=True):
        length = len(trajectory.response_ids)
        examples.append(replace(trajectory, loss_mask=mask[:length]))
        lengths.append(len(trajectory.prompt_ids) + length)

    batch_loss = 0.0
    wanted = learned.any(dim=1).nonzero().flatten().tolist()
    for rows in my_share(micro_batches(lengths, micro_batch, among=wanted)):
        # 2. The M learned tokens of a micro-batch, one trajectory after another.
        batch = [examples[row] for row in rows]
        batch_ids = ids[rows][learned[rows]].to(model.device)  # (M,)
        batch_weights = weights[rows][learned[rows]].to(model.device)  # (M,)

        # 3. Hidden states of all of them, then logits and loss of a chunk at a time.
        #    The chunks' gradients meet in leaf.grad, and go through the model once.
        hidden = policy_hidden(model, batch)  # (M, H)
        leaf = hidden.detach().requires_grad_()  # (M, H)
        for chunk in token_chunks(model, len(leaf)):
            logits = to_logits(model, leaf[chunk])  # (n, V)
            logprobs = token_logprobs(logits, batch_ids[chunk])  # (n,)
            loss = -(batch_weights[chunk] * logprobs).sum()
            loss.backward()
            batch_loss += loss.item()
        hidden.backward(leaf.grad)

    # 4. The update, unless there is nothing to learn, or the gradient is not finite.
    parameters = optimizer.param_groups[0]["params"]
    sum_gradients(parameters)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if 0 < grad_norm < math.inf:
        optimizer.step()
    optimizer.zero_grad()
    return {"loss": sum(gather(batch_loss)), "grad_norm": grad_norm}


def as_trajectory(
    tokenizer,
    steps: list[str | list[Passage]],
    question: str,
    prompt_ids: list[int],
    max_observation_tokens: int = 512,
) -> Trajectory:
    """A demonstration in the form that rollouts have.

    steps: what the agent writes (a str) and what it is shown (a list of passages), in
    turn. The passages are cut to max_observation_tokens, as a rollout cuts them.
    """
    trajectory = Trajectory(question, prompt_ids)
    for step in steps:
        if isinstance(step, str):
            ids = encode(tokenizer, step)
            # Nobody sampled these tokens, so they have no log-probability of their own.
            trajectory.extend(ids, logprobs=[0.0] * len(ids))
        else:
            trajectory.extend(observation_ids(tokenizer, step, max_observation_tokens))
            trajectory.passages.append(step)
    return trajectory
