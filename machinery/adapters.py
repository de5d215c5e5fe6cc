"""LoRA adapters: a small trainable product of matrices beside each linear layer.

    y = W x + 2 B A x        W (out, in) frozen, A (r, in), B (out, r); 2 is alpha / r

B begins as zero, so at first nothing changes. Switched off, adapters leave the model as
it was before them: that is OFSD's teacher, without a second copy of the weights.
"""

import contextlib

import torch
from torch.nn import functional

from machinery.errors import BadInput


class LoRA(torch.nn.Module):
    """A linear layer with an adapter beside it."""

    def __init__(self, linear: torch.nn.Linear, rank: int, seed: int):
        super().__init__()
        # A generator of its own: A is the same on all devices and in all runs.
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(rank, linear.in_features, generator=generator)  # (r, in)
        A = A / linear.in_features**0.5
        self.linear = linear
        self.A = torch.nn.Parameter(A.to(linear.weight))  # (r, in)
        zeros = linear.weight.new_zeros(linear.out_features, rank)
        self.B = torch.nn.Parameter(zeros)  # (out, r)
        self.on = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)  # (..., out)
        if not self.on:
            return y
        # Autocast keeps its rounded copies of A and B. Of A.T it would keep none.
        inner = functional.linear(x, self.A)  # (..., r), which is x A^T
        change = 2 * functional.linear(inner, self.B)  # (..., out)
        return y + change.to(y.dtype)


def layers_of(model, kind: type) -> list[tuple]:
    """(parent, name, layer) for every layer of this kind in the decoder."""
    layers = []
    for parent in model.base_model.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, kind):
                layers.append((parent, name, layer))
    return layers


def add_adapters(model, rank: int) -> None:
    """Put an adapter beside every linear layer of the decoder, and train only these.

    Raises BadInput where the decoder has matrices of another kind, as GPT-2 and
    mixtures of experts have.
    """
    known = set()
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Embedding)):
            known.add(id(layer.weight))
    for name, parameter in model.base_model.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in known:
            raise BadInput(
                f"{name} is no torch.nn.Linear, which adapters need: use rank 0"
            )
    model.requires_grad_(False)
    linear_layers = layers_of(model, torch.nn.Linear)
    for number, (parent, name, linear) in enumerate(linear_layers):
        setattr(parent, name, LoRA(linear, rank, seed=number))


@torch.no_grad()
def merge_adapters(model) -> None:
    """Add the adapters to the weights, and put the linear layers back.

    Afterwards all weights can be trained. They are float32: in bfloat16 most of a small
    update would be rounded away, as a test shows.
    """
    for parent, name, adapter in layers_of(model, LoRA):
        adapter.linear.weight += 2 * adapter.B @ adapter.A
        setattr(parent, name, adapter.linear)
    model.requires_grad_(True)


@contextlib.contextmanager
def adapters_off(model):
    """A context in which the model computes as if it had no adapters."""
    adapters = [layer for _, _, layer in layers_of(model, LoRA)]
    for adapter in adapters:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.on = True
