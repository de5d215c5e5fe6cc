"""GRPO: an answer that beats its group becomes likelier, one that falls short less likely.

Sample G trajectories for a question and reward each: the group's mean is the baseline, so no
value network is needed. Every token that the policy sampled is weighed by its advantage.

Equations (R_i: reward of trajectory i of B; y_it: its token t; m_it: loss_mask; beta: kl_coef)

    A_i     = (R_i - mean(R)) / (std(R) + 1e-6)                      over its group, ddof 1
    rho_it  = exp(log pi_theta(y_it) - log pi_old(y_it))             pi_old sampled y
    l_it    = -min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i)   [+ beta k3_it]
    k3      = exp(x) - x - 1,   x = log pi_ref - log pi_theta        estimates KL(pi_theta|pi_ref)
    loss    = token:   sum_it m_it l_it / sum_it m_it    over the whole batch of an update
              grpo:    mean over i of (sum_t m_it l_it / sum_t m_it)
              dr_grpo: sum_it m_it l_it / (B * L)        L is a constant length

"The loss is zero. Is it learning?" At the first update rho is 1, so the loss is minus the tokens'
mean advantage: 0 at equal lengths. The gradient of l_it, -A_i times that of log pi(y_it), is not.

Deviations from the paper (Search-E1, arXiv 2605.22511)
    1. beta is 0; Search-R1, whose recipe the paper follows, has .001. pi_ref is the first policy.
    2. The paper does not state its normalisation. Training takes `token` (the others are here to
       compare): one division a batch, so the size of the micro-batches changes no gradient.
    3. If beta is 0, trajectories with A = 0 have no gradient. Their forward pass is skipped, but
       their tokens stay in the divisor. Statistics are of the others; kl is of one micro-batch.

    python grpo.py                # a lesson: one group, its advantages, one update
"""

import copy
import math
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

