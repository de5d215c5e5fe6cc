"""ofsd.py: every case of the mining rule, the privileged prompt, and the divergences in numbers."""

import json
import math
from pathlib import Path

import pytest
import torch

import grpo
from grpo import backward_in_chunks, output_layer, policy_hidden
from make import response_logits
from ofsd import (
    Adapters, difference, distill_loss, divergence_terms, divergences, mine_pair, privileged_prompt, query_mask,
)  # fmt: skip
from retriever import BadInput, Passage
from rollout import TAGS, Trajectory, chat_ids, decode, encode, observation_ids, rollout, spans, standard_prompt

ROOT = Path(__file__).resolve().parent.parent

P, Q = (0.6, 0.3, 0.1), (0.2, 0.3, 0.5)  # teacher, student: METHOD's test vector


def asked(*queries):
    return Trajectory("?", [], queries=list(queries))


# ---------------------------------------------------------------- mining


def test_reference_is_the_correct_one_with_the_fewest_searches():
    group = [asked("a"), asked("a", "b", "c"), asked("a", "b"), asked("a", "b")]
    assert mine_pair(group, [0, 1, 1, 1])[0] is group[2]  # the tie with 3 goes to the lower index


def test_a_wrong_student_is_preferred_however_alike():
    group = [asked("a"), asked("a"), asked("x", "y", "z", "w")]
    assert mine_pair(group, [1, 0, 1]) == (group[0], group[1])


def test_among_wrong_ones_the_difference_in_searches_decides_then_the_words():
    group = [asked("ada mother"), asked("other words"), asked("a", "b", "c"), asked()]
    assert mine_pair(group, [1, 0, 0, 0])[1] is group[2]  # 2 apart against 0 and 1
    group = [asked("ada mother"), asked("Mother ADA"), asked("ada father"), asked("ada king")]
    assert mine_pair(group, [1, 0, 0, 0])[1] is group[2]  # overlap 1/3, as index 3: the lower one
    assert mine_pair(group[:2], [1, 0])[1] is group[1]


def test_without_a_wrong_one_the_most_different_correct_one():
    group = [asked("a"), asked("a"), asked("b"), asked("a", "a")]
    assert mine_pair(group, [1, 1, 1, 1]) == (group[0], group[3])
    assert mine_pair(group[:3], [1, 1, 1]) == (group[0], group[2])


def test_no_correct_and_no_contrast_give_no_pair():
    assert mine_pair([asked("a"), asked("b")], [0, 0]) is None
    assert mine_pair([asked("a b"), asked("B a"), asked("b, a")], [1, 1, 1]) is None
    assert mine_pair([asked("a")], [1]) is None
    assert mine_pair([asked(), asked()], [1, 1]) is None


def test_difference_worked_by_hand():
    assert difference(asked("Ada's mother"), asked("ada father")) == (0, pytest.approx(1 - 1 / 4))
    assert difference(asked(), asked()) == (0, 0.0)  # two empty sets overlap wholly
    assert difference(asked("a"), asked("b", "c")) == (1, 1.0)


# ---------------------------------------------------------------- the privileged prompt


@pytest.fixture
def reference(tokenizer):
    trajectory = Trajectory("Who?", [], answer="Ada")
    found = [Passage("0", "Long", "many words " * 60), Passage("1", "Short", "just this")]
    for text in ("<think> hm</think>\n<search> Ada</search>", found, "<think> so</think>\n<answer> Ada</answer>"):
        if isinstance(text, str):
            ids = encode(tokenizer, text)
            trajectory.extend(ids, [-1.0] * len(ids))
        else:
            trajectory.extend(observation_ids(tokenizer, text, 512))
    trajectory.extend([tokenizer.eos_token_id], [-1.0])
    return trajectory


def test_spans_are_by_author(tokenizer, reference):
    assert [sampled for sampled, _ in spans(reference)] == [True, False, True]
    assert sum((ids for _, ids in spans(reference)), []) == reference.response_ids
    assert list(spans(Trajectory("?", []))) == []


