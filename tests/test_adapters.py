"""LoRA adapters: what they train, what is left when they are off, and their merging."""

import pytest
import torch

from grpo import response_logits
from machinery.adapters import (
    LoRA,
    adapters_off,
    add_adapters,
    layers_of,
    merge_adapters,
)
from rollout import Trajectory

PROBE = Trajectory("", [5, 6], [7, 8, 9], [1, 1, 1])


def logits_of(model):
    with torch.no_grad():
        return response_logits(model, PROBE)


def adapters_of(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train_a_little(model):
    optimizer = torch.optim.SGD(adapters_of(model), lr=0.5)
    for _ in range(3):
        response_logits(model, PROBE)[:, 4].mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_untrained_adapters_change_nothing(random_model):
    before = logits_of(random_model)
    add_adapters(random_model, 4)
    # So the student equals the teacher, if they have the same prompt.
    assert torch.equal(logits_of(random_model), before)
    with adapters_off(random_model):
        assert torch.equal(logits_of(random_model), before)


def test_only_the_adapters_are_trained_and_off_is_the_model_before(
    random_model, monkeypatch
):
    before = logits_of(random_model)
    weights = {name: p.clone() for name, p in random_model.named_parameters()}
    add_adapters(random_model, 4)
    # 4 layers of seven products: q, o (128 x 128), k, v (128 x 64), and gate, up, down
    # (128 x 512)
    numbers = 2 * 256 + 2 * 192 + 3 * 640
    assert sum(p.numel() for p in adapters_of(random_model)) == 4 * 4 * numbers
    train_a_little(random_model)
    assert not torch.allclose(logits_of(random_model), before, atol=1e-2)
    with adapters_off(random_model):
        assert torch.equal(logits_of(random_model), before)
    frozen = {
        name.replace(".linear.", "."): p
        for name, p in random_model.named_parameters()
        if not p.requires_grad
    }
    assert frozen.keys() == weights.keys()
    assert all(
        torch.equal(p, weights[name]) and p.grad is None for name, p in frozen.items()
    )


def test_adapters_are_the_same_on_every_device_and_differ_from_layer_to_layer(
    small_model,
):
    """Each device adds them for itself, whatever it drew before."""
    found = []
    for seed in (1, 2):
        model = small_model("llama")
        torch.manual_seed(seed)
        add_adapters(model, 4)
        found.append([lora.A for _, _, lora in layers_of(model, LoRA)])
    assert len(found[0]) == 14 and all(map(torch.equal, *found))
    assert not torch.equal(found[0][0], found[0][1])


def test_the_merged_model_equals_the_adapted_one(random_model):
    embedding = random_model.get_input_embeddings().weight.clone()
    names = [name for name, _ in random_model.named_parameters()]
    add_adapters(random_model, 4)
    train_a_little(random_model)
    adapted = logits_of(random_model)
    merge_adapters(random_model)
    assert torch.allclose(logits_of(random_model), adapted, atol=1e-5)
    assert [name for name, _ in random_model.named_parameters()] == names
    assert layers_of(random_model, LoRA) == []
    assert all(p.requires_grad for p in random_model.parameters())
    assert torch.equal(random_model.get_input_embeddings().weight, embedding)
    # The next round begins from the merged weights.
    add_adapters(random_model, 4)
    with adapters_off(random_model):
        assert torch.allclose(logits_of(random_model), adapted, atol=1e-5)


def test_a_merge_in_bfloat16_would_lose_a_small_update(random_model):
    add_adapters(random_model, 4)
    _, _, lora = layers_of(random_model, LoRA)[0]
    with torch.no_grad():
        lora.B.normal_(std=1e-5)
    update, linear = 2 * lora.B @ lora.A, lora.linear
    before, half = linear.weight.clone(), linear.weight.bfloat16()
    merge_adapters(random_model)
    assert linear.weight.dtype == torch.float32
    assert torch.allclose(linear.weight - before, update, atol=1e-8)
    lost = (half + update.bfloat16() == half).float().mean()
    assert (
        lost > 0.95
    )  # of 8 bits of mantissa nothing is left for a change of a ten-thousandth


def test_a_model_without_linear_layers_is_refused(small_model):
    model = small_model("gpt2")
    with pytest.raises(ValueError, match="which adapters need"):
        add_adapters(model, 4)
    assert (
        all(p.requires_grad for p in model.parameters())
        and layers_of(model, LoRA) == []
    )


def test_adapters_are_on_again_whatever_stops_the_work(random_model):
    add_adapters(random_model, 4)
    with pytest.raises(KeyboardInterrupt), adapters_off(random_model):
        raise KeyboardInterrupt
    assert all(adapter.on for _, _, adapter in layers_of(random_model, LoRA))
