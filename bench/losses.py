"""Memory and time of the losses at a vocabulary of 151,936: plain, in chunks, TRL's.

    python -m bench.losses                  # 3 minutes on 2 cores, 6 GB
    python -m bench.losses --positions 250  # smaller

A hidden state of width --hidden stands for the model; the output layer is a real one.
Each line is a process of its own, which goes forward and backward through

    GRPO  the clipped loss of each token, with the entropies that are logged
    OFSD  the forward KL to a teacher

in one of these ways:

    plain       the formula on the logits of all positions at once
    chunks      what grpo_step and ofsd_step do: some positions at a time, each with a
                backward pass of its own, and at the end one through the model
    TRL         what the trainers of TRL call without a fused kernel. For GRPO these are
                selective_log_softmax and entropy_from_logits, for OFSD the loss on the
                full vocabulary of its self-distillation
    TRL chunks  the chunked divergence of TRL's distillation trainer

Where trl is not installed, its lines are skipped. The peak is the largest resident size
above that before the loss, or on a GPU the most memory that torch held above that. The
time is the median of --repeats runs, after one that warms up. All ways of a loss must
show the same two gradients.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from bench.memory import resident
from grpo import (
    grpo_loss,
    to_logits,
    token_chunks,
    token_entropies,
    token_logprobs,
    token_losses,
)
from ofsd import distill_loss, divergences

VOCABULARY = 151_936


class OutputLayer(torch.nn.Module):
    """What to_logits asks of a model: a linear layer, and the vocabulary's size."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.head = torch.nn.Linear(width, vocabulary, bias=False)
        self.config = PretrainedConfig(vocab_size=vocabulary)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head


class Inputs(NamedTuple):
    """What a loss is made of: N positions of width H."""

    model: OutputLayer
    hidden: torch.Tensor  # (N, H)
    teacher_hidden: torch.Tensor  # (N, H)
    ids: torch.Tensor  # (N,)


class Measurement(NamedTuple):
    """What one way of a loss costs, and the norms of its two gradients."""

    peak: int  # bytes above the start
    seconds: float
    states_norm: float  # gradient in the hidden states
    layer_norm: float  # gradient in the output layer


def make_inputs(vocabulary: int, positions: int, width: int) -> Inputs:
    model = OutputLayer(width, vocabulary)
    hidden = torch.randn(positions, width, requires_grad=True)  # (N, H)
    noise = torch.randn(positions, width)  # (N, H)
    teacher_hidden = hidden.detach() + 0.3 * noise  # (N, H)
    ids = torch.randint(vocabulary, (positions,))  # (N,)
    return Inputs(model, hidden, teacher_hidden, ids)


# ------------------------------------------------------------------ the ways of GRPO


def grpo_of_logprobs(logprobs: torch.Tensor) -> torch.Tensor:
    """The loss of one trajectory with advantage 1, from log-probabilities (N,)."""
    loss, _ = grpo_loss(
        logprobs[None],
        logprobs.detach()[None],
        torch.ones(1),
        torch.ones(1, len(logprobs)),
    )
    return loss


def grpo_plain(inputs: Inputs) -> None:
    logits = to_logits(inputs.model, inputs.hidden)  # (N, V)
    token_entropies(logits)
    grpo_of_logprobs(token_logprobs(logits, inputs.ids)).backward()


def grpo_chunks(inputs: Inputs) -> None:
    count = len(inputs.ids)
    leaf = inputs.hidden.detach().requires_grad_()  # (N, H)
    for part in token_chunks(inputs.model, count):
        logits = to_logits(inputs.model, leaf[part])  # (n, V)
        token_entropies(logits)
        logprobs = token_logprobs(logits, inputs.ids[part])  # (n,)
        advantages = torch.ones_like(logprobs)  # (n,)
        losses = token_losses(logprobs, logprobs.detach(), advantages)
        loss = losses.loss.sum() / count
        loss.backward()
    inputs.hidden.backward(leaf.grad)


def grpo_trl(inputs: Inputs) -> None:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = inputs.model.head(inputs.hidden)  # (N, V)
    with torch.no_grad():
        entropy_from_logits(logits)
    grpo_of_logprobs(selective_log_softmax(logits, inputs.ids)).backward()


# ------------------------------------------------------------------ the ways of OFSD


def ofsd_plain(inputs: Inputs) -> None:
    with torch.no_grad():
        teacher_logits = to_logits(inputs.model, inputs.teacher_hidden)  # (N, V)
    logits = to_logits(inputs.model, inputs.hidden)  # (N, V)
    mask = torch.ones(1, len(logits))  # (1, N)
    distill_loss(logits[None], teacher_logits[None], mask).backward()