def test_both_prompts_end_in_the_same_header_and_the_reference_is_whole(tokenizer, reference):
    privileged = privileged_prompt(tokenizer, "Who wrote it?", reference, 1000)
    text = decode(tokenizer, privileged)
    standard = decode(tokenizer, chat_ids(tokenizer, standard_prompt(tokenizer, "Who wrote it?")))
    header = "<|im_end|>\n<|im_start|>assistant\n"
    assert text.endswith(header) and standard.endswith(header)
    assert text.count("<|im_end|>") == text.count("<|im_start|>") - 1 == 1  # the reference's own stop is harmless
    assert "Who wrote it?" in text and "many words " * 59 in text
    assert text.index("<think> hm</think>") < text.index("- Long:") < text.index("<answer> Ada</answer>")


def test_too_long_a_reference_loses_passage_words_longest_first_and_nothing_else(tokenizer, reference):
    whole = privileged_prompt(tokenizer, "Who wrote it?", reference, 1000)
    cut = privileged_prompt(tokenizer, "Who wrote it?", reference, len(whole) - 50)
    text = decode(tokenizer, cut)
    assert len(whole) - 60 <= len(cut) <= len(whole) - 50
    assert "Short: just this" in text and "- Long: many words" in text
    for kept in ("Who wrote it?", "<search> Ada</search>", "<information>", "</information>", "<answer> Ada</answer>"):
        assert kept in text
    shortest = len(whole) - sum(len(encode(tokenizer, t)) for t in ("Long: " + "many words " * 60, "Short: just this"))
    assert privileged_prompt(tokenizer, "Who wrote it?", reference, shortest + 5) is not None
    assert privileged_prompt(tokenizer, "Who wrote it?", reference, shortest - 5) is None


# ---------------------------------------------------------------- the loss


def loss_and_gradient(teacher=P, student=Q, **how):
    logits = torch.tensor([[student]], dtype=torch.float64).log().requires_grad_()  # (1, 1, 3)
    loss = distill_loss(logits, torch.tensor([[teacher]], dtype=torch.float64).log(), torch.ones(1, 1), **how)
    loss.backward()
    return loss.item(), logits.grad[0, 0].tolist()


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        # .6 ln 3 + .3 ln 1 + .1 ln .2 = .65917 + 0 - .16094; gradient q - p
        ("forward_kl", 0.498224, (-0.4, 0.0, 0.4)),
        # .2 ln(1/3) + 0 + .5 ln 5 = -.21972 + .80472; gradient q (ln(q / p) - D)
        ("reverse_kl", 0.584996, (-0.33672, -0.17550, 0.51222)),
        ("jsd", 0.125101, (-0.08099, -0.01752, 0.09851)),
    ],
)
def test_divergences_against_hand_worked_values_and_gradients(kind, value, gradient):
    found, grad = loss_and_gradient(kind=kind)
    assert found == pytest.approx(value, abs=1e-6)
    assert grad == pytest.approx(gradient, abs=1e-5)


def closed_form(p, q, kind):
    if kind == "forward_kl":
        return q - p
    if kind == "reverse_kl":
        log = (q / p).log()
        return q * (log - (q * log).sum(-1, keepdim=True))
    log = (q / ((p + q) / 2)).log() / 2
    return q * (log - (q * log).sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_gradients_equal_the_closed_forms_in_float64(kind):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 7, dtype=torch.float64).requires_grad_(), torch.randn(3, 4, 7).double()
    mask = torch.randint(0, 2, (3, 4))
    distill_loss(student, teacher, mask, kind=kind).backward()
    expected = closed_form(teacher.softmax(-1), student.detach().softmax(-1), kind) * mask[..., None] / mask.sum()
    assert torch.allclose(student.grad, expected, atol=1e-12)


def test_the_papers_clip_reverses_the_correction():
    """Clipped words A = {d_v <= tau} keep their terms, the others are constant. With P_A the
    teacher's mass on A the logit gradient is P_A q_i - p_i [i in A]: here A = {1, 2}, P_A = .4,
    (.4 * .2, .4 * .3 - .3, .4 * .5 - .1). The exact gradient raises word 0, which the teacher
    prefers (-.4); the clipped one lowers it (+.08)."""
    value, gradient = loss_and_gradient(clip="entry", tau=0.05)
    assert value == pytest.approx(-0.110944, abs=1e-6)  # below zero: no divergence
    assert gradient == pytest.approx([0.08, -0.18, 0.10])
    assert loss_and_gradient()[1][0] < 0 < gradient[0]


