"""The tests that grade the assignment (lessons/assignment.py), worked by hand.

A test is named after the function that it grades, and calls no other of them. A proof
is in system/test_assignment.py. The other tests ask for more, such as extreme numbers.
"""

import math
from types import SimpleNamespace

import pytest
import torch

import train
from eval import exact_match
from grpo import group_advantages, token_losses, token_weights
from ofsd import Pair, divergences, mine_group
from retriever import bm25_score
from rollout import Trajectory, parse_turn

# ---------------------------------------------------------------- 1. the BM25 score

# Three texts of two words on average.
TEXTS = ["red fox", "Red dog dog", "blue"]
# "dog" is in one text: idf = ln(1 + 2.5 / 1.5). It is there twice, among three words:
# norm = .9 * (1 - .4 + .4 * 3 / 2) = 1.08.
DOG = math.log(1 + 2.5 / 1.5) * 2 / (2 + 1.08)


def test_bm25_score_of_a_word():
    assert bm25_score("dog", TEXTS[1], TEXTS) == pytest.approx(DOG)
    # "red" is in two texts. A text of average length has norm = .9.
    idf = math.log(1 + 1.5 / 2.5)
    red = idf * 1 / (1 + 0.9)
    assert bm25_score("Red!", TEXTS[0], TEXTS) == pytest.approx(red)


def test_bm25_score_adds_up_the_words_of_the_query():
    idf = math.log(1 + 1.5 / 2.5)
    red = idf * 1 / (1 + 1.08)
    assert bm25_score("a red dog", TEXTS[1], TEXTS) == pytest.approx(red + DOG)
    assert bm25_score("dog, dog", TEXTS[1], TEXTS) == pytest.approx(2 * DOG)
    assert bm25_score("fox", TEXTS[1], TEXTS) == 0


def test_bm25_score_has_two_constants():
    # With b = 0 the length has no part: norm = k1.
    idf = math.log(1 + 2.5 / 1.5)
    score = bm25_score("dog", TEXTS[1], TEXTS, k1=2.0, b=0.0)
    assert score == pytest.approx(idf * 2 / (2 + 2))


# ---------------------------------------------------------------- 2. the turn's parser


def test_parse_turn_finds_a_query_or_an_answer():
    assert parse_turn("<think>hm</think> <search> a b </search>") == ("search", "a b")
    assert parse_turn("<answer>Rome\n</answer>\n") == ("answer", "Rome")
    assert parse_turn("<answer></answer>") == ("answer", "")


def test_parse_turn_waits_for_the_end_of_a_turn():
    for text in ("", "<think>hm</think>", "<search> a", "<search> a </answer>"):
        assert parse_turn(text) is None


def test_parse_turn_takes_the_first_closing_tag_and_the_last_opening_one():
    text = "<search>a</search> <answer>b</answer>"
    assert parse_turn(text) == ("search", "a")
    text = "<search> a <search> b </search>"
    assert parse_turn(text) == ("search", "b")
    text = "</search> <answer>b</answer>"  # a closing tag without an opening one
    assert parse_turn(text) == ("answer", "b")


# ---------------------------------------------------------------- 3. who wrote a token


def test_extend_marks_who_wrote_a_token():
    trajectory = Trajectory("?", [1])
    trajectory.extend([7, 8], [-0.5, -1.0])
    trajectory.extend([9])
    trajectory.extend([7], [-2.0])
    assert trajectory.prompt_ids == [1]
    assert trajectory.response_ids == [7, 8, 9, 7]
    assert trajectory.loss_mask == [1, 1, 0, 1]
    assert trajectory.logprobs == [-0.5, -1.0, 0.0, -2.0]


def test_extend_goes_by_the_log_probabilities_even_if_there_is_no_token():
    trajectory = Trajectory("?", [1])
    trajectory.extend([], [])
    trajectory.extend([])
    trajectory.extend([5], [0.0])  # a token of probability 1
    assert trajectory.response_ids == [5]
    assert trajectory.loss_mask == [1]
    assert trajectory.logprobs == [0.0]


# ---------------------------------------------------------------- 4. exact match


