"""grpo.py against numbers worked by hand, in the comments, and against autograd in float64."""

import math
from dataclasses import replace

import pytest
import torch

import grpo
from grpo import (
    backward_in_chunks, check_training, clip_and_update, frozen_copy, group_advantages, grpo_loss,
    grpo_step, policy_hidden, policy_logprobs, response_logits, to_logits, token_entropies,
    token_logprobs,
)  # fmt: skip
from rollout import Trajectory
from train import Config


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
    found = group_advantages(torch.tensor([[1.0, 0.0]]), eps=1.0)
    assert found.tolist() == [pytest.approx([0.29289, -0.29289], abs=1e-5)]


def test_groups_without_variance_and_groups_of_one_teach_nothing():
    rewards = torch.tensor([[1.0, 1, 1], [0, 0, 0], [0.9, 0.9, 0.9]])
    assert rewards[2].mean() != rewards[2, 0]  # float32 rounds
    assert group_advantages(rewards).eq(0).all()
    assert group_advantages(torch.full((1, 5), 0.1)).eq(0).all()
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
    batch = logprobs, tensor([0.0]), tensor([advantage])[0], torch.ones(1, 1)
    value, stats = grpo_loss(*batch, clip_eps=0.2)
    value.backward()
    assert value.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert stats["clip_frac"] == float(gradient == 0.0)


def test_normalisations_by_hand():
    # Lengths 2 and 4, token losses 1 and 2 (rho = 1, A = -1 and -2), L = 8:
    # token (2 * 1 + 4 * 2) / 6, grpo (1 + 2) / 2, dr_grpo 10 / (2 * 8)
    mask = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 0, 1, 1]])
    batch = torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([-1.0, -2.0]), mask
    value = lambda **how: grpo_loss(*batch, **how)[0].item()
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
    equal = [tensor([-1.0])] * 2
    _, stats = grpo_loss(*equal, tensor([1.0])[0], torch.ones(1, 1), ref_logprobs=equal[0])
    assert stats["kl"] == 0
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        grpo_loss(tensor([0.0]), tensor([0.0]), tensor([1.0])[0], torch.ones(1, 1), kl_coef=0.1)


def random_batch(seed=0, sequences=6, size=9):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
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
    anything = torch.tensor([math.inf, -math.inf, math.nan]).double().repeat(6, 3)
    garbage = torch.where(mask == 1, new, anything)
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
        piece = [x[i : i + size] for x in (parts, old, advantages, mask)]
        grpo_loss(*piece, num_tokens=mask.sum())[0].backward()
    assert torch.allclose(whole.grad, parts.grad, rtol=1e-12)


@pytest.mark.parametrize("norm", ["token", "grpo", "dr_grpo"])
def test_all_masked_is_zero_with_a_graph(norm):
    values = torch.full((2, 3), math.nan, requires_grad=True)
    loss, stats = grpo_loss(values, torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3), norm=norm)
    loss.backward()
    assert loss.item() == 0.0 and values.grad.eq(0).all() and stats["clip_frac"] == 0.0


