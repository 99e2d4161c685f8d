"""USER: parameters cut into pieces in which every head is one long row, so that one loop updates and measures it.

In: a `FactorPlan` and the parameters. Out: for each tensor its `Piece`s, which cover it once, and `Spans`, which take
the squared norms of their parts to the plan's units and the units' scales back.

A *run* is a stretch of rows that belong to the same units. Equal runs that follow each other at equal distances
(heads, mostly) are one piece; rows of no unit (values) join in where they make such runs. A run is cut into *spans* of
a few thousand numbers, and the piece viewed as [runs, spans, numbers of a span]: an update in that shape reads weight,
gradient and moments once, scales each span by its own number, and sums up the squares of what it writes. With one
number for a whole run, or the rows left as they are, the compiler writes two loops; with longer spans, it sums in a
slower way that keeps more digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from quack_fx.factors import FactorPlan

_LONGEST_PATTERN = 8
"""Runs after which a pattern has to begin anew: queries, keys, values, gates of one head in a fused weight."""

_NO_UNIT = -1
"""Stands among the units of a span for none: its scale is 1."""

_SPAN = 4096
"""Numbers that are summed up in one go, at most; above that, Inductor's loops for CPUs keep a stack of sums."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Runs of equal size and distance along one axis of a tensor.

    Attributes:
        axis: The axis.
        start: First row of the block that holds the piece, `count * stride` rows long.
        count: Number of runs.
        stride: Rows from one run to the next.
        skip: Rows before the run in its part of the block.
        size: Rows of a run.
        spans: Spans of a run.
        flat: Whether a run is one stretch of memory.
        first: Number of its first span in `Spans`; None where none of its rows is of a unit.
    """

    axis: int
    start: int
    count: int
    stride: int
    skip: int
    size: int
    spans: int
    flat: bool
    first: int | None

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor, a view: [runs, spans, the rest] where it is flat, else [..., runs, size, ...]."""
        block = tensor.narrow(self.axis, self.start, self.count * self.stride)
        if not self.flat:
            split: Tensor = block.unflatten(self.axis, (self.count, self.stride))
            return split.narrow(self.axis + 1, self.skip, self.size)
        rest = block[0].numel()
        runs: Tensor = block.view(self.count, self.stride * rest).narrow(1, self.skip * rest, self.size * rest)
        return runs.view(self.count, self.spans, -1)

    def numbers(self) -> range:
        """Numbers of its spans among those of all, if it has some."""
        return range(0) if self.first is None else range(self.first, self.first + self.count * self.spans)

    def anywhere(self) -> Piece:
        """An equal piece, the same for all that are equal but for where they lie."""
        return replace(self, start=0, skip=0, first=None)

    def along(self, scales: Tensor, piece: Tensor) -> Tensor:
        """A number for each of its spans, shaped to broadcast over the piece."""
        if self.flat:
            return scales.view(self.count, self.spans, 1)
        return scales.view([-1 if d == self.axis else 1 for d in range(piece.dim())])

    def squares(self, piece: Tensor) -> Tensor:
        """Squared norm of each span: [runs, spans] where it is flat, else [runs]; as they come, no copies."""
        if self.flat:
            return piece.square().sum(-1)
        return piece.square().sum([d for d in range(piece.dim()) if d != self.axis])


@dataclass(frozen=True, slots=True)
class Spans:
    """What ties spans to units.

    Attributes:
        of_unit: Spans of each unit, n_spans where it has fewer than another, int64 [n_units, most].
        owners: Units of each span, n_units likewise, -1 in a span of no unit, int64 [n_spans, most].
    """

    of_unit: Tensor
    owners: Tensor

    def norms(self, squares: Tensor) -> Tensor:
        """Norm of every unit from the squared norms of the spans: [n_spans] -> [n_units]."""
        return torch.cat([squares, squares.new_zeros(1)])[self.of_unit].sum(-1).sqrt()

    def spread(self, scales: Tensor) -> Tensor:
        """Scale of every span, the smallest of its units', 1 in a span of none: [n_units] -> [n_spans]."""
        return torch.cat([scales, scales.new_full((1,), torch.inf), scales.new_ones(1)])[self.owners].amin(-1)


