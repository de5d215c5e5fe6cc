"""OFSD, offline self-distillation: the policy learns from its own better attempts.

Of G trajectories the correct one with the fewest searches is the reference. The one
that differs most from it, a wrong one if there is any, is to be corrected. The policy
plays two parts. The teacher is frozen and reads the reference. The student does not
read it, and is pulled towards the teacher at each token that it wrote.

Equations. q is the question, y_ref the reference, y_stu the student's trajectory, m_t
its loss_mask. The policy sampled N tokens of all students' trajectories in an update.

    p_T(. | t) = pi_frozen( . | P_T(q, y_ref), y_stu[:t])     the privileged prompt
    p_S(. | t) = pi_theta ( . | P_S(q),        y_stu[:t])     the standard prompt
    loss       = sum_t m_t D_t / N,     D_t = D(p_T || p_S), without gradient to p_T

    forward_kl : D = sum_v d_v,   d_v = p_T(v) log(p_T(v) / p_S(v))
                 its gradient with respect to the student's logits is p_S - p_T
    reverse_kl : D = sum_v d_v,   d_v = p_S(v) log(p_S(v) / p_T(v))
    jsd        : D = sum_v d_v,   d_v = (p_T log(p_T / p_M) + p_S log(p_S / p_M)) / 2,
                 where p_M is the mean of p_T and p_S
    clip entry    : D = sum_v min(d_v, tau). This is the paper's. It can be below 0.
                    A clipped term is a constant. So with forward_kl its logit has
                    the gradient p_S times the teacher's mass on the unclipped ones.
                    That is above 0: it pushes p_S AWAY from the teacher.
    clip position : w D with w = min(1, tau / D), without gradient to w. This keeps the
                    direction of each position's gradient.

The loss falls when the student agrees with the teacher, right or wrong. The teacher's
edge measures whether it is worth agreeing with (teacher_edge in train.py).

Start reading at ofsd_step. In its part 3 loss.backward() computes dloss/dh for the
hidden states h, and hidden.backward() carries it through the model. optimizer.step() is
in part 4. The frozen teacher and the optimizer are made by distil in train.py.

Deviations from the paper (Search-E1, arXiv 2605.22511)
    1. The default clip is none, since entry can reverse the correction. The paper does
       not state its tau; .05 is that of another paper, OPSD (arXiv 2601.18734).
    2. By default all weights are trained, and the teacher is a frozen copy (rounded to
       bfloat16 on a GPU that computes in it). The paper trains adapters (--lora-rank).
       Switching them off gives the teacher, without a second copy.
    3. G, the measure of difference and the wording of the privileged prompt are ours.
       So is --students, which can correct several trajectories of a question. The paper
       corrects one.

The same on one page, without chunks and micro-batches: lessons/plain.py.

    python -m lessons.ofsd        # a lesson: one pair, both prompts, each token's D
"""

import math
from typing import NamedTuple

import torch

from eval import exact_match
from grpo import (
    micro_batches,
    padded,
    policy_hidden,
    to_logits,
    token_chunks,
    token_weights,
)
from machinery.adapters import adapters_off
from machinery.ranks import gather, my_share, sum_gradients
from machinery.text import chat_ids, decode, neutralise
from retriever import words
from rollout import (
    Trajectory,
    context_length,
    observation_ids,
    spans,
    standard_prompt,
)

PRIVILEGED = """\
{prompt}

An expert answered this very question as follows:

{reference}

Now answer it yourself."""


class Pair(NamedTuple):
    """A reference, and a trajectory of the same question that is to be corrected."""

    question: dict
    reference: Trajectory
    student: Trajectory  # the one to be corrected
    prompt: list[int]  # the privileged prompt, which shows the reference
    # For the log: the rewards of the whole group, and those of these two.
    rewards: list[float]
    reference_reward: float = 1.0
    student_reward: float = 0.0


# ------------------------------------------------------------------------------ mining


def difference(reference: Trajectory, other: Trajectory) -> tuple[int, float]:
    """How two trajectories differ: in their number of searches, then in their words.

    The second number is 1 minus the Jaccard overlap of the words of all their queries.
    (0, 0.0) means that they search with the same words.
    """
    reference_words = set(words(" ".join(reference.queries)))
    other_words = set(words(" ".join(other.queries)))
    overlap = 1.0
    if reference_words | other_words:
        shared = len(reference_words & other_words)
        overlap = shared / len(reference_words | other_words)
    return abs(len(reference.queries) - len(other.queries)), 1.0 - overlap


