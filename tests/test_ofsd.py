"""ofsd.py: every case of mining, the privileged prompt, the divergences in numbers."""

import math
from dataclasses import replace

import pytest
import torch

from machinery.passages import Passage
from machinery.text import TAGS, chat_ids, decode, encode
from ofsd import (
    PRIVILEGED,
    difference,
    distill_loss,
    divergences,
    mine_group,
    mine_pair,
    mine_pairs,
    privileged_prompt,
)
from rollout import Trajectory, context_length, observation_ids, standard_prompt

P, Q = (
    (0.6, 0.3, 0.1),
    (0.2, 0.3, 0.5),
)  # what teacher and student think of three entries


def asked(*queries):
    return Trajectory("?", [], queries=list(queries))


# ---------------------------------------------------------------- mining


def test_reference_is_the_correct_one_with_the_fewest_searches():
    group = [asked("a"), asked("a", "b", "c"), asked("a", "b"), asked("a", "b")]
    assert (
        mine_pair(group, [0, 1, 1, 1])[0] is group[2]
    )  # the tie with 3 goes to the lower index


def test_a_wrong_student_is_preferred_however_alike():
    group = [asked("a"), asked("a"), asked("x", "y", "z", "w")]
    assert mine_pair(group, [1, 0, 1]) == (group[0], group[1])


def test_among_wrong_ones_the_difference_in_searches_decides_then_the_words():
    group = [asked("ada mother"), asked("other words"), asked("a", "b", "c"), asked()]
    assert mine_pair(group, [1, 0, 0, 0])[1] is group[2]  # 2 apart against 0 and 1
    group = [
        asked("ada mother"),
        asked("Mother ADA"),
        asked("ada father"),
        asked("ada king"),
    ]
    assert (
        mine_pair(group, [1, 0, 0, 0])[1] is group[2]
    )  # overlap 1/3, as index 3: the lower one
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
    searches, overlap = difference(asked("Ada's mother"), asked("ada father"))
    assert searches == 0 and overlap == pytest.approx(1 - 1 / 4)
    assert difference(asked(), asked()) == (0, 0.0)  # two empty sets overlap wholly
    assert difference(asked("a"), asked("b", "c")) == (1, 1.0)


def test_several_students_are_the_most_different_first_and_wrong_ones_before_right():
    group = [asked("a"), asked("a b"), asked("x", "y"), asked("a", "b"), asked("a")]
    correct = [True, False, False, True, True]
    reference, students = mine_group(group, correct, students=9)
    assert reference is group[0]
    # Wrong ones: a search more, and half of the words. Then the right one that differs;
    # the last trajectory searches as the reference does.
    assert [group.index(student) for student in students] == [2, 1, 3]
    assert mine_group(group, correct, students=2).students == students[:2]
    assert mine_pair(group, correct) == (reference, students[0])


@pytest.mark.parametrize("reward", [0.1, -0.1, 2, math.nan])
def test_a_pair_by_rewards_wants_rewards_that_say_what_is_correct(reward):
    with pytest.raises(ValueError, match="rewards of 0 and 1"):
        mine_pair([asked("a"), asked("b")], [1, reward])


# ---------------------------------------------------------------- the privileged prompt


@pytest.fixture
def reference(tokenizer):
    """A correct one: a search that found two passages, an answer, the stop token."""
    found = [
        Passage("0", "Long", "many words " * 60),
        Passage("1", "Short", "just this"),
    ]
    first = encode(tokenizer, "<think> hm</think>\n<search> Ada</search>")
    last = encode(tokenizer, "<think> so</think>\n<answer> Ada</answer>")
    last += [tokenizer.eos_token_id]
    trajectory = Trajectory("Who?", [], queries=["Ada"], answer="Ada", passages=[found])
    trajectory.extend(first, [-1.0] * len(first))
    trajectory.extend(observation_ids(tokenizer, found, 512))
    trajectory.extend(last, [-1.0] * len(last))
    return trajectory


