"""Heads in a tensor of logits, and seeds that stay inside one.

In: a softmax and one of its logit products. Out: for every plausible reading of "axis of heads" the head of each logit;
which operand holds the keys; and for a head, a seed on each operand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from quack_fx.verify.watch import Product, Softmax


@dataclass
class Operand:
    """One side of a logit product: where its gradient is seeded, its value, and its contracted axis."""

    edge: GradientEdge | None
    value: Tensor
    axis: int
    position: int


def head_labels(softmax: Softmax, heads: int) -> Iterator[Tensor]:
    """Readings of the logits' shape: int tensors that broadcast to it and name the head of each logit.

    The usual place of the head axis comes first; then any other axis of that size, a pair of axes (key heads, and
    query heads that share one), and an axis that folds heads and batch.
    """
    ndim = len(softmax.shape)
    free = [a for a in range(ndim) if a != softmax.dim]
    free.sort(key=lambda a: (a != ndim - 3, a))

    def along(axis: int, labels: Tensor) -> Tensor:
        return labels.view([-1 if a == axis else 1 for a in range(ndim)])

    if heads == 1:
        yield torch.zeros([1] * ndim, dtype=torch.long)
        return
    for axis in free:
        if softmax.shape[axis] == heads:
            yield along(axis, torch.arange(heads))
    for axis in range(ndim - 1):
        outer, inner = softmax.shape[axis : axis + 2]
        if softmax.dim not in (axis, axis + 1) and outer * inner == heads and min(outer, inner) > 1:
            yield along(axis, torch.arange(outer)) * inner + along(axis + 1, torch.arange(inner))
    for axis in free:
        size = softmax.shape[axis]
        if size > heads and size % heads == 0:
            yield along(axis, torch.arange(size) % heads)
            yield along(axis, torch.arange(size) // (size // heads))


def operands(product: Product, softmax: Softmax) -> tuple[Operand, Operand] | None:
    """Query and key operand of a logit product; None when that cannot be told."""
    left, right = product.factors
    if any(product.args[i].ndim != 3 for i in (left, right)) or product.node is None:
        return None
    query = _query_position(product, softmax)
    if query is None:
        return None

    def operand(position: int) -> Operand:
        axis = -1 if position == left else -2
        return Operand(product.edges[position], product.args[position], axis, position)

    return operand(query), operand(right if query == left else left)


def _query_position(product: Product, softmax: Softmax) -> int | None:
    """Position of the query operand, which the softmax tells: it runs over the keys of one query.

    So a gradient on all logits of two keys touches two entries of the key operand's free axis and many of the query
    operand's; one on all logits of a query touches one of the query operand's (two where windows overlap) and many of
    the key operand's. A single query has a free axis of one entry, which says it as well.
    """
    left, right = product.factors
    free = {left: product.args[left].shape[-2], right: product.args[right].shape[-1]}
    keys = softmax.shape[softmax.dim]
    if 1 in free.values():
        query = min(free, key=lambda position: free[position])
        return query if max(free.values()) in (keys, keys - 1) and keys > 1 else None  # one more: a sink

    def touched(*indices: tuple[int, int, float]) -> dict[int, int]:
        """Entries of each operand's free axis that a gradient on slices (axis, index, value) of the logits touches."""
        seed = torch.zeros(softmax.shape, dtype=softmax.dtype, device=softmax.device)
        for axis, index, value in indices:
            seed.select(axis, index).fill_(value)
        used = product_gradient(softmax, product, seed).any(0)
        return {left: int(used.any(1).sum()), right: int(used.any(0).sum())}

    for index in range(1, keys):
        # One key up and another down: some models subtract the largest logit first, which such a seed does not see.
        count = touched((softmax.dim, 0, 1.0), (softmax.dim, index, -1.0))
        if min(count.values()) <= 2 < max(count.values()):
            return max(count, key=lambda position: count[position])
    for axis in range(len(softmax.shape)):
        count = touched((axis, softmax.shape[axis] - 1, 1.0))
        if axis != softmax.dim and min(count.values()) <= 2 < max(count.values()):
            return min(count, key=lambda position: count[position])
    return None


def product_gradient(softmax: Softmax, product: Product, seed: Tensor) -> Tensor:
    """Gradient at a logit product's result, given one at the softmax's input."""
    assert product.node is not None
    (gradient,) = torch.autograd.grad([softmax.logits], [GradientEdge(product.node, 0)], [seed], retain_graph=True)
    return gradient


def head_seed(softmax: Softmax, product: Product, operand: Operand, labels: Tensor, head: int, noise: Tensor) -> Tensor:
    """Gradient on an operand that reaches the features of one head and no others.

    Arguments:
        softmax: The softmax.
        product: The logit product.
        operand: The side to seed.
        labels: Head of each logit, from `head_labels`.
        head: The head.
        noise: Random numbers in the operand's shape.

    Returns:
        The seed. It is random, so that no rows cancel, and at each position orthogonal to the operand itself: a norm's
        statistic, which would spread the gradient over all features it covers, then receives none.
    """
    mask = (labels.to(softmax.device) == head).to(softmax.dtype).expand(softmax.shape)
    touched = product.replay(product_gradient(softmax, product, mask))[operand.position]
    # A feature that a zero of the other operand hides belongs to the head as well: decide by position.
    here = (touched != 0).any(operand.axis, keepdim=True)
    return orthogonal(noise * here, operand.value, operand.axis)


def orthogonal(seed: Tensor, value: Tensor, axis: int) -> Tensor:
    """Seed without its part along the vectors that `value` has on an axis."""
    if value.shape[axis] < 2:
        return seed
    length = value.square().sum(axis, keepdim=True).clamp_min(torch.finfo(value.dtype).tiny)
    return seed - (seed * value).sum(axis, keepdim=True) / length * value