def group_advantages(rewards: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """(Q, G) rewards -> (Q, G) advantages; 0 where the rewards of a group are equal, or G is 1.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]))
    tensor([[ 1.7889, -0.4472, -0.4472, -0.4472, -0.4472]])
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)  # (Q, G)
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (Q, G)
    variance = centred.square().sum(dim=1, keepdim=True) / max(rewards.shape[1] - 1, 1)  # (Q, 1)
    advantages = centred / (variance.sqrt() + eps)  # (Q, G)
    # Rounding leaves three rewards of .9 a hair off their mean: equal ones are exactly 0.
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # (Q, 1)
    return torch.where(equal, 0.0, advantages)  # (Q, G)

def grpo_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor,
    loss_mask: torch.Tensor, *, clip_eps: float = 0.2, ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0, norm: str = "token", max_len: int | None = None,
    num_tokens: float | None = None,
) -> tuple[torch.Tensor, dict]:  # fmt: skip
    """The loss of the equations above, and statistics of it.

    logprobs, old_logprobs, ref_logprobs and loss_mask are (B, T), advantages (B,). Position t
    belongs to response token t; where the mask is 0 anything may stand. num_tokens: the divisor
    of norm "token"; pass the whole batch's count when the batch comes in pieces. max_len: L of
    dr_grpo, T if None. Statistics: clip_frac, the share of tokens whose gradient the clip stops;
    gap, the largest |log rho|; kl, the mean k3, with ref_logprobs. Raises ValueError for an
    unknown norm, and for kl_coef > 0 without ref_logprobs.

    >>> old, mask = torch.log(torch.tensor([[0.5, 0.5]])), torch.ones(1, 2)
    >>> new = torch.log(torch.tensor([[0.7, 0.5]])).requires_grad_()   # rho = 1.4, 1.0
    >>> loss, stats = grpo_loss(new, old, torch.tensor([1.0]), mask)
    >>> loss.backward(); round(loss.item(), 4), stats["clip_frac"], new.grad.tolist()
    (-1.1, 0.5, [[0.0, -0.5]])
    """
    if kl_coef > 0 and ref_logprobs is None:
        raise ValueError("kl_coef > 0 needs ref_logprobs")
    mask, A = loss_mask.bool(), advantages[:, None]  # (B, T), (B, 1)
    count = mask.sum().clamp(min=1)

    # A token whose ratio has moved by eps, the way that A pushes it, is pushed no further.
    log_rho = torch.where(mask, logprobs - old_logprobs, 0.0).clamp(max=80)  # (B, T) e^80 is finite
    rho = log_rho.exp()  # (B, T)
    clipped = rho.clamp(1 - clip_eps, 1 + clip_eps)  # (B, T)
    losses = -torch.minimum(rho * A, clipped * A)  # (B, T)
    is_clipped = mask & (clipped * A < rho * A)  # (B, T)
    gap = log_rho.detach().abs().max().item() if log_rho.numel() else 0.0
    stats = {"clip_frac": (is_clipped.sum() / count).item(), "gap": gap}

    # The penalty for leaving pi_ref.
    if ref_logprobs is not None:
        x = torch.where(mask, ref_logprobs - logprobs, 0.0).clamp(max=80)  # (B, T)
        k3 = x.exp() - x - 1  # (B, T)
        losses = losses + kl_coef * k3 if kl_coef else losses  # (B, T); 0 times infinity is NaN
        stats["kl"] = (k3.detach().sum() / count).item()

    # The environment's tokens do not count (grpo_step and policy_hidden drop them in training).
    losses = torch.where(mask, losses, 0.0)  # (B, T)
    if norm == "token":
        return losses.sum() / (num_tokens or count), stats
    if norm == "grpo":
        return (losses.sum(1) / mask.sum(1).clamp(min=1)).sum() / max(len(losses), 1), stats
    if norm == "dr_grpo":
        return losses.sum() / max(len(losses) * (max_len or losses.shape[1]), 1), stats
    raise ValueError(f"norm is token, grpo or dr_grpo, not {norm!r}")

def grpo_step(model, ref_model, optimizer, trajectories, rewards: torch.Tensor, config) -> dict:
    """One update on a batch of trajectories, question-major, and their rewards (Q, G). config is
    train.py's. Returns the statistics of a step."""
    # 1. Advantages, and the divisor: all tokens of the batch that the policy sampled.
    advantages = group_advantages(rewards).flatten().tolist()  # (Q * G,)
    num_tokens = sum(sum(t.loss_mask) for t in trajectories)
    loss = partial(chunk_loss, config=config, num_tokens=num_tokens)

    # 2. Keep what has a gradient. If nothing has, a few still tell the statistics.
    weighed = zip(trajectories, advantages, strict=True)
    sampled = [(t, A) for t, A in weighed if any(t.loss_mask)]
    batch = [(t, A) for t, A in sampled if A or config.kl_coef] or sampled[: config.micro_batch]
    parts = micro_batches(batch, config.micro_batch, lambda item: len(item[0].response_ids))

    (rank, ranks), stats = rank_and_ranks(), []
    for i in range(rank, len(parts), ranks):
        # 3. The policy's tokens of a micro-batch, with all that the loss needs of them.
        part = [t for t, _ in parts[i]]
        tokens = [
            (token, logprob, A) for t, A in parts[i]
            for token, logprob, m in zip(t.response_ids, t.logprobs, t.loss_mask, strict=True) if m
        ]  # fmt: skip
        ids, old_logprobs, A = (torch.tensor(x, device=model.device) for x in zip(*tokens))
        tensors = [ids, old_logprobs, A]  # (N,) each, in the order of chunk_loss
        # 4. pi_ref's log-probabilities. If they only serve the statistic kl, those of the middle
        #    micro-batch are enough (micro-batches are sorted by length).
        if config.kl_coef or i == len(parts) // 2:
            tensors.append(policy_logprobs(ref_model, policy_hidden(ref_model, part), ids))  # (N,)
        # 5. Forward, loss, backward.
        stats += backward_in_chunks(model, loss, policy_hidden(model, part), *tensors)
    norm = clip_and_update(optimizer, config.max_grad_norm)  # 6. the update itself
    stats = sum(gather(stats), [])  # those of all devices
    return {name: token_mean(stats, name) for name in ("kl", "clip_frac", "entropy")} | {
        "loss": sum(one["loss"] for one in stats), "grad_norm": norm,
        "logprob_gap": max((one["gap"] for one in stats), default=0.0),
    }  # fmt: skip

def chunk_loss(logits, ids, old_logprobs, advantages, ref_logprobs=None, *, config, num_tokens):
    """grpo_loss, by norm token, of n policy tokens: logits (n, V), and (n,) of all else."""
    logprobs = token_logprobs(logits, ids)[:, None]  # (n, 1): n sequences of one token
    loss, stats = grpo_loss(
        logprobs, old_logprobs[:, None], advantages, torch.ones_like(logprobs),
        clip_eps=config.clip_eps, kl_coef=config.kl_coef, num_tokens=num_tokens,
        ref_logprobs=None if ref_logprobs is None else ref_logprobs[:, None],
    )  # fmt: skip
    entropy = token_entropies(logits).sum().item() / max(len(ids), 1)
    return loss, stats | {"loss": loss.item(), "entropy": entropy, "tokens": len(ids)}

def response_logits(model, trajectory) -> torch.Tensor:
    """The plain forward pass, to read and test against: logits of each response token, (T, V)."""
    ids = torch.tensor([trajectory.prompt_ids + trajectory.response_ids], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0].float()  # (S, V)
    return logits[len(trajectory.prompt_ids) - 1 : -1]  # token t is predicted at position t - 1

def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log pi(y_t): logits (..., V) that predict the ids (...) -> (...)."""
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)

@torch.no_grad()
def token_entropies(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of each position's distribution in nats, a statistic: (..., V) -> (...)."""
    logp = torch.log_softmax(logits, dim=-1)  # (..., V)
    finite = logp.clamp(min=torch.finfo(logp.dtype).min)  # so that 0 log 0 is 0
    return -(logp.exp() * finite).sum(-1)

# ---------------------------------------------------------------- machinery

# Memory. With 151,936 words the logits of 4,000 tokens are 2.4 GB. But a loss is a sum over tokens.
# So the output layer takes a chunk at a time, forward and backward; the model goes backward once.

CHUNK = 2**25  # logits at a time: 134 MB a copy

def policy_hidden(model, trajectories: list, prompts: list[list[int]] | None = None):
    """The hidden states (N, H) that predict the tokens of mask 1, one trajectory after another.
    prompts: ids in place of their own (OFSD's teacher). On a CPU the caller's autocast holds."""
    prompts = prompts or [t.prompt_ids for t in trajectories]
    rows = [torch.tensor(prompt + t.response_ids) for prompt, t in zip(prompts, trajectories)]
    # The token at position s is predicted at s - 1, so the mask moves one to the left. Rows are
    # padded on the right, where a causal model never looks.
    masks = [[0] * (len(p) - 1) + t.loss_mask + [0] for p, t in zip(prompts, trajectories)]
    ids = pad_sequence(rows, batch_first=True).to(model.device)  # (B, S)
    where = pad_sequence([torch.tensor(mask) for mask in masks], batch_first=True).bool()  # (B, S)
    model.train(model.is_activation_checkpointing)  # checkpointing works in training mode only
    with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, S, H)
    model.eval()
    return hidden[where.to(hidden.device)]  # (N, H)

