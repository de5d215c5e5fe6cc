"""grpo.py against numbers worked by hand, in the comments, and against autograd in float64."""

import math

import pytest
import torch

import grpo
from grpo import (
    backward_in_chunks, group_advantages, grpo_loss, output_layer, policy_hidden, policy_logprobs, token_entropies, token_logprobs,
)  # fmt: skip
from make import response_logits
from rollout import Trajectory


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_advantages_worked_by_hand():
    # mean .2, std (ddof 1) = sqrt((.8^2 + 4 * .2^2) / 4) = .4472; .8 / .4472 = 1.7889
    found = group_advantages(torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]))
    assert found[0].tolist() == pytest.approx([1.7889, *[-0.4472] * 4], abs=1e-4)
    # mean .4, std = sqrt((2 * .36 + 3 * .16) / 4) = .5477
    assert found[1].tolist() == pytest.approx([1.0954] * 2 + [-0.7303] * 3, abs=1e-4)


def test_eps_is_added_to_the_deviation():
    # mean .5, std .7071: .5 / (.7071 + 1)
    assert group_advantages(torch.tensor([[1.0, 0.0]]), eps=1.0).tolist() == [pytest.approx([0.29289, -0.29289], abs=1e-5)]


def test_advantages_without_the_division():
    rewards = torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0.1, 0.1, 0.1, 0.1, 0.1]])
    expected = [[0.8] + [-0.2] * 4, [0.6] * 2 + [-0.4] * 3, [0.0] * 5]
    assert group_advantages(rewards, by_std=False).tolist() == [pytest.approx(row) for row in expected]


def test_groups_without_variance_and_groups_of_one_teach_nothing():
    assert group_advantages(torch.tensor([[1.0, 1, 1], [0, 0, 0], [0.9, 0.9, 0.9]])).eq(0).all()  # .9 is not its own mean in float32
    assert group_advantages(torch.tensor([[1.0], [0.0]])).tolist() == [[0.0], [0.0]]


def test_advantages_are_relative_to_the_own_group_only():
    both = group_advantages(torch.tensor([[1.0, 0, 0], [1, 1, 0]]))
    assert torch.equal(both[:1], group_advantages(torch.tensor([[1.0, 0, 0]])))
    assert both.sum(1).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_logprobs_and_entropy_of_a_three_word_vocabulary():
    logits = tensor([0.2, 0.3, 0.5]).log()[:, None] + 7.0  # (1, 1, 3); a constant changes nothing
    assert token_logprobs(logits, torch.tensor([[2]])).item() == pytest.approx(math.log(0.5))
    expected = -(0.2 * math.log(0.2) + 0.3 * math.log(0.3) + 0.5 * math.log(0.5))
    assert token_entropies(logits).item() == pytest.approx(expected)


def test_a_word_of_probability_zero():
    logits = tensor([0.25, 0.75, 0.0]).log()[:, None].requires_grad_()  # (1, 1, 3)
    entropy = token_entropies(logits)
    assert not entropy.requires_grad
    assert entropy.item() == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    token_logprobs(logits, torch.tensor([[1]])).sum().backward()
    assert logits.grad.flatten().tolist() == pytest.approx([-0.25, 0.25, 0.0])
    assert token_logprobs(logits, torch.tensor([[2]])).item() == -math.inf


def test_value_is_zero_but_the_gradient_is_not_at_ratio_one():
    logprobs = tensor([-1.0, -2.0], [-0.5, -3.0]).requires_grad_()
    loss, stats = grpo_loss(logprobs, logprobs.detach(), tensor([1.0, -1.0])[0], torch.ones(2, 2))
    loss.backward()
    assert loss.item() == 0.0
    # d(-rho A)/d(log pi) = -A at rho = 1; four tokens share it
    assert logprobs.grad.tolist() == [[-0.25, -0.25], [0.25, 0.25]]
    assert stats == {"clip_frac": 0.0, "gap": 0.0}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 1.0, -1.2, 0.0),  # good and already 1.5 times likelier: stopped
        (1.5, -1.0, 1.5, 1.5),  # bad and likelier: pushed back, in full
        (0.5, 1.0, -0.5, -0.5),  # good and less likely: pulled up, in full
        (0.5, -1.0, 0.8, 0.0),  # bad and already half as likely: stopped
        (1.1, 1.0, -1.1, -1.1),  # within the range
        (0.9, -1.0, 0.9, 0.9),
    ],
)
def test_the_clip_acts_only_on_the_side_where_it_should(ratio, advantage, loss, gradient):
    logprobs = tensor([math.log(ratio)]).requires_grad_()
    value, stats = grpo_loss(logprobs, tensor([0.0]), tensor([advantage])[0], torch.ones(1, 1), clip_eps=0.2)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert stats["clip_frac"] == float(gradient == 0.0)