def test_the_clip_by_position_keeps_the_direction():
    exact, direction = loss_and_gradient()
    value, gradient = loss_and_gradient(clip="position", tau=0.05)
    assert value == pytest.approx(0.05)
    assert gradient == pytest.approx([0.05 / exact * g for g in direction])
    assert loss_and_gradient(clip="position", tau=1.0) == (pytest.approx(exact), pytest.approx(direction))


def test_entry_clips_the_named_divergences_own_terms():
    # reverse: d = (.2 ln(1/3), 0, .5 ln 5) = (-.21972, 0, .80472), capped at .05
    assert loss_and_gradient(kind="reverse_kl", clip="entry")[0] == pytest.approx(-0.21972 + 0.05, abs=1e-5)


def test_names_are_checked():
    with pytest.raises(ValueError, match="kind is"):
        loss_and_gradient(kind="kl")
    with pytest.raises(ValueError, match="clip is"):
        loss_and_gradient(clip="all")


def random_logits(seed=0):
    torch.manual_seed(seed)
    return torch.randn(5, 6, 8).double(), torch.randn(5, 6, 8).double(), torch.randint(0, 2, (5, 6))


def test_no_gradient_into_the_teacher_and_none_into_information_tokens():
    student, teacher, mask = random_logits()
    student.requires_grad_()
    teacher.requires_grad_()
    distill_loss(student, teacher, mask).backward()
    assert teacher.grad is None
    assert student.grad[mask == 0].eq(0).all() and student.grad[mask == 1].ne(0).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_masked_positions_may_hold_anything(kind):
    student, teacher, mask = random_logits()
    plain = distill_loss(student, teacher, mask, kind=kind)
    student[mask == 0], teacher[mask == 0] = math.inf, math.nan
    student.requires_grad_()
    loss = distill_loss(student, teacher, mask, kind=kind)
    loss.backward()
    assert loss.item() == plain.item() and student.grad.isfinite().all()


def test_all_masked_is_zero_with_a_graph():
    student = torch.randn(2, 3, 4, requires_grad=True)
    loss = distill_loss(student, torch.randn(2, 3, 4), torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0.0 and student.grad.eq(0).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_word_that_is_impossible_for_both_adds_nothing(kind):
    with_word = [torch.tensor([[[*values, 0.0]]], dtype=torch.float64).log() for values in (Q, P)]
    with_word[0].requires_grad_()
    loss = distill_loss(*with_word, torch.ones(1, 1), kind=kind)
    loss.backward()
    value, gradient = loss_and_gradient(kind=kind)
    assert loss.item() == pytest.approx(value)
    assert with_word[0].grad[0, 0].tolist() == pytest.approx([*gradient, 0.0])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_gradient_does_not_depend_on_the_micro_batch_size(size):
    student, teacher, mask = random_logits()
    whole, parts = (student.clone().requires_grad_() for _ in range(2))
    distill_loss(whole, teacher, mask).backward()
    for i in range(0, len(student), size):
        piece = slice(i, i + size)
        distill_loss(parts[piece], teacher[piece], mask[piece], num_tokens=mask.sum()).backward()
    assert torch.allclose(whole.grad, parts.grad, rtol=1e-12)


def test_equal_distributions_have_no_divergence_and_it_is_never_negative():
    torch.manual_seed(1)
    log_p, log_q = torch.randn(2, 50, 9).double().log_softmax(-1)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        assert divergence_terms(log_p, log_p, kind).sum(-1).abs().max() < 1e-12
        assert divergence_terms(log_p, log_q, kind).sum(-1).min() > 0


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("clip", ["none", "position"])
def test_neither_padding_nor_order_changes_loss_or_gradient(kind, clip):
    student, teacher, mask = random_logits()
    order, results = torch.tensor([4, 2, 0, 1, 3]), []
    for pad, rows in ((0, torch.arange(5)), (3, order)):
        padded = [torch.nn.functional.pad(x, (0, 0, 0, pad), value=7.0)[rows] for x in (student, teacher)]
        padded[0].requires_grad_()
        loss = distill_loss(*padded, torch.nn.functional.pad(mask, (0, pad))[rows], kind=kind, clip=clip)
        loss.backward()
        results.append((loss, padded[0].grad[torch.argsort(rows), :6]))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-12)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-12, atol=1e-18)


