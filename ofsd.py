"""OFSD, offline self-distillation: the policy learns from itself, shown a better attempt.

After GRPO the policy samples K trajectories per training question. Where one of them is right
and another wrong (or longer, or searched otherwise), the same parameters act as teacher and
student: the teacher reads the good trajectory in its prompt, the student does not, and on
every token of the worse trajectory the student is pulled towards what the teacher would say.

Equations (q question, y_ref reference, y_stu the student's trajectory, m_t its loss_mask)

    p_T(. | t) = pi_frozen( . | P_T(q, y_ref), y_stu[:t])      the privileged prompt, no gradient
    p_S(. | t) = pi_theta ( . | P_S(q),        y_stu[:t])      the standard prompt
    loss       = sum_t m_t D(p_T || p_S) / sum_t m_t
    forward_kl : D = sum_v d_v,   d_v = p_T(v) log(p_T(v) / p_S(v))       gradient by logit  p_S - p_T
    reverse_kl : D = sum_v d_v,   d_v = p_S(v) log(p_S(v) / p_T(v))
    jsd        : D = sum_v d_v,   d_v = 1/2 p_T log(p_T / m) + 1/2 p_S log(p_S / m),   m = (p_T + p_S) / 2

    clip none     : D as it is
    clip entry    : sum_v min(d_v, tau), the paper's. It is no divergence (it can be below 0) and
                    on clipped words its gradient points AWAY from the teacher; a test shows it.
    clip position : w_t D with w_t = min(1, tau / D), detached: caps rare large positions and
                    keeps the direction of every one

Deviations from the paper
    1. The default clip is none: entry reverses the correction (above), and the paper's tau is
       not known (.05, the default where a clip is asked for, is that of OPSD, 2601.18734).
    2. The teacher is a frozen copy of the policy GRPO left behind. The paper trains LoRA adapters
       on that policy and takes it with the adapters off: the same teacher, in less memory.
    3. The measure by which the student "differs most" is not published; mine_pair states ours.
    4. K is not stated either; we sample as many as GRPO does (5). The wording is ours.
"""

import math
import re

import torch

from rollout import Trajectory, chat_ids, decode, encode, fit_lengths, neutralise, standard_prompt

PRIVILEGED = """\
{prompt}

An expert answered this very question as follows:

{reference}

Now answer it yourself."""


def query_words(trajectory: Trajectory) -> set[str]:
    return set(re.findall(r"\w+", " ".join(trajectory.queries).lower()))


def difference(reference: Trajectory, other: Trajectory) -> tuple[int, float]:
    """How two trajectories differ, to be compared as a pair: first the difference in number of
    searches, then 1 - the Jaccard overlap of the words of all their queries. (0, 0.0): alike."""
    one, two = query_words(reference), query_words(other)
    overlap = len(one & two) / len(one | two) if one | two else 1.0
    return abs(len(reference.queries) - len(other.queries)), 1.0 - overlap


def mine_pair(trajectories: list[Trajectory], rewards) -> tuple[Trajectory, Trajectory] | None:
    """The (reference, student) of one group, from its trajectories and 0/1 rewards.

    Reference: the correct trajectory with the fewest searches. Student: the one that differs
    most from it, a wrong one if there is any. Ties: the lowest index. None where no trajectory
    is correct, or where all are correct and none differs from the reference.
    """
    correct = [i for i, reward in enumerate(rewards) if reward > 0]
    if not correct:
        return None
    first = min(correct, key=lambda i: len(trajectories[i].queries))
    others = [i for i in range(len(trajectories)) if i not in correct] or [i for i in correct if i != first]
    gaps = {i: difference(trajectories[first], trajectories[i]) for i in others}
    student = max(others, key=gaps.get, default=None)
    if student is None or (student in correct and gaps[student] == (0, 0.0)):
        return None
    return trajectories[first], trajectories[student]


