"""ofsd_step: an update, against the plain formula and against finite differences."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from updates import Spy, trainable_copy

import grpo
import ofsd
from eval import load_questions
from grpo import policy_hidden, response_logits
from machinery.adapters import LoRA, add_adapters, layers_of
from machinery.models import frozen_copy
from ofsd import (
    Pair,
    distill_loss,
    divergences,
    ofsd_step,
    token_divergences,
)
from rollout import Trajectory, rollout

NOBODY = Trajectory("", [])
PAIRS = [
    Pair({}, NOBODY, Trajectory("", [3], [10, 11, 12], [1, 1, 0]), [3, 8, 9], []),
    Pair({}, NOBODY, Trajectory("", [4, 5], [13, 14, 15], [0, 1, 1]), [4, 5, 6], []),
]


@pytest.fixture(scope="module")
def rows(micro, micro_index):
    """Trajectories of 4 questions x 3."""
    questions = load_questions(str(ROOT / "micro/train.jsonl"))[:4]
    asked = [question["question"] for question in questions]
    return rollout(*micro, micro_index, asked, group_size=3, seed=0)


def pairs_of(rows, students):
    """Pairs whose privileged prompt is longer than the student's own."""
    shown = rows[0].prompt_ids
    pairs = []
    for number in students:
        student = rows[number]
        pairs.append(Pair({}, rows[0], student, shown + student.prompt_ids, [1.0]))
    return pairs


def plain_loss(model, teacher, **settings):
    """distill_loss of PAIRS, from a plain forward pass for each prompt."""
    students = [response_logits(model, pair.student) for pair in PAIRS]
    teachers = []
    with torch.no_grad():
        for pair in PAIRS:
            privileged = replace(pair.student, prompt_ids=pair.prompt)
            teachers.append(response_logits(teacher, privileged))
    mask = torch.tensor([pair.student.loss_mask for pair in PAIRS])  # (2, 3)
    return distill_loss(torch.stack(students), torch.stack(teachers), mask, **settings)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("positions", [1, 3, 100])
