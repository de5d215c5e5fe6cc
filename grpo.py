"""GRPO: group-relative advantages and the clipped, masked, token-normalised policy loss.

Sample G answers to one question; what is better than its siblings becomes likelier, what is
worse less likely. No value network: the group's mean is the baseline.

Equations (R_i reward of trajectory i of a group, m its loss_mask, rho its probability ratio)

    A_i     = (R_i - mean(R)) / (std(R) + 1e-6)     std with ddof 1; Dr. GRPO: no division
    rho_it  = exp(log pi_theta(y_it) - log pi_old(y_it))             pi_old sampled y
    l_it    = -min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i)  [+ beta k3_it]
    k3      = exp(x) - x - 1,   x = log pi_ref - log pi_theta        at least 0, 0 where equal
    loss    = token:   sum_it m_it l_it / sum_it m_it    over the whole optimisation batch
              grpo:    mean over i of (sum_t m_it l_it / sum_t m_it)
              dr_grpo: sum_it m_it l_it / (B * L)        L a constant length

"The loss is zero, is it learning?" At the first update of a batch rho = 1, and the loss is
minus the mean advantage of the policy's tokens: 0 where the responses of a group are equally
long, and near 0 otherwise. It says nothing. Its gradient is -A_i times the gradient of
log pi(y_it), which is not 0: watch the reward.

Deviations from the paper
    1. beta is 0 by default; Search-R1, whose recipe the paper follows, uses .001. pi_ref is
       the policy that the run started from (`start` in the code).
    2. The paper does not state its normalisation. Ours is `token`: one division for the whole
       batch, so the gradient does not depend on the micro-batch size.
    3. Trajectories of a group without variance have A = 0. With beta = 0 they have no gradient,
       and grpo_step skips their forward pass; their tokens stay in the divisor, as in the plain
       formula. So kl, entropy, clip_frac and the gap are over the groups with variance; where no
       group has any, the first micro-batch stands in. And kl is then of a quarter of the
       micro-batches: the start policy's pass is a fourth of an update.

    python grpo.py                # one group, its advantages, one update
"""

import copy
import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer


def group_advantages(rewards: torch.Tensor, eps: float = 1e-6, by_std: bool = True) -> torch.Tensor:
    """(Q, G) rewards -> (Q, G) advantages; 0 where all rewards of a group are equal or G = 1.
    by_std: divide by the group's standard deviation, which lifts groups that are almost of one
    mind: one right among five counts 1.79 instead of .8, two among five 1.10 instead of .6.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]))
    tensor([[ 1.7889, -0.4472, -0.4472, -0.4472, -0.4472]])
    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]), by_std=False)
    tensor([[ 0.8000, -0.2000, -0.2000, -0.2000, -0.2000]])
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)  # (Q, G)
    if rewards.shape[1] == 1:
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (Q, G)
    if by_std:
        centred = centred / (rewards.std(dim=1, keepdim=True) + eps)  # (Q, G), ddof 1
    # Rounding leaves three rewards of .9 a hair off their mean: a group of equals is exactly 0.
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # (Q, 1)
    return torch.where(equal, 0.0, centred)  # (Q, G)


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log pi(y_t): (..., V) logits that predict the ids (...) -> (...). Training never holds the
    logits of a whole batch: it calls this and the next function a chunk at a time (below)."""
    return logits.gather(-1, ids[..., None])[..., 0] - logits.logsumexp(-1)