def ofsd_chunks(inputs: Inputs) -> None:
    count = len(inputs.ids)
    leaf = inputs.hidden.detach().requires_grad_()  # (N, H)
    for part in token_chunks(inputs.model, count):
        with torch.no_grad():
            teacher_states = inputs.teacher_hidden[part]  # (n, H)
            teacher_logits = to_logits(inputs.model, teacher_states)  # (n, V)
        logits = to_logits(inputs.model, leaf[part])  # (n, V)
        loss = divergences(logits, teacher_logits).sum() / count
        loss.backward()
    inputs.hidden.backward(leaf.grad)


def ofsd_trl(inputs: Inputs) -> None:
    from trl.experimental.sdpo.loss_utils import (
        compute_full_logit_self_distillation_loss,
    )

    with torch.no_grad():
        teacher_logits = inputs.model.head(inputs.teacher_hidden)  # (N, V)
    logits = inputs.model.head(inputs.hidden)  # (N, V)
    losses = compute_full_logit_self_distillation_loss(
        logits, teacher_logits, distillation_alpha=0.0
    )
    losses.mean().backward()


def ofsd_trl_chunks(inputs: Inputs) -> None:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    weight = inputs.model.head.weight  # (V, H)
    loss = _chunked_divergence_loss(
        inputs.hidden[None],
        inputs.teacher_hidden[None],
        weight,
        weight.detach(),
        torch.ones(1, len(inputs.ids)),
        beta=0.0,
    )[0]
    loss.backward()


WAYS: dict[str, Callable[[Inputs], None]] = {
    "GRPO plain": grpo_plain,
    "GRPO chunks": grpo_chunks,
    "GRPO TRL": grpo_trl,
    "OFSD plain": ofsd_plain,
    "OFSD chunks": ofsd_chunks,
    "OFSD TRL": ofsd_trl,
    "OFSD TRL chunks": ofsd_trl_chunks,
}


# ------------------------------------------------------------------ measuring


def memory_held() -> int:
    """Bytes held now: by torch on the GPU, else by the process."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return resident("VmRSS")


def memory_peak() -> int:
    """The most bytes held so far."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def measure(name: str, positions: int, width: int, repeats: int) -> Measurement:
    """Run in a fresh process, which has held no more than it holds now."""
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
    way = WAYS[name]
    way(make_inputs(1000, 4, width))  # imports and thread pools are not the loss's

    # The gradients are there before the loss, so they are no part of its peak.
    inputs = make_inputs(VOCABULARY, positions, width)
    weight = inputs.model.head.weight
    weight.grad = torch.zeros_like(weight)
    inputs.hidden.grad = torch.zeros_like(inputs.hidden)

    before = memory_held()
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        way(inputs)
        memory_held()  # waits for the GPU
        seconds.append(time.perf_counter() - began)
    return Measurement(
        peak=memory_peak() - before,
        seconds=median(seconds[1:]),
        states_norm=(inputs.hidden.grad.norm() / (repeats + 1)).item(),
        layer_norm=(weight.grad.norm() / (repeats + 1)).item(),
    )


def measure_apart(name: str, positions: int, width: int, repeats: int) -> Measurement:
    """The same, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, name, positions, width, repeats).result()


def show(name: str, positions: int, measured: Measurement, plain: Measurement) -> None:
    print(f"{name:18}{positions:10}", end="")
    print(f"{measured.peak / 1e6:9.0f}{measured.peak / plain.peak:10.2f}", end="")
    print(f"{measured.seconds:9.4f}{measured.seconds / plain.seconds:10.2f}", end="")
    print(f"{measured.states_norm:18.5e}{measured.layer_norm:14.5e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Memory and time of the losses, side by side."
    )
    parser.add_argument("--positions", type=int, nargs="+", default=[500, 1000])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    device = "CPU"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    print(f"vocabulary {VOCABULARY}, hidden width {args.hidden}, float32, ", end="")
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"{'':18}{'positions':>10}{'peak MB':>9}{'of plain':>10}", end="")
    print(f"{'seconds':>9}{'of plain':>10}", end="")
    print(f"{'gradients of states and layer':>32}")

    for positions in args.positions:
        plain_of = {}  # loss -> the measurement of its plain way
        for name in WAYS:
            try:
                measured = measure_apart(name, positions, args.hidden, args.repeats)
            except ImportError as error:
                print(f"{name:18} is skipped: {error}")
                continue
            loss = name.split()[0]
            if name.endswith("plain"):
                plain_of[loss] = measured
            show(name, positions, measured, plain_of[loss])


if __name__ == "__main__":
    main()
