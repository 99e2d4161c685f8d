"""Which axis of some attention logits counts the heads, proved by gradients.

In: a tensor with the logits (or the queries) of all heads, and the weight rows of every head. Out: `HeadAxes`, how to
bring the heads to the front; or None, where the tensor is another one than the logits of these heads.

Shapes do not tell: a batch may be as large as the heads are many, and heads may lie in one axis with it. So each way to
read the axes is tried: a gradient is sent into the logits of half of the heads, and the rows of the other half must
receive exactly zero. The halves are those of each bit in the number of a head. All of this is done once for each call
in a forward pass, and waits for the device.
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
"""Logits that a mask took out are below."""


class Undecided(Exception):
    """Nothing shows yet whether some tensor is the logits of some heads."""


@dataclass(frozen=True)
class HeadRows:
    """A weight, and the query head whose logits each of its rows makes alone.

    Attributes:
        weight: The weight, or a bias.
        axis: Axis that counts its rows.
        heads: The heads, [rows]; negative where a row is not of one head alone.
    """

    weight: Tensor
    axis: int
    heads: Tensor


@dataclass(frozen=True)
class HeadAxes:
    """Where the heads are counted: in one axis, or in two, key heads and the query heads of each.

    Attributes:
        places: The axes, that of the slower count first: axis, whether the heads are all of it or the outer or inner
            part of its numbers, and how many.
    """

    places: tuple[tuple[int, _Part, int], ...]

    def fit(self, shape: Sequence[int]) -> bool:
        """Whether a shape has room for the heads."""
        for axis, part, size in self.places:
            if axis >= len(shape) or shape[axis] % size or (part == "whole") != (shape[axis] == size):
                return False
        return True

    def first(self, tensor: Tensor) -> Tensor:
        """A tensor as [heads, rest]."""
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
        """A number for each head as a tensor of some shape, the way back from `first`."""
        cells = self.first(torch.arange(prod(shape), device=by_head.device).view(*shape))
        found = by_head.new_empty(cells.numel())
        found[cells] = by_head.unsqueeze(-1).expand_as(cells)
        return found.view(*shape)


def find_axes(source: Tensor, axis: int, heads: int, key_heads: int, rows: Sequence[HeadRows]) -> HeadAxes | None:
    """How the heads are counted in a tensor.

    Arguments:
        source: Logits, or queries, of a forward pass that autograd follows.
        axis: Axis of `source` that is left out of the answer: it counts keys, or features.
        heads: Number of query heads.
        key_heads: Number of key heads.
        rows: The rows of each head in the weights that are trained.

    Returns:
        The axes of `source` without `axis`; None where it does not depend on the rows head by head.

    Raises:
        Undecided: All gradients are zero, as they are behind weights of zero.
        RuntimeError: There are no gradients to be had.
    """
    shape = [n for i, n in enumerate(source.shape) if i != axis]

    def behind(cotangent: Tensor) -> list[Tensor]:
        """The heads of the rows that receive a gradient, for each weight."""
        whole = cotangent.unsqueeze(axis).expand_as(source)
        grads = torch.autograd.grad(source, [own.weight for own in rows], whole, retain_graph=True, allow_unused=True)
        found = []
        for own, grad in zip(rows, grads, strict=True):
            if grad is not None:
                seen = (grad.movedim(own.axis, 0).unsqueeze(-1).flatten(1) != 0).any(1)
                found.append(own.heads[seen & (own.heads >= 0)])
        return found

    def apart(half: Tensor, axes: HeadAxes) -> bool:
        """Whether no row of a head outside of a half receives a gradient."""
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
    """Whether the first or the last of the logits is no product of queries and keys, as an attention sink is not."""
    for edge in (0, logits.shape[axis] - 1):
        column = logits.select(axis, edge)
        grads = torch.autograd.grad(column.sum(), [own.weight for own in rows], retain_graph=True, allow_unused=True)
        if not any(grad is not None and bool(grad.any()) for grad in grads) and bool(column.amax() > _SINK):
            return True
    return False


def _halves(numbers: Tensor) -> list[Tensor]:
    """The heads whose number has a bit, and those whose number has not, for every bit; [heads] each."""
    bits = [(numbers >> bit) % 2 == 1 for bit in range((len(numbers) - 1).bit_length())]
    return [half for has in bits for half in (has, ~has)]


def _ways(shape: Sequence[int], heads: int, key_heads: int) -> Iterator[HeadAxes]:
    """Ways to count the heads in a shape, the usual one first: the axis before that of the queries."""
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
