"""grpo_step: an update, against the plain formula and against finite differences."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from updates import ROWS, Spy, trainable_copy

import grpo
from eval import load_questions
from grpo import (
    group_advantages,
    grpo_loss,
    grpo_step,
    policy_hidden,
    response_logits,
    token_logprobs,
)
from machinery.models import load_model
from rollout import Trajectory, rollout

TWO_GROUPS = ROWS + ROWS
FIRST_WINS = torch.tensor([[1.0, 0.0], [0.0, 0.0]])


@pytest.fixture(scope="module")
def batch(micro, micro_index):
    """Trajectories of 4 questions x 3, and rewards; the second group's are equal."""
    questions = load_questions(str(ROOT / "micro/train.jsonl"))[:4]
    asked = [question["question"] for question in questions]
    rows = rollout(*micro, micro_index, asked, group_size=3, seed=0)
    return rows, torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]])


def gradient(model, batch, **settings):
    """The gradient of an update of a copy of the model, and its statistics."""
    copy = trainable_copy(model)
    spy = Spy(copy)
    stats = grpo_step(copy, spy, *batch, max_grad_norm=1e9, **settings)
    return spy.gradient, stats


def plain_update(model, trajectories, rewards, **settings):
    """The loss of grpo_loss over plain forward passes, with its graph."""
    length = max(len(row.response_ids) for row in trajectories)

    def row_of(values):
        return torch.nn.functional.pad(values, (0, length - len(values)))

    logprobs = []
    old = []
    masks = []
    for row in trajectories:
        ids = torch.tensor(row.response_ids)
        logprobs.append(row_of(token_logprobs(response_logits(model, row), ids)))
        old.append(row_of(torch.tensor(row.logprobs)))
        masks.append(row_of(torch.tensor(row.loss_mask)))
    advantages = group_advantages(rewards).flatten()
    loss, _ = grpo_loss(
        torch.stack(logprobs),
        torch.stack(old),
        advantages,
        torch.stack(masks),
        **settings,
    )
    return loss


@pytest.mark.parametrize("norm", ["token", "grpo", "dr_grpo"])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("positions", [2, 100])
def test_a_step_is_the_plain_formula_over_its_batch(
    random_model, monkeypatch, norm, size, positions
):
    """Two groups of two. Only the first has a winner, so advantages are 1, -1 (over the
    root of two), 0, 0. The second group's tokens and sequences keep their weight."""
    monkeypatch.setattr(grpo, "CHUNK", positions * random_model.config.vocab_size)
    settings = {"norm": norm, "max_len": 7}
    loss = plain_update(random_model, TWO_GROUPS, FIRST_WINS, **settings)
    parameters = list(random_model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    weights = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    stats = grpo_step(
        random_model,
        optimizer,
        TWO_GROUPS,
        FIRST_WINS,
        micro_batch=size,
        max_grad_norm=1e9,
        **settings,
    )
    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for p, weight, expected in zip(parameters, weights, gradients, strict=True):
        assert torch.allclose(p, weight - expected, atol=1e-5)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-2


def test_a_step_with_a_penalty_is_the_plain_formula(random_model, micro):
    reference = micro[0]
    ref_logprobs = torch.zeros(4, 5)
    with torch.no_grad():
        for number, row in enumerate(TWO_GROUPS):
            ids = torch.tensor(row.response_ids)
            values = token_logprobs(response_logits(reference, row), ids)
            ref_logprobs[number, : len(ids)] = values
    loss = plain_update(
        random_model, TWO_GROUPS, FIRST_WINS, kl_coef=0.1, ref_logprobs=ref_logprobs
    )
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in random_model.parameters()])
    random_model.zero_grad()
    found, stats = gradient(
        random_model, (TWO_GROUPS, FIRST_WINS), kl_coef=0.1, ref_model=reference
    )
    assert torch.allclose(found, expected, atol=1e-5)
    assert stats["kl"] > 0.1


