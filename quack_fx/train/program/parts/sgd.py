"""SGD: its arithmetic, and a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from quack_fx.train.program.parts.change import Number, Scales, Tensors, change_all, job_of


def sgd(w: Tensor, g: Tensor, state: Tensors, numbers: Tensors) -> tuple[Tensor, Tensors]:
    """SGD as in torch.optim, with momentum, dampening, Nesterov momentum and coupled weight decay: step and new state.

    Weight w, gradient g and the state (the momentum, if any) are [rows, ...].
    """
    clip, lr, decay, momentum, nesterov, rest = numbers
    g = clip * g + decay * w
    if not state:
        return lr * g, ()
    moving = momentum * state[0] + rest * g
    return lr * torch.where(nesterov > 0, g + momentum * moving, moving), (moving,)


def step_sgd(optimizer: Optimizer, scales: Scales, clip: Number, finite: Tensor | None, compiled: Any) -> None:
    """One step."""
    for group in optimizer.param_groups:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        names = ("momentum_buffer",) if group["momentum"] else ()
        # The first gradient of a weight is not dampened.
        begun = [optimizer.state[weight].get("momentum_buffer") is not None for weight in weights]
        jobs = [job_of(weight, optimizer.state[weight], names, scales) for weight in weights]
        if jobs:
            rest = 1 - group["dampening"] * torch.tensor(begun, dtype=torch.float64, device=jobs[0][1].device)
            same = group["lr"], group["weight_decay"], group["momentum"], float(group["nesterov"])
            change_all(sgd, (-clip if group["maximize"] else clip, *same, rest), finite, jobs, compiled)