def cut(plan: FactorPlan, params: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Piece, ...]], Spans]:
    """Cut the parameters of a plan into pieces.

    Arguments:
        plan: The plan.
        params: Its parameters, whole, by name.

    Returns:
        The pieces of each, and the tables of all their spans, on the device of the first.

    Example:
        >>> from quack_fx.factors import Unit
        >>> heads = tuple(Unit("q", 0, ((4 * h, 4 * h + 4),), None) for h in range(2))
        >>> cut(FactorPlan(heads, ((0, 1),), ()), {"q": torch.zeros(9, 3)})[0]["q"]
        (Piece(axis=0, start=0, count=2, stride=4, skip=0, size=4, spans=1, flat=True, first=0), Piece(axis=0, ...))
    """
    owners: list[tuple[int, ...]] = []
    pieces: dict[str, tuple[Piece, ...]] = {}
    for (name, axis), edges in _edges(plan).items():
        runs = list(_runs(edges, params[name].shape[axis]))
        pieces[name] = tuple(_pieces(params[name], axis, runs, owners))
    of_unit: list[list[int]] = [[] for _ in plan.units]
    for span, units in enumerate(owners):
        for unit in units:
            if unit != _NO_UNIT:
                of_unit[unit].append(span)
    device = next(iter(params.values())).device if params else None
    return pieces, Spans(_padded(of_unit, len(owners), device), _padded(owners, len(plan.units), device))


_Run = tuple[int, tuple[int, ...]]
"""Size of a run, and its units."""


def _edges(plan: FactorPlan) -> dict[tuple[str, int], dict[int, list[int]]]:
    """For each tensor and axis: the rows at which units begin or end, with the units; ~unit for an end."""
    edges: dict[tuple[str, int], dict[int, list[int]]] = {}
    for i, unit in enumerate(plan.units):
        for part in unit.parts():
            for start, stop in unit.ranges:
                edges.setdefault(part, {}).setdefault(start, []).append(i)
                edges[part].setdefault(stop, []).append(~i)
    return edges


def _runs(edges: dict[int, list[int]], length: int) -> list[_Run]:
    """The runs of a tensor, those of no unit too, in order."""
    inside: set[int] = set()
    runs: list[_Run] = []
    for here, after in pairwise(sorted({0, length, *edges})):
        for edge in sorted(edges.get(here, ())):
            inside.add(edge) if edge >= 0 else inside.discard(~edge)
        runs.append((after - here, tuple(sorted(inside))))
    return runs


def _pieces(tensor: Tensor, axis: int, runs: list[_Run], owners: list[tuple[int, ...]]) -> list[Piece]:
    """Pieces of one tensor; the units of their spans are added to `owners`."""
    made: list[Piece] = []
    flat = axis == 0 and tensor.is_contiguous()
    start, runs = 0, _evened(runs)
    while runs:
        period, count = _pattern(runs)
        stride = sum(size for size, _ in runs[:period])
        skip = 0
        for i, (size, _) in enumerate(runs[:period]):
            units = [runs[i + period * n][1] for n in range(count)]
            first = len(owners) if any(units) else None
            spans = _spans(size * tensor[0].numel()) if flat else 1
            if first is not None:
                owners += [own or (_NO_UNIT,) for own in units for _ in range(spans)]
            made.append(Piece(axis, start, count, stride, skip, size, spans, flat, first))
            skip += size
        start += count * stride
        runs = runs[period * count :]
    return made


def _evened(runs: list[_Run]) -> list[_Run]:
    """The runs, those of no unit cut into runs of the size of the unit before them, or of the first."""
    evened: list[_Run] = []
    beside = next((size for size, units in runs if units), 0)
    for size, units in runs:
        beside = size if units else beside
        parts = size // beside if beside and size % beside == 0 else 1
        evened += [(size // parts, units)] * parts
    return evened


def _spans(numbers: int) -> int:
    """Into how many equal spans a run is cut: the fewest that are short enough, unless they are very short."""
    fewest = max(1, -(-numbers // _SPAN))
    return next((n for n in range(fewest, 4 * fewest) if numbers % n == 0), 1)


def _pattern(runs: list[_Run]) -> tuple[int, int]:
    """How many of the first runs make a pattern, and how often it stands there; the one that covers most."""
    kinds = [size for size, _ in runs]
    found = (1, 1)
    for period in range(1, min(_LONGEST_PATTERN, len(kinds)) + 1):
        count = 1
        while kinds[count * period : (count + 1) * period] == kinds[:period]:
            count += 1
        if count > 1 and period * count > found[0] * found[1]:
            found = period, count
    return found


def _padded(rows: list[list[int]] | list[tuple[int, ...]], filler: int, device: torch.device | None) -> Tensor:
    longest = max(map(len, rows), default=1)
    table = [[*row, *[filler] * (longest - len(row))] for row in rows]
    return torch.tensor(table, dtype=torch.int64, device=device).view(len(rows), longest)