def test_exact_match_with_one_of_the_golden_answers():
    assert exact_match("the Beatles!", ["Rolling Stones", "Beatles"]) == 1.0
    assert exact_match("Beatles", ["The  beatles."]) == 1.0
    assert exact_match("Beatles and Stones", ["Beatles"]) == 0.0
    assert exact_match("Beatles", []) == 0.0


def test_exact_match_needs_an_answer():
    assert exact_match(None, ["Rome"]) == 0.0
    assert exact_match("", ["Rome"]) == 0.0
    assert exact_match("The", ["a"]) == 0.0  # both normalize to nothing


# ---------------------------------------------------------------- 5. advantages


def test_group_advantages_by_hand():
    # Mean .2, std (ddof 1) = sqrt((.8^2 + 4 * .2^2) / 4) = .4472; .8 / .4472 = 1.7889.
    # Mean .4, std = sqrt((2 * .6^2 + 3 * .4^2) / 4) = .5477.
    rewards = torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    advantages = group_advantages(rewards)
    expected = torch.tensor(
        [
            [1.7889, -0.4472, -0.4472, -0.4472, -0.4472],
            [1.0954, 1.0954, -0.7303, -0.7303, -0.7303],
        ]
    )
    assert torch.allclose(advantages, expected, atol=1e-4)


def test_group_advantages_add_eps_to_the_deviation():
    # Mean .5, std .7071: .5 / (.7071 + 1).
    advantages = group_advantages(torch.tensor([[1.0, 0.0]]), eps=1.0)
    assert advantages[0].tolist() == pytest.approx([0.29289, -0.29289], abs=1e-5)


def test_group_advantages_are_zero_without_variance():
    equal = torch.tensor([[1.0, 1.0, 1.0], [0.9, 0.9, 0.9]])
    assert equal[1].mean() != equal[1, 0]  # float32 rounds
    assert group_advantages(equal).eq(0).all()
    single = torch.tensor([[1.0], [0.0]])
    assert group_advantages(single).tolist() == [[0.0], [0.0]]


# ---------------------------------------------------------------- 6. the token weights

# Lengths 2 and 4 of T = 5, so N = 6 and B = 2.
MASK = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 0, 1, 1]])


def test_token_weights_of_a_mean_over_tokens():
    weights = token_weights(MASK)
    assert torch.allclose(weights, MASK / 6)
    weights = token_weights(MASK, num_tokens=12)
    assert torch.allclose(weights, MASK / 12)


def test_token_weights_of_the_other_norms():
    weights = token_weights(MASK, norm="grpo")
    assert weights[0].tolist() == [0.25, 0, 0.25, 0, 0]
    assert weights[1].tolist() == [0.125, 0.125, 0, 0.125, 0.125]
    weights = token_weights(MASK, norm="dr_grpo")
    assert torch.allclose(weights, MASK / 10)
    weights = token_weights(MASK, norm="dr_grpo", max_len=8)
    assert torch.allclose(weights, MASK / 16)
    with pytest.raises(ValueError, match="mean"):
        token_weights(MASK, norm="mean")


def test_token_weights_are_zero_if_no_token_is_the_policys():
    for norm in ("token", "grpo", "dr_grpo"):
        weights = token_weights(torch.zeros(2, 3), norm=norm)
        assert weights.eq(0).all()
    weights = token_weights(MASK, dtype=torch.float64)
    assert weights.dtype == torch.float64


# ---------------------------------------------------------------- 7. the loss


def test_token_losses_are_clipped_on_the_side_where_they_should():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.9])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    old = torch.full((6,), -2.0)
    logprobs = (old + ratio.log()).requires_grad_()
    tokens = token_losses(logprobs, old, advantages, clip_eps=0.2)
    tokens.loss.sum().backward()
    expected = [-1.2, 1.5, -0.5, 0.8, -1.1, 0.9]
    assert tokens.loss.tolist() == pytest.approx(expected, rel=1e-5)
    # Where the clip holds, the loss is a constant. Elsewhere it is -rho A.
    expected = [0.0, 1.5, -0.5, 0.0, -1.1, 0.9]
    assert logprobs.grad.tolist() == pytest.approx(expected, rel=1e-5)
    assert tokens.is_clipped.tolist() == [True, False, False, True, False, False]
    assert torch.allclose(tokens.log_ratio, ratio.log(), atol=1e-6)
    assert tokens.kl is None