@pytest.mark.parametrize("norm", ["token", "grpo", "dr_grpo"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_an_empty_batch_is_zero_with_a_graph(norm, shape):
    values = torch.zeros(shape, requires_grad=True)
    how = dict(norm=norm, ref_logprobs=torch.zeros(shape), kl_coef=0.1)
    batch = values, torch.zeros(shape), torch.ones(shape[0]), torch.ones(shape)
    loss, stats = grpo_loss(*batch, **how)
    loss.backward()
    assert loss.item() == 0.0 and values.grad.shape == shape
    assert stats == {"clip_frac": 0.0, "gap": 0.0, "kl": 0.0}


def test_a_ratio_too_large_for_float32_stays_finite():
    """A token that was all but impossible when it was sampled, and is likely now: e^200."""
    new = torch.tensor([[-0.1, -1.0]]).requires_grad_()
    old = torch.tensor([[-200.1, -1.0]])
    how = dict(ref_logprobs=torch.tensor([[-0.1, 300.0]]), kl_coef=1e-3)
    for advantage in (1.0, -1.0):
        loss, _ = grpo_loss(new, old, torch.tensor([advantage]), torch.ones(1, 2), **how)
        loss.backward()
        assert loss.isfinite() and new.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["token", "grpo", "dr_grpo"])
def test_one_sequence_and_equal_rewards(norm):
    # One sequence, all of them right, all of them wrong.
    for rewards in ([[1.0]], [[1.0, 1.0, 1.0]], [[0.0, 0.0]]):
        advantages = group_advantages(torch.tensor(rewards))[0]
        mask = torch.ones(len(advantages), 3)
        values = torch.full((len(advantages), 3), -1.0, requires_grad=True)
        loss, _ = grpo_loss(values, values.detach() - 0.7, advantages, mask, norm=norm)
        loss.backward()
        assert loss.item() == 0.0 and values.grad.eq(0).all()


@pytest.mark.parametrize("norm", ["token", "grpo", "dr_grpo"])
def test_neither_padding_nor_order_changes_loss_or_gradient(norm):
    new, old, advantages, mask = random_batch()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    results = []
    for pad, rows in ((0, torch.arange(6)), (4, order)):
        fills = (new, 9.0), (old, -9.0), (mask, 0)
        pad_by = lambda x, value: torch.nn.functional.pad(x, (0, pad), value=value)
        padded = [pad_by(x, value)[rows] for x, value in fills]
        padded[0].requires_grad_()
        loss, _ = grpo_loss(*padded[:2], advantages[rows], padded[2], norm=norm, max_len=9)
        loss.backward()
        results.append((loss, padded[0].grad[torch.argsort(rows), :9]))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-12)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-12, atol=0)


# ---------------------------------------------------------------- in bounded memory

ROWS = [
    Trajectory("", [5, 6, 7, 8], [10, 11, 12], [1, 0, 1]),
    Trajectory("", [9], [13, 14, 15, 16, 17], [0, 1, 1, 0, 1]),
]
IDS = torch.tensor([10, 12, 14, 15, 17])  # those of mask 1


def plain_logits(model):
    """Those that predict IDS, (5, V), from plain forward passes."""
    masks = [torch.tensor(row.loss_mask).bool() for row in ROWS]
    return torch.cat([response_logits(model, row)[mask] for row, mask in zip(ROWS, masks)])


def summed_logprobs(logits, ids):
    """A loss to go backward through, and its statistics."""
    value = token_logprobs(logits, ids).sum()
    return value, {"loss": value.item()}


def test_response_logits_predict_each_response_token(random_model):
    """The oracle itself: token t is predicted from what stands before it, and from that alone."""
    row = ROWS[0]
    found = response_logits(random_model, row)  # (3, V)
    assert len(found) == 3
    for t in range(3):
        seen = torch.tensor([row.prompt_ids + row.response_ids[:t]])
        expected = random_model(input_ids=seen, use_cache=False).logits[0, -1]
        assert torch.allclose(found[t], expected, atol=1e-5)


@pytest.mark.parametrize("positions", [1, 2, 5, 100])
def test_chunks_give_the_value_and_the_gradient_of_the_plain_formula(
    random_model, monkeypatch, positions
):
    weights = torch.randn(5)
    plain = token_logprobs(plain_logits(random_model), IDS)  # (5,)
    (plain * weights).sum().backward()
    expected = [p.grad.clone() for p in random_model.parameters()]
    random_model.zero_grad()
    monkeypatch.setattr(grpo, "CHUNK", positions * random_model.config.vocab_size)
    hidden = policy_hidden(random_model, ROWS)
    assert torch.allclose(policy_logprobs(random_model, hidden, IDS), plain, atol=1e-5)

    def loss(logits, ids, weights):
        value = (token_logprobs(logits, ids) * weights).sum()
        return value, {"loss": value.item(), "tokens": len(ids)}

    stats = backward_in_chunks(random_model, loss, hidden, IDS, weights)
    sizes = {1: [1, 1, 1, 1, 1], 2: [2, 2, 1], 5: [5], 100: [5]}
    assert [its["tokens"] for its in stats] == sizes[positions]
    value = sum(its["loss"] for its in stats)
    assert value == pytest.approx((plain * weights).sum().item(), rel=1e-5)
    for p, gradient in zip(random_model.parameters(), expected):
        assert (p.grad - gradient).norm() < 1e-5 * gradient.norm()