class Mined(NamedTuple):
    """A reference, and trajectories to be corrected, the most different first."""

    reference: Trajectory
    students: list[Trajectory]


def mine_group(
    trajectories: list[Trajectory], correct: list[bool], students: int = 1
) -> Mined | None:
    """The reference of a group, and up to `students` trajectories to be corrected.

    None if no trajectory is correct, or if all are correct and search alike.
    """
    right = []
    wrong = []
    for trajectory, is_correct in zip(trajectories, correct, strict=True):
        if is_correct:
            right.append(trajectory)
        else:
            wrong.append(trajectory)
    if not right:
        return None

    # The reference has the fewest searches. Of several it is the first.
    reference = min(right, key=lambda t: len(t.queries))

    # Wrong trajectories are corrected first, then right ones that search differently.
    different = [t for t in right if difference(reference, t) != (0, 0.0)]
    wrong.sort(key=lambda t: difference(reference, t), reverse=True)
    different.sort(key=lambda t: difference(reference, t), reverse=True)
    candidates = wrong + different
    if not candidates:
        return None
    return Mined(reference, candidates[:students])


def mine_pair(
    trajectories: list[Trajectory], rewards: list[float]
) -> tuple[Trajectory, Trajectory] | None:
    """(reference, student) of one group, from its trajectories and their 0/1 rewards.

    The mining rule by itself, to try by hand; training calls mine_pairs. None if
    mine_group gives None. Raises ValueError for a reward that is not 0 or 1, since only
    these say which trajectory is correct.
    """
    for reward in rewards:
        if reward not in (0, 1):
            raise ValueError(f"mine_pair takes rewards of 0 and 1, not {reward}")
    mined = mine_group(trajectories, [reward == 1 for reward in rewards])
    if mined is None:
        return None
    return mined.reference, mined.students[0]


def mine_pairs(
    model,
    tokenizer,
    questions: list[dict],
    trajectories: list[Trajectory],
    rewards: list[float],
    max_tokens: int,
    students: int = 1,
) -> tuple[list[Pair], dict[str, int]]:
    """Up to `students` pairs per question, and counts of what gave none and why.

    The trajectories and rewards are grouped by question. Correct is exact match,
    whatever the rewards are. Counts: pairs; no_correct, questions without a right
    answer; no_contrast, questions whose trajectories are all right and search alike;
    too_long, students whose privileged prompt exceeds max_tokens, or does not fit into
    the model's context together with the response.
    """
    pairs = []
    counts = {"pairs": 0, "no_correct": 0, "no_contrast": 0, "too_long": 0}
    group_size = len(trajectories) // len(questions)
    for number, question in enumerate(questions):
        first = number * group_size
        group = trajectories[first : first + group_size]
        group_rewards = rewards[first : first + group_size]
        answers = question["golden_answers"]
        correct = [exact_match(t.answer, answers) == 1 for t in group]
        mined = mine_group(group, correct, students)
        if mined is None:
            reason = "no_contrast" if any(correct) else "no_correct"
            counts[reason] += 1
            continue
        for student in mined.students:
            room = min(max_tokens, context_length(model) - len(student.response_ids))
            prompt = privileged_prompt(
                tokenizer, question["question"], mined.reference, room
            )
            if prompt is None:
                counts["too_long"] += 1
                continue
            counts["pairs"] += 1
            pair = Pair(
                question,
                mined.reference,
                student,
                prompt,
                group_rewards,
                reference_reward=group_rewards[group.index(mined.reference)],
                student_reward=group_rewards[group.index(student)],
            )
            pairs.append(pair)
    return pairs, counts


# --------------------------------------------------------------- the privileged prompt


def privileged_prompt(
    tokenizer, question: str, reference: Trajectory, max_tokens: int
) -> list[int] | None:
    """P_T(q, y_ref) as token ids, at most max_tokens of them.

    The standard prompt and the reference share one user message. The assistant's header
    follows, as after the standard prompt. If that is too long, the reference's
    observations are cut, keeping as much as fits. None if it is too long even without
    any passage.
    """
    whole = privileged_ids(tokenizer, question, reference, budget=None)
    if len(whole) <= max_tokens:
        return whole
    best = privileged_ids(tokenizer, question, reference, budget=0)
    if len(best) > max_tokens:
        return None
    # A budget of `fits` fits, and one of `fails` does not. A larger budget never makes
    # the prompt shorter, so halve what is between them.
    fits = 0
    fails = len(reference.response_ids)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        ids = privileged_ids(tokenizer, question, reference, budget=middle)
        if len(ids) <= max_tokens:
            fits = middle
            best = ids
        else:
            fails = middle
    return best


