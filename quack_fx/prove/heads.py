"""The heads in a tensor of logits, and which operand of a logit product holds the keys.

In: the logits of a softmax, replayed with the operands of its products as leaves (`Upper`). Out: candidate head labels
of the logits; the positions of each operand that the logits of a head read; the query and key operand of a product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quack_fx.layout import Side
from quack_fx.prove.graph import Graph
from quack_fx.prove.ops import Product, Softmax
from quack_fx.prove.replay import Replay
from quack_fx.prove.tape import Op, Value


@dataclass(frozen=True, eq=False, repr=False)
class Operand:
    """One operand of a logit product: its value, the op that reads it, its contracted axis counted from the end."""

    value: Value
    reader: Op
    axis: int

    @property
    def width(self) -> int:
        """Number of features that the product contracts."""
        return self.value.tensor.shape[self.axis]


class Upper:
    """Replay of the slice from the operands of logit products, with random values, to the softmax."""

    def __init__(self, graph: Graph, softmax: Softmax, products: Sequence[Product], generator: torch.Generator) -> None:
        self.softmax = softmax
        mixing = graph.mixing(softmax)
        first = min((p.op.index for p in mixing), default=None)
        passed = [op.out for op in graph.between(softmax) if first is not None and op.index < first]
        outs = [p.op.out for p in products]
        size = outs[0].tensor.numel()
        self.cuts = [softmax.logits] if not mixing else [v for v in passed + outs if v.tensor.numel() == size]
        """Tensors in which heads are separate: the softmax's input, or those before heads are mixed."""
        self._replay = Replay(
            graph.tape,
            [(softmax.logits, softmax.op), *((v, None) for v in self.cuts if v is not softmax.logits)],
            stops=graph.barriers - {p.op for p in (*products, *mixing)},
            # Random: zeros or equal values in one operand would hide what the logits read of the other.
            leaves={
                v: torch.randn(v.tensor.shape, generator=generator).to(v.tensor) for p in products for v in p.factors
            },
            statistics=graph.statistics,
        )

    def touched(self, cut: Value, seed: Tensor, values: Sequence[Value]) -> list[Tensor]:
        """Mask of the elements of some operands that receive a gradient from a seed on a tensor of logits."""
        arrived = self._replay.gradients_at(cut, seed.to(cut.tensor), values)
        return [arrived[v] != 0 if v in arrived else torch.zeros_like(v.tensor, dtype=torch.bool) for v in values]

    def positions(self, cut: Value, labels: Tensor, head: int, operands: Sequence[Operand]) -> list[Tensor]:
        """For each operand, mask of the positions that the logits of a head read; the contracted axis has size 1."""
        mask = (labels == head).to(torch.float32).expand(cut.tensor.shape)
        if cut is self.softmax.logits:
            mask = mask * self._weights_of_no_shift()
        touched = self.touched(cut, mask, [o.value for o in operands])
        return [t.any(o.axis, keepdim=True) for t, o in zip(touched, operands, strict=True)]

    def shifts_only(self, product: Product) -> bool:
        """Whether a product only shifts all logits of a query equally, like one in the maximum over earlier keys."""
        seed = self._weights_of_no_shift().expand(self.softmax.shape)
        return not any(t.any() for t in self.touched(self.softmax.logits, seed, product.factors))

    def _weights_of_no_shift(self) -> Tensor:
        """Small integers along the softmax's axis that sum to zero.

        As a seed, they give no gradient to a value subtracted from all logits equally, such as a maximum over heads.
        """
        size, dim = self.softmax.shape[self.softmax.dim], self.softmax.dim
        weights = 1.0 - 2.0 * (torch.arange(size) % 2)
        if size > 1 and size % 2:
            weights[-1], weights[-2] = 1.0, -2.0
        return weights.view([-1 if axis == dim else 1 for axis in range(len(self.softmax.shape))])

    def operands(self, product: Product) -> dict[Side, Operand] | None:
        """The query and key operand of a product; None if they cannot be told apart.

        The softmax runs over the keys of one query. So a gradient on all logits of two keys reaches few positions of
        the key operand and every query; one on all logits of one query reaches few positions of the query operand.
        """
        if product.axes is None:
            return None
        left, right = (Operand(v, product.reader, a) for v, a in zip(product.factors, product.axes, strict=True))
        groups = self.softmax.groups
        few = self._touched_least([left, right]) if groups is None else self._changes_within(groups, [left, right])
        if few is None:
            return None
        key = (left, right)[few]
        return {"query": right if key is left else left, "key": key}

    def _changes_within(self, groups: Tensor, operands: Sequence[Operand]) -> int | None:
        """Index of the only operand whose vectors differ within a group, which holds the keys; else None."""
        changes = []
        for operand in operands:
            vectors = operand.value.tensor.movedim(self.softmax.dim, 0)
            if len(vectors) % len(groups):
                return None
            vectors = vectors.reshape(len(groups), -1)  # heads may be folded into this axis
            first = {int(group): i for i, group in reversed(list(enumerate(groups.tolist())))}
            like = vectors[torch.tensor([first[group] for group in groups.tolist()], device=vectors.device)]
            changes.append(not torch.equal(vectors, like))
        return changes.index(True) if sum(changes) == 1 else None

    def _touched_least(self, operands: Sequence[Operand]) -> int | None:
        """Index of the operand that holds the keys; None if undecided."""
        shape, dim = self.softmax.shape, self.softmax.dim

        def read(seed: Tensor) -> list[Tensor]:
            """Positions of each operand that a gradient on the logits reaches."""
            touched = self.touched(self.softmax.logits, seed, [o.value for o in operands])
            return [t.any(o.axis) for t, o in zip(touched, operands, strict=True)]

        # Some positions are never read: a table of relative positions has more of them than there are tokens.
        ever = [float(t.sum()) for t in read(torch.rand(shape, generator=torch.Generator().manual_seed(0)))]

        def fraction(*slices: tuple[int, int, float]) -> list[float]:
            """Fraction of each operand's positions that a seed on (axis, index, value) slices of the logits reaches."""
            seed = torch.zeros(shape)
            for axis, index, value in slices:
                seed.select(axis, index).fill_(value)
            return [float(t.sum()) / max(1.0, e) for t, e in zip(read(seed), ever, strict=True)]

        last = shape[dim] - 1
        # +1 on one key and -1 on another: gradients through a maximum that the model subtracts first cancel.
        seeds = [((dim, i, 1.0), (dim, j, -1.0)) for i, j in [(0, last), *((i, i + 1) for i in range(min(last, 8)))]]
        few: list[tuple[tuple[int, int, float], ...]] = [((dim, i, 1.0),) for i in range(min(last + 1, 3))]
        for seed in [*seeds, *few] if last else []:
            fractions = fraction(*seed)
            # If the softmax runs over all pairs of queries and keys, both fractions are small, which decides nothing.
            if 0 < 2 * min(fractions) <= max(fractions) >= 0.5:
                return fractions.index(min(fractions))
        for axis in range(1, len(shape)):
            fractions = fraction((axis, shape[axis] - 1, 1.0)) if axis != dim else [0.0]
            if 0 < 2 * min(fractions) <= max(fractions):
                return fractions.index(max(fractions))
        return None


