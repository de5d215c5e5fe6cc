"""grpo.py's loss against numbers worked by hand and against autograd in float64."""

import math

import pytest
import torch

from grpo import (
    group_advantages,
    grpo_loss,
    token_entropies,
    token_logprobs,
    token_losses,
    token_weights,
)


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


def test_logprobs_and_entropy_of_a_three_token_vocabulary():
    logits = (
        tensor([0.2, 0.3, 0.5]).log()[:, None] + 7.0
    )  # (1, 1, 3); a constant changes nothing
    assert token_logprobs(logits, torch.tensor([[2]])).item() == pytest.approx(
        math.log(0.5)
    )
    expected = -(0.2 * math.log(0.2) + 0.3 * math.log(0.3) + 0.5 * math.log(0.5))
    assert token_entropies(logits).item() == pytest.approx(expected)


def test_a_token_of_probability_zero():
    logits = tensor([0.25, 0.75, 0.0]).log()[:, None].requires_grad_()  # (1, 1, 3)
    entropy = token_entropies(logits)
    assert not entropy.requires_grad
    assert entropy.item() == pytest.approx(
        -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    )
    token_logprobs(logits, torch.tensor([[1]])).sum().backward()
    assert logits.grad.flatten().tolist() == pytest.approx([-0.25, 0.25, 0.0])
    assert token_logprobs(logits, torch.tensor([[2]])).item() == -math.inf


def test_value_is_zero_but_the_gradient_is_not_at_ratio_one():
    logprobs = tensor([-1.0, -2.0], [-0.5, -3.0]).requires_grad_()
    loss, stats = grpo_loss(
        logprobs, logprobs.detach(), tensor([1.0, -1.0])[0], torch.ones(2, 2)
    )
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
def test_the_clip_acts_only_on_the_side_where_it_should(
    ratio, advantage, loss, gradient
):
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

    def value(**settings):
        return grpo_loss(*batch, **settings)[0].item()

    assert value(norm="token") == pytest.approx(1.6667, abs=1e-4)
    assert value(norm="grpo") == pytest.approx(1.5)
    assert value(norm="dr_grpo", max_len=8) == pytest.approx(0.625)
    assert value(norm="dr_grpo") == pytest.approx(1.0)  # L = T = 5
    assert value(num_tokens=20) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="norm is"):
        value(norm="mean")


def test_k3_by_hand():
    # x = log ref - log pi = ln 2: k3 = 2 - ln 2 - 1 = .3069; its derivative is 1 - e^x
    logprobs = tensor([math.log(0.25)]).requires_grad_()
    how = {"ref_logprobs": tensor([math.log(0.5)]), "kl_coef": 0.1}
    loss, stats = grpo_loss(
        logprobs, logprobs.detach(), tensor([0.0])[0], torch.ones(1, 1), **how
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.1 * (1 - math.log(2)))
    assert stats["kl"] == pytest.approx(1 - math.log(2))
    assert logprobs.grad.item() == pytest.approx(-0.1)
    equal = [tensor([-1.0])] * 2
    _, stats = grpo_loss(
        *equal, tensor([1.0])[0], torch.ones(1, 1), ref_logprobs=equal[0]
    )
    assert stats["kl"] == 0
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        grpo_loss(
            tensor([0.0]),
            tensor([0.0]),
            tensor([1.0])[0],
            torch.ones(1, 1),
            kl_coef=0.1,
        )


def random_batch(seed=0, sequences=6, size=9):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

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
        loss, stats = grpo_loss(
            values, old, advantages, mask, ref_logprobs=reference, kl_coef=0.5
        )
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
    loss, stats = grpo_loss(
        values, torch.zeros(2, 3), torch.ones(2), torch.zeros(2, 3), norm=norm
    )
    loss.backward()
    assert loss.item() == 0.0 and values.grad.eq(0).all() and stats["clip_frac"] == 0.0


@pytest.mark.parametrize("norm", ["token", "grpo", "dr_grpo"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_an_empty_batch_is_zero_with_a_graph(norm, shape):
    values = torch.zeros(shape, requires_grad=True)
    how = {"norm": norm, "ref_logprobs": torch.zeros(shape), "kl_coef": 0.1}
    batch = values, torch.zeros(shape), torch.ones(shape[0]), torch.ones(shape)
    loss, stats = grpo_loss(*batch, **how)
    loss.backward()
    assert loss.item() == 0.0 and values.grad.shape == shape
    assert stats == {"clip_frac": 0.0, "gap": 0.0, "kl": 0.0}


def test_a_ratio_too_large_for_float32_stays_finite():
    """A token that was all but impossible when sampled, and is likely now: e^200."""
    new = torch.tensor([[-0.1, -1.0]]).requires_grad_()
    old = torch.tensor([[-200.1, -1.0]])
    how = {"ref_logprobs": torch.tensor([[-0.1, 300.0]]), "kl_coef": 1e-3}
    for advantage in (1.0, -1.0):
        loss, _ = grpo_loss(
            new, old, torch.tensor([advantage]), torch.ones(1, 2), **how
        )
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

        def pad_by(x, value, pad=pad):
            return torch.nn.functional.pad(x, (0, pad), value=value)

        padded = [pad_by(x, value)[rows] for x, value in fills]
        padded[0].requires_grad_()
        loss, _ = grpo_loss(
            *padded[:2], advantages[rows], padded[2], norm=norm, max_len=9
        )
        loss.backward()
        results.append((loss, padded[0].grad[torch.argsort(rows), :9]))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-12)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-12, atol=0)


def test_weights_by_hand():
    # Lengths 2 and 4 of T = 5, so N = 6 and B = 2.
    mask = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 0, 1, 1]])
    sixth = token_weights(mask)
    assert torch.allclose(sixth, mask / 6)
    assert token_weights(mask, num_tokens=12).sum().item() == pytest.approx(0.5)
    rows = token_weights(mask, norm="grpo")
    assert rows[0].tolist() == [0.25, 0, 0.25, 0, 0]
    assert rows[1].tolist() == [0.125, 0.125, 0, 0.125, 0.125]
    constant = token_weights(mask, norm="dr_grpo", max_len=8)
    assert torch.equal(constant, mask / 16)
    assert token_weights(torch.zeros(2, 3)).eq(0).all()


def test_k3_is_exact_where_the_policies_are_close():
    # x = 1e-4: k3 = x^2 / 2 + x^3 / 6 = 5.00017e-9; exp(x) - x - 1 is 0 in float32.
    old = torch.tensor([0.0])
    x = torch.tensor([1e-4])
    tokens = token_losses(old, old, torch.tensor([0.0]), ref_logprobs=x, kl_coef=1.0)
    assert tokens.kl.item() == pytest.approx(5.00017e-9, rel=1e-3)
    assert tokens.loss.item() == pytest.approx(5.00017e-9, rel=1e-3)


# ---------------------------------------------------------------------------------- TRL


def test_parity_with_trls_log_probabilities_and_entropies():
    utils = pytest.importorskip("trl.trainer.utils")
    logits = torch.randn(3, 4, 9)
    ids = torch.randint(9, (3, 4))
    theirs = utils.selective_log_softmax(logits, ids)
    assert torch.allclose(token_logprobs(logits, ids), theirs, atol=1e-6)
    entropies = utils.entropy_from_logits(logits)
    assert torch.allclose(token_entropies(logits), entropies, atol=1e-6)