def privileged_ids(
    tokenizer, question: str, reference: Trajectory, budget: int | None
) -> list[int]:
    """The privileged prompt with observations of at most `budget` tokens each.

    None sets no limit. What the policy wrote in the reference always stays whole. A
    special token in it is made harmless, and its tags stay.
    """
    parts = []
    observations = iter(reference.passages)  # a list of passages for each observation
    for sampled, ids in spans(reference):
        if not sampled and budget is not None:
            ids = observation_ids(tokenizer, next(observations), budget)
        parts.append(neutralise(decode(tokenizer, ids), tokenizer, tags=()))
    shown = "".join(parts).strip()
    prompt = standard_prompt(tokenizer, question)
    return chat_ids(tokenizer, PRIVILEGED.format(prompt=prompt, reference=shown))


# ---------------------------------------------------------------------------- the loss


def divergences(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    kind: str = "forward_kl",
    clip: str = "none",
    tau: float = 0.05,
) -> torch.Tensor:
    """D of the equations at each position, in nats: (n, V), (n, V) -> (n,).

    No gradient reaches the teacher. Raises ValueError for a kind or a clip that the
    equations do not have.
    """
    log_s = torch.log_softmax(student_logits, dim=-1)  # (n, V)
    log_t = torch.log_softmax(teacher_logits.detach(), dim=-1)  # (n, V)

    # d_v for each entry of the vocabulary.
    if kind == "forward_kl":
        terms = kl_terms(log_t, log_s)  # (n, V)
    elif kind == "reverse_kl":
        terms = kl_terms(log_s, log_t)  # (n, V)
    elif kind == "jsd":
        # The clamp: where both are -inf, the gradient of logaddexp would be NaN.
        lowest = torch.finfo(log_s.dtype).min
        # (n, V)
        log_sum = torch.logaddexp(log_s.clamp(min=lowest), log_t.clamp(min=lowest))
        log_m = log_sum - math.log(2)  # (n, V)
        terms = 0.5 * kl_terms(log_t, log_m) + 0.5 * kl_terms(log_s, log_m)  # (n, V)
    else:
        raise ValueError(f"kind is forward_kl, reverse_kl or jsd, not {kind!r}")

    if clip == "none":
        return terms.sum(-1)  # (n,)
    if clip == "entry":
        return terms.clamp(max=tau).sum(-1)  # (n,)
    if clip == "position":
        divergence = terms.sum(-1)  # (n,)
        weight = tau / divergence.detach().clamp(min=tau)  # (n,) min(1, tau / D)
        return divergence * weight  # (n,)
    raise ValueError(f"clip is none, entry or position, not {clip!r}")


def kl_terms(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """p log(p / q) for each vocabulary entry, where 0 log 0 is 0: (n, V) each."""
    # 0 times infinity would be NaN in the gradient, so fill in before the product.
    absent = log_p == -torch.inf  # (n, V)
    # (n, V)
    log_ratio = log_p.masked_fill(absent, 0.0) - log_q.masked_fill(absent, 0.0)
    return log_p.exp() * log_ratio  # (n, V)


def distill_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    kind: str = "forward_kl",
    clip: str = "none",
    tau: float = 0.05,
    num_tokens: float | None = None,
) -> torch.Tensor:
    """The loss for a whole padded batch: the plain form, which training does not call.

    It is the mean D, in nats, over the positions of mask 1. ofsd_step computes the same
    from the same parts, a chunk at a time, and a test compares the two.
    (B, T, V), (B, T, V), (B, T) -> scalar. logits[:, t] are those that predict response
    token t. num_tokens is the divisor; pass the whole batch's count if you pass a part
    of the batch. Masked positions may hold any value: they are left out first.

    >>> teacher = torch.tensor([[[0.6, 0.3, 0.1]]]).log()  # (1, 1, 3)
    >>> student = torch.tensor([[[0.2, 0.3, 0.5]]]).log()
    >>> round(distill_loss(student, teacher, torch.ones(1, 1)).item(), 6)
    0.498224
    """
    mask = loss_mask.bool()  # (B, T), M of them true
    # (B, T)
    weights = token_weights(mask, num_tokens=num_tokens, dtype=student_logits.dtype)
    divergence = divergences(
        student_logits[mask], teacher_logits[mask], kind=kind, clip=clip, tau=tau
    )  # (M,)
    return (weights[mask] * divergence).sum()


