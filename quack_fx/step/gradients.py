"""USER: what is to be known of all gradients of a step before any weight changes.

In: optimizers. Out: their gradients, the factor that clips them, and whether all are finite; as tensors, so that
nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quack_fx.step.rules import Gate


def gradients(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """All gradients of some optimizers' parameters, lying in memory as those do."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return [_like(p) for group in groups for p in group["params"] if p.grad is not None]


def _like(param: Tensor) -> Tensor:
    """The gradient of a parameter, lying in memory as the parameter does."""
    grad = param.grad
    assert grad is not None
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)


def look_at(grads: list[Tensor], clip_grad_norm: float | None, skip_nonfinite: bool) -> Gate:
    """What is to be known of gradients, if there are any.

    Arguments:
        grads: All gradients of the step.
        clip_grad_norm: Largest total norm; None for no limit.
        skip_nonfinite: Whether to find out whether all are finite.
    """
    clip = _clip(grads, clip_grad_norm) if grads and clip_grad_norm is not None else None
    return Gate(clip, all_finite(grads) if grads and skip_nonfinite else None)


def all_finite(grads: Sequence[Tensor]) -> Tensor:
    """Whether no gradient is infinite or not a number, 0-d."""
    return torch.stack([g.isfinite().all() for g in grads]).all()


def _clip(grads: list[Tensor], limit: float) -> Tensor:
    """Factor on all gradients, as `torch.nn.utils.clip_grad_norm_` has it."""
    squares = [g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() for g in grads]
    total = torch.stack(squares).sum().sqrt()
    return (limit / (total + 1e-6)).clamp(max=1.0)