def test_the_gradient_in_chunks_is_exact_in_float64(random_model, monkeypatch):
    model = random_model.double()
    # The layer itself, whose logits are not rounded to float32.
    monkeypatch.setattr(
        grpo, "to_logits", lambda model, x: model.get_output_embeddings()(x)
    )
    gradients = []
    for positions in (1, 2, 5):
        monkeypatch.setattr(grpo, "CHUNK", positions * model.config.vocab_size)
        gradients.append(gradient(model, (TWO_GROUPS, FIRST_WINS))[0])
    for other in gradients[1:]:
        assert (gradients[0] - other).norm() < 1e-13 * other.norm()


def test_only_the_policys_tokens_reach_the_output_layer_a_chunk_at_a_time(
    random_model, monkeypatch
):
    monkeypatch.setattr(grpo, "CHUNK", 3 * random_model.config.vocab_size - 1)
    seen = []

    def note(layer, inputs, output):
        seen.append(len(inputs[0]))

    random_model.get_output_embeddings().register_forward_hook(note)
    grpo_step(random_model, Spy(random_model), TWO_GROUPS, FIRST_WINS)
    assert seen == [2, 2, 1]  # 5 of 8 response tokens, 2 at a time


def test_the_same_gradient_for_any_micro_batch_size(micro, batch):
    whole, stats = gradient(micro[0], batch, micro_batch=100)
    for size in (1, 5):
        parts, other = gradient(micro[0], batch, micro_batch=size)
        assert torch.allclose(whole, parts, atol=1e-5 * whole.abs().max().item())
        assert other == pytest.approx(stats, rel=1e-3, abs=1e-5)


def test_gradient_checkpointing_changes_no_gradient_and_no_sample(
    micro, micro_index, batch
):
    plain, stats = gradient(micro[0], batch)
    model = trainable_copy(micro[0])
    model.activation_checkpointing_enable()
    again, other = gradient(model, batch)
    assert torch.allclose(plain, again, atol=1e-6 * plain.abs().max().item())
    assert other == pytest.approx(stats, rel=1e-3, abs=1e-6)
    # Sampling keeps its cache.
    assert not any(module.training for module in model.modules())
    asked = [batch[0][0].question]
    samples = []
    for policy in (model, micro[0]):
        rows = rollout(policy, micro[1], micro_index, asked, seed=0, group_size=2)
        samples.append([row.response_ids for row in rows])
    assert samples[0] == samples[1]


