"""Changes of all tensors in the inputs of a call: other sizes, another rank."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from quack_fx.targets.inputs.values import TOKENS, Inputs, has_fields, is_array

Change = Callable[[Tensor], Tensor | None]
"""Gives the new tensor for an old one; None to keep it."""

LARGEST = 1 << 24
"""The most elements of a tensor that is tried."""


def resize(old: int, new: int, last: bool = False) -> Change:
    """Another size for all axes of one size, or for the last axis only."""

    def change(x: Tensor) -> Tensor | None:
        start = x.dim() - 1 if last else 0
        shape = [new if size == old and axis >= start else size for axis, size in enumerate(x.shape)]
        return refilled(x, tuple(shape))

    return change if new > 0 else lambda x: None


def reshape(given: tuple[int, ...], wanted: tuple[int, ...]) -> Change:
    """Another shape for tensors of one shape."""
    return lambda x: refilled(x, wanted) if tuple(x.shape) == given else None


def with_rank(rank: int, wanted: int) -> Change:
    """Another rank for tensors of one rank: axes of tokens are added or dropped after that of the batch."""

    def change(x: Tensor) -> Tensor | None:
        if x.dim() != rank:
            return None
        shape = list(x.shape)
        if wanted == 4 and rank == 3 and x.is_floating_point():
            return refilled(x, (shape[0], 3, 32, 32))
        shape[1:1] = [TOKENS] * (wanted - rank)
        return refilled(x, tuple(shape[:1] + shape[1 + max(rank - wanted, 0) :] if wanted > 0 else []))

    return change


def only(number: int, change: Change) -> Change:
    """A change of only one of the tensors that it would change, by index."""
    changed: list[Tensor] = []

    def one(x: Tensor) -> Tensor | None:
        made = change(x)
        changed.extend([x] if made is not None else [])
        return made if made is not None and len(changed) == number + 1 else None

    return one


def refilled(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of another shape with the same elements, repeated; the same tensor where that would be too large."""
    if tuple(x.shape) == shape or not x.numel() or math.prod(shape) > LARGEST:
        return x
    if x.dtype == torch.bool and len(shape) == x.dim():
        # Repeat along each axis, so that a mask still selects as many entries in each sequence.
        for axis, size in enumerate(shape):
            x = x.index_select(axis, torch.arange(size) % x.shape[axis])
        return x
    return x.flatten()[torch.arange(math.prod(shape)) % x.numel()].view(shape)


def changed(inputs: Inputs, change: Change) -> Inputs:
    """Inputs with every tensor in them changed."""
    return inputs.map(lambda value: each_in(value, change))


def each_in(value: Any, change: Change) -> Any:
    """A value with every tensor in it changed."""
    if isinstance(value, Tensor):
        changed = change(value)
        return value if changed is None else changed
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**{name: each_in(part, change) for name, part in vars(value).items()})
    if has_fields(value):
        made = copy.copy(value)  # its class, which may compute other fields, is not called
        for field in dataclasses.fields(value):
            object.__setattr__(made, field.name, each_in(getattr(value, field.name), change))
        return made
    if isinstance(value, Mapping):
        return {name: each_in(part, change) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(each_in(part, change) for part in value)
    if is_array(value):
        return each_in(torch.from_numpy(value), change).numpy()
    return value


def tensors(inputs: Inputs) -> list[Tensor]:
    """All tensors in the arguments, in the order of changes."""
    found: list[Tensor] = []
    for value in (*inputs.args, *inputs.kwargs.values()):
        each_in(value, found.append)
    return found


def sizes(inputs: Inputs) -> set[int]:
    """All sizes of all tensors."""
    return {size for x in tensors(inputs) for size in x.shape}
