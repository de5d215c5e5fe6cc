"""GRPO: above-average trajectories become likelier, below-average ones less likely.

Sample G trajectories for a question and reward each. The mean of the group is the
baseline, so no value network is needed, and every token that the policy sampled is
pushed up or down by the advantage of its trajectory.

Equations. A batch has B trajectories, and the policy sampled N of their tokens. R_i is
the reward of trajectory i, y_it its token t, m_it its loss_mask, and beta is kl_coef.

    A_i     = (R_i - mean(R)) / (std(R) + 1e-6)                  over its group, ddof 1
    rho_it  = exp(log pi_theta(y_it) - log pi_old(y_it))         pi_old sampled y
    l_it    = -min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i)  [+ beta k3_it]
    k3      = exp(x) - 1 - x    x = log pi_ref - log pi_theta; estimates KL to pi_ref
    loss    = sum_it w_it l_it,  where the weight w_it is 0 where m_it is 0, and else
              token:   1 / N                  a mean over all tokens of the update
              grpo:    1 / (B sum_t m_it)     a mean over trajectories of their means
              dr_grpo: 1 / (B L)              L is the longest response allowed

"The loss is near zero. Is it learning?" At the first update on a batch, by default the
only one, rho is 1, so the loss is minus a weighted sum of advantages. This tells
nothing about progress: the gradient of l_it is -A_i times that of log pi(y_it).

Start reading at grpo_step. In its part 3 loss.backward() computes dloss/dh for the
hidden states h, and hidden.backward() carries it through the model. optimizer.step() is
in part 4. The reward is rewards_of in eval.py; new_optimizer in train.py makes the
optimizer.

Deviations from the paper (Search-E1, arXiv 2605.22511)
    1. beta is 0. Search-R1, whose recipe the paper follows, has .001. pi_ref is the
       first policy, and no copy of it is kept if beta is 0.
    2. The paper does not state its normalisation. The default is `token`.
    3. If beta is 0, a trajectory with A = 0 has no gradient, so its forward pass is
       skipped. Its tokens still count in N. Entropy and clip_frac are means over the
       tokens of the trajectories that were passed through the model.

The same on one page, without chunks and micro-batches: lessons/plain.py.

    python -m lessons.grpo        # a lesson: one group, its advantages, one update
"""

import math
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from machinery.devices import arithmetic
from machinery.ranks import my_share, sum_gradients
from machinery.token_statistics import TokenStatistics
from rollout import Trajectory


