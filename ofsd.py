"""OFSD, offline self-distillation: the policy learns from itself, when shown a better attempt.

Of K trajectories the correct one with the fewest searches is the reference. The one that differs
most from it, a wrong one if there is any, is corrected. The policy plays two parts: the teacher,
frozen, reads the reference; the student does not, and is pulled to the teacher at each token.

Equations (q question, y_ref reference, y_stu the student's trajectory, m_t its loss_mask)

    p_T(. | t) = pi_frozen( . | P_T(q, y_ref), y_stu[:t])      the privileged prompt, no gradient
    p_S(. | t) = pi_theta ( . | P_S(q),        y_stu[:t])      the standard prompt
    loss       = sum_t m_t D(p_T || p_S) / sum_t m_t           over all pairs of an update
    forward_kl : D = sum_v d_v,  d_v = p_T(v) log(p_T(v) / p_S(v))    gradient in logits: p_S - p_T
    reverse_kl : D = sum_v d_v,  d_v = p_S(v) log(p_S(v) / p_T(v))
    jsd        : D = sum_v d_v,  d_v = (p_T log(p_T / p_M) + p_S log(p_S / p_M)) / 2,  p_M the mean
    clip entry    : sum_v min(d_v, tau). This is the paper's. It can be below 0, and by forward_kl
                    its gradient on clipped words points AWAY from the teacher (a test shows it).
    clip position : w_t D, w_t = min(1, tau / D) without gradient. It keeps each D's direction.
    LoRA          : W x + 2 B A x in each linear layer of the decoder; 2 is alpha / r.

The loss falls when the student agrees with the teacher, right or wrong: watch the edge (train.py).

Deviations from the paper (Search-E1, arXiv 2605.22511)
    1. The default clip is none, since entry can reverse the correction. The paper's tau is not
       known; .05 is that of another paper, OPSD (arXiv 2601.18734).
    2. By default all weights are trained, and the teacher is a frozen copy. The paper trains
       adapters (--lora-rank): switched off, they leave the teacher, and no second copy is needed.
    3. Ours are K, mine_pair's measure of difference, and the wording of the privileged prompt.

    python ofsd.py                # a lesson: one pair, both prompts, the divergence at each token
"""

import math
from bisect import bisect
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch

from grpo import backward_in_chunks, chunks, clip_and_update, gather, micro_batches
from grpo import policy_hidden, rank_and_ranks, to_logits
from retriever import words
from rollout import Trajectory, chat_ids, context_length, decode, neutralise, observation_ids
from rollout import standard_prompt

PRIVILEGED = """\
{prompt}

An expert answered this very question as follows:

{reference}

Now answer it yourself."""

class Pair(NamedTuple):
    """What one question teaches: a good attempt, and the one that it corrects."""

    question: dict
    reference: Trajectory
    student: Trajectory  # the student's, which is corrected
    prompt: list[int]  # the privileged prompt, which shows the reference
    rewards: list[float]  # of the whole group, to look at

def difference(reference: Trajectory, other: Trajectory) -> tuple[int, float]:
    """How two trajectories differ: first by their number of searches, then by 1 - the Jaccard
    overlap of the words of all their queries. (0, 0.0): they search alike."""
    one, two = ({*words(" ".join(t.queries))} for t in (reference, other))
    overlap = len(one & two) / len(one | two) if one | two else 1.0
    return abs(len(reference.queries) - len(other.queries)), 1.0 - overlap

def mine_pair(trajectories: list[Trajectory], rewards) -> tuple[Trajectory, Trajectory] | None:
    """(reference, student) of one group, from its trajectories and their 0/1 rewards. None where
    no trajectory is correct, or where all are and none differs from the reference."""
    # The reference is the correct trajectory with the fewest searches, the first of several.
    correct = [t for t, reward in zip(trajectories, rewards) if reward > 0]
    if not correct:
        return None
    reference = min(correct, key=lambda t: len(t.queries))
    # The student's is the one that differs most from it, a wrong one if there is any.
    wrong = [t for t, reward in zip(trajectories, rewards) if reward <= 0]
    student = max(wrong or correct, key=lambda t: difference(reference, t))
    if not wrong and difference(reference, student) == (0, 0.0):
        return None
    return reference, student

def mine_pairs(model, tokenizer, questions, trajectories, rewards, max_tokens: int):
    """Pairs, and counts of questions: no_correct (no answer is right), no_contrast (all are right
    and search alike), too_long (the prompt exceeds max_tokens, or the context with a response)."""
    pairs, counts = [], dict(pairs=0, no_correct=0, no_contrast=0, too_long=0)
    size = len(trajectories) // len(questions)
    for i, question in enumerate(questions):
        group = slice(i * size, (i + 1) * size)
        mined = mine_pair(trajectories[group], rewards[group])
        if mined is None:
            counts["no_contrast" if max(rewards[group]) > 0 else "no_correct"] += 1
            continue
        reference, student = mined
        room = min(max_tokens, context_length(model) - len(student.response_ids))
        prompt = privileged_prompt(tokenizer, question["question"], reference, room)
        counts["pairs" if prompt else "too_long"] += 1
        pairs += [Pair(question, reference, student, prompt, rewards[group])] if prompt else []
    return pairs, counts