def test_a_word_that_is_impossible_for_one_of_the_two():
    """p = (.5, .5, 0) and q = (.2, 0, .8), and the other way round: KL is infinite where the first
    holds a word that the second excludes, finite in the other direction, and JSD is always finite:
    m = (.35, .25, .4), JSD = (.5 ln(.5/.35) + .5 ln(.5/.25) + .2 ln(.2/.35) + .8 ln(.8/.4)) / 2."""
    p, q = (torch.tensor([[[*values]]], dtype=torch.float64).log() for values in ((0.5, 0.5, 0.0), (0.2, 0.0, 0.8)))
    ones, student = torch.ones(1, 1), q.clone().requires_grad_()
    loss = distill_loss(student, p, ones)
    loss.backward()
    assert loss.item() == math.inf
    assert student.grad.flatten().tolist() == pytest.approx([0.2 - 0.5, 0.0 - 0.5, 0.8])  # p_S - p_T still
    assert distill_loss(q, p, ones, kind="reverse_kl").item() == math.inf
    student = q.clone().requires_grad_()
    loss = distill_loss(student, p, ones, kind="jsd")
    loss.backward()
    expected = 0.5 * math.log(0.5 / 0.35) + 0.5 * math.log(2) + 0.2 * math.log(0.2 / 0.35) + 0.8 * math.log(2)
    assert loss.item() == pytest.approx(expected / 2) and student.grad.isfinite().all()
    # One that only the student's excess excludes: .5 ln(.5/.2) + .5 ln(.5/.2)
    one, two = (torch.tensor([[[*values]]], dtype=torch.float64).log() for values in ((0.5, 0.5, 0.0), (0.2, 0.2, 0.6)))
    assert distill_loss(two, one, ones).item() == pytest.approx(math.log(2.5))
    assert distill_loss(one, two, ones, kind="reverse_kl").item() == pytest.approx(math.log(2.5))


def test_divergences_in_chunks_are_those_of_the_plain_formula(random_model, monkeypatch):
    model, mask = random_model, torch.tensor([[1, 1, 0], [0, 1, 1]])
    prompts, privileged, responses = [[3], [4, 5]], [[3, 8, 9], [4, 5, 6]], [[10, 11, 12], [13, 14, 15]]
    students = [Trajectory("", *ids) for ids in zip(prompts, responses, mask.tolist())]
    how = dict(kind="jsd", clip="position", tau=0.01)
    with torch.no_grad():
        teacher = response_logits(model, privileged, responses)  # (2, 3, V)
    plain = distill_loss(response_logits(model, prompts, responses), teacher, mask, **how)
    plain.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(grpo, "CHUNK", 3 * model.config.vocab_size)
    head = output_layer(model)
    with torch.no_grad():
        teacher_hidden = policy_hidden(model, students, privileged)
    hidden = policy_hidden(model, students)
    loss = lambda logits, read: divergences(logits, head(read).detach(), **how).sum() / 4  # noqa: E731
    assert backward_in_chunks(model, loss, hidden, teacher_hidden) == pytest.approx(plain.item(), rel=1e-5)
    for p, gradient in zip(model.parameters(), expected):
        assert (p.grad - gradient).norm() < 1e-5 * gradient.norm()