def group_advantages(rewards: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """(Q, G) rewards -> (Q, G) advantages, in standard deviations of their group.

    They are 0 if all rewards of a group are equal, and if G is 1.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]))
    tensor([[ 1.7889, -0.4472, -0.4472, -0.4472, -0.4472]])
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)  # (Q, G)
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (Q, G)
    squares = centred.square().sum(dim=1, keepdim=True)  # (Q, 1)
    variance = squares / max(rewards.shape[1] - 1, 1)  # (Q, 1)
    advantages = centred / (variance.sqrt() + eps)  # (Q, G)
    # Rounding leaves three rewards of .9 a hair off their mean. Make it exactly 0.
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # (Q, 1)
    return torch.where(equal, 0.0, advantages)  # (Q, G)


def token_weights(
    loss_mask: torch.Tensor,
    *,
    norm: str = "token",
    max_len: int | None = None,
    num_tokens: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """w_it of the equations: how much each token counts in the loss. (B, T) -> (B, T).

    norm is token, grpo or dr_grpo. max_len is L of dr_grpo, and defaults to T.
    num_tokens is N of token; pass the whole batch's count if you pass a part of the
    batch. Raises ValueError for another norm.

    >>> token_weights(torch.tensor([[1, 0, 1], [1, 1, 0]])).tolist()
    [[0.25, 0.0, 0.25], [0.25, 0.25, 0.0]]
    """
    mask = loss_mask.to(dtype)  # (B, T)
    sequences, length = mask.shape
    if norm == "token":
        divisor = mask.sum() if num_tokens is None else torch.as_tensor(num_tokens)
    elif norm == "grpo":
        divisor = sequences * mask.sum(dim=1, keepdim=True)  # (B, 1)
    elif norm == "dr_grpo":
        divisor = torch.as_tensor(sequences * (max_len or length))
    else:
        raise ValueError(f"norm is token, grpo or dr_grpo, not {norm!r}")
    return mask / divisor.clamp(min=1)  # (B, T)


class TokenLosses(NamedTuple):
    """The terms of the loss, for each of M tokens."""

    loss: torch.Tensor  # (M,) l_it, before its weight
    log_ratio: torch.Tensor  # (M,) log rho_it
    is_clipped: torch.Tensor  # (M,) true where the clip stops the gradient
    kl: torch.Tensor | None  # (M,) k3_it, if there is a pi_ref


def token_losses(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_eps: float = 0.2,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> TokenLosses:
    """l_it of the equations for M tokens of the policy; all tensors are (M,)."""
    # The clamp prevents an overflow: e^80 is 5e34, and float32 ends at 3e38.
    log_ratio = (logprobs - old_logprobs).clamp(max=80)  # (M,)
    ratio = log_ratio.exp()  # (M,) rho

    # Once rho has moved by eps in the direction of A, the token's gradient is 0.
    objective = ratio * advantages  # (M,)
    clipped_objective = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages  # (M,)
    loss = -torch.minimum(objective, clipped_objective)  # (M,)
    is_clipped = clipped_objective < objective  # (M,)

    # The penalty for leaving pi_ref. expm1 is exact even if x is small.
    kl = None
    if ref_logprobs is not None:
        x = (ref_logprobs - logprobs).clamp(max=80)  # (M,)
        kl = torch.expm1(x) - x  # (M,)
    if kl_coef > 0:
        loss = loss + kl_coef * kl  # (M,)
    return TokenLosses(loss, log_ratio, is_clipped, kl)


def grpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    clip_eps: float = 0.2,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    norm: str = "token",
    max_len: int | None = None,
    num_tokens: float | None = None,
) -> tuple[torch.Tensor, dict]:
    """The loss for a whole padded batch, and statistics of it: the plain form.

    Training does not call it. grpo_step computes the same from the same parts, a chunk
    of tokens at a time, and a test compares the two.
    logprobs, old_logprobs, ref_logprobs and loss_mask are (B, T), advantages (B,).
    Position t belongs to response token t. Where the mask is 0 any value will do. For
    norm, max_len and num_tokens see token_weights. Three statistics:

    clip_frac  the share of the tokens whose gradient the clip stops
    gap        the largest |log rho|, which is logprob_gap in the logs
    kl         the mean k3, if ref_logprobs are given

    Raises ValueError for an unknown norm, and for kl_coef > 0 without ref_logprobs.

    >>> old, mask = torch.log(torch.tensor([[0.5, 0.5]])), torch.ones(1, 2)
    >>> new = torch.log(torch.tensor([[0.7, 0.5]])).requires_grad_()   # rho = 1.4, 1.0
    >>> loss, stats = grpo_loss(new, old, torch.tensor([1.0]), mask)
    >>> loss.backward(); round(loss.item(), 4), stats["clip_frac"], new.grad.tolist()
    (-1.1, 0.5, [[0.0, -0.5]])
    """
    if kl_coef > 0 and ref_logprobs is None:
        raise ValueError("kl_coef > 0 needs ref_logprobs")
    mask = loss_mask.bool()  # (B, T), M of them true
    weights = token_weights(
        mask, norm=norm, max_len=max_len, num_tokens=num_tokens, dtype=logprobs.dtype
    )  # (B, T)
    if ref_logprobs is not None:
        ref_logprobs = ref_logprobs[mask]  # (M,)
    tokens = token_losses(
        logprobs[mask],
        old_logprobs[mask],
        advantages[:, None].expand(mask.shape)[mask],
        clip_eps=clip_eps,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
    )  # (M,) each
    loss = (weights[mask] * tokens.loss).sum()

    count = max(len(tokens.loss), 1)
    largest = max(tokens.log_ratio.abs().tolist(), default=0.0)
    stats = {"clip_frac": tokens.is_clipped.sum().item() / count, "gap": largest}
    if tokens.kl is not None:
        stats["kl"] = tokens.kl.sum().item() / count
    return loss, stats


def grpo_step(
    model,
    optimizer: torch.optim.Optimizer,
    trajectories: list[Trajectory],
    rewards: torch.Tensor,
    *,
    ref_model=None,
    clip_eps: float = 0.2,
    kl_coef: float = 0.0,
    norm: str = "token",
    max_len: int | None = None,
    micro_batch: int = 20,
    max_grad_norm: float = 1.0,
) -> dict[str, float]:
    """One update from B trajectories, grouped by question, and their rewards (Q, G).

    ref_model is pi_ref, required if kl_coef is above 0. micro_batch trajectories share
    a forward pass, which changes memory and time but not the gradient. Returns the
    statistics of the step: loss, clip_frac, entropy, logprob_gap, tokens_trained,
    grad_norm, and kl if kl_coef is above 0.
    """
    # 1. The advantage of each trajectory, and the weight of each token in the loss.
    advantages = group_advantages(rewards).flatten()  # (B,)
    loss_mask = padded([t.loss_mask for t in trajectories], torch.bool)  # (B, T)
    weights = token_weights(loss_mask, norm=norm, max_len=max_len)  # (B, T)

    statistics = TokenStatistics(with_kl=kl_coef > 0)
    needed = with_gradient(advantages, loss_mask, kl_coef, at_least=micro_batch)
    lengths = [len(t.response_ids) for t in trajectories]
    for rows in my_share(micro_batches(lengths, micro_batch, among=needed)):
        # 2. The policy's M tokens of a micro-batch, one trajectory after another.
        batch = [trajectories[row] for row in rows]
        tokens = policy_tokens(batch, advantages[rows], weights[rows], model.device)
        if kl_coef > 0:
            ref_hidden = policy_hidden(ref_model, batch)  # (M, H) no gradient to pi_ref
            ref_logprobs = policy_logprobs(ref_model, ref_hidden, tokens.ids)  # (M,)
            tokens = tokens._replace(ref_logprobs=ref_logprobs)

        # 3. Forward. The graph is cut at the hidden states h, so that the large logits
        #    exist for n tokens at a time: dloss/dtheta = dloss/dh * dh/dtheta.
        hidden = policy_hidden(model, batch)  # (M, H)
        leaf = hidden.detach().requires_grad_()  # (M, H)
        for chunk in token_chunks(model, len(leaf)):
            part = tokens.chunk(chunk)  # (n,) each
            logits = to_logits(model, leaf[chunk])  # (n, V)
            losses = token_losses(
                token_logprobs(logits, part.ids),
                part.old_logprobs,
                part.advantages,
                clip_eps=clip_eps,
                ref_logprobs=part.ref_logprobs,
                kl_coef=kl_coef,
            )  # (n,) each
            loss = (part.weights * losses.loss).sum()
            loss.backward()  # dloss/dh into leaf.grad, and the output layer's gradient
            statistics.add(loss, losses, token_entropies(logits))
        hidden.backward(leaf.grad)  # the decoder's gradient, by the chain rule

    # 4. Clip the gradient, and step. If its norm is 0 or not finite, skip the step:
    #    Adam would move on its momentum, or write NaN.
    parameters = optimizer.param_groups[0]["params"]
    sum_gradients(parameters)  # over devices
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if 0 < grad_norm < math.inf:
        optimizer.step()
    optimizer.zero_grad()
    return {**statistics.summary(), "grad_norm": grad_norm}


class PolicyTokens(NamedTuple):
    """The M tokens that the policy sampled in some trajectories, one after another."""

    ids: torch.Tensor  # (M,)
    old_logprobs: torch.Tensor  # (M,) log pi_old, as they were sampled
    advantages: torch.Tensor  # (M,) those of their trajectories
    weights: torch.Tensor  # (M,) w_it
    ref_logprobs: torch.Tensor | None = None  # (M,) log pi_ref, if beta is above 0

    def chunk(self, part: slice) -> "PolicyTokens":
        """A slice of these tokens, n of them."""
        ref_logprobs = self.ref_logprobs
        if ref_logprobs is not None:
            ref_logprobs = ref_logprobs[part]  # (n,)
        return PolicyTokens(
            self.ids[part],
            self.old_logprobs[part],
            self.advantages[part],
            self.weights[part],
            ref_logprobs,
        )


def policy_tokens(
    trajectories: list[Trajectory],
    advantages: torch.Tensor,
    weights: torch.Tensor,
    device,
) -> PolicyTokens:
    """What the loss needs from tokens of mask 1. advantages (B,), weights (B, T)."""
    loss_mask = padded([t.loss_mask for t in trajectories], torch.bool)  # (B, T)
    ids = padded([t.response_ids for t in trajectories], torch.long)  # (B, T)
    old_logprobs = padded([t.logprobs for t in trajectories], torch.float32)  # (B, T)
    advantages = advantages[:, None].expand(loss_mask.shape)  # (B, T)
    weights = weights[:, : loss_mask.shape[1]]  # (B, T), without the padding of others
    return PolicyTokens(
        ids[loss_mask].to(device),
        old_logprobs[loss_mask].to(device),
        advantages[loss_mask].to(device),
        weights[loss_mask].to(device),
    )


def with_gradient(
    advantages: torch.Tensor, loss_mask: torch.Tensor, kl_coef: float, at_least: int
) -> list[int]:
    """The indices of the trajectories that have a gradient: (B,), (B, T).

    If none has one, these are the first `at_least` ones, so that there are statistics.
    """
    sampled = loss_mask.any(dim=1)  # (B,)
    has_gradient = sampled & ((advantages != 0) | (kl_coef > 0))  # (B,)
    if has_gradient.any():
        return has_gradient.nonzero().flatten().tolist()
    return sampled.nonzero().flatten().tolist()[:at_least]


# ----------------------------------------------- what both losses need from the model


def response_logits(model, trajectory: Trajectory) -> torch.Tensor:
    """The plain forward pass: the logits that predict each response token, (T, V).

    Training does not call it. Tests compare policy_hidden and to_logits with it.
    """
    ids = trajectory.prompt_ids + trajectory.response_ids
    ids = torch.tensor([ids], device=model.device)  # (1, S)
    logits = model(input_ids=ids, use_cache=False).logits[0].float()  # (S, V)
    # Token t is predicted at the position before it.
    return logits[len(trajectory.prompt_ids) - 1 : -1]  # (T, V)


def policy_hidden(
    model, trajectories: list[Trajectory], prompts: list[list[int]] | None = None
) -> torch.Tensor:
    """The hidden states (M, H) that predict the M tokens of mask 1, with their graph.

    They stand one trajectory after another. prompts are ids that replace the prompts of
    the trajectories, as for OFSD's teacher.
    """
    if prompts is None:
        prompts = [trajectory.prompt_ids for trajectory in trajectories]
    sequences = []
    masks = []
    for trajectory, prompt in zip(trajectories, prompts, strict=True):
        sequences.append(prompt + trajectory.response_ids)
        # The token at position s is predicted at s - 1: the mask moves one to the left.
        masks.append([0] * (len(prompt) - 1) + trajectory.loss_mask + [0])
    # Padding stands on the right, where a causal model never looks.
    ids = padded(sequences, torch.long).to(model.device)  # (B, S)
    mask = padded(masks, torch.bool).to(model.device)  # (B, S), M of them true

    # Checkpointing of activations works in training mode only. Dropout would be active
    # then, but read_model has removed it.
    model.train(model.is_activation_checkpointing)
    with arithmetic(model):
        output = model.base_model(input_ids=ids, use_cache=False)
    model.eval()
    return output.last_hidden_state[mask]  # (M, H)


def to_logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """The output layer, which some models scale: (M, H) -> (M, V) in float32."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1
    divisor = getattr(config, "logits_scaling", None) or 1
    with arithmetic(model):
        logits = model.get_output_embeddings()(hidden)  # (M, V)
    return logits.float() * (scale / divisor)  # (M, V)


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log pi(y_t): logits (..., V) that predict the ids (...) -> (...)."""
    chosen = logits.gather(-1, ids[..., None])[..., 0]  # (...)
    return chosen - logits.logsumexp(-1)  # (...)


@torch.no_grad()
def token_entropies(logits: torch.Tensor) -> torch.Tensor:
    """The entropy of each distribution in nats, a statistic: (..., V) -> (...)."""
    logprobs = torch.log_softmax(logits, dim=-1)  # (..., V)
    finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)  # so that 0 log 0 is 0
    return -(logprobs.exp() * finite).sum(-1)  # (...)


@torch.no_grad()
def policy_logprobs(model, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """token_logprobs of hidden states without a gradient: (M, H), (M,) -> (M,)."""
    logprobs = []
    for chunk in token_chunks(model, len(hidden)):
        logits = to_logits(model, hidden[chunk])  # (n, V)
        logprobs.append(token_logprobs(logits, ids[chunk]))  # (n,)
    return torch.cat(logprobs)  # (M,)


# With a vocabulary of 151,936 the logits of 4,000 tokens are 2.4 GB. So at most this
# many logits are computed at a time: 134 MB per copy.
CHUNK = 2**25


def token_chunks(model, count: int) -> list[slice]:
    """Slices of `count` tokens, each with at most CHUNK logits.

    Without any token there is one empty slice, so that the loss still has a graph.
    """
    size = max(1, CHUNK // model.config.get_text_config().vocab_size)
    return [slice(start, start + size) for start in range(0, max(count, 1), size)]


def micro_batches(
    lengths: list[int], size: int, among: list[int] | None = None
) -> list[list[int]]:
    """Batches of sequence numbers, sorted by length, so that they need little padding.

    among: only these numbers; None takes all.

    >>> micro_batches([30, 10, 31, 11], 2)
    [[1, 3], [0, 2]]
    """
    if among is None:
        among = range(len(lengths))
    order = sorted(among, key=lambda number: lengths[number])
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded(rows: list[list], dtype: torch.dtype) -> torch.Tensor:
    """B lists as one tensor (B, T), with zeros after the shorter ones.

    >>> padded([[1, 2], [3]], torch.long).tolist()
    [[1, 2], [3, 0]]
    """
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    return pad_sequence(tensors, batch_first=True)