def to_logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """The output layer, which some models scale: (N, H) -> (N, V) in float32."""
    config = model.config.get_text_config()
    up, down = (getattr(config, name, None) or 1 for name in ("logit_scale", "logits_scaling"))
    with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
        return model.get_output_embeddings()(hidden).float() * (up / down)

def chunks(model, *tensors: torch.Tensor):
    """Yield the (N, ...) tensors some rows at a time, so that their logits are CHUNK at most."""
    rows = max(1, CHUNK // model.config.get_text_config().vocab_size)
    yield from zip(*(tensor.split(rows) for tensor in tensors))

@torch.no_grad()
def policy_logprobs(model, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """token_logprobs of hidden states, a chunk at a time: (N, H), (N,) -> (N,)."""
    parts = chunks(model, hidden, ids)
    return torch.cat([token_logprobs(to_logits(model, h), i) for h, i in parts])

def backward_in_chunks(model, loss, hidden: torch.Tensor, *tensors: torch.Tensor) -> list[dict]:
    """Backward through the sum of loss(logits, *tensors), a chunk at a time.

    hidden (N, H) is policy_hidden's, with its graph; the tensors are (N, ...). loss gets logits
    (n, V) and as many rows of the tensors, and returns a scalar and its statistics, a dict."""
    stats, gradients = [], []
    for part, *others in chunks(model, hidden.detach(), *tensors):
        value, one = loss(to_logits(model, part.requires_grad_()), *others)
        value.backward()
        stats.append(one)
        gradients.append(part.grad)
    hidden.backward(torch.cat(gradients))  # (N, H)
    return stats

def frozen_copy(model):
    """A copy that is never trained. On a GPU it is rounded to bfloat16, so kl begins above 0."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return frozen.bfloat16() if model.device.type == "cuda" else frozen

def micro_batches(items: list, size: int, length) -> list[list]:
    """Parts of similar length, so there is little padding. No gradient depends on their size."""
    items = sorted(items, key=length)
    return [items[i : i + size] for i in range(0, len(items), size)]

@torch.autocast("cpu", enabled=False)
def check_training(model) -> None:
    """Raise ValueError if a training pass does not see the logits that sampling sees."""
    tried = SimpleNamespace(prompt_ids=[1], response_ids=[2] * 40, loss_mask=[1] * 40)
    logits, plain = to_logits(model, policy_hidden(model, [tried])), response_logits(model, tried)
    gap = (logits.softmax(-1) - plain.softmax(-1)).abs().sum(-1).max() / 2  # total variation
    if not gap < (0.005 if model.device.type == "cpu" else 0.1):  # bfloat16: .06 with SmolLM2
        raise ValueError(f"its probabilities are off by {gap:.2g} when it is trained")
    logits.sum().backward()  # which must work, too
    model.zero_grad()

# Several devices. Under torchrun every rank holds all weights and the whole batch, and trains on
# its share of the micro-batches. The sum of the ranks' gradients is the gradient of one device.

def rank_and_ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def clip_and_update(optimizer, max_norm: float) -> float:
    """Add up the ranks' gradients, clip, step. Returns the norm before the clip. If that is 0 or
    not finite nothing changes: momentum must not move, and NaN must not reach the weights."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters if dist.is_initialized() else ():
        if parameter.grad is None:  # this rank had no micro-batch
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    if 0 < norm < math.inf:
        optimizer.step()
    optimizer.zero_grad()
    return norm

def gather(value) -> list:
    """Every rank's value."""
    values = [value] * rank_and_ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values

def token_mean(stats: list[dict], name: str) -> float:
    """The mean over tokens of a statistic, where it was measured."""
    measured = [one for one in stats if name in one]
    tokens = sum(one["tokens"] for one in measured)
    return sum(one[name] * one["tokens"] for one in measured) / max(tokens, 1)

if __name__ == "__main__":
    from micro.lessons import grpo_lesson, run_script
    run_script(grpo_lesson)