def test_both_prompts_end_in_the_same_header_and_the_reference_is_whole(
    tokenizer, reference
):
    privileged = privileged_prompt(tokenizer, "Who wrote it?", reference, 1000)
    text = decode(tokenizer, privileged)
    standard = decode(
        tokenizer, chat_ids(tokenizer, standard_prompt(tokenizer, "Who wrote it?"))
    )
    header = "<|im_end|>\n<|im_start|>assistant\n"
    assert text.endswith(header) and standard.endswith(header)
    # The reference's own stop token is harmless.
    assert text.count("<|im_end|>") == text.count("<|im_start|>") - 1 == 1
    assert "<answer> Ada</answer>(|im_end|)" in text
    assert "Who wrote it?" in text and "many words " * 59 in text
    places = [
        text.index(part) for part in ("<think> hm</think>", "- Long:", "<answer> Ada")
    ]
    assert places == sorted(places)


def test_too_long_a_reference_loses_passage_words_longest_first_and_nothing_else(
    tokenizer, reference
):
    whole = privileged_prompt(tokenizer, "Who wrote it?", reference, 1000)
    cut = privileged_prompt(tokenizer, "Who wrote it?", reference, len(whole) - 50)
    text = decode(tokenizer, cut)
    assert len(whole) - 60 <= len(cut) <= len(whole) - 50
    assert "Short: just this" in text and "- Long: many words" in text
    own = (
        "Who wrote it?",
        "<think> hm</think>\n<search> Ada</search>",
        "<information>",
        "</information>",
        "<think> so</think>\n<answer> Ada</answer>",
    )
    assert all(kept in text for kept in own)
    # With every word of the passages gone it is as short as it gets.
    shown = (
        "<think> hm</think>\n<search> Ada</search>\n<information>\n\n\n</information>\n"
        "<think> so</think>\n<answer> Ada</answer>(|im_end|)"
    )
    prompt = standard_prompt(tokenizer, "Who wrote it?")
    shortest = chat_ids(tokenizer, PRIVILEGED.format(prompt=prompt, reference=shown))
    room = len(shortest)
    assert privileged_prompt(tokenizer, "Who wrote it?", reference, room) == shortest
    assert privileged_prompt(tokenizer, "Who wrote it?", reference, room - 1) is None


def test_as_much_of_the_passages_as_fits_is_kept(tokenizer, reference):
    """Against all budgets of an observation, tried one by one."""
    first = "<think> hm</think>\n<search> Ada</search>"
    last = "<think> so</think>\n<answer> Ada</answer>"
    forms = []
    for budget in range(120):
        seen = decode(
            tokenizer, observation_ids(tokenizer, reference.passages[0], budget)
        )
        shown = first + seen + last + "(|im_end|)"
        prompt = standard_prompt(tokenizer, "Who?")
        forms.append(
            chat_ids(tokenizer, PRIVILEGED.format(prompt=prompt, reference=shown))
        )
    for room in range(len(forms[0]), len(forms[-1]), 5):
        found = privileged_prompt(tokenizer, "Who?", reference, room)
        assert found in forms
        assert len(found) == max(len(form) for form in forms if len(form) <= room)


def test_each_observation_of_the_reference_is_cut_to_passages_of_its_own(tokenizer):
    """Two searches. Each observation holds what its own search found, cut or not."""
    trajectory = Trajectory("Who?", [], queries=["a", "b"], answer="x")
    for title, turn in (("One", "<search> a</search>"), ("Two", "<search> b</search>")):
        found = [Passage("0", title, "many words " * 30)]
        trajectory.extend(said := encode(tokenizer, turn), [-1.0] * len(said))
        trajectory.extend(observation_ids(tokenizer, found, 512))
        trajectory.passages.append(found)
    trajectory.extend(
        said := encode(tokenizer, "<answer> x</answer>"), [-1.0] * len(said)
    )
    whole = privileged_prompt(tokenizer, "Who?", trajectory, 1000)
    cut = privileged_prompt(tokenizer, "Who?", trajectory, len(whole) - 40)
    assert len(cut) <= len(whole) - 40
    for ids in (whole, cut):
        text = decode(tokenizer, ids)
        parts = (
            "<search> a</search>",
            "- One: many words many",
            "<search> b</search>",
            "- Two: many words many",
            "<answer> x</answer>",
        )
        places = [text.index(part) for part in parts]
        assert places == sorted(places)