def test_normalisations_by_hand():
    # Lengths 2 and 4, token losses 1 and 2 (rho = 1, A = -1 and -2), L = 8:
    # token (2 * 1 + 4 * 2) / 6, grpo (1 + 2) / 2, dr_grpo 10 / (2 * 8)
    zeros, mask = torch.zeros(2, 5), torch.tensor([[1, 0, 1, 0, 0], [1, 1, 0, 1, 1]])
    value = lambda **how: grpo_loss(zeros, zeros, torch.tensor([-1.0, -2.0]), mask, **how)[0].item()  # noqa: E731
    assert value(norm="token") == pytest.approx(1.6667, abs=1e-4)
    assert value(norm="grpo") == pytest.approx(1.5)
    assert value(norm="dr_grpo", max_len=8) == pytest.approx(0.625)
    assert value(norm="dr_grpo") == pytest.approx(1.0)  # L = T = 5
    assert value(num_tokens=20) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="norm is"):
        value(norm="mean")


def test_k3_by_hand():
    # x = log ref - log pi = ln 2: k3 = 2 - ln 2 - 1 = .3069, d k3 / d log pi = 1 - e^x = -1
    logprobs = tensor([math.log(0.25)]).requires_grad_()
    how = dict(ref_logprobs=tensor([math.log(0.5)]), kl_coef=0.1)
    loss, stats = grpo_loss(logprobs, logprobs.detach(), tensor([0.0])[0], torch.ones(1, 1), **how)
    loss.backward()
    assert loss.item() == pytest.approx(0.1 * (1 - math.log(2)))
    assert stats["kl"] == pytest.approx(1 - math.log(2))
    assert logprobs.grad.item() == pytest.approx(-0.1)
    assert grpo_loss(*[tensor([-1.0])] * 2, tensor([1.0])[0], torch.ones(1, 1), ref_logprobs=tensor([-1.0]))[1]["kl"] == 0
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        grpo_loss(tensor([0.0]), tensor([0.0]), tensor([1.0])[0], torch.ones(1, 1), kl_coef=0.1)


def random_batch(seed=0, sequences=6, size=9):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    old = -draw(sequences, size).abs()
    new = old + 0.3 * draw(sequences, size)
    return new, old, draw(sequences), (draw(sequences, size) > 0).long()


def test_gradient_equals_the_closed_form_in_float64():
    new, old, advantages, mask = random_batch()
    new.requires_grad_()
    loss, _ = grpo_loss(new, old, advantages, mask)
    loss.backward()
    ratio, signal = (new - old).exp().detach(), advantages[:, None]
    stopped = ((signal > 0) & (ratio > 1.2)) | ((signal < 0) & (ratio < 0.8))
    expected = torch.where(stopped | (mask == 0), 0.0, -ratio * signal) / mask.sum()
    assert stopped.any() and torch.allclose(new.grad, expected, rtol=1e-12, atol=0)


def test_information_tokens_have_no_part_in_loss_or_gradient():
    new, old, advantages, mask = random_batch()
    reference = new + 0.1
    garbage = torch.where(mask == 1, new, torch.tensor([math.inf, -math.inf, math.nan]).double().repeat(6, 3))
    results = []
    for values in (new, garbage):
        values = values.clone().requires_grad_()
        loss, stats = grpo_loss(values, old, advantages, mask, ref_logprobs=reference, kl_coef=0.5)
        loss.backward()
        results.append((loss, stats, values.grad))
        assert values.grad[mask == 0].eq(0).all()
    assert results[0][0] == results[1][0] and results[0][1] == results[1][1]
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_gradient_does_not_depend_on_the_micro_batch_size(size):
    new, old, advantages, mask = random_batch()
    whole, parts = (new.clone().requires_grad_() for _ in range(2))
    grpo_loss(whole, old, advantages, mask)[0].backward()
    for i in range(0, len(new), size):
        piece = slice(i, i + size)
        grpo_loss(parts[piece], old[piece], advantages[piece], mask[piece], num_tokens=mask.sum())[0].backward()
    assert torch.allclose(whole.grad, parts.grad, rtol=1e-12)


@pytest.mark.parametrize("norm", ["token", "grpo", "dr_grpo"])
def test_all_masked_is_zero_with_a_graph(norm):
    values = torch.full((2, 3), math.nan, requires_grad=True)
    loss, stats = grpo_loss(values, torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3), norm=norm)
    loss.backward()
    assert loss.item() == 0.0 and values.grad.eq(0).all() and stats["clip_frac"] == 0.0


@pytest.mark.parametrize("norm", ["token", "grpo", "dr_grpo"])
def test_one_sequence_and_equal_rewards(norm):
    for rewards in ([[1.0]], [[1.0, 1.0, 1.0]], [[0.0, 0.0]]):  # one sequence, all right, all wrong
        advantages = group_advantages(torch.tensor(rewards))[0]
        values = torch.full((len(advantages), 3), -1.0, requires_grad=True)
        loss, _ = grpo_loss(values, values.detach() - 0.7, advantages, torch.ones(len(advantages), 3), norm=norm)
        loss.backward()
        assert loss.item() == 0.0 and values.grad.eq(0).all()


