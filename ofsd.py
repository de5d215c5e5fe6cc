"""OFSD, offline self-distillation: the policy learns from itself, shown a better attempt.

After GRPO the policy samples K trajectories per training question. Where one of them is right
and another wrong (or longer, or searched otherwise), the same parameters act as teacher and
student: the teacher reads the good trajectory in its prompt, the student does not, and on
every token of the worse trajectory the student is pulled towards what the teacher would say.

Equations (q question, y_ref reference, y_stu the student's trajectory, m_t its loss_mask)

    p_T(. | t) = pi_frozen( . | P_T(q, y_ref), y_stu[:t])      the privileged prompt, no gradient
    p_S(. | t) = pi_theta ( . | P_S(q),        y_stu[:t])      the standard prompt
    loss       = sum_t m_t D(p_T || p_S) / sum_t m_t           sums over all pairs of an update
    forward_kl : D = sum_v d_v,   d_v = p_T(v) log(p_T(v) / p_S(v))       gradient by logit  p_S - p_T
    reverse_kl : D = sum_v d_v,   d_v = p_S(v) log(p_S(v) / p_T(v))
    jsd        : D = sum_v d_v,   d_v = 1/2 p_T log(p_T / p_m) + 1/2 p_S log(p_S / p_m),   p_m = (p_T + p_S) / 2

    clip none     : D as it is
    clip entry    : sum_v min(d_v, tau), the paper's. It is no divergence (it can be below 0) and
                    on clipped words its gradient points AWAY from the teacher; a test shows it.
    clip position : w_t D with w_t = min(1, tau / D), detached: caps rare large positions and
                    keeps the direction of every one

    LoRA : W x + (alpha / r) B A x in every linear layer of the decoder; only A and B are trained, the
           teacher is the same model with them off, and afterwards they are merged into W

All tensors over the vocabulary are (N, V): the N positions whose mask is 1, at most a chunk of
them at a time in training (grpo.py). "The loss is near zero, is it learning?" It is zero where the
reference tells the teacher nothing that the student does not know, and it falls when the student
agrees with the teacher, right or wrong: watch the teacher's edge, and the reward after the stage.

Deviations from the paper
    1. The default clip is none: entry reverses the correction (above), and the paper's tau is
       not known (.05, the default where a clip is asked for, is that of OPSD, 2601.18734).
    2. By default all weights are trained, and the teacher is a frozen copy of the policy that GRPO
       left behind. The paper trains LoRA adapters on that policy (class Adapters, --lora-rank) and
       takes it with the adapters off: the same teacher, in less memory. Its rank is not stated.
    3. The measure by which the student "differs most" is not published; `difference` is ours.
    4. K is not stated either; we sample as many as GRPO does (5). The wording is ours.

    python ofsd.py                # one pair, both prompts, the divergence at each token
"""

import math
import re
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from grpo import backward_in_chunks, chunks, micro_batches, output_layer, over_ranks, policy_hidden, rank_and_ranks, update
from retriever import BadInput, Parser, open_index, paint, run_script
from rollout import (
    Trajectory, autocast, chat_ids, context_length, decode, encode, fit_lengths, load_model, neutralise, parse_turn, rollout,
    spans, standard_prompt,
)  # fmt: skip

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


def reference_index(trajectories: list[Trajectory], rewards) -> int | None:
    """Of the correct trajectory with the fewest searches, the first one; None where none is correct."""
    correct = [i for i, reward in enumerate(rewards) if reward > 0]
    return min(correct, key=lambda i: len(trajectories[i].queries), default=None)


