"""Finds the head axis of attention logits and proves it by gradients.

In: a tensor with the logits (or the queries) of all heads, and the weight rows of every head. Out: `HeadAxes`, which
moves the heads to the front; or None if the tensor does not hold the logits of these heads.

Shapes are ambiguous: the batch size may equal the number of heads, and both may share one axis. So each candidate is
tested: backpropagate through the logits of half of the heads; the rows of the other half must receive a gradient of
exactly zero. There are two halves for each bit of the head number. This is done once for each call in a forward pass,
and waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from math import prod
from typing import Literal

import torch
from torch import Tensor

_Part = Literal["whole", "outer", "inner"]

_SINK = -1000.0
"""Masked logits are below this value."""


class Undecided(Exception):
    """It cannot be decided yet whether a tensor holds the logits of these heads."""


@dataclass(frozen=True)
class HeadRows:
    """A weight, and the query head that each of its rows belongs to.

    Attributes:
        weight: The weight, or a bias.
        axis: Axis of its rows.
        heads: The head of each row, [rows]; negative for a row that does not belong to exactly one head.
    """

    weight: Tensor
    axis: int
    heads: Tensor


@dataclass(frozen=True)
class HeadAxes:
    """The axes of the heads: one axis, or two (key heads, and the query heads of each).

    Attributes:
        places: The axes, slowest first. For each: the axis, whether the heads are the whole axis or its outer or inner
            part, and their number.
    """

    places: tuple[tuple[int, _Part, int], ...]

    def fit(self, shape: Sequence[int]) -> bool:
        """Whether a shape is compatible with these axes."""
        for axis, part, size in self.places:
            if axis >= len(shape) or shape[axis] % size or (part == "whole") != (shape[axis] == size):
                return False
        return True

    def first(self, tensor: Tensor) -> Tensor:
        """A tensor reshaped to [heads, rest]."""
        parts = {axis: (part, size) for axis, part, size in self.places}
        shape, front = list[int](), dict[int, int]()
        for axis, n in enumerate(tensor.shape):
            part, size = parts.get(axis, ("whole", n))
            front[axis] = len(shape) + (part == "inner")
            shape += {"whole": [n], "outer": [size, n // size], "inner": [n // size, size]}[part]
        order = [front[axis] for axis, *_ in self.places]
        order += [i for i in range(len(shape)) if i not in order]
        return tensor.reshape(shape).permute(order).reshape(prod(size for *_, size in self.places), -1)

    def spread(self, by_head: Tensor, shape: Sequence[int]) -> Tensor:
        """Broadcast one number per head to a tensor of the given shape; the inverse of `first`."""
        cells = self.first(torch.arange(prod(shape), device=by_head.device).view(*shape))
        found = by_head.new_empty(cells.numel())
        found[cells] = by_head.unsqueeze(-1).expand_as(cells)
        return found.view(*shape)


def find_axes(source: Tensor, axis: int, heads: int, key_heads: int, rows: Sequence[HeadRows]) -> HeadAxes | None:
    """Find the head axes of a tensor.

    Arguments:
        source: Logits or queries, from a forward pass with gradients.
        axis: Axis of `source` that the result leaves out: keys or features.
        heads: Number of query heads.
        key_heads: Number of key heads.
        rows: The rows of each head in the trained weights.

    Returns:
        The head axes of `source` without `axis`; None if `source` does not depend on the rows head by head.

    Raises:
        Undecided: All gradients are zero, as with weights that are zero.
        RuntimeError: Gradients cannot be computed.
    """
    shape = [n for i, n in enumerate(source.shape) if i != axis]

    def behind(cotangent: Tensor) -> list[Tensor]:
        """For each weight, the heads of the rows that receive a gradient."""
        whole = cotangent.unsqueeze(axis).expand_as(source)
        grads = torch.autograd.grad(source, [own.weight for own in rows], whole, retain_graph=True, allow_unused=True)
        found = []
        for own, grad in zip(rows, grads, strict=True):
            if grad is not None:
                seen = (grad.movedim(own.axis, 0).unsqueeze(-1).flatten(1) != 0).any(1)
                found.append(own.heads[seen & (own.heads >= 0)])
        return found

    def apart(half: Tensor, axes: HeadAxes) -> bool:
        """Whether only rows of heads in the half receive a gradient."""
        found = behind(axes.spread(half.to(source.dtype), shape))
        return all(bool(half[numbers].all()) for numbers in found)

    everything = behind(source.new_ones(shape)) if source.requires_grad else []
    if not everything:
        return None
    if not any(len(numbers) for numbers in everything):
        raise Undecided
    halves = _halves(torch.arange(heads, device=source.device))
    return next((axes for axes in _ways(shape, heads, key_heads) if all(apart(half, axes) for half in halves)), None)


def has_sink(logits: Tensor, axis: int, rows: Sequence[HeadRows]) -> bool:
    """Whether the first or last column of the logits is an attention sink, not a product of queries and keys."""
    for edge in (0, logits.shape[axis] - 1):
        column = logits.select(axis, edge)
        grads = torch.autograd.grad(column.sum(), [own.weight for own in rows], retain_graph=True, allow_unused=True)
        if not any(grad is not None and bool(grad.any()) for grad in grads) and bool(column.amax() > _SINK):
            return True
    return False


def _halves(numbers: Tensor) -> list[Tensor]:
    """For every bit, masks of the heads whose number has the bit set and of those with it unset; [heads] each."""
    bits = [(numbers >> bit) % 2 == 1 for bit in range((len(numbers) - 1).bit_length())]
    return [half for has in bits for half in (has, ~has)]


def _ways(shape: Sequence[int], heads: int, key_heads: int) -> Iterator[HeadAxes]:
    """Candidate head axes for a shape, the most common first: the axis before that of the queries."""
    if heads == 1:
        yield HeadAxes(())
        return
    order = sorted(range(len(shape)), key=lambda axis: (axis != len(shape) - 2, axis))
    parts: tuple[_Part, ...] = ("whole", "inner", "outer")
    ways = [HeadAxes(((axis, part, heads),)) for part in parts for axis in order]
    if 1 < key_heads < heads and heads % key_heads == 0:
        for sizes in ((key_heads, heads // key_heads), (heads // key_heads, key_heads)):
            for pair in permutations(order, 2):
                for one in parts:
                    ways += [HeadAxes(((pair[0], one, sizes[0]), (pair[1], other, sizes[1]))) for other in parts]
    yield from (way for way in ways if way.fit(shape))