def test_gradient_checkpointing_needs_less_memory():
    """Numbers kept for the backward pass, counted by torch's own hooks."""
    kept = []
    for checkpointing in (False, True):
        model = trainable_copy(load_model("micro/model")[0])
        sizes = []
        if checkpointing:
            model.activation_checkpointing_enable()

        def count(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            policy_hidden(model, [Trajectory("", [5] * 20, [6] * 200, [1] * 200)] * 4)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


def test_skipping_groups_without_variance_changes_nothing(micro, batch):
    skipped, _ = gradient(micro[0], batch)
    model = trainable_copy(micro[0])
    plain_update(model, *batch).backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.allclose(plain, skipped, atol=1e-5 * plain.abs().max().item())


def test_without_any_variance_nothing_moves_and_the_statistics_are_there(micro, batch):
    found, stats = gradient(micro[0], (batch[0], torch.zeros(4, 3)))
    assert found.eq(0).all() and stats["grad_norm"] == 0 and stats["entropy"] > 0
    # Not even by the momentum of the updates before.
    model = trainable_copy(micro[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grpo_step(model, optimizer, *batch)
    before = [p.clone() for p in model.parameters()]
    grpo_step(model, optimizer, batch[0], torch.zeros(4, 3))
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_prompts_too_long_for_the_model_give_no_answer_and_no_error(micro, micro_index):
    asked = ["word " * 2000, "Who?"]
    rows = rollout(*micro, micro_index, asked, group_size=2, seed=0)
    assert [row.finish_reason for row in rows[:2]] == ["context"] * 2
    assert not rows[0].response_ids
    for rewards in (torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [1.0, 0.0]])):
        found, stats = gradient(micro[0], (rows, rewards))
        assert found.isfinite().all() and stats["entropy"] > 0
    model = trainable_copy(micro[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stats = grpo_step(model, optimizer, rows[:2], torch.zeros(1, 2))
    assert stats["grad_norm"] == 0
    for old, new in zip(micro[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_one_update_makes_the_good_likelier_and_the_bad_less_likely(micro, batch):
    model = trainable_copy(micro[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    first = grpo_step(model, optimizer, *batch)
    second = grpo_step(model, optimizer, *batch, clip_eps=100.0)
    assert first["loss"] == pytest.approx(0, abs=0.2) and first["grad_norm"] > 0
    assert second["loss"] < first["loss"]
    assert second["logprob_gap"] > first["logprob_gap"]


def test_several_updates_bring_the_clip_to_work(micro, batch):
    model = trainable_copy(micro[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    updates = [grpo_step(model, optimizer, *batch) for _ in range(4)]
    assert updates[0]["clip_frac"] == 0 < updates[-1]["clip_frac"]


def test_kl_is_a_statistic_only_where_there_is_a_penalty(micro, batch):
    assert "kl" not in gradient(micro[0], batch)[1]
    _, stats = gradient(micro[0], batch, kl_coef=0.1, ref_model=micro[0])
    assert 0 <= stats["kl"] < 1e-6


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_the_gradient_is_that_of_finite_differences(micro, batch, kl_coef):
    """End to end: along its gradient g the loss rises by |g|^2 a unit."""
    older = []
    for row in batch[0]:  # as if an older policy had sampled them
        values = []
        for value, mask in zip(row.logprobs, row.loss_mask, strict=True):
            values.append(value - 0.05 * mask)
        older.append(replace(row, logprobs=values))
    settings = {"max_grad_norm": 1e9, "kl_coef": kl_coef, "ref_model": micro[0]}

    model = trainable_copy(micro[0])
    spy = Spy(model)
    grpo_step(model, spy, older, batch[1], **settings)
    norm = spy.gradient.norm()
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    values = []
    for epsilon in (0.003, -0.003):
        moved = start + epsilon * spy.gradient / norm
        torch.nn.utils.vector_to_parameters(moved, model.parameters())
        stats = grpo_step(model, Spy(model), older, batch[1], **settings)
        values.append(stats["loss"])
    slope = (values[0] - values[1]) / 0.006
    assert slope == pytest.approx(norm.item(), rel=0.01)


# ----------------------------------------------------------------- the optimizer's step


def test_a_gradient_is_scaled_down_to_the_norm_and_steps_once(random_model):
    """By SGD of rate 1 the weights move by the gradient itself."""
    full, stats = gradient(random_model, (TWO_GROUPS, FIRST_WINS))
    norm = full.norm().item()
    assert stats["grad_norm"] == pytest.approx(norm, rel=1e-3)
    for limit in (norm / 4, norm * 4):
        model = trainable_copy(random_model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        stats = grpo_step(model, optimizer, TWO_GROUPS, FIRST_WINS, max_grad_norm=limit)
        after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        assert stats["grad_norm"] == pytest.approx(norm, rel=1e-3)  # before the clip
        assert (before - after).norm().item() == pytest.approx(min(norm, limit), 1e-3)
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_where_the_norm_is_no_number_nothing_changes(random_model, monkeypatch, factor):
    optimizer = torch.optim.SGD(random_model.parameters(), lr=0.1, momentum=1.0)
    grpo_step(random_model, optimizer, TWO_GROUPS, FIRST_WINS)
    weights = [p.detach().clone() for p in random_model.parameters()]
    momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in optimizer.state]

    def broken(logits, ids):
        return token_logprobs(logits, ids) * factor

    monkeypatch.setattr(grpo, "token_logprobs", broken)
    stats = grpo_step(random_model, optimizer, TWO_GROUPS, FIRST_WINS)
    assert not math.isfinite(stats["grad_norm"])
    for old, new in zip(weights, random_model.parameters(), strict=True):
        assert torch.equal(old, new) and new.grad is None
    for old, p in zip(momenta, optimizer.state, strict=True):
        assert torch.equal(old, optimizer.state[p]["momentum_buffer"])