def privileged_prompt(tokenizer, question: str, reference: Trajectory, max_tokens: int) -> list[int] | None:
    """P_T(q, y_ref) as token ids: the standard prompt and the reference in one user turn, then
    the same assistant header as the standard prompt. Where that is longer than max_tokens the
    reference's passages are shortened, longest first, never its own words; None where even
    that does not fit. A special token inside the reference is made harmless; its tags stay."""
    written, lines = [""], []  # written[i] stands before passage line i
    for sampled, ids in spans(reference):
        for line in decode(tokenizer, ids).splitlines(keepends=True):
            if not sampled and line.startswith("- "):
                lines.append(encode(tokenizer, neutralise(line[2:].rstrip("\n"), tokenizer)))
                written[-1] += "- "
                written.append("\n")
            else:
                written[-1] += neutralise(line, tokenizer, tags=[])
    lengths = [len(line) for line in lines]
    while True:
        kept = [decode(tokenizer, line[:length]) for line, length in zip(lines, lengths)] + [""]
        content = PRIVILEGED.format(
            prompt=standard_prompt(tokenizer, question),
            reference="".join(text for pair in zip(written, kept) for text in pair).strip(),
        )
        ids = chat_ids(tokenizer, content)
        if len(ids) <= max_tokens:
            return ids
        if not sum(lengths):
            return None
        lengths = fit_lengths(lengths, max(0, sum(lengths) - (len(ids) - max_tokens)))


def spans(trajectory: Trajectory):
    """Yield (sampled, ids) for each run of tokens with the same author, in order."""
    start, mask = 0, trajectory.loss_mask
    for end in range(1, len(mask) + 1):
        if end == len(mask) or mask[end] != mask[start]:
            yield bool(mask[start]), trajectory.response_ids[start:end]
            start = end


def divergence_terms(log_s: torch.Tensor, log_t: torch.Tensor, kind: str) -> torch.Tensor:
    """d_v of the equations above, from log-probabilities (N, V), as (N, V). 0 log 0 is 0."""

    def term(log_p, log_q):
        absent = log_p == -torch.inf  # filled before the product, so that no gradient is NaN
        return log_p.exp() * (log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0))

    if kind == "forward_kl":
        return term(log_t, log_s)
    if kind == "reverse_kl":
        return term(log_s, log_t)
    if kind == "jsd":
        absent = (log_s == -torch.inf) & (log_t == -torch.inf)  # log_m is not used there
        log_m = torch.logaddexp(log_s.masked_fill(absent, 0.0), log_t.masked_fill(absent, 0.0)) - math.log(2)  # (N, V)
        return 0.5 * term(log_t, log_m) + 0.5 * term(log_s, log_m)
    raise ValueError(f"kind is forward_kl, reverse_kl or jsd, not {kind!r}")


def distill_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, loss_mask: torch.Tensor, *,
    kind: str = "forward_kl", clip: str = "none", tau: float = 0.05, num_tokens: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """The mean divergence, in nats, over the positions whose mask is 1.

    (B, T, V), (B, T, V), (B, T) -> scalar. logits[:, t] predict response token t. num_tokens:
    the divisor; pass the whole batch's count when the batch comes in pieces. Masked positions
    may hold anything, infinities too: they are left out before anything is computed.

    >>> p, q = torch.tensor([[[0.6, 0.3, 0.1]]]).log(), torch.tensor([[[0.2, 0.3, 0.5]]]).log()
    >>> round(distill_loss(q, p, torch.ones(1, 1)).item(), 6)
    0.498224
    """
    inside = loss_mask.bool()
    log_s = torch.log_softmax(student_logits[inside], dim=-1)  # (N, V), N positions
    log_t = torch.log_softmax(teacher_logits[inside].detach(), dim=-1)  # (N, V)
    terms = divergence_terms(log_s, log_t, kind)  # (N, V)
    if clip == "entry":
        terms = terms.clamp(max=tau)
    divergence = terms.sum(-1)  # (N,)
    if clip == "position":
        divergence = divergence * (tau / divergence.detach().clamp(min=tau))
    elif clip not in ("none", "entry"):
        raise ValueError(f"clip is none, entry or position, not {clip!r}")
    return divergence.sum() / (num_tokens or max(len(divergence), 1))


if __name__ == "__main__":
    print(__doc__)