def privileged_prompt(tokenizer, question: str, reference: Trajectory, max_tokens: int):
    """P_T(q, y_ref) as token ids: the standard prompt and the reference in one user message, then
    the assistant's header, as after the standard prompt. If that is longer than max_tokens, the
    reference's observations are cut, the longest first. None if even that does not fit."""
    write = partial(privileged_ids, tokenizer, question, reference)
    if len(whole := write(None)) <= max_tokens:
        return whole
    budgets = range(len(reference.response_ids))  # 0, 1, 2, ... tokens an observation
    fits = bisect(budgets, max_tokens, key=lambda budget: len(write(budget)))  # how many fit
    return write(fits - 1) if fits else None

def privileged_ids(tokenizer, question: str, reference: Trajectory, budget: int | None):
    """The privileged prompt with observations of at most `budget` tokens (None: as they were). The
    reference's own words always stay whole; a special token among them is made harmless."""
    parts, found = [], iter(reference.passages)  # one list of passages for each observation
    for sampled, ids in spans(reference):
        if budget is not None and not sampled:
            ids = observation_ids(tokenizer, next(found), budget)
        parts.append(neutralise(decode(tokenizer, ids), tokenizer, tags=()))  # its tags stay
    shown = "".join(parts).strip()
    prompt = standard_prompt(tokenizer, question)
    return chat_ids(tokenizer, PRIVILEGED.format(prompt=prompt, reference=shown))

def spans(trajectory: Trajectory):
    """Yield (sampled, ids) for each run of tokens with the same author, in order."""
    tokens = zip(trajectory.loss_mask, trajectory.response_ids)
    for sampled, run in groupby(tokens, key=lambda token: token[0]):
        yield bool(sampled), [id for _, id in run]

def divergences(student_logits, teacher_logits, *, kind="forward_kl", clip="none", tau=0.05):
    """D at each position in nats, clipped if asked: (N, V), (N, V) -> (N,). No gradient reaches
    the teacher. Raises ValueError for a kind or a clip that the equations do not have."""
    log_s = torch.log_softmax(student_logits, dim=-1)  # (N, V)
    log_t = torch.log_softmax(teacher_logits.detach(), dim=-1)  # (N, V)
    if kind == "forward_kl":
        terms = kl_terms(log_t, log_s)  # (N, V) d_v
    elif kind == "reverse_kl":
        terms = kl_terms(log_s, log_t)  # (N, V)
    elif kind == "jsd":
        lowest = torch.finfo(log_s.dtype).min  # logaddexp gives NaN where both are -inf
        log_m = torch.logaddexp(log_s.clamp(min=lowest), log_t.clamp(min=lowest)) - math.log(2)
        terms = 0.5 * kl_terms(log_t, log_m) + 0.5 * kl_terms(log_s, log_m)  # (N, V)
    else:
        raise ValueError(f"kind is forward_kl, reverse_kl or jsd, not {kind!r}")
    if clip == "none":
        return terms.sum(-1)  # (N,)
    if clip == "entry":
        return terms.clamp(max=tau).sum(-1)  # (N,)
    if clip == "position":
        divergence = terms.sum(-1)  # (N,)
        return divergence * (tau / divergence.detach().clamp(min=tau))  # (N,)
    raise ValueError(f"clip is none, entry or position, not {clip!r}")

def kl_terms(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """p log(p / q) for each word, where 0 log 0 is 0: (N, V), (N, V) -> (N, V)."""
    absent = log_p == -torch.inf  # filled before the product, so that no gradient is NaN
    return log_p.exp() * (log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0))

def distill_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, loss_mask: torch.Tensor, *,
    kind: str = "forward_kl", clip: str = "none", tau: float = 0.05, num_tokens: float | None = None
) -> torch.Tensor:  # fmt: skip
    """The loss as a whole (training takes it in pieces, by chunk_loss): the mean divergence, in
    nats, over the positions whose mask is 1.

    (B, T, V), (B, T, V), (B, T) -> scalar. logits[:, t] are those that predict response token t.
    num_tokens: the divisor; pass the whole batch's count when the batch comes in pieces. Masked
    positions may hold anything: they are left out before anything is computed.

    >>> teacher, student = torch.tensor([[[[0.6, 0.3, 0.1]]], [[[0.2, 0.3, 0.5]]]]).log()
    >>> round(distill_loss(student, teacher, torch.ones(1, 1)).item(), 6)
    0.498224
    """
    mask = loss_mask.bool()  # (B, T)
    how = dict(kind=kind, clip=clip, tau=tau)
    divergence = divergences(student_logits[mask], teacher_logits[mask], **how)  # (N,)
    return divergence.sum() / (num_tokens or max(len(divergence), 1))