def test_the_reference_may_hold_tags(tokenizer, reference):
    text = decode(tokenizer, privileged_prompt(tokenizer, "Who?", reference, 1000))
    assert all(tag in text for tag in TAGS)


def test_pairs_of_several_questions_and_why_others_gave_none(micro, reference):
    model, tokenizer = micro
    wrong = replace(reference, answer="Eve", queries=["Eve"])
    questions = []
    for i in range(4):
        asks = f"Who is {i}?"
        questions.append({"id": str(i), "question": asks, "golden_answers": ["Ada"]})
    groups = [reference, wrong, wrong, wrong, reference, reference, wrong, reference]
    # What is correct is exact match, whatever the rewards say.
    rewards = [0.3, 0.1, -0.1, 0.2, 1.0, 1.0, 0.0, -1.0]
    pairs, counts = mine_pairs(model, tokenizer, questions, groups, rewards, 1000)
    assert counts == {"pairs": 2, "no_correct": 1, "no_contrast": 1, "too_long": 0}
    assert [pair.question for pair in pairs] == [questions[0], questions[3]]
    for pair, text in zip(pairs, ("Who is 0?", "Who is 3?"), strict=True):
        assert pair.reference is reference and pair.student is wrong
        assert pair.prompt == privileged_prompt(tokenizer, text, reference, 1000)
    assert [pair.rewards for pair in pairs] == [[0.3, 0.1], [0.0, -1.0]]


def test_a_question_may_give_several_pairs(micro, reference):
    model, tokenizer = micro
    wrong = replace(reference, answer="Eve")
    group = [reference]
    group += [replace(wrong, queries=[query]) for query in ("Eve", "Adam", "Ada")]
    question = {"id": "q", "question": "Who?", "golden_answers": ["Ada"]}
    rewards = [1.0, 0.0, 0.0, 0.0]
    for students in (1, 2, 3, 9):
        pairs, counts = mine_pairs(
            model, tokenizer, [question], group, rewards, 1000, students
        )
        assert counts["pairs"] == len(pairs) == min(students, 3)
        for pair, student in zip(pairs, group[1:], strict=False):
            assert pair.reference is reference and pair.student is student


def test_a_privileged_prompt_leaves_room_for_the_response(micro, reference):
    """The model's context holds the privileged prompt and the student's response."""
    model, tokenizer = micro
    whole = len(privileged_prompt(tokenizer, "Who?", reference, 1000))
    question = {"question": "Who?", "golden_answers": ["Ada"]}

    def mine(length, most=1000):
        long = Trajectory("Who?", [], [5] * length, [1] * length)
        group = [reference, long]
        return mine_pairs(model, tokenizer, [question], group, [1.0, 0.0], most)

    for room in (whole, whole - 50):  # the context has so much left for the prompt
        pairs, counts = mine(context_length(model) - room)
        assert counts["pairs"] == 1 and counts["too_long"] == 0
        assert room - 10 <= len(pairs[0].prompt) <= room
    # The setting is a limit, too.
    assert len(mine(10, most=whole - 50)[0][0].prompt) <= whole - 50
    pairs, counts = mine(context_length(model) - 30)
    assert pairs == [] and counts["too_long"] == 1 and counts["pairs"] == 0


# ---------------------------------------------------------------- the loss