def test_a_step_is_the_plain_formula(random_model, monkeypatch, size, positions):
    monkeypatch.setattr(grpo, "CHUNK", positions * random_model.config.vocab_size)
    settings = {"kind": "jsd", "clip": "position", "tau": 0.01}
    plain = plain_loss(random_model, random_model, **settings)
    parameters = list(random_model.parameters())
    gradients = torch.autograd.grad(plain, parameters)
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    teacher = frozen_copy(random_model)
    spy = Spy(random_model)
    stats = ofsd_step(
        random_model,
        teacher,
        spy,
        PAIRS,
        micro_batch=size,
        max_grad_norm=1e9,
        **settings,
    )
    assert stats["loss"] == pytest.approx(plain.item(), rel=1e-5)
    assert stats["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-3)
    assert (spy.gradient - expected).norm() < 1e-5 * expected.norm()


def test_the_divergence_of_each_token_to_look_at(random_model):
    student = PAIRS[1].student
    privileged = replace(student, prompt_ids=PAIRS[1].prompt)
    values = token_divergences(random_model, PAIRS[1])
    with torch.no_grad():
        student_logits = response_logits(random_model, student)
        teacher_logits = response_logits(random_model, privileged)
    expected = divergences(student_logits, teacher_logits)  # forward KL
    assert values[0] is None
    assert values[1:] == pytest.approx(expected[1:].tolist(), rel=1e-4)
    assert min(values[1:]) > 0.0


def test_one_response_is_read_twice_and_the_teacher_is_left_alone(
    micro, rows, monkeypatch
):
    pairs = pairs_of(rows, (1, 2))
    teacher = frozen_copy(micro[0])
    model = trainable_copy(micro[0])
    passes = []

    def noted(model, trajectories, prompts=None):
        passes.append((model, prompts, trajectories))
        return policy_hidden(model, trajectories, prompts)

    monkeypatch.setattr(ofsd, "policy_hidden", noted)
    before = [p.clone() for p in teacher.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stats = ofsd_step(model, teacher, optimizer, pairs)
    (first, privileged, taught), (second, standard, learnt) = passes
    assert first is teacher and second is model
    assert taught == learnt and standard is None
    assert sorted(privileged) == sorted(pair.prompt for pair in pairs)
    assert sorted(privileged) != sorted(t.prompt_ids for t in learnt)
    assert stats["loss"] > 0
    for old, new in zip(before, teacher.parameters(), strict=True):
        assert torch.equal(old, new) and new.grad is None


def test_under_one_prompt_the_student_is_its_own_teacher(micro, rows):
    pair = pairs_of(rows, (1,))[0]
    same = pair._replace(prompt=pair.student.prompt_ids)
    model = trainable_copy(micro[0])
    stats = ofsd_step(model, frozen_copy(model), Spy(model), [same])
    assert stats["loss"] < 1e-6


def test_the_same_gradient_for_any_micro_batch_size(micro, rows):
    teacher = frozen_copy(micro[0])
    pairs = pairs_of(rows, (1, 2, 4, 7))
    assert len({sum(pair.student.loss_mask) for pair in pairs}) > 1
    results = []
    for size in (1, 3, 100):
        model = trainable_copy(micro[0])
        spy = Spy(model)
        stats = ofsd_step(
            model, teacher, spy, pairs, micro_batch=size, max_grad_norm=1e9
        )
        results.append((stats, spy.gradient))
    first, whole = results[0]
    for stats, parts in results[1:]:
        assert (parts - whole).norm() < 1e-4 * whole.norm()
        assert stats == pytest.approx(first, rel=1e-4)


def test_the_gradient_is_that_of_finite_differences(micro, rows):
    """End to end: along its gradient g the loss rises by |g|^2 a unit."""
    pairs = pairs_of(rows, (1, 2))
    teacher = frozen_copy(micro[0])
    model = trainable_copy(micro[0])
    spy = Spy(model)
    ofsd_step(model, teacher, spy, pairs, max_grad_norm=1e9)
    norm = spy.gradient.norm()
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    values = []
    for epsilon in (0.003, -0.003):
        moved = start + epsilon * spy.gradient / norm
        torch.nn.utils.vector_to_parameters(moved, model.parameters())
        stats = ofsd_step(model, teacher, Spy(model), pairs, max_grad_norm=1e9)
        values.append(stats["loss"])
    slope = (values[0] - values[1]) / 0.006
    assert slope == pytest.approx(norm.item(), rel=0.01)


def test_a_student_who_sampled_nothing_has_no_gradient(random_model):
    silent = Pair({}, NOBODY, Trajectory("", [3], [10, 11], [0, 0]), [3, 8], [])
    spy = Spy(random_model)
    stats = ofsd_step(random_model, frozen_copy(random_model), spy, [silent])
    assert stats == {"loss": 0.0, "grad_norm": 0.0, "tokens_trained": 0}
    assert not spy.stepped


def test_where_the_norm_is_no_number_nothing_changes(random_model, monkeypatch):
    teacher = frozen_copy(random_model)
    optimizer = torch.optim.SGD(random_model.parameters(), lr=0.1, momentum=1.0)
    ofsd_step(random_model, teacher, optimizer, PAIRS)
    weights = [p.detach().clone() for p in random_model.parameters()]

    def broken(*logits, **settings):
        return divergences(*logits, **settings) * math.nan

    monkeypatch.setattr(ofsd, "divergences", broken)
    stats = ofsd_step(random_model, teacher, optimizer, PAIRS)
    assert math.isnan(stats["grad_norm"])
    for old, new in zip(weights, random_model.parameters(), strict=True):
        assert torch.equal(old, new) and new.grad is None


@pytest.mark.parametrize("size", [1, 2])
def test_the_teacher_of_adapters_is_the_model_without_them(random_model, size):
    """A step, against plain forward passes and a teacher that never had adapters."""
    teacher = copy.deepcopy(random_model)
    add_adapters(random_model, 4)
    adapters = [p for p in random_model.parameters() if p.requires_grad]
    with torch.no_grad():
        for adapter in adapters:
            adapter.normal_(std=0.2)
    expected = plain_loss(random_model, teacher)
    gradients = torch.autograd.grad(expected, adapters)
    # With its adapters on, the model would be another teacher.
    assert abs(expected.item() - plain_loss(random_model, random_model).item()) > 0.01

    before = [p.detach().clone() for p in adapters]
    optimizer = torch.optim.SGD(adapters, lr=1.0)
    stats = ofsd_step(
        random_model,
        random_model,
        optimizer,
        PAIRS,
        micro_batch=size,
        max_grad_norm=1e9,
    )
    assert stats["loss"] == pytest.approx(expected.item(), rel=1e-5)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    assert stats["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for p, old, gradient in zip(adapters, before, gradients, strict=True):
        assert torch.allclose(p, old - gradient, atol=1e-4 * norm)
    assert all(adapter.on for _, _, adapter in layers_of(random_model, LoRA))