def mine_pair(trajectories: list[Trajectory], rewards) -> tuple[Trajectory, Trajectory] | None:
    """The (reference, student) of one group, from its trajectories and 0/1 rewards.

    Reference: the correct trajectory with the fewest searches. Student: the one that differs
    most from it, a wrong one if there is any. Ties: the lowest index. None where no trajectory
    is correct, or where all are correct and none differs from the reference.
    """
    best = reference_index(trajectories, rewards)
    if best is None:
        return None
    wrong = [i for i, reward in enumerate(rewards) if reward <= 0]
    others = wrong or [i for i in range(len(trajectories)) if i != best]
    gaps = {i: difference(trajectories[best], trajectories[i]) for i in others}
    student = max(others, key=gaps.get, default=None)
    if student is None or (not wrong and gaps[student] == (0, 0.0)):
        return None
    return trajectories[best], trajectories[student]


def mine_pairs(
    model, tokenizer, questions: list[dict], trajectories: list[Trajectory], rewards: list[float], max_tokens: int
) -> tuple[list[tuple], dict]:
    """Of question-major trajectories, the pairs as (question, reference, student, privileged prompt),
    and how many questions gave one, and why others gave none. max_tokens: of a privileged prompt,
    which must also fit the model's context together with the student's response."""
    pairs, counts = [], dict(pairs=0, no_correct=0, no_contrast=0, too_long=0)
    size = len(trajectories) // len(questions)
    for i, question in enumerate(questions):
        group = slice(i * size, (i + 1) * size)
        pair = mine_pair(trajectories[group], rewards[group])
        if pair is None:
            counts["no_contrast" if any(rewards[group]) else "no_correct"] += 1
            continue
        room = min(max_tokens, context_length(model) - len(pair[1].response_ids))
        prompt = privileged_prompt(tokenizer, question["question"], pair[0], room)
        if prompt is None:
            counts["too_long"] += 1
            continue
        pairs.append((question, *pair, prompt))
    return pairs, counts | {"pairs": len(pairs)}


def privileged_prompt(
    tokenizer, question: str, reference: Trajectory, max_tokens: int, reads: str = "whole"
) -> list[int] | None:
    """P_T(q, y_ref) as token ids: the standard prompt and the reference in one user turn, then
    the same assistant header as the standard prompt. reads: what of the reference stands there,
    the "whole" (the paper's) or its "queries" and answer only. Where that is longer than
    max_tokens the reference's passages are shortened, longest first, never its own words; None
    where even that does not fit. A special token inside the reference is made harmless; its
    tags stay."""
    if reads == "queries":
        shown = "".join(f"<search> {query} </search>\n" for query in reference.queries) + f"<answer> {reference.answer} </answer>"
        texts = [(True, shown)]
    elif reads == "whole":
        texts = [(sampled, decode(tokenizer, ids)) for sampled, ids in spans(reference)]
    else:
        raise ValueError(f"reads is whole or queries, not {reads!r}")
    written, lines = [""], []  # written[i] stands before passage line i
    for sampled, text in texts:
        for line in text.splitlines(keepends=True):
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


def query_mask(tokenizer, trajectory: Trajectory) -> list[int]:
    """The loss_mask narrowed to search queries: 1 for the sampled tokens that end between <search>
    and </search> of a turn that searched. (The paper aligns all of the policy's tokens.)"""
    mask = []
    for sampled, ids in spans(trajectory):
        text = decode(tokenizer, ids)
        end = text.find("</search>")
        begin = text.rfind("<search>", 0, max(end, 0)) + len("<search>")
        searched = sampled and (parse_turn(text) or "?")[0] == "search"
        mask += [int(searched and begin < len(decode(tokenizer, ids[: i + 1])) <= end) for i in range(len(ids))]
    return mask


def divergence_terms(log_s: torch.Tensor, log_t: torch.Tensor, kind: str) -> torch.Tensor:
    """d_v of the equations above, from log-probabilities (N, V), as (N, V). 0 log 0 is 0."""

    def term(log_p, log_q):
        absent = log_p == -torch.inf  # (N, V), filled before the product, so that no gradient is NaN
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