def head_labels(cut: Value, heads: int, without: int | None) -> Iterator[Tensor]:
    """Candidate divisions of the logits into heads: int tensors of head indices that broadcast to the logits.

    The usual head axis comes first; then other axes of that size, pairs of axes (key heads, and the query heads of
    each), and axes that fold heads and batch. The softmax's axis does not count heads: `without` is it, if it is known.
    """
    shape = cut.tensor.shape
    ndim = len(shape)
    free = [a for a in range(ndim) if a != without]
    free.sort(key=lambda a: (a != ndim - 3, a))

    def along(axis: int, labels: Tensor) -> Tensor:
        return labels.view([-1 if a == axis else 1 for a in range(ndim)])

    if heads == 1:
        yield torch.zeros([1] * ndim, dtype=torch.long)
        return
    for axis in free:
        if shape[axis] == heads:
            yield along(axis, torch.arange(heads))
    for one, two in itertools.combinations(free, 2):
        if shape[one] * shape[two] == heads and min(shape[one], shape[two]) > 1:
            for outer, inner in ((min(one, two), max(one, two)), (max(one, two), min(one, two))):
                yield along(outer, torch.arange(shape[outer])) * shape[inner] + along(inner, torch.arange(shape[inner]))
    for axis in free:
        size = shape[axis]
        if size > heads and size % heads == 0:
            yield along(axis, torch.arange(size) % heads)
            yield along(axis, torch.arange(size) // (size // heads))