def test_token_losses_are_minus_the_advantage_at_first():
    advantages = torch.tensor([2.0, -0.5])
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    tokens = token_losses(logprobs, logprobs.detach(), advantages)
    tokens.loss.sum().backward()
    assert tokens.loss.tolist() == [-2.0, 0.5]
    assert logprobs.grad.tolist() == [-2.0, 0.5]


def test_token_losses_charge_for_leaving_the_reference_policy():
    # x = ln(.5 / .25) = ln 2: k3 = 2 - 1 - ln 2 = .3069. Its derivative is 1 - 2.
    logprobs = torch.tensor([0.25]).log().requires_grad_()
    tokens = token_losses(
        logprobs,
        logprobs.detach(),
        torch.tensor([1.0]),
        ref_logprobs=torch.tensor([0.5]).log(),
        kl_coef=0.1,
    )
    tokens.loss.sum().backward()
    k3 = 1 - math.log(2)
    assert tokens.kl.item() == pytest.approx(k3, rel=1e-5)
    assert tokens.loss.item() == pytest.approx(-1 + 0.1 * k3, rel=1e-5)
    assert logprobs.grad.item() == pytest.approx(-1 - 0.1, rel=1e-5)


# ---------------------------------------------------------------- 8. mining


def searching(*queries):
    """A trajectory with these queries."""
    return Trajectory("?", [1], queries=list(queries))


def test_mine_group_corrects_the_wrong_trajectory_that_differs_most():
    group = [
        searching("a", "b"),  # right
        searching("a"),  # right, with the fewest searches: the reference
        searching("c"),  # right, and as short, but later
        searching("a"),  # wrong, with the same words
        searching("a b"),  # wrong: half of the words
        searching("b"),  # wrong: none of the words
    ]
    right = [True, True, True, False, False, False]
    mined = mine_group(group, right)
    assert mined.reference is group[1]
    assert [group.index(student) for student in mined.students] == [5]
    # Wrong ones first, and then right ones that search differently.
    mined = mine_group(group, right, students=9)
    expected = [group[5], group[4], group[3], group[0], group[2]]
    assert len(mined.students) == len(expected)
    for student, trajectory in zip(mined.students, expected, strict=True):
        assert student is trajectory


def test_mine_group_corrects_a_right_trajectory_if_none_is_wrong():
    group = [searching("a"), searching("A"), searching("a", "a")]
    mined = mine_group(group, [True, True, True], students=2)
    assert mined.reference is group[0]
    assert len(mined.students) == 1
    assert mined.students[0] is group[2]


def test_mine_group_gives_none_where_nothing_can_be_learned():
    group = [searching("a"), searching("a")]
    assert mine_group(group, [False, False]) is None
    assert mine_group(group, [True, True]) is None
    assert mine_group(group, [True, False]) is not None


# ---------------------------------------------------------------- 9. the divergence

TEACHER = torch.tensor([[0.6, 0.3, 0.1]]).log()  # (1, 3)
STUDENT = torch.tensor([[0.2, 0.3, 0.5]]).log()
FORWARD = 0.6 * math.log(3)
FORWARD += 0.1 * math.log(0.2)


def test_divergences_of_three_kinds():
    reverse = 0.2 * math.log(1 / 3)
    reverse += 0.5 * math.log(5)
    # The mean of the two is (.4, .3, .3).
    jsd = 0.6 * math.log(0.6 / 0.4)
    jsd += 0.1 * math.log(0.1 / 0.3)
    jsd += 0.2 * math.log(0.2 / 0.4)
    jsd += 0.5 * math.log(0.5 / 0.3)
    expected = {"forward_kl": FORWARD, "reverse_kl": reverse, "jsd": jsd / 2}
    for kind, value in expected.items():
        divergence = divergences(STUDENT, TEACHER, kind=kind)
        assert divergence.shape == (1,)
        assert divergence.item() == pytest.approx(value, rel=1e-5)
        divergence = divergences(TEACHER, TEACHER, kind=kind)
        assert divergence.item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="sideways"):
        divergences(STUDENT, TEACHER, kind="sideways")


