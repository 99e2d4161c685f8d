"""Updates weights, for every optimizer: large ones in compiled code, small ones in stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quack_fx.train.program.parts.sharded import local

Tensors = Sequence[Tensor]
Number = float | Tensor
Scales = Mapping[Tensor, Tensor]
SMALL = 8192  # elements of a weight; a stack of eight times as many is worth compiled code  # if small


def change(rule: Any, numbers: Tensor, finite: Tensor | None, scale: Tensor, weight: Tensor, *others: Tensor) -> None:
    """Update a weight, w - scale * step, and its state in place, by the optimizer's rule; this function is compiled.

    Shapes: weight and others (its gradient and state) [rows, ...]; scale [rows, 1, ...]; numbers, the arguments of the
    rule, [n]. A stack of weights has one more axis in front, and numbers are [n, weights, 1, ...].
    """
    w, g, *state = (tensor.to(scale.dtype) for tensor in (weight, *others))
    step, new = rule(w, g, state, numbers.unbind())
    for old, value in zip((weight, *others[1:]), (w - scale * step, *new), strict=True):
        old.copy_(value if finite is None else torch.where(finite.to(old.device) > 0, value.to(old.dtype), old))


def change_all(rule: Any, numbers: Sequence[Number], finite: Tensor | None, jobs: Any, code: Any) -> None:
    """Update the weight of each job, (scale, weight, gradient, *state); each number is one for all jobs, or [jobs]."""
    kind: dict[str, Any] = {"dtype": torch.float64, "device": jobs[0][1].device}
    each = [n.to(**kind) if isinstance(n, Tensor) else torch.full((), n, **kind) for n in numbers]
    table = torch.stack([number.expand(len(jobs)) for number in each], 1)  # [jobs, n]
    alike: dict[Any, list[Any]] = {}  # if small
    for i, (scale, weight, *others) in enumerate(jobs):
        scale = ones_of(weight) if scale is None else scale  # if others
        if weight.numel() <= SMALL:  # if small
            key = scale.shape, weight.shape, weight.stride(), weight.dtype, others[0].dtype, weight.device  # if small
            alike.setdefault(key, []).append((i, scale, weight, *others))  # if small
            continue  # if small
        # No views: torch.compile would recompile for each storage offset.
        code(rule, table[i].to(scale, copy=True), finite, scale, *(t.data for t in (weight, *others)))
        torch.autograd.graph.increment_version([weight, *others[1:]])
    for some in alike.values():  # if small
        own, *columns = zip(*some, strict=True)  # if small
        change_stacked(rule, table[list(own)], finite, columns, code)  # if small


def ones_of(weight: Tensor) -> Tensor:
    """The scale of a weight without query or key rows, [rows, 1, ...]."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_ones(weight.shape[:1] + (1,) * (weight.dim() - 1), dtype=exact)


def change_stacked(rule: Any, numbers: Tensor, finite: Tensor | None, columns: Any, code: Any) -> None:
    """Update small weights of the same shape and type at once; columns: their scales, weights, gradients, state."""
    scale, weight, *others = (torch.stack(column) for column in columns)
    numbers = numbers.to(scale).T.reshape(-1, len(scale), *[1] * (scale.dim() - 1))
    (code if weight.numel() > 8 * SMALL else change)(rule, numbers, finite, scale, weight, *others)
    for old, new in zip((columns[1], *columns[3:]), (weight, *others[1:]), strict=True):
        torch._foreach_copy_(old, list(new.unbind()))


def job_of(weight: Tensor, state: dict[str, Any], names: Sequence[str], scales: Scales) -> list[Any]:
    """A weight's scale (None without query or key rows), the weight, its gradient and its state, zeros if missing."""
    scale, grad = scales.get(weight), weight.grad
    assert grad is not None
    weight = state.get("master_param", weight)  # if masters
    state |= {name: torch.zeros_like(weight) for name in names if state.get(name) is None}
    grad = grad if grad.stride() == weight.stride() else torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
    return [scale, weight, grad, *[state[name] for name in names]]  # if not sharded
    return [scale, *map(local, [weight, grad, *[state[name] for name in names]])]  # if sharded