def loss_and_gradient(teacher=P, student=Q, **how):
    logits = torch.tensor([[student]], dtype=torch.float64).log()  # (1, 1, 3)
    logits.requires_grad_()
    wanted = torch.tensor([[teacher]], dtype=torch.float64).log()  # (1, 1, 3)
    loss = distill_loss(logits, wanted, torch.ones(1, 1), **how)
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
    student = torch.randn(3, 4, 7, dtype=torch.float64).requires_grad_()
    teacher, mask = torch.randn(3, 4, 7).double(), torch.randint(0, 2, (3, 4))
    distill_loss(student, teacher, mask, kind=kind).backward()
    expected = closed_form(teacher.softmax(-1), student.detach().softmax(-1), kind)
    expected = expected * mask[..., None] / mask.sum()
    assert torch.allclose(student.grad, expected, atol=1e-12)


def test_the_papers_clip_reverses_the_correction():
    """The entries A = {d_v <= tau} keep their terms, and the others are constant. With
    P_A the teacher's mass on A the logit gradient is P_A q_i - p_i [i in A]: here
    A = {1, 2}, P_A = .4, (.4 * .2, .4 * .3 - .3, .4 * .5 - .1). The exact gradient
    raises entry 0, which the teacher prefers (-.4). The clipped one lowers it."""
    value, gradient = loss_and_gradient(clip="entry", tau=0.05)
    assert value == pytest.approx(-0.110944, abs=1e-6)  # below zero: no divergence
    assert gradient == pytest.approx([0.08, -0.18, 0.10])
    assert loss_and_gradient()[1][0] < 0 < gradient[0]
    # One step of SGD on the logits, then. The teacher gives entry 0 a probability of
    # .6, the student one of .2: without a clip it rises, with the paper's it falls.
    after = {}
    for clip in ("none", "entry"):
        logits = torch.tensor([[Q]], dtype=torch.float64).log().requires_grad_()
        optimizer = torch.optim.SGD([logits], lr=0.5)
        wanted = torch.tensor([[P]], dtype=torch.float64).log()
        distill_loss(logits, wanted, torch.ones(1, 1), clip=clip, tau=0.05).backward()
        optimizer.step()
        after[clip] = logits.softmax(-1)[0, 0, 0].item()
    assert after["entry"] < Q[0] < after["none"] < P[0]
    # By hand: the logits are ln q minus half the gradient, so q_i is multiplied by
    # e^(-g_i / 2).
    none = 0.2 * math.exp(0.2), 0.3, 0.5 * math.exp(-0.2)
    entry = 0.2 * math.exp(-0.04), 0.3 * math.exp(0.09), 0.5 * math.exp(-0.05)
    assert after["none"] == pytest.approx(none[0] / sum(none))
    assert after["entry"] == pytest.approx(entry[0] / sum(entry))


def test_the_clip_by_position_keeps_the_direction():
    exact, direction = loss_and_gradient()
    value, gradient = loss_and_gradient(clip="position", tau=0.05)
    assert value == pytest.approx(0.05)
    assert gradient == pytest.approx([0.05 / exact * g for g in direction])
    value, gradient = loss_and_gradient(
        clip="position", tau=1.0
    )  # too high to do anything
    assert value == pytest.approx(exact) and gradient == pytest.approx(direction)


def test_entry_clips_the_named_divergences_own_terms():
    # reverse: d = (.2 ln(1/3), 0, .5 ln 5) = (-.21972, 0, .80472), capped at .05
    value, _ = loss_and_gradient(kind="reverse_kl", clip="entry")
    assert value == pytest.approx(-0.21972 + 0.05, abs=1e-5)


def test_names_are_checked():
    with pytest.raises(ValueError, match="kind is"):
        loss_and_gradient(kind="kl")
    with pytest.raises(ValueError, match="clip is"):
        loss_and_gradient(clip="all")