def test_parity_with_trls_self_distillation():
    utils = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    student, teacher = torch.randn(2, 3, 4, 9)
    for kind, alpha in (("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5)):
        theirs = utils.compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
        ours = divergences(student.flatten(0, 1), teacher.flatten(0, 1), kind=kind)
        assert torch.allclose(ours, theirs.flatten(), atol=1e-6)


# ---------------------------------------------------------------- LoRA


def logits_of(model):
    with torch.no_grad():
        return response_logits(model, [[5, 6]], [[7, 8, 9]])


def train_a_little(adapters, model, seed=0):
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        response_logits(model, [[5, 6]], [[7, 8, 9]])[..., 4].mean().neg().backward()
        optimizer.step()


def test_untrained_adapters_change_nothing(random_model):
    before = logits_of(random_model)
    adapters = Adapters(random_model, 4)
    assert torch.equal(logits_of(random_model), before)  # student equals teacher, given the same prompt
    with adapters.off():
        assert torch.equal(logits_of(random_model), before)


def test_only_the_adapters_are_trained_and_off_is_the_model_before(random_model):
    before, weights = logits_of(random_model), {name: p.clone() for name, p in random_model.named_parameters()}
    adapters = Adapters(random_model, 4)
    # 4 layers of seven products: q, k, v, o (128 x 128), gate, up, down (128 x 512)
    assert sum(p.numel() for p in adapters.parameters()) == 4 * 4 * (4 * 256 + 3 * 640)
    train_a_little(adapters, random_model)
    assert not torch.allclose(logits_of(random_model), before, atol=1e-2)
    with adapters.off():
        assert torch.equal(logits_of(random_model), before)
    assert all(torch.equal(p, weights[name]) and p.grad is None for name, p in random_model.named_parameters())


def test_the_merged_model_equals_the_adapted_one(random_model):
    embedding = random_model.get_input_embeddings().weight.clone()
    names = [name for name, _ in random_model.named_parameters()]
    adapters = Adapters(random_model, 4)
    train_a_little(adapters, random_model)
    adapted = logits_of(random_model)
    adapters.merge()
    assert torch.allclose(logits_of(random_model), adapted, atol=1e-5)
    assert [name for name, _ in random_model.named_parameters()] == names
    assert all(p.requires_grad for p in random_model.parameters())
    assert torch.equal(random_model.get_input_embeddings().weight, embedding)
    # The next round begins from the merged weights.
    again = Adapters(random_model, 4)
    with again.off():
        assert torch.allclose(logits_of(random_model), adapted, atol=1e-5)


def test_a_merge_in_bfloat16_would_lose_a_small_update(random_model):
    adapters = Adapters(random_model, 4)
    linear, a, b, _ = adapters.layers[0]
    with torch.no_grad():
        b.normal_(std=1e-5)
    update = 2 * b @ a
    before, half = linear.weight.clone(), linear.weight.bfloat16()
    adapters.merge()
    assert linear.weight.dtype == torch.float32 and torch.allclose(linear.weight - before, update, atol=1e-8)
    lost = (half + update.bfloat16() == half).float().mean()
    assert lost > 0.95  # of 8 bits of mantissa nothing is left for a change of a ten-thousandth


def test_a_model_without_linear_layers_is_refused(small_model):
    with pytest.raises(BadInput, match="gpt2 has no torch.nn.Linear layer"):
        Adapters(small_model("gpt2"), 4)


# ---------------------------------------------------------------- what is aligned, what is read


def test_the_query_mask_holds_the_queries_and_nothing_else(micro, micro_index):
    model, tokenizer = micro
    questions = [json.loads(line)["question"] for line in open(ROOT / "micro/train.jsonl", encoding="utf-8")][:6]
    rows = rollout(model, tokenizer, micro_index, questions, seed=0)
    assert sum(len(row.queries) for row in rows) > 6
    for row in rows:
        mask = query_mask(tokenizer, row)
        assert len(mask) == len(row.loss_mask) and all(m <= sampled for m, sampled in zip(mask, row.loss_mask))
        kept = decode(tokenizer, [token for token, m in zip(row.response_ids, mask) if m])
        assert kept.split() == " ".join(row.queries).split()


def test_the_teacher_may_read_only_queries_and_answer(tokenizer, reference):
    whole = decode(tokenizer, privileged_prompt(tokenizer, "Who?", reference, 1000))
    short = decode(tokenizer, privileged_prompt(tokenizer, "Who?", reference, 1000, reads="queries"))
    assert "<information>" in whole and "<information>" not in short and "<think>" not in short
    for query in reference.queries:
        assert f"<search> {query} </search>" in short
    assert f"<answer> {reference.answer} </answer>" in short and short.startswith(whole[:20])
    with pytest.raises(ValueError, match="reads is"):
        privileged_prompt(tokenizer, "Who?", reference, 1000, reads="answer")


def test_the_reference_may_hold_tags(tokenizer, reference):
    text = decode(tokenizer, privileged_prompt(tokenizer, "Who?", reference, 1000))
    assert all(tag in text for tag in TAGS)