@pytest.mark.parametrize("norm", ["token", "grpo", "dr_grpo"])
def test_neither_padding_nor_order_changes_loss_or_gradient(norm):
    new, old, advantages, mask = random_batch()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    results = []
    for pad, rows in ((0, torch.arange(6)), (4, order)):
        padded = [torch.nn.functional.pad(x, (0, pad), value=value)[rows] for x, value in ((new, 9.0), (old, -9.0), (mask, 0))]
        padded[0].requires_grad_()
        loss, _ = grpo_loss(*padded[:2], advantages[rows], padded[2], norm=norm, max_len=9)
        loss.backward()
        results.append((loss, padded[0].grad[torch.argsort(rows), :9]))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-12)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-12, atol=0)


# ---------------------------------------------------------------- in bounded memory

PROMPTS, RESPONSES = [[5, 6, 7, 8], [9]], [[10, 11, 12], [13, 14, 15, 16, 17]]
MASKS = [[1, 0, 1], [0, 1, 1, 0, 1]]
ROWS = [Trajectory("", *ids) for ids in zip(PROMPTS, RESPONSES, MASKS)]
MASK = torch.tensor([[1, 0, 1, 0, 0], MASKS[1]]).bool()
IDS = torch.tensor([[10, 11, 12, 0, 0], RESPONSES[1]])


@pytest.mark.parametrize("positions", [1, 2, 5, 100])
def test_chunks_give_the_value_and_the_gradient_of_the_plain_formula(random_model, monkeypatch, positions):
    weights = torch.randn(5)
    logits = response_logits(random_model, PROMPTS, RESPONSES)  # (2, 5, V)
    plain = token_logprobs(logits, IDS)[MASK]  # (5,)
    (plain * weights).sum().backward()
    expected = [p.grad.clone() for p in random_model.parameters()]
    random_model.zero_grad()
    monkeypatch.setattr(grpo, "CHUNK", positions * random_model.config.vocab_size)
    hidden = policy_hidden(random_model, ROWS)
    assert torch.allclose(policy_logprobs(random_model, hidden, IDS[MASK]), plain, atol=1e-5)
    loss = lambda logits, ids, weights: (token_logprobs(logits, ids) * weights).sum()  # noqa: E731
    value = backward_in_chunks(random_model, loss, hidden, IDS[MASK], weights)
    assert value == pytest.approx((plain * weights).sum().item(), rel=1e-5)
    for p, gradient in zip(random_model.parameters(), expected):
        assert (p.grad - gradient).norm() < 1e-5 * gradient.norm()


def test_only_the_policys_tokens_reach_the_output_layer_and_only_a_chunk_at_a_time(random_model, monkeypatch):
    monkeypatch.setattr(grpo, "CHUNK", 3 * random_model.config.vocab_size - 1)
    seen = []
    random_model.get_output_embeddings().register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
    hidden = policy_hidden(random_model, ROWS)
    backward_in_chunks(random_model, lambda logits, ids: token_logprobs(logits, ids).sum(), hidden, IDS[MASK])
    assert seen == [2, 2, 1]  # 5 of 8 response tokens, 2 at a time


def test_chunks_are_exact_in_float64(random_model, monkeypatch):
    model = random_model.double()
    monkeypatch.setattr(grpo, "output_layer", lambda model: model.get_output_embeddings())  # whose logits are not rounded to float32
    gradients = []
    for positions in (1, 2, 5):
        monkeypatch.setattr(grpo, "CHUNK", positions * model.config.vocab_size)
        model.zero_grad()
        hidden = policy_hidden(model, ROWS)
        backward_in_chunks(model, lambda logits, ids: token_logprobs(logits, ids).sum(), hidden, IDS[MASK])
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in gradients[1:]:
        assert (gradients[0] - other).norm() < 1e-13 * other.norm()


def test_nothing_sampled_is_a_graph_of_zeros(random_model):
    hidden = policy_hidden(random_model, [Trajectory("", [5], [6, 7], [0, 0])])
    ids = torch.tensor([], dtype=torch.long)
    assert policy_logprobs(random_model, hidden, ids).shape == (0,)
    assert backward_in_chunks(random_model, lambda logits, ids: token_logprobs(logits, ids).sum(), hidden, ids) == 0.0
    assert all(p.grad is None or p.grad.eq(0).all() for p in random_model.parameters())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma", "phi3", "olmo2", "gpt_neox", "granite", "stablelm", "cohere"])
def test_the_output_layer_of_each_family_gives_its_logits(kind, small_model):
    more = {} if kind in ("gpt2", "gpt_neox") else {"num_key_value_heads": 2}
    model = small_model(kind, **more, **({"logits_scaling": 3.0} if kind == "granite" else {}))
    found = output_layer(model)(policy_hidden(model, ROWS))
    expected = response_logits(model, PROMPTS, RESPONSES)[MASK]
    assert torch.allclose(found, expected, atol=1e-5)


# ---------------------------------------------------------------- TRL


def test_parity_with_trls_log_probabilities_and_entropies():
    utils = pytest.importorskip("trl.trainer.utils")
    logits, ids = torch.randn(3, 4, 9), torch.randint(9, (3, 4))
    assert torch.allclose(token_logprobs(logits, ids), utils.selective_log_softmax(logits, ids), atol=1e-6)
    assert torch.allclose(token_entropies(logits), utils.entropy_from_logits(logits), atol=1e-6)