@torch.no_grad()
def token_entropies(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each position's distribution, a statistic: (..., V) -> (...). 0 log 0 is 0."""
    logp = torch.log_softmax(logits, dim=-1)  # (..., V)
    return -logp.exp().mul_(logp.clamp_(min=torch.finfo(logp.dtype).min)).sum(-1)


def grpo_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, loss_mask: torch.Tensor, *,
    clip_eps: float = 0.2, ref_logprobs: torch.Tensor | None = None, kl_coef: float = 0.0,
    norm: str = "token", max_len: int | None = None, num_tokens: float | None = None,
) -> tuple[torch.Tensor, dict]:  # fmt: skip
    """The loss of the equations above, and statistics of it.

    logprobs, old_logprobs, loss_mask (and ref_logprobs): (B, T); advantages: (B,). Position t
    belongs to response token t. num_tokens: the divisor of norm "token"; pass the whole
    batch's count when it comes in pieces (the other two norms want a batch whole). max_len: L of
    dr_grpo (None: T). Masked positions may hold anything. stats: clip_frac (share of policy
    tokens whose gradient the clip stops), kl (mean k3, where ref_logprobs are given), gap
    (largest |log rho|). Raises ValueError for an unknown norm, and for kl_coef > 0 without ref_logprobs.

    >>> old, mask = torch.log(torch.tensor([[0.5, 0.5]])), torch.ones(1, 2)
    >>> new = torch.log(torch.tensor([[0.7, 0.5]])).requires_grad_()   # rho = 1.4, 1.0
    >>> loss, stats = grpo_loss(new, old, torch.tensor([1.0]), mask)
    >>> loss.backward(); round(loss.item(), 4), stats["clip_frac"], new.grad.tolist()
    (-1.1, 0.5, [[0.0, -0.5]])
    """
    if kl_coef > 0 and ref_logprobs is None:
        raise ValueError("kl_coef > 0 needs ref_logprobs")
    inside = loss_mask.bool()  # (B, T)
    signal = advantages[:, None]  # (B, 1)
    log_ratio = torch.where(inside, logprobs - old_logprobs, 0.0)  # (B, T)
    ratio = log_ratio.exp()  # (B, T)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)  # (B, T)
    losses = -torch.minimum(ratio * signal, clipped * signal)  # (B, T)
    count = inside.sum().clamp(min=1)
    stopped = inside & (clipped * signal < ratio * signal)  # (B, T)
    stats = {"clip_frac": (stopped.sum() / count).item(), "gap": log_ratio.detach().abs().max().item()}
    if ref_logprobs is not None:
        x = torch.where(inside, ref_logprobs - logprobs, 0.0)  # (B, T)
        k3 = x.exp() - x - 1  # (B, T)
        losses = losses + kl_coef * k3  # (B, T)
        stats["kl"] = (k3.detach().sum() / count).item()
    losses = torch.where(inside, losses, 0.0)  # (B, T)
    if norm == "token":
        return losses.sum() / (num_tokens or count), stats
    if norm == "grpo":
        return (losses.sum(1) / inside.sum(1).clamp(min=1)).mean(), stats
    if norm == "dr_grpo":
        return losses.sum() / (len(losses) * (max_len or losses.shape[1])), stats
    raise ValueError(f"norm is token, grpo or dr_grpo, not {norm!r}")


# ---------------------------------------------------------------- in bounded memory

# With a vocabulary of 151,936 the logits of 4,000 tokens are 2.4 GB, and a loss holds several
# copies. But both losses are sums over the policy's tokens, so training does for positions what
# micro-batches do for sequences: one chunk of hidden states at a time goes through the output
# layer, forward and backward, and what reaches the hidden states goes through the model once.

CHUNK = 2**25  # logits at a time: 134 MB a copy


def policy_hidden(model, trajectories: list, prompts: list[list[int]] | None = None) -> torch.Tensor:
    """What the output layer reads where it predicts the policy's tokens, those whose mask is 1,
    trajectory after trajectory: (N, H). prompts: ids to read in place of the trajectories' own
    (OFSD's teacher). Rows are padded on the right, where a causal model never looks."""
    prompts = prompts or [t.prompt_ids for t in trajectories]
    rows = [torch.tensor(prompt + t.response_ids) for prompt, t in zip(prompts, trajectories)]
    ids = pad_sequence(rows, batch_first=True).to(model.device)  # (B, S)
    with checkpointed(model):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, S, H)
    # Response token i of row b is predicted at position len(prompt) + i - 1.
    places = [(b, len(prompts[b]) + i - 1) for b, t in enumerate(trajectories) for i, sampled in enumerate(t.loss_mask) if sampled]
    where = torch.tensor(places, dtype=torch.long, device=model.device).view(-1, 2)  # (N, 2)
    return hidden[where[:, 0], where[:, 1]]  # (N, H)


@contextmanager
def checkpointed(model):
    """Where gradient checkpointing is enabled, it works in here only: transformers ties it to a layer's
    training mode, and would take the cache from a layer that samples. The modules in a layer stay in
    evaluation mode, without dropout."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def output_layer(model):
    """The function from what policy_hidden returns to logits, (N, H) -> (N, V) in float32."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return lambda hidden: layer(hidden).float() if scale == 1 else layer(hidden).float() * scale


@torch.no_grad()
def knows_output_layer(model) -> bool:
    """Does output_layer give this model's logits? Else training would see others than sampling."""
    ids = torch.tensor([[0, 1]], device=model.device)
    logits = output_layer(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)  # (1, 2, V)
    return torch.allclose(logits, model(input_ids=ids, use_cache=False).logits.float(), atol=1e-3)


