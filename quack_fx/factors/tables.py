"""A plan as index tensors: what a training step needs of it, free of python objects per unit.

In: a `FactorPlan`. Out: `PlanTables`, which sums a value of weight rows over units and spreads a value of units over
weight rows.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quack_fx.factors.plan import FactorPlan


@dataclass(frozen=True)
class Strip:
    """The stretch of one tensor from the first to the last row that belongs to a unit.

    The rows of all strips of a plan, one strip after the other, are its *flat rows*.

    Attributes:
        name: Name of the parameter or bias.
        axis: Axis that counts its rows.
        start: First row.
        stop: One past the last row.
        offset: Place of the first row among the flat rows.
    """

    name: str
    axis: int
    start: int
    stop: int
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The strip of a tensor, rows first; a view."""
        return tensor.detach().narrow(self.axis, self.start, self.stop - self.start).movedim(self.axis, 0)


@dataclass(frozen=True)
class PlanTables:
    """Index tensors of a plan; what a training step needs of it, free of python objects per unit.

    Attributes:
        strips: The strips, in the order of their flat rows.
        buckets: Units of equal size together; for each size, the flat rows of its units, int64 [units, size].
        order: Place of each unit among the units of all buckets, int64 [n_units].
        others: For each place of each term, the units at its other places, n_units where the term is shorter, int64
            [terms, longest, longest - 1].
        places: Units of equally many terms together; for each number, the places of its units in all terms one after
            the other, int64 [units, number].
        place_order: Place of each unit among the units of all of them, int64 [n_units].
        owners: Units that contain each flat row, n_units for a row of none, int64 [rows, most units of one row].
    """

    strips: tuple[Strip, ...]
    buckets: tuple[Tensor, ...]
    order: Tensor
    others: Tensor
    places: tuple[Tensor, ...]
    place_order: Tensor
    owners: Tensor

    @classmethod
    def of(cls, plan: FactorPlan) -> PlanTables:
        """Tables of a plan, on the CPU."""
        hulls: dict[tuple[str, int], tuple[int, int]] = {}
        for unit in plan.units:
            for part in unit.parts():
                start, stop = hulls.get(part, unit.ranges[0])
                hulls[part] = min(start, unit.ranges[0][0]), max(stop, unit.ranges[-1][1])
        strips: dict[tuple[str, int], Strip] = {}
        n_rows = 0
        for part, (start, stop) in hulls.items():
            strips[part] = Strip(*part, start, stop, offset=n_rows)
            n_rows += stop - start

        flat: list[Tensor] = []  # flat rows of each unit
        for unit in plan.units:
            shifts = [strips[part].offset - strips[part].start for part in unit.parts()]
            flat.append(torch.cat([torch.arange(a + by, b + by) for by in shifts for a, b in unit.ranges]))
        buckets, order = _by_length(flat)
        others, places = _term_tables(plan)
        by_number, place_order = _by_length(places)
        return cls(
            strips=tuple(strips.values()),
            buckets=buckets,
            order=order,
            others=others,
            places=by_number,
            place_order=place_order,
            owners=_owners(flat, n_rows),
        )

    def to(self, device: torch.device) -> PlanTables:
        """The same tables on a device."""
        return PlanTables(
            self.strips,
            tuple(bucket.to(device) for bucket in self.buckets),
            self.order.to(device),
            self.others.to(device),
            tuple(places.to(device) for places in self.places),
            self.place_order.to(device),
            self.owners.to(device),
        )

    def sum_rows(self, rows: Tensor) -> Tensor:
        """Sum of a value of the flat rows over each unit: [..., rows] -> [..., n_units].

        Gathers and sums instead of scattering: the order of additions, and so the result, never changes.
        """
        if not self.buckets:
            return rows
        return torch.cat([rows[..., bucket].sum(-1) for bucket in self.buckets], -1)[..., self.order]

    def factors(self, norms: Tensor) -> Tensor:
        """What the one rule makes of the norms of the units: [n_units] -> [n_units]."""
        if not self.places:
            return norms
        products = torch.cat([norms, norms.new_ones(1)])[self.others].prod(-1).flatten()
        return torch.cat([products[places].amax(-1) for places in self.places])[self.place_order].reciprocal()

    def spread(self, scales: Tensor) -> Tensor:
        """Scale of each flat row, the smallest of its units' scales, 1 for a row of none: [n_units] -> [rows]."""
        return torch.cat([scales, scales.new_ones(1)])[self.owners].amin(-1)


def _by_length(rows: list[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Rows of equal length stacked, in the order in which their lengths appear, and where each row is among them."""
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        by_length[len(row)].append(i)
    order = torch.empty(len(rows), dtype=torch.int64)
    order[[i for alike in by_length.values() for i in alike]] = torch.arange(len(rows))
    return tuple(torch.stack([rows[i] for i in alike]) for alike in by_length.values()), order


def _term_tables(plan: FactorPlan) -> tuple[Tensor, list[Tensor]]:
    """For each place of each term the units at its other places, [terms, longest, longest - 1], and the places of each
    unit in all terms one after the other."""
    longest = max(map(len, plan.terms), default=1)
    padded = [[*term, *[len(plan.units)] * (longest - len(term))] for term in plan.terms]
    members = torch.tensor(padded, dtype=torch.int64).view(len(plan.terms), longest)
    elsewhere = torch.tensor([[j for j in range(longest) if j != i] for i in range(longest)], dtype=torch.int64)
    places: list[list[int]] = [[] for _ in plan.units]
    for t, term in enumerate(plan.terms):
        for i, unit in enumerate(term):
            places[unit].append(t * longest + i)
    return members[:, elsewhere], [torch.tensor(own, dtype=torch.int64) for own in places]


def _owners(flat: list[Tensor], n_rows: int) -> Tensor:
    """`owners` of `PlanTables` from the flat rows of each unit."""
    if not flat:
        return torch.empty(0, 1, dtype=torch.int64)
    rows, by_row = torch.cat(flat).sort(stable=True)
    units = torch.arange(len(flat)).repeat_interleave(torch.tensor(list(map(len, flat))))[by_row]
    counts = rows.bincount(minlength=n_rows)
    firsts = counts.cumsum(0) - counts
    # a row with fewer units than another names one of its own again, which changes no minimum
    owners = torch.full((n_rows,), len(flat)).index_put((rows,), units)[:, None].repeat(1, int(counts.max()))
    owners[rows, torch.arange(len(rows)) - firsts[rows]] = units
    return owners
