"""How weights are changed, whatever the optimizer: those that look alike share compiled code, and few calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from quack_fx.train.program.parts.sharded import local

Tensors = Sequence[Tensor]
Scales = Mapping[Tensor, Tensor]
Number = float | Tensor
SMALL = 16384  # numbers  # if small
Compiled = Callable[..., None]


def change(rule: Any, numbers: Tensor, scales: Tensors, weights: Tensors, grads: Tensors, *states: Tensors) -> None:
    """Change some weights, w - scale * step, and their state in place, by the rule of the optimizer; this is compiled.

    Shapes: numbers [weights, clip, finite, those of the rule], scales [rows, 1, ...] each, the others [rows, ...] each.
    """
    for i, (scale, weight, grad, *state) in enumerate(zip(scales, weights, grads, *states, strict=True)):
        clip, finite, *own = numbers[i].unbind()
        w, g, *s = (tensor.to(scale.dtype) for tensor in (weight, grad, *state))
        step, new = rule(w, g * clip, s, own)
        for old, value in zip((weight, *state), (w - scale * step, *new), strict=True):
            old.copy_(torch.where(finite > 0, value.to(old.dtype), old))


def change_alike(rule: Any, numbers: Sequence[Number], jobs: Sequence[list[Any]], compiled: Compiled) -> None:
    """Change the weight of each job, [scale, weight, gradient, *state]: small ones in stacks, the others two by two."""
    plain = torch.tensor([0.0 if isinstance(n, Tensor) else n for n in numbers], dtype=torch.float64, device="cpu")
    each = zip(numbers, plain.to(jobs[0][1].device, non_blocking=True).unbind(), strict=True)
    columns = [n.to(own, non_blocking=True) if isinstance(n, Tensor) else own for n, own in each]
    table = torch.stack([column.expand(len(jobs)) for column in columns], 1)
    alike: dict[Any, list[tuple[Tensor, list[Tensor]]]] = {}
    for job, row in zip(jobs, table.unbind(), strict=True):
        if job[0] is None:
            exact = torch.promote_types(job[1].dtype, torch.float32)
            job[0] = job[1].new_ones(job[1].shape[:1] + (1,) * (job[1].dim() - 1), dtype=exact)
        key = *((tensor.shape, tensor.dtype) for tensor in job[:3]), job[1].stride(), job[1].device
        alike.setdefault(key, []).append((row, job))
    for some in alike.values():
        tensors = [list(column) for column in zip(*(job for _, job in some), strict=True)]
        rows = torch.stack([row for row, _ in some]).to(tensors[0][0])
        if tensors[1][0].numel() <= SMALL:  # if small
            stacks = [torch.stack(column) for column in tensors]  # if small
            spread = rows.T.reshape(1, -1, len(some), *[1] * tensors[1][0].dim())  # if small
            change(rule, spread, *([stack] for stack in stacks))  # if small
            for i in (1, *range(3, len(stacks))):  # if small
                torch._foreach_copy_(tensors[i], list(stacks[i].unbind()))  # if small
            continue  # if small
        # No views: for each place that one may have in its memory, torch.compile would compile anew.
        bare = [torch._foreach_mul(tensors[0], 1), *([tensor.data for tensor in column] for column in tensors[1:])]
        twos = len(some) // 2 * 2
        for start, stop in pairwise([*range(0, twos, 2), *range(twos, len(some) + 1)]):
            compiled(rule, rows[start:stop].clone(), *(column[start:stop] for column in bare))
        torch.autograd.graph.increment_version([*tensors[1], *chain(*tensors[3:])])


def job_of(weight: Tensor, state: dict[str, Any], names: Sequence[str], scales: Scales) -> list[Any]:
    """The scale of a weight, if any, itself, its gradient, laid out as it is, and its state, made where it lacks."""
    own, grad = weight.detach(), weight.grad
    assert grad is not None
    own = state.get("master_param", own)  # if masters
    for name in names:
        if state.get(name) is None:
            state[name] = torch.zeros_like(own, memory_format=torch.preserve_format)
    if grad.stride() != own.stride():
        grad = torch.empty_like(weight).copy_(grad)
    tensors = [own, grad, *(state[name] for name in names)]
    tensors = [local(tensor) for tensor in tensors]  # if sharded
    return [scales.get(weight), *tensors]