def divergences(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, kind: str = "forward_kl", clip: str = "none", tau: float = 0.05
) -> torch.Tensor:  # fmt: skip
    """D at each position, clipped if asked, in nats: (N, V), (N, V) -> (N,). Training calls this
    in grpo.py's backward_in_chunks, so that only a chunk of positions at a time is as wide as V.
    Raises ValueError for a kind or a clip that is not in the equations above."""
    log_s = torch.log_softmax(student_logits, dim=-1)  # (N, V)
    log_t = torch.log_softmax(teacher_logits.detach(), dim=-1)  # (N, V)
    terms = divergence_terms(log_s, log_t, kind)  # (N, V)
    if clip == "entry":
        terms = terms.clamp(max=tau)  # (N, V)
    divergence = terms.sum(-1)  # (N,)
    if clip == "position":
        return divergence * (tau / divergence.detach().clamp(min=tau))  # (N,)
    if clip not in ("none", "entry"):
        raise ValueError(f"clip is none, entry or position, not {clip!r}")
    return divergence


def distill_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, loss_mask: torch.Tensor, *,
    kind: str = "forward_kl", clip: str = "none", tau: float = 0.05, num_tokens: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """The mean divergence, in nats, over the positions whose mask is 1.

    (B, T, V), (B, T, V), (B, T) -> scalar. logits[:, t] predict response token t. num_tokens:
    the divisor; pass the whole batch's count when the batch comes in pieces. Masked positions
    may hold anything, infinities too: they are left out before anything is computed. This is the
    formula to read and to test against; ofsd_step computes it a chunk at a time.

    >>> p, q = torch.tensor([[[0.6, 0.3, 0.1]]]).log(), torch.tensor([[[0.2, 0.3, 0.5]]]).log()
    >>> round(distill_loss(q, p, torch.ones(1, 1)).item(), 6)
    0.498224
    """
    inside = loss_mask.bool()
    divergence = divergences(student_logits[inside], teacher_logits[inside], kind=kind, clip=clip, tau=tau)  # (N,)
    return divergence.sum() / (num_tokens or max(len(divergence), 1))


def ofsd_step(model, teacher, optimizer, pairs: list[tuple], config, adapters: "Adapters | None" = None) -> dict:
    """One update on a batch of (student, privileged prompt); config is train.py's. With adapters the
    teacher is the model itself, with them off."""
    num_tokens = sum(sum(student.loss_mask) for student, _ in pairs)
    teacher_head = output_layer(teacher)

    def loss(logits, teacher_hidden):
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_hidden)  # (n, V)
        how = dict(kind=config.divergence, clip=config.clip, tau=config.tau)
        return divergences(logits, teacher_logits, **how).sum() / num_tokens

    total = 0.0
    rank, ranks = rank_and_ranks()
    for part in micro_batches(pairs, config.micro_batch, lambda pair: len(pair[0].response_ids))[rank::ranks]:
        students, prompts = zip(*part)  # the same response under both prompts
        with autocast(model.device):
            with torch.no_grad(), adapters.off() if adapters else nullcontext():
                teacher_hidden = policy_hidden(teacher, students, prompts)  # (N, H)
            hidden = policy_hidden(model, students)  # (N, H)
            total += backward_in_chunks(model, loss, hidden, teacher_hidden)
    return {"loss": over_ranks(total), "grad_norm": update(optimizer, config.max_grad_norm)}


@torch.no_grad()
def token_divergences(model, student: Trajectory, privileged: list[int]) -> list[tuple[int, float | None]]:
    """To look at: of each of the student's tokens its id and the forward KL there, in nats, from the model
    under the privileged prompt (the teacher) to itself; None for the environment's."""
    head = output_layer(model)
    with autocast(model.device):
        hidden, teacher_hidden = policy_hidden(model, [student]), policy_hidden(model, [student], [privileged])  # (N, H)
        parts = [divergences(head(h), head(t)) for h, t in chunks(model, hidden, teacher_hidden)]  # (n,) each
    values = iter(torch.cat(parts).tolist())
    return [(token, next(values) if sampled else None) for token, sampled in zip(student.response_ids, student.loss_mask)]


