"""Muon: its arithmetic, and a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz  # private, but a copy could drift from it

from quack_fx.train.program.parts.change import Number, Scales, Tensors, change_all, job_of
from quack_fx.train.program.parts.sharded import local


def muon(w: Tensor, g: Tensor, state: Tensors, numbers: Tensors) -> tuple[Tensor, Tensors]:
    """Muon (Jordan et al., 2024): its step, where g is the orthogonalised momentum of the whole matrix.

    Weight w and g are [rows, inputs].
    """
    lr, decay, shape = numbers
    return lr * shape * g + lr * decay * w, ()


def direction_of(
    grad: Tensor, momentum: Tensor, group: Mapping[str, Any], clip: Number, finite: Tensor | None
) -> Tensor:
    """The orthogonalised momentum of a matrix, [rows, inputs]."""
    grad = grad.to(momentum.dtype)
    grad = grad * clip.to(grad.dtype) if isinstance(clip, Tensor) else grad
    new = momentum.lerp(grad, 1 - group["momentum"])
    momentum.copy_(new if finite is None else torch.where(finite.to(new.device) > 0, new, momentum))
    ahead = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
    if isinstance(ahead, DTensor):  # if sharded
        ahead = ahead.redistribute(placements=[Replicate()] * ahead.device_mesh.ndim)  # if sharded
    return _zeropower_via_newtonschulz(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])


def step_muon(optimizer: Optimizer, scales: Scales, clip: Number, finite: Tensor | None, compiled: Any) -> None:
    """One step."""
    for group in optimizer.param_groups:
        jobs, shapes = list[list[Any]](), list[float]()
        for weight in (weight for weight in group["params"] if weight.grad is not None):
            state = optimizer.state[weight]
            scale, own, grad, momentum = job_of(weight, state, ("momentum_buffer",), scales)
            grad, momentum = weight.grad, state["momentum_buffer"]  # if sharded
            direction = direction_of(grad, momentum, group, clip, finite)
            if isinstance(direction, DTensor) and isinstance(weight, DTensor):  # if sharded
                direction = local(direction.redistribute(placements=weight.placements))  # if sharded
            jobs.append([scale, own, direction])
            shapes.append(_adjust_lr(1.0, group["adjust_lr_fn"], weight.shape))
        if jobs:
            shape = torch.tensor(shapes, dtype=torch.float64, device=jobs[0][1].device)
            change_all(muon, (group["lr"], group["weight_decay"], shape), finite, jobs, compiled)