def ofsd_step(
    model,
    teacher,
    optimizer: torch.optim.Optimizer,
    pairs: list[Pair],
    *,
    kind: str = "forward_kl",
    clip: str = "none",
    tau: float = 0.05,
    micro_batch: int = 20,
    max_grad_norm: float = 1.0,
) -> dict[str, float]:
    """One update on a batch of pairs. Returns its loss, grad_norm and tokens_trained.

    If adapters are trained, the teacher is the model itself, with its adapters off.
    micro_batch pairs share a forward pass, which changes memory and time but not the
    gradient.
    """
    # 1. The weight of each token: the loss is a mean over all that the policy sampled.
    loss_mask = padded([pair.student.loss_mask for pair in pairs], torch.bool)  # (B, T)
    weights = token_weights(loss_mask)  # (B, T)

    loss_sum = 0.0
    lengths = [len(pair.student.response_ids) for pair in pairs]
    for rows in my_share(micro_batches(lengths, micro_batch)):
        # 2. The teacher and the student read the same responses under two prompts.
        students = [pairs[row].student for row in rows]
        prompts = [pairs[row].prompt for row in rows]
        batch_weights = weights[rows][loss_mask[rows]].to(model.device)  # (M,)
        with torch.no_grad(), adapters_off(teacher):
            teacher_hidden = policy_hidden(teacher, students, prompts)  # (M, H)
        hidden = policy_hidden(model, students)  # (M, H)

        # 3. The graph is cut at the student's hidden states, as in grpo_step, so that
        #    the large logits exist for a chunk of n tokens at a time.
        leaf = hidden.detach().requires_grad_()  # (M, H)
        for chunk in token_chunks(model, len(leaf)):
            logits = to_logits(model, leaf[chunk])  # (n, V)
            with torch.no_grad():  # adapters may be on: the output layer has none
                teacher_logits = to_logits(teacher, teacher_hidden[chunk])  # (n, V)
            divergence = divergences(
                logits, teacher_logits, kind=kind, clip=clip, tau=tau
            )  # (n,)
            loss = (batch_weights[chunk] * divergence).sum()
            loss.backward()  # dloss/dh into leaf.grad, and the output layer's gradient
            loss_sum += loss.item()
        hidden.backward(leaf.grad)  # the decoder's gradient, by the chain rule

    # 4. Clip the gradient, and step. If its norm is 0 or not finite, skip the step.
    parameters = optimizer.param_groups[0]["params"]
    sum_gradients(parameters)  # over devices
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if 0 < grad_norm < math.inf:
        optimizer.step()
    optimizer.zero_grad()
    # Each device has its part of the loss.
    return {
        "loss": sum(gather(loss_sum)),
        "grad_norm": grad_norm,
        "tokens_trained": loss_mask.sum().item(),
    }


@torch.no_grad()
def token_divergences(model, pair: Pair) -> list[float | None]:
    """For the log: D of forward_kl at each token of the student's trajectory, in nats.

    The model as it is now is both teacher and student. A token of the environment has
    None.
    """
    student_hidden, teacher_hidden = read_by_both(model, pair)  # (M, H) each
    return divergences_of(model, pair, student_hidden, teacher_hidden)


@torch.no_grad()
def read_by_both(model, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of the student's trajectory behind the standard prompt, and behind
    the privileged one: (M, H) each."""
    student_hidden = policy_hidden(model, [pair.student])  # (M, H)
    teacher_hidden = policy_hidden(model, [pair.student], [pair.prompt])  # (M, H)
    return student_hidden, teacher_hidden


@torch.no_grad()
def divergences_of(
    model, pair: Pair, student_hidden: torch.Tensor, teacher_hidden: torch.Tensor
) -> list[float | None]:
    """token_divergences, from what read_by_both returns."""
    of_the_policy = []
    for chunk in token_chunks(model, len(student_hidden)):
        student_logits = to_logits(model, student_hidden[chunk])  # (n, V)
        teacher_logits = to_logits(model, teacher_hidden[chunk])  # (n, V)
        of_the_policy += divergences(student_logits, teacher_logits).tolist()

    values = iter(of_the_policy)
    by_token = []
    for sampled in pair.student.loss_mask:
        value = next(values) if sampled else None
        by_token.append(value)
    return by_token
