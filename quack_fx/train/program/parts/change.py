"""How weights are changed, whatever the optimizer: those that look alike share compiled code, and few calls."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quack_fx.train.program.parts.sharded import local, norm_of

Stepped = tuple[Tensor, tuple[Tensor, ...]]
Rule = Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]], Stepped]
Scales = Mapping[Tensor, Tensor]
SMALL = 16384  # numbers


class Job(NamedTuple):
    """A weight to change, its gradient, laid out in memory as it is, and its state."""

    weight: Tensor
    grad: Tensor
    state: dict[str, Any]


def change(
    rule: Rule,
    numbers: Tensor,
    scales: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    *states: Sequence[Tensor],
) -> None:
    """Change some weights and their state in place, w - scale * step; this is what is compiled.

    Arguments:
        rule: The arithmetic of the optimizer: gives the step and the new state.
        numbers: What clips the gradients, whether the step counts, and the numbers of the rule, for each weight.
        scales: [rows, 1, ...] for each weight.
        weights, grads: [rows, ...] for each weight.
        states: The same for each tensor of the state.
    """
    for i, (scale, weight, grad, *state) in enumerate(zip(scales, weights, grads, *states, strict=True)):
        clip, finite, *own = numbers[i].unbind()
        w, g, *s = (tensor.to(scale.dtype) for tensor in (weight, grad, *state))
        step, new = rule(w, g * clip, s, own)
        for old, value in zip((weight, *state), (w - scale * step, *new), strict=True):
            old.copy_(torch.where(finite > 0, value.to(old.dtype), old))


def change_alike(
    rule: Rule,
    numbers: Tensor,
    jobs: Sequence[Job],
    names: Sequence[str],
    scales: Scales,
    compiled: Callable[..., None],
) -> None:
    """Do the jobs: small weights are stacked, for they are not worth a call; the others are changed two by two.

    `names` are those of the state that the rule knows; see `change` for the rest.
    """
    alike: dict[Any, list[tuple[Tensor, ...]]] = {}
    for (weight, grad, state), own in zip(jobs, numbers.unbind(), strict=True):
        tensors = [weight.detach(), grad, *(state[name] for name in names)]
        tensors[0] = state.get("master_param", tensors[0])  # if masters
        tensors = [local(tensor) for tensor in tensors]  # if sharded
        first = tensors[0]
        exact = torch.float64 if first.dtype == torch.float64 else torch.float32
        scale = scales.get(weight)
        scale = first.new_ones(first.shape[:1] + (1,) * (first.dim() - 1), dtype=exact) if scale is None else scale
        key = first.shape, first.stride(), first.dtype, grad.dtype, first.device, scale.shape
        alike.setdefault(key, []).append((own, scale, *tensors))
    for some in alike.values():
        rows, *columns = (list(column) for column in zip(*some, strict=True))
        weight, table = columns[1][0], torch.stack(rows).to(columns[1][0].device, columns[0][0].dtype)
        if weight.numel() <= SMALL:
            stacks = [torch.stack(column) for column in columns]
            change(rule, table.T.reshape(1, -1, len(rows), *[1] * weight.dim()), *([stack] for stack in stacks))
            for column, stack in zip([columns[1], *columns[3:]], [stacks[1], *stacks[3:]], strict=True):
                torch._foreach_copy_(column, list(stack.unbind()))
            continue
        twos = len(some) // 2 * 2
        for start, stop in pairwise([*range(0, twos, 2), *range(twos, len(some) + 1)]):
            compiled(rule, table[start:stop], *(column[start:stop] for column in columns))


def jobs_of(group: Mapping[str, Any], state: Mapping[Tensor, dict[str, Any]], names: Sequence[str]) -> list[Job]:
    """The weights of a group that have a gradient; what their state lacks is made."""
    jobs = []
    for weight in group["params"]:
        if (grad := weight.grad) is not None:
            own = state[weight]
            like = own.get("master_param", weight)  # if masters
            for name in names:
                if own.get(name) is None:
                    own[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
                    own[name] = torch.zeros_like(like, memory_format=torch.preserve_format)  # if masters
            if grad.stride() != weight.stride():
                grad = torch.empty_like(weight).copy_(grad)
            jobs.append(Job(weight, grad, own))
    return jobs


class Look(NamedTuple):
    """What was found about all gradients of a step, without waiting for the device.

    Attributes:
        device: Where.
        clip: What to multiply them with.
        finite: 1 if they are finite or nobody asked; 0 if not, and then the step changes nothing.
    """

    device: torch.device
    clip: float | Tensor = 1.0
    finite: float | Tensor = 1.0

    def numbers(self, weights: Collection[Any], *values: float | Tensor) -> Tensor:
        """Both and some other numbers for each weight, [weights, numbers], in double."""
        every = self.clip, self.finite, *values
        plain = torch.tensor([0.0 if isinstance(v, Tensor) else v for v in every], dtype=torch.float64, device="cpu")
        each = zip(every, plain.to(self.device, non_blocking=True).unbind(), strict=True)
        columns = [value.to(own, non_blocking=True) if isinstance(value, Tensor) else own for value, own in each]
        return torch.stack([column.expand(len(weights)) for column in columns], 1)


def look_at(grads: list[Tensor], device: torch.device, clip_grad_norm: float | None, skip_nonfinite: bool) -> Look:
    """Look at all gradients at once: their total norm tells both."""
    if not grads or (clip_grad_norm is None and not skip_nonfinite):
        return Look(device)
    total: Callable[[list[Tensor]], Tensor] = torch.nn.utils.get_total_norm
    total = norm_of  # if sharded
    norm = total(grads)
    clip = 1.0 if clip_grad_norm is None else (clip_grad_norm / (norm + 1e-6)).clamp(max=1.0).float()
    return Look(device, clip, norm.isfinite().float() if skip_nonfinite else 1.0)
