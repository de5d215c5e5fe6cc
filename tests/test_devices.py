"""Which device and which arithmetic are chosen, by a stand-in for each kind of card."""

import pytest
import torch
from torch.profiler import profile

from machinery.adapters import add_adapters
from machinery.devices import (
    arithmetic,
    choose_arithmetic,
    choose_device,
    frozen_kept,
    product_dtype,
)
from machinery.errors import BadInput


@pytest.fixture
def card(monkeypatch):
    """card(there, in_hardware): pretend that there is a GPU, and what it can do."""

    def pretend(there, in_hardware=False):
        def supported(including_emulation=True):
            # A T4 says yes unless it is asked about its hardware.
            return there and (including_emulation or in_hardware)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)

    return pretend


def test_without_a_card_everything_is_on_the_cpu_in_float32(card):
    card(there=False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    assert choose_arithmetic("auto", "cpu") == torch.float32
    with pytest.raises(BadInput, match="no NVIDIA GPU"):
        choose_device("cuda")


def test_a_card_with_bfloat16_in_hardware_uses_it(card):
    card(there=True, in_hardware=True)
    assert choose_device("auto") == choose_device("cuda") == "cuda"
    assert choose_device("cpu") == "cpu"
    assert choose_arithmetic("auto", "cuda") == torch.bfloat16
    assert choose_arithmetic("float32", "cuda") == torch.float32
    assert choose_arithmetic("auto", "cpu") == torch.float32


def test_a_t4_which_only_emulates_it_stays_with_float32(card):
    card(there=True, in_hardware=False)
    assert choose_arithmetic("auto", "cuda") == torch.float32
    assert choose_arithmetic("bfloat16", "cuda") == torch.bfloat16  # who insists


def test_apples_gpu_is_never_chosen_by_itself(card, monkeypatch):
    card(there=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == "cpu" and choose_device("mps") == "mps"
    assert choose_arithmetic("auto", "mps") == torch.float32
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(BadInput, match="no Apple GPU"):
        choose_device("mps")


def test_the_arithmetic_of_a_model_is_that_of_its_products(random_model):
    ids = torch.tensor([[1, 2, 3]])

    def kind_of_logits():
        with torch.no_grad(), arithmetic(random_model):
            return random_model(ids).logits.dtype

    assert kind_of_logits() == torch.float32  # nobody has chosen, and this is a CPU
    random_model.arithmetic = torch.bfloat16
    assert kind_of_logits() == torch.bfloat16
    random_model.arithmetic = torch.float32
    assert kind_of_logits() == torch.float32
    # A caller's own autocast is left alone.
    with torch.autocast("cpu", torch.bfloat16):
        assert kind_of_logits() == torch.bfloat16


def test_the_dtype_of_products_is_what_they_return(random_model):
    def returned():
        weight = random_model.lm_head.weight
        return (weight @ weight.T).dtype

    assert product_dtype(random_model) == returned() == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(random_model) == returned() == torch.bfloat16


@pytest.mark.parametrize("rank", [0, 4])
def test_in_sampling_each_weight_is_rounded_once(random_model, rank):
    """With adapters, too: the frozen weights beside them are most of the model."""
    if rank:
        add_adapters(random_model, rank)
    random_model.arithmetic = torch.bfloat16
    shapes = {str(list(weight.shape)) for weight in random_model.parameters()}
    trained = [weight.requires_grad for weight in random_model.parameters()]
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), arithmetic(random_model), frozen_kept(random_model):
        random_model(ids)  # here they are rounded
        with profile(record_shapes=True) as profiler:
            random_model(ids)
    rounded = [
        event
        for event in profiler.events()
        if event.name == "aten::_to_copy" and str(event.input_shapes[0]) in shapes
    ]
    assert not rounded
    assert trained == [weight.requires_grad for weight in random_model.parameters()]