class Adapters:
    """LoRA: a low-rank addition to the output of every linear layer of the decoder. A (r, in) is
    random and B (out, r) zero: nothing changes until they are trained. The model's own weights
    are frozen until merge(). alpha is 2 r: the usual choice, so the factor of B A is 2."""

    def __init__(self, model, rank: int):
        self.model, self.on, self.layers = model.requires_grad_(False), True, []
        for linear in model.base_model.modules():
            if isinstance(linear, torch.nn.Linear):
                a = torch.nn.Parameter(torch.randn(rank, linear.in_features, device=linear.weight.device) / linear.in_features**0.5)
                b = torch.nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
                hook = linear.register_forward_hook(lambda _, inputs, output, a=a, b=b: self.add(inputs[0], output, a, b))
                self.layers.append((linear, a, b, hook))
        if not self.layers:
            raise BadInput(f"{model.config.model_type} has no torch.nn.Linear layer to adapt: train all weights (lora_rank 0)")

    def add(self, x, output, a, b):
        """(..., in), (..., out) -> (..., out)"""
        return output + 2 * (x.to(a.dtype) @ a.T @ b.T).to(output.dtype) if self.on else output

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for _, a, b, _ in self.layers for parameter in (a, b)]

    @contextmanager
    def off(self):
        """The teacher: the model as it was when the adapters were added."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapters to the weights, which are trainable again, and take the hooks away.
        The weights are float32: in bfloat16 most of a small update is rounded away (a test shows it)."""
        for linear, a, b, hook in self.layers:
            linear.weight += 2 * (b @ a).to(linear.weight.dtype)
            hook.remove()
        self.layers = []
        self.model.requires_grad_(True)


def lesson() -> None:
    """One pair of micro/model: both prompts, and what the teacher would say otherwise, token by token."""
    from eval import load_questions, rewards_of

    Parser(description="One pair of micro/model: both prompts, and the divergence at each token.").parse_args()
    folder = Path(__file__).parent / "micro"
    model, tokenizer = load_model(str(folder / "model"))
    index, pair = open_index(folder / "corpus.jsonl"), None
    for question in load_questions(str(folder / "train.jsonl")):
        group = rollout(model, tokenizer, index, [question["question"]], group_size=5, seed=0)
        rewards = rewards_of([question], group)
        pair = mine_pair(group, rewards)
        if pair and not rewards[group.index(pair[1])]:
            break
    reference, student = pair
    privileged = privileged_prompt(tokenizer, question["question"], reference, 400)
    for reader, prompt in (("student", student.prompt_ids), ("teacher", privileged)):
        print(paint(f"---- the {reader}'s prompt ({len(prompt)} tokens)", "1") + f"\n{decode(tokenizer, prompt).strip()}\n")
    heat = token_divergences(model, student, privileged)
    kl = [value for _, value in heat if value is not None]
    print(paint("---- the student's own trajectory", "1") + f", wrong: {student.answer}, not {question['golden_answers'][0]}. A number in")
    print("braces is the KL to the teacher at that token, in nats, where it is above .1; the environment's words have none.\n")
    for token, value in heat:
        shade = "34" if value is None else "0" if value < 0.1 else "33" if value < 1 else "31"
        print(paint(decode(tokenizer, [token]), shade) + (f"{{{value:.1f}}}" if (value or 0) >= 0.1 else ""), end="")
    print(f"\n\n{len(kl)} tokens, mean KL {sum(kl) / len(kl):.3f}: the loss. {sum(value >= 0.1 for value in kl)} tokens carry "
          f"{sum(value for value in kl if value >= 0.1) / (sum(kl) or 1):.0%} of it.")  # fmt: skip


if __name__ == "__main__":
    run_script(lesson)