def test_only_the_policys_tokens_reach_the_output_layer_a_chunk_at_a_time(
    random_model, monkeypatch
):
    monkeypatch.setattr(grpo, "CHUNK", 3 * random_model.config.vocab_size - 1)
    seen, layer = [], random_model.get_output_embeddings()
    layer.register_forward_hook(lambda _, inputs, output: seen.append(len(inputs[0])))
    hidden = policy_hidden(random_model, ROWS)
    backward_in_chunks(random_model, summed_logprobs, hidden, IDS)
    assert seen == [2, 2, 1]  # 5 of 8 response tokens, 2 at a time


def test_chunks_are_exact_in_float64(random_model, monkeypatch):
    model = random_model.double()
    # The layer itself, whose logits are not rounded to float32.
    monkeypatch.setattr(grpo, "to_logits", lambda model, x: model.get_output_embeddings()(x))
    gradients = []
    for positions in (1, 2, 5):
        monkeypatch.setattr(grpo, "CHUNK", positions * model.config.vocab_size)
        model.zero_grad()
        hidden = policy_hidden(model, ROWS)
        backward_in_chunks(model, summed_logprobs, hidden, IDS)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in gradients[1:]:
        assert (gradients[0] - other).norm() < 1e-13 * other.norm()


def test_nothing_sampled_is_a_graph_of_zeros(random_model):
    hidden = policy_hidden(random_model, [Trajectory("", [5], [6, 7], [0, 0])])
    ids = torch.tensor([], dtype=torch.long)
    assert policy_logprobs(random_model, hidden, ids).shape == (0,)
    stats = backward_in_chunks(random_model, summed_logprobs, hidden, ids)
    assert sum(its["loss"] for its in stats) == 0.0
    assert all(p.grad is None or p.grad.eq(0).all() for p in random_model.parameters())


@pytest.mark.parametrize("kind", [
    "llama", "qwen2", "qwen3", "gpt2", "gemma", "phi3", "olmo2", "gpt_neox", "granite", "stablelm",
    "cohere",
])  # fmt: skip
def test_the_output_layer_of_each_family_gives_its_logits(kind, small_model):
    more = {} if kind in ("gpt2", "gpt_neox") else {"num_key_value_heads": 2}
    model = small_model(kind, **more, **({"logits_scaling": 3.0} if kind == "granite" else {}))
    found = to_logits(model, policy_hidden(model, ROWS))
    assert torch.allclose(found, plain_logits(model), atol=1e-5)
    check_training(model)
    assert all(p.grad is None for p in model.parameters())


def test_a_model_whose_logits_are_computed_otherwise_is_refused(random_model):
    random_model.config.logits_scaling = 2.0  # a Qwen2 does not heed it
    with pytest.raises(ValueError, match="probabilities are off by 0.14"):
        check_training(random_model)


def test_a_model_is_checked_in_float32_whatever_is_around(random_model, monkeypatch):
    def exact(*args, plain=policy_hidden):
        assert not torch.is_autocast_enabled("cpu")
        return plain(*args)

    monkeypatch.setattr("grpo.policy_hidden", exact)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        check_training(random_model)
        with pytest.raises(AssertionError):  # or this test would say nothing
            exact(random_model, ROWS)


@pytest.mark.parametrize("likely", [False, True])
def test_a_model_may_be_off_only_where_nothing_is_likely(likely, random_model, monkeypatch):
    """In bfloat16 a pretrained model is off by .8 nats at a word that it never says. That is no
    reason to refuse it; being off by as much at the word that it says is one."""
    random_model.lm_head.weight.data *= 5.0  # now some words are likely, and most are not

    def noisy(model, hidden, plain=to_logits):
        logits = plain(model, hidden)  # (N, V)
        word = logits.argmax(-1) if likely else logits.argmin(-1)  # (N,)
        return logits.scatter_add(1, word[:, None], torch.full((len(logits), 1), -0.8))

    monkeypatch.setattr("grpo.to_logits", noisy)
    if likely:
        with pytest.raises(ValueError, match="probabilities are off by"):
            check_training(random_model)
    else:
        check_training(random_model)