def chunks(model, *tensors: torch.Tensor):
    """Yield the (N, ...) tensors some rows at a time, so few that their logits are at most CHUNK numbers."""
    positions = max(1, CHUNK // model.config.get_text_config().vocab_size)
    yield from zip(*(x.split(positions) for x in tensors))


@torch.no_grad()
def policy_logprobs(model, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """token_logprobs of hidden states, in chunks, without gradient: (N, H), (N,) -> (N,)."""
    head = output_layer(model)
    return torch.cat([token_logprobs(head(h), i) for h, i in chunks(model, hidden, ids)])


def backward_in_chunks(model, loss, hidden: torch.Tensor, *tensors: torch.Tensor) -> float:
    """The value and the gradients of loss(logits, *tensors), a sum over positions, in chunks.

    hidden (N, H) is what policy_hidden returns, with its graph; tensors are (N, ...). loss gets
    logits (n, V) and as many rows of the tensors, and returns a scalar.
    """
    head, total, gradients = output_layer(model), 0.0, []
    for part, *others in chunks(model, hidden.detach(), *tensors):
        part.requires_grad_()
        value = loss(head(part), *others)
        value.backward()
        total += value.item()
        gradients.append(part.grad)
    hidden.backward(torch.cat(gradients))  # (N, H)
    return total


# ---------------------------------------------------------------- on several devices

# Under torchrun every rank holds the whole batch of trajectories and the same weights, and trains on
# its share of the micro-batches. Losses are sums over tokens divided by the whole batch's count, so
# the sum of the ranks' gradients is the gradient of one.


def rank_and_ranks() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def same_on_all_ranks(parameters: list) -> None:
    """Give every rank the values of rank 0."""
    if dist.is_initialized():
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)


def over_ranks(value: float, how=dist.ReduceOp.SUM) -> float:
    """The sum (or the maximum) of each rank's value."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total, how)
    return total.item()


# ---------------------------------------------------------------- one step


def policy_tokens(trajectories: list, name: str, device) -> torch.Tensor:
    """One of a trajectory's lists where its loss_mask is 1, trajectory after trajectory: (N,)."""
    return torch.tensor([x for t in trajectories for x, m in zip(getattr(t, name), t.loss_mask) if m], device=device)


def micro_batches(items: list, size: int, length) -> list[list]:
    """Parts of similar length: little padding. The gradient does not depend on how they are cut."""
    items = sorted(items, key=length)
    return [items[i : i + size] for i in range(0, len(items), size)]


def update(optimizer, max_norm: float) -> float:
    """Add up the ranks' gradients, clip, step, clear; the gradient's norm before it was clipped. Where
    that is not a finite number nothing changes: one bad batch must not turn the weights into NaN."""
    parameters = optimizer.param_groups[0]["params"]
    if dist.is_initialized():
        for parameter in parameters:
            if parameter.grad is None:  # this rank had no micro-batch
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm).item()
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def batch_stats(trajectories: list, rewards: torch.Tensor) -> dict[str, float]:
    """What a batch of rollouts and its rewards (Q, G) say before anything is trained."""
    count = len(trajectories)
    return {
        "reward": rewards.mean().item(),
        "zero_var": (rewards == rewards[:, :1]).all(dim=1).float().mean().item(),
        "length": sum(len(t.response_ids) for t in trajectories) / count,
        "searches": sum(len(t.queries) for t in trajectories) / count,
        "no_answer": sum(t.answer is None for t in trajectories) / count,
        "repeats": sum(len(set(map(str.lower, t.queries))) < len(t.queries) for t in trajectories) / count,
    }