def ofsd_step(model, teacher, optimizer, pairs: list[Pair], config) -> dict:
    """One update on a batch of pairs: the distill_loss of all their tokens, a chunk at a time.
    config is train.py's. With adapters the teacher is the model itself, while they are off."""
    num_tokens = sum(sum(pair.student.loss_mask) for pair in pairs)
    loss = partial(chunk_loss, teacher=teacher, config=config, num_tokens=num_tokens)
    parts = micro_batches(pairs, config.micro_batch, lambda pair: len(pair.student.response_ids))
    (rank, ranks), stats = rank_and_ranks(), []
    for part in parts[rank::ranks]:
        # The same responses stand under both prompts.
        students, prompts = [pair.student for pair in part], [pair.prompt for pair in part]
        LoRA.on = False  # the teacher has no adapters
        with torch.no_grad():
            teacher_hidden = policy_hidden(teacher, students, prompts)  # (N, H)
        LoRA.on = True  # until after the backward pass, which may compute layers again
        hidden = policy_hidden(model, students)  # (N, H)
        stats += backward_in_chunks(model, loss, hidden, teacher_hidden)
    norm = clip_and_update(optimizer, config.max_grad_norm)
    return {"loss": sum(one["loss"] for one in sum(gather(stats), [])), "grad_norm": norm}

def chunk_loss(logits, teacher_hidden, *, teacher, config, num_tokens):
    """distill_loss of n policy tokens: logits (n, V), the teacher's hidden states (n, H)."""
    with torch.no_grad():
        teacher_logits = to_logits(teacher, teacher_hidden)  # (n, V), from no adapted layer
    how = dict(kind=config.divergence, clip=config.clip, tau=config.tau)
    loss = divergences(logits, teacher_logits, **how).sum() / max(num_tokens, 1)
    return loss, {"loss": loss.item()}

# ---------------------------------------------------------------- machinery

@torch.no_grad()
def token_divergences(model, pair: Pair) -> list[float | None]:
    """To look at: the forward KL at each token of the student's trajectory, in nats, from the model
    as it is now under the privileged prompt to itself. None for the environment's tokens."""
    hidden = policy_hidden(model, [pair.student])  # (N, H)
    teacher_hidden = policy_hidden(model, [pair.student], [pair.prompt])  # (N, H)
    parts = chunks(model, hidden, teacher_hidden)
    values = [divergences(to_logits(model, h), to_logits(model, t)).tolist() for h, t in parts]
    values = iter(sum(values, []))
    return [next(values) if sampled else None for sampled in pair.student.loss_mask]

class LoRA(torch.nn.Module):
    """W x + 2 B A x in place of a linear layer. B is zero, so at first nothing changes."""

    on = True  # for all adapters; when off, the model is as it was before they were added

    def __init__(self, linear: torch.nn.Linear, rank: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)  # the same on all devices and in all runs
        A = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        self.linear, self.A = linear, torch.nn.Parameter(A.to(linear.weight))  # (r, in)
        self.B = torch.nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))  # (out, r)

    def forward(self, x):
        y = self.linear(x)  # (..., out)
        return y + 2 * (x.to(self.A.dtype) @ self.A.T @ self.B.T).to(y.dtype) if LoRA.on else y

def trainable(model, lora_rank: int, lr: float) -> torch.optim.AdamW:
    """Add adapters to the model if a rank is given. Returns the optimizer of what is trained."""
    if lora_rank:
        add_adapters(model, lora_rank)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)

def layers_of(model, kind: type) -> list[tuple]:
    """(parent, name, layer) for every layer of this kind in the decoder."""
    return [(parent, name, layer) for parent in model.base_model.modules()
            for name, layer in parent.named_children() if isinstance(layer, kind)]  # fmt: skip

def add_adapters(model, rank: int) -> None:
    """LoRA in every linear layer of the decoder. Only the adapters are trainable then. Raises
    ValueError where the decoder has other matrices (GPT-2, mixtures of experts)."""
    kinds = torch.nn.Linear, torch.nn.Embedding
    known = {id(layer.weight) for layer in model.modules() if isinstance(layer, kinds)}
    for name, parameter in model.base_model.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in known:
            raise ValueError(f"{name} is no torch.nn.Linear, which adapters need: use rank 0")
    model.requires_grad_(False)
    for number, (parent, name, linear) in enumerate(layers_of(model, torch.nn.Linear)):
        setattr(parent, name, LoRA(linear, rank, seed=number))

@torch.no_grad()
def merge_adapters(model) -> None:
    """Add the adapters to the weights, and put the linear layers back. Weights are float32: in
    bfloat16 most of a small update would be rounded away (a test shows it)."""
    for parent, name, lora in layers_of(model, LoRA):
        lora.linear.weight += 2 * lora.B @ lora.A
        setattr(parent, name, lora.linear)
    model.requires_grad_(True)

if __name__ == "__main__":
    from micro.lessons import ofsd_lesson, run_script
    run_script(ofsd_lesson)
