"""QuacK's one rule, straight from a layout, in fp64 and one number at a time: what programs are compared with.

A *unit* is one head's rows of a block, with their entries of its bias. In each term of a head's logits units are
multiplied, and

    factor(unit) = min over the terms that contain it of  1 / product of the norms of the others in that term,

where a unit that stands twice in a term is among its own others. A row in several units takes the smallest of their
scales, and one in none has the scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from quack_fx.layout import QKLayout, Ranges, WeightBlock

Weights = Mapping[str, Tensor]
Norm = Callable[[Tensor], float]


class Unit(NamedTuple):
    """One head's rows of a block."""

    param: str
    axis: int
    bias: str | None
    rows: tuple[int, ...]

    @classmethod
    def of(cls, block: WeightBlock, ranges: Ranges) -> Unit:
        return cls(block.param, block.axis, block.bias, tuple(sorted({r for a, b in ranges for r in range(a, b)})))

    def matrix(self, weights: Weights) -> Tensor:
        """Its numbers, [rows, inputs], the bias as one input more."""
        columns = [weights[self.param].detach().double().movedim(self.axis, 0)[list(self.rows)].flatten(1)]
        if self.bias is not None:
            columns.append(weights[self.bias].detach().double()[list(self.rows), None])
        return torch.cat(columns, 1)


def frobenius(matrix: Tensor) -> float:
    return math.hypot(*matrix.flatten().tolist())


def spectral(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix)[0])


def products(layout: QKLayout) -> Iterator[list[Unit]]:
    """The units that are multiplied, for each term of each query head."""
    for site in layout.sites:
        if not site.qk_norm:
            for head in range(site.query_heads):
                for term in site.head_terms(head):
                    yield [Unit.of(block, ranges) for block, ranges in term]


def units(layout: QKLayout) -> list[Unit]:
    """All units, each once."""
    return list(dict.fromkeys(unit for product in products(layout) for unit in product))


def factors(layout: QKLayout, norms: Mapping[Unit, float]) -> dict[Unit, float]:
    """The factor of every unit, from the norms of all."""
    found: dict[Unit, float] = {}
    for product in products(layout):
        for place, unit in enumerate(product):
            others = math.prod(norms[other] for i, other in enumerate(product) if i != place)
            found[unit] = min(found.get(unit, math.inf), 1 / others)
    return found


def scales(
    layout: QKLayout, first: Weights, now: Weights, tau: float, norm: Norm = frobenius
) -> dict[str, dict[int, float]]:
    """The scale of every row that a unit has, by the name of its weight or bias: tau * factor / initial factor."""
    found: dict[str, dict[int, float]] = {}
    start, end = (factors(layout, {u: norm(u.matrix(w)) for u in units(layout)}) for w in (first, now))
    for unit, factor in end.items():
        for name in filter(None, (unit.param, unit.bias)):
            own = found.setdefault(name, {})
            for row in unit.rows:
                own[row] = min(own.get(row, math.inf), tau * factor / start[unit])
    return found


class AdamW:
    """AdamW (Loshchilov & Hutter, 2019, Alg. 2) with QuacK, in fp64.

    Arguments:
        layout: The pairs.
        weights: All weights, as they are at first.
        tau: As in a step.
    """

    def __init__(self, layout: QKLayout, weights: Weights, tau: float) -> None:
        self.layout, self.tau, self.steps = layout, tau, 0
        self.weights = {name: w.detach().double().clone() for name, w in weights.items()}
        self.first = {name: w.clone() for name, w in self.weights.items()}
        self.mean = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.square = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.axes = {block.param: block.axis for site in layout.sites for _, block in site.blocks()}

    def step(self, grads: Weights, lr: Mapping[str, float], decay: Mapping[str, float]) -> None:
        """One step with a learning rate and a decay for each weight."""
        by_row = scales(self.layout, self.first, self.weights, self.tau)
        self.steps += 1
        for name, w in self.weights.items():
            g = grads[name].double()
            self.mean[name] = 0.9 * self.mean[name] + 0.1 * g
            self.square[name] = 0.999 * self.square[name] + 0.001 * g * g
            mean, square = self.mean[name] / (1 - 0.9**self.steps), self.square[name] / (1 - 0.999**self.steps)
            change = lr[name] * (mean / (square.sqrt() + 1e-8) + decay[name] * w)
            rows = change.movedim(self.axes.get(name, 0), 0)
            for row, scale in by_row.get(name, {}).items():
                rows[row] *= scale
            self.weights[name] = w - change