def frozen_copy(model):
    """A copy that is never trained; on a GPU in bfloat16, half the memory: autocast computes in it anyway."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return frozen.bfloat16() if model.device.type == "cuda" else frozen


def grpo_step(model, start, optimizer, trajectories: list, rewards: torch.Tensor, config) -> dict:
    """One batch of rollouts, question-major, and its rewards (Q, G): config.updates updates. config is
    train.py's; start is the policy that the run started from. Returns the statistics of a step's line."""
    advantages = group_advantages(rewards).flatten().tolist()  # (Q * G,)
    num_tokens = sum(sum(t.loss_mask) for t in trajectories)
    # Without variance there is no gradient, and the forward pass may be skipped; not all of
    # them, though, since the statistics are what tells a collapse.
    weighed = [(t, a) for t, a in zip(trajectories, advantages) if t.response_ids]  # a prompt too long gets no answer
    batch = [(t, a) for t, a in weighed if a or config.kl_coef] or weighed[: config.micro_batch]
    seen = sum(sum(t.loss_mask) for t, _ in batch)  # policy tokens with a forward pass
    stats = dict.fromkeys(("loss", "kl", "clip_frac", "entropy", "grad_norm", "logprob_gap"), 0.0)
    parts = micro_batches(batch, config.micro_batch, lambda weighed: len(weighed[0].response_ids))
    # The start policy's forward pass: once for all updates, and where nothing but a statistic
    # depends on it, for every fourth micro-batch only (they are sorted by length).
    every = 1 if config.kl_coef else 4
    measured = range(len(parts) // 2 % every, len(parts), every)
    measured_tokens = sum(sum(t.loss_mask) for i in measured for t, _ in parts[i])
    start_logprobs: dict[int, torch.Tensor] = {}

    def loss(logits, ids, old, advantage, *of_start):
        """Of n of the policy's tokens, (n, V) and (n,) each, as n sequences of one; it also keeps the statistics."""
        logprobs = token_logprobs(logits, ids)[:, None]  # (n, 1)
        value, its = grpo_loss(
            logprobs, old[:, None], advantage, torch.ones_like(logprobs), clip_eps=config.clip_eps,
            ref_logprobs=of_start[0][:, None] if of_start else None, kl_coef=config.kl_coef, num_tokens=num_tokens,
        )  # fmt: skip
        stats["entropy"] += token_entropies(logits).sum().item() / seen / config.updates
        stats["clip_frac"] += its["clip_frac"] * len(ids) / seen / config.updates
        if of_start:
            stats["kl"] += its["kl"] * len(ids) / measured_tokens / config.updates
        if nth == 0:  # before any update: the two must agree
            stats["logprob_gap"] = max(stats["logprob_gap"], its["gap"])
        return value

    rank, ranks = rank_and_ranks()
    for nth in range(config.updates):
        for i in tqdm(range(rank, len(parts), ranks), desc="update", disable=None, leave=False):
            rows = [t for t, _ in parts[i]]
            ids, old = policy_tokens(rows, "response_ids", model.device), policy_tokens(rows, "logprobs", model.device)  # (N,)
            advantage = torch.tensor([a for t, a in parts[i] for _ in range(sum(t.loss_mask))], device=model.device)  # (N,)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
                if nth == 0 and i in measured:
                    with torch.no_grad():
                        start_logprobs[i] = policy_logprobs(start, policy_hidden(start, rows), ids)  # (N,)
                hidden = policy_hidden(model, rows)  # (N, H)
                of_start = [start_logprobs[i]] if i in start_logprobs else []
                stats["loss"] += backward_in_chunks(model, loss, hidden, ids, old, advantage, *of_start) / config.updates
        stats["grad_norm"] += update(optimizer, config.max_grad_norm) / config.updates
    stats |= {name: over_ranks(stats[name]) for name in ("loss", "kl", "clip_frac", "entropy")}
    return stats | {"logprob_gap": over_ranks(stats["logprob_gap"], dist.ReduceOp.MAX)}


def lesson() -> None:
    """One group of micro/model: rewards, advantages, weights, and one update."""
    from eval import load_questions, rewards_of
    from retriever import Parser, open_index
    from rollout import load_model, rollout

    Parser(description="One group of micro/model: its advantages, and one update.").parse_args()
    folder = Path(__file__).parent / "micro"
    model, tokenizer = load_model(str(folder / "model"))
    index = open_index(folder / "corpus.jsonl")
    for question in load_questions(str(folder / "train.jsonl")):
        group = rollout(model, tokenizer, index, [question["question"]], group_size=5, seed=0)
        rewards = torch.tensor(rewards_of([question], group)).view(1, 5)  # (1, G)
        if (rewards != rewards[:, :1]).any():  # a group of equals teaches nothing
            break

    def likely() -> list[float]:
        """log pi of each whole trajectory, the policy's tokens only."""
        with torch.no_grad():
            values = policy_logprobs(model, policy_hidden(model, group), policy_tokens(group, "response_ids", model.device))
        return [part.sum().item() for part in values.split([sum(t.loss_mask) for t in group])]

    optimizer, num_tokens = torch.optim.AdamW(model.parameters(), lr=1e-4), sum(sum(t.loss_mask) for t in group)
    config = type("Settings", (), dict(micro_batch=5, kl_coef=0.0, updates=1, clip_eps=0.2, max_grad_norm=1.0))
    before = likely()
    stats = grpo_step(model, frozen_copy(model), optimizer, group, rewards, config)
    print(f"question: {question['question']}  (answer: {question['golden_answers'][0]})\n")
    print(f"{'answer':20}{'reward':>8}{'advantage':>11}{'tokens':>8}{'weight of a token':>19}{'log pi before':>15}{'after':>9}")
    for t, reward, advantage, old, new in zip(group, rewards[0], group_advantages(rewards)[0].tolist(), before, likely()):
        print(f"{str(t.answer):20}{reward:8.0f}{advantage:11.3f}{sum(t.loss_mask):8d}{advantage / num_tokens:19.5f}{old:15.3f}{new:9.3f}")
    print(f"\nThe loss was {stats['loss']:.1e}: minus the mean advantage of all tokens. Its gradient had the norm {stats['grad_norm']:.3f},")
    print("and one update moved log pi as the last two columns say: up for the right ones, down for the wrong ones.")


if __name__ == "__main__":
    from retriever import run_script

    run_script(lesson)