# ---------------------------------------------------------------- the update


def weight_and_optimizer():
    """A weight of two numbers at (1, 1), and SGD of rate .1, whose momentum still is (2, 2)."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=1.0)
    weight.grad = torch.full((2,), 2.0)
    optimizer.step()
    with torch.no_grad():
        weight.fill_(1.0)
    return weight, optimizer


def test_an_update_scales_the_gradient_down_to_the_norm_and_steps_once():
    weight, optimizer = weight_and_optimizer()
    weight.grad = torch.tensor([3.0, 4.0])
    assert clip_and_update(optimizer, 1.0) == pytest.approx(5.0)
    # The gradient becomes (.6, .8), the momentum (2.6, 2.8).
    assert weight.tolist() == pytest.approx([1 - 0.26, 1 - 0.28])
    assert weight.grad is None
    weight, optimizer = weight_and_optimizer()
    weight.grad = torch.tensor([0.3, 0.4])  # below the norm: left as it is
    assert clip_and_update(optimizer, 1.0) == pytest.approx(0.5)
    assert weight.tolist() == pytest.approx([1 - 0.23, 1 - 0.24])


@pytest.mark.parametrize("gradient", [
    (0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (-math.inf, math.inf), (1e38, 3e38),
])  # fmt: skip
def test_where_the_norm_is_zero_or_no_number_nothing_changes(gradient):
    weight, optimizer = weight_and_optimizer()
    momentum = optimizer.state[weight]["momentum_buffer"].clone()
    weight.grad = torch.tensor(gradient)
    norm = clip_and_update(optimizer, 1.0)
    assert norm == 0.0 if gradient == (0.0, 0.0) else not math.isfinite(norm)
    assert weight.tolist() == [1.0, 1.0] and weight.grad is None
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum)


@pytest.mark.parametrize("size", [1, 3])
def test_a_step_is_the_plain_formula_over_its_batch(random_model, size):
    """Two groups of two. Only the first has a winner, so advantages are 1, -1 (over the root of
    two), 0, 0; the tokens of the second group still count in the divisor."""
    old = [[-7.0, 0.0, -7.2], [0.0, -7.1, -7.3, 0.0, -7.0]]
    batch = [replace(row, logprobs=values) for row, values in zip(ROWS + ROWS, old + old)]
    loss, tokens = 0.0, 10
    for row, advantage in zip(batch[:2], (0.5**0.5, -(0.5**0.5))):
        mask = torch.tensor([row.loss_mask])
        ids = torch.tensor(row.response_ids)
        logprobs = token_logprobs(response_logits(random_model, row), ids)
        before, A = torch.tensor([row.logprobs]), torch.tensor([advantage])
        loss = loss + grpo_loss(logprobs[None], before, A, mask, num_tokens=tokens)[0]
    parameters = list(random_model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    weights = [p.detach().clone() for p in parameters]
    config = Config(micro_batch=size, max_grad_norm=1e9)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    stats = grpo_step(random_model, frozen_copy(random_model), optimizer, batch, rewards, config)
    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-5)
    for p, weight, gradient in zip(parameters, weights, gradients):
        assert torch.allclose(p, weight - gradient, atol=1e-5)
    assert max(gradient.abs().max() for gradient in gradients) > 1e-2


# ---------------------------------------------------------------- TRL


def test_parity_with_trls_log_probabilities_and_entropies():
    utils = pytest.importorskip("trl.trainer.utils")
    logits, ids = torch.randn(3, 4, 9), torch.randint(9, (3, 4))
    theirs = utils.selective_log_softmax(logits, ids)
    assert torch.allclose(token_logprobs(logits, ids), theirs, atol=1e-6)
    assert torch.allclose(token_entropies(logits), utils.entropy_from_logits(logits), atol=1e-6)
