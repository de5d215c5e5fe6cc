"""Several devices. Under torchrun each has a process, whose number is its rank.

Every rank holds all weights and the whole batch, and works on its share of it. The sum
of the ranks' gradients is the gradient that one device would have computed. Without
torchrun there is one rank, and nothing here does anything.
"""

import torch
import torch.distributed as dist


def rank() -> int:
    """The number of this process, 0 for the one that writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def rank_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def my_share(items: list) -> list:
    """The items that this rank works on."""
    return items[rank() :: rank_count()]


def gather(value) -> list:
    """Every rank's value, by rank."""
    values = [value] * rank_count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Give every rank the sum of all ranks' gradients."""
    if not dist.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:  # nothing of the batch was left for this rank
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