def random_logits(seed=0):
    torch.manual_seed(seed)
    return (
        torch.randn(5, 6, 8).double(),
        torch.randn(5, 6, 8).double(),
        torch.randint(0, 2, (5, 6)),
    )


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
def test_an_entry_that_is_impossible_for_both_adds_nothing(kind):
    with_word = [
        torch.tensor([[[*values, 0.0]]], dtype=torch.float64).log() for values in (Q, P)
    ]
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
        piece = [x[i : i + size] for x in (parts, teacher, mask)]
        distill_loss(*piece, num_tokens=mask.sum()).backward()
    assert torch.allclose(whole.grad, parts.grad, rtol=1e-12)


def test_equal_distributions_have_no_divergence_and_it_is_never_negative():
    torch.manual_seed(1)
    one, two = torch.randn(2, 50, 9).double()
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        assert divergences(one, one, kind=kind).abs().max() < 1e-12
        assert divergences(one, two, kind=kind).min() > 0


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("clip", ["none", "position"])
def test_neither_padding_nor_order_changes_loss_or_gradient(kind, clip):
    student, teacher, mask = random_logits()
    order = torch.tensor([4, 2, 0, 1, 3])
    results = []
    for pad, rows in ((0, torch.arange(5)), (3, order)):

        def pad_by(x, pad=pad):
            return torch.nn.functional.pad(x, (0, 0, 0, pad), value=7.0)

        padded = [pad_by(x)[rows] for x in (student, teacher)]
        padded[0].requires_grad_()
        padded_mask = torch.nn.functional.pad(mask, (0, pad))[rows]
        loss = distill_loss(*padded, padded_mask, kind=kind, clip=clip)
        loss.backward()
        results.append((loss, padded[0].grad[torch.argsort(rows), :6]))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-12)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-12, atol=1e-18)


def test_an_entry_that_is_impossible_for_one_of_the_two():
    """p = (.5, .5, 0) and q = (.2, 0, .8), and the other way round. KL is infinite
    where the first holds an entry that the second excludes, and else it is finite.
    JSD is always finite: m = (.35, .25, .4), so it is half of
    .5 ln(.5/.35) + .5 ln(.5/.25) + .2 ln(.2/.35) + .8 ln(.8/.4)."""

    def logits(*values):
        return torch.tensor([[values]], dtype=torch.float64).log()  # (1, 1, 3)

    p = logits(0.5, 0.5, 0.0)
    q = logits(0.2, 0.0, 0.8)
    ones = torch.ones(1, 1)
    student = q.clone().requires_grad_()
    loss = distill_loss(student, p, ones)
    loss.backward()
    assert loss.item() == math.inf
    # The gradient still is p_S - p_T.
    assert student.grad.flatten().tolist() == pytest.approx([0.2 - 0.5, 0.0 - 0.5, 0.8])
    assert distill_loss(q, p, ones, kind="reverse_kl").item() == math.inf
    student = q.clone().requires_grad_()
    loss = distill_loss(student, p, ones, kind="jsd")
    loss.backward()
    expected = 0.5 * math.log(0.5 / 0.35) + 0.5 * math.log(2)
    expected += 0.2 * math.log(0.2 / 0.35) + 0.8 * math.log(2)
    assert loss.item() == pytest.approx(expected / 2) and student.grad.isfinite().all()
    # One that only the student's excess excludes: .5 ln(.5/.2) + .5 ln(.5/.2)
    one, two = logits(0.5, 0.5, 0.0), logits(0.2, 0.2, 0.6)
    assert distill_loss(two, one, ones).item() == pytest.approx(math.log(2.5))
    assert distill_loss(one, two, ones, kind="reverse_kl").item() == pytest.approx(
        math.log(2.5)
    )


def test_parity_with_trls_self_distillation():
    utils = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    student, teacher = torch.randn(2, 3, 4, 9)
    loss = utils.compute_full_logit_self_distillation_loss
    for kind, alpha in (("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5)):
        theirs = loss(student, teacher, distillation_alpha=alpha)
        ours = divergences(student.flatten(0, 1), teacher.flatten(0, 1), kind=kind)
        assert torch.allclose(ours, theirs.flatten(), atol=1e-6)