def test_divergences_pull_the_student_and_not_the_teacher():
    # Logits need not be normalized. The gradient is p_S - p_T.
    student = (STUDENT + 5.0).requires_grad_()
    teacher = (TEACHER - 3.0).requires_grad_()
    divergences(student, teacher).sum().backward()
    assert student.grad[0].tolist() == pytest.approx([-0.4, 0.0, 0.4], abs=1e-6)
    assert teacher.grad is None


def test_divergences_can_be_clipped():
    # By entry: .6 ln 3 becomes .05, the other terms are below it.
    entry = divergences(STUDENT, TEACHER, clip="entry", tau=0.05)
    assert entry.item() == pytest.approx(0.05 + 0.1 * math.log(0.2), rel=1e-5)
    # By position: the value becomes tau, and the gradient shrinks in proportion.
    student = STUDENT.clone().requires_grad_()
    position = divergences(student, TEACHER, clip="position", tau=0.05)
    position.sum().backward()
    assert position.item() == pytest.approx(0.05)
    size = 0.4 * 0.05 / FORWARD
    assert student.grad[0].tolist() == pytest.approx([-size, 0.0, size], abs=1e-6)
    # A divergence below tau stays as it is.
    loose = divergences(STUDENT, TEACHER, clip="position", tau=1.0)
    assert loose.item() == pytest.approx(FORWARD, rel=1e-5)
    with pytest.raises(ValueError, match="twice"):
        divergences(STUDENT, TEACHER, clip="twice")


# ---------------------------------------------------------------- 10. the edge

SCORES = {
    "standard": {"em": 0.25, "em_supported": 0.25},
    "own": {"em": 0.75, "em_supported": 0.5},
    "other": {"em": 0.125, "em_supported": 0.0},
}


def edge_of(privileged_prompts):
    """teacher_edge of three pairs, whose own prompts are [10], [20] and [30].

    privileged_prompts has the prompt of each question and reference; None is too long.
    Returns the edges, and the prompts of each sampling.
    """
    pairs = []
    for number in (1, 2, 3):
        question = {"question": f"q{number}"}
        reference = Trajectory(f"y{number}", [])
        pairs.append(Pair(question, reference, reference, [10 * number], []))
    seen = []

    def sample(questions, *, group_size=1, temperature=1.0, prompts=None, progress=""):
        assert questions == [pair.question for pair in pairs]
        assert (group_size, temperature) == (1, 1.0)
        seen.append(prompts)
        if prompts is None:
            return "standard"
        if prompts == [pair.prompt for pair in pairs]:
            return "own"
        return "other"

    def score(questions, trajectories):
        assert questions == [pair.question for pair in pairs]
        return SCORES[trajectories]

    def privileged_prompt(tokenizer, question, reference, max_tokens):
        assert (tokenizer, max_tokens) == ("tokenizer", 99)
        return privileged_prompts[question, reference.question]

    run = SimpleNamespace(tokenizer="tokenizer", sample=sample)
    run.config = SimpleNamespace(max_privileged_tokens=99)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "score", score)
        patch.setattr(train, "privileged_prompt", privileged_prompt)
        return train.teacher_edge(run, pairs), seen


def test_teacher_edge_is_the_difference_of_two_scores():
    prompts = {
        ("q1", "y2"): [12],
        ("q2", "y3"): [23],
        ("q3", "y1"): [31],
    }
    edges, seen = edge_of(prompts)
    assert edges == {"edge": 0.5, "edge_supported": 0.25, "edge_control": -0.125}
    assert len(seen) == 3
    assert None in seen
    assert [[10], [20], [30]] in seen
    assert [[12], [23], [31]] in seen


def test_teacher_edge_takes_the_own_reference_if_the_other_is_too_long():
    prompts = {
        ("q1", "y2"): [12],
        ("q2", "y3"): None,
        ("q3", "y1"): [31],
    }
    _, seen = edge_of(prompts)
    assert [[12], [20], [31]] in seen
