"""Shared by the tests of grpo_step and ofsd_step: trajectories without a meaning, and
an optimizer that keeps the gradient in place of using it."""

import torch

from grpo import response_logits
from machinery.models import frozen_copy
from rollout import Trajectory

ROWS = [
    Trajectory("", [5, 6, 7, 8], [10, 11, 12], [1, 0, 1], [-7.0, 0.0, -7.2]),
    Trajectory(
        "", [9], [13, 14, 15, 16, 17], [0, 1, 1, 0, 1], [0.0, -7.1, -7.3, 0.0, -7.0]
    ),
]
IDS = torch.tensor([10, 12, 14, 15, 17])  # those of mask 1


class Spy:
    """An optimizer that keeps the gradient."""

    def __init__(self, model):
        self.model = model
        self.param_groups = [{"params": list(model.parameters())}]
        self.stepped = False

    def step(self):
        self.stepped = True

    def zero_grad(self):
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.gradient = torch.zeros(1)
        if gradients:
            self.gradient = torch.cat([gradient.flatten() for gradient in gradients])
        self.model.zero_grad()


def trainable_copy(model):
    return frozen_copy(model).requires_grad_(True)


def plain_logits(model):
    """Those that predict IDS, (5, V), from plain forward passes."""
    parts = []
    for row in ROWS:
        mask = torch.tensor(row.loss_mask).bool()
        parts.append(response_logits(model, row)[mask])
    return torch.cat(parts)


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])
