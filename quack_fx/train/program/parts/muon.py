"""Muon: its arithmetic, and a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz  # a copy would drift from torch's

from quack_fx.train.program.parts.change import Job, Look, Scales, Stepped, change_alike, jobs_of
from quack_fx.train.program.parts.sharded import gathered


def muon(w: Tensor, g: Tensor, state: Sequence[Tensor], numbers: Sequence[Tensor]) -> Stepped:
    """Muon (Jordan et al., 2024), its direction in place of the gradient: that of the whole matrix, before any scale.

    Arguments:
        w, g: Weight and direction, [rows, inputs].
        state: None.
        numbers: As in `step_muon`, [] each.
    """
    lr, decay, shape = numbers
    return lr * shape * g + lr * decay * w, ()


def direction_of(grad: Tensor, momentum: Tensor, group: Mapping[str, Any], look: Look) -> Tensor:
    """The orthogonalised momentum of a matrix, [rows, inputs]."""
    grad = grad.to(momentum.dtype)
    grad = grad * look.clip.to(grad) if isinstance(look.clip, Tensor) else grad
    new = momentum.lerp(grad, 1 - group["momentum"])
    momentum.copy_(torch.where(look.finite > 0, new, momentum) if isinstance(look.finite, Tensor) else new)
    ahead = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    ahead = gathered(ahead)  # if sharded
    return _zeropower_via_newtonschulz(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])


def step_muon(optimizer: Optimizer, scales: Scales, look: Look, compiled: Callable[..., None]) -> None:
    """One step on all groups."""
    for group in optimizer.param_groups:
        jobs = []
        for weight, grad, state in jobs_of(group, optimizer.state, ("momentum_buffer",)):
            direction = direction_of(grad, state["momentum_buffer"], group, look)
            if isinstance(direction, DTensor) and isinstance(weight, DTensor):  # if sharded
                direction = direction.redistribute(placements=weight.placements)  # if sharded
            jobs.append(Job(weight, direction, state))
        if jobs:
            shapes = [_adjust_lr(1.0, group["adjust_lr_fn"], job.weight.shape) for job in jobs]
            shape = torch.tensor(shapes, dtype=torch.float64, device="cpu")
            table = look._replace(clip=1.0).numbers(jobs, group["lr"], group["weight_decay"], shape)
            change_alike(muon, table, jobs, (), scales, compiled)
