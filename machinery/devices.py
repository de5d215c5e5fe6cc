"""The device of a model and its arithmetic: the one place that decides both."""

import contextlib

import torch

from machinery.errors import BadInput

DEVICES = ("auto", "cpu", "cuda", "mps")
ARITHMETICS = ("auto", "float32", "bfloat16")


def choose_device(name: str) -> str:
    """cpu, cuda or mps. auto takes the NVIDIA GPU if there is one, and else the CPU.

    Apple's mps is never chosen by auto, since nobody has tried it with this project.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput("this torch sees no NVIDIA GPU: use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise BadInput("this torch sees no Apple GPU: use --device cpu")
    return name


def choose_arithmetic(name: str, device: str) -> torch.dtype:
    """bfloat16 or float32. auto takes bfloat16 on a GPU whose hardware has it.

    A T4 only emulates bfloat16, which is slower than float32. A CPU may have it in
    hardware, but torch cannot say whether it has, so there it must be asked for.
    """
    if name == "bfloat16":
        return torch.bfloat16
    in_hardware = device == "cuda" and torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    if name == "auto" and in_hardware:
        return torch.bfloat16
    return torch.float32


def arithmetic(model):
    """A context in which the matrix products of this model use its arithmetic.

    place_model notes the choice in model.arithmetic. Weights stay float32: autocast
    rounds a copy, and keeps it until the context ends. So no context may enclose an
    optimizer step. Where float32 was chosen, a caller's own autocast is left alone.
    """
    device = model.device.type
    chosen = getattr(model, "arithmetic", None)
    if chosen is None:
        chosen = choose_arithmetic("auto", device)
    if chosen == torch.bfloat16:
        return torch.autocast(device, torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def frozen_kept(model):
    """A context for sampling, in which autocast keeps copies of frozen weights, too.

    By itself it keeps only the copies of weights that require a gradient. While no
    gradients are computed we may say that all do: else the weights beside adapters are
    rounded anew for each token. The copies take 2 bytes a weight.
    """
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def product_dtype(model) -> torch.dtype:
    """What matrix products return here and now: autocast's dtype, or the weights'."""
    device = model.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return model.dtype
