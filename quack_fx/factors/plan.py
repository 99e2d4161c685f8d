"""From a layout to plain data: which rows are one unit, and which units are multiplied in the logits.

In: a `QKLayout`. Out: a `FactorPlan`, no tensors but the index tables that it makes on request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from quack_fx.errors import LayoutError
from quack_fx.factors.tables import PlanTables
from quack_fx.layout import QKLayout, Ranges, WeightBlock, merged


@dataclass(frozen=True)
class Unit:
    """One head's rows of one parameter, and the same entries of its bias.

    Attributes:
        param: Name of the parameter.
        axis: Axis that counts output features.
        ranges: Half-open ranges along `axis`, sorted, none touching the next.
        bias: Name of the bias whose entries (along its first axis) belong to the unit, or None.

    Example:
        >>> str(Unit("attn.q.weight", 0, ((0, 64),), "attn.q.bias"))
        'attn.q.weight[0:64] + attn.q.bias'
    """

    param: str
    axis: int
    ranges: Ranges
    bias: str | None

    @classmethod
    def of(cls, block: WeightBlock, ranges: Ranges) -> Unit:
        """Unit that these ranges of a block make; the same rows in another order make the same unit."""
        return cls(block.param, block.axis, merged(ranges), block.bias)

    def parts(self) -> Iterator[tuple[str, int]]:
        """The tensors that hold the unit, as (name, axis): the parameter, then the bias if there is one."""
        yield self.param, self.axis
        if self.bias is not None:
            yield self.bias, 0

    def rows(self) -> Iterator[int]:
        """The row numbers of the unit."""
        for start, stop in self.ranges:
            yield from range(start, stop)

    def __str__(self) -> str:
        rows = ",".join(f"{start}:{stop}" for start, stop in self.ranges)
        bias = f" + {self.bias}" if self.bias is not None else ""
        return f"{self.param}[{':, ' * self.axis}{rows}]{bias}"


@dataclass(frozen=True)
class FactorPlan:
    """The one rule as plain data: the units of a layout, and which of them are multiplied in the logits.

    Attributes:
        units: All units, in the order in which norms and factors stand in their tensors.
        terms: Each distinct product in the logits as indices into `units`; a unit that stands twice is there twice.
        left_out: Names of the sites that keep a QK norm. Their logits do not depend on the norms of the weights, so
            QuacK leaves them alone.

    Example:
        >>> plan = FactorPlan.from_layout(layout)
        >>> norms = unit_norms(plan, dict(model.named_parameters()))
        >>> factors(plan, norms)  # one factor for each of plan.units
    """

    units: tuple[Unit, ...]
    terms: tuple[tuple[int, ...], ...]
    left_out: tuple[str, ...]

    @classmethod
    def from_layout(cls, layout: QKLayout) -> FactorPlan:
        """The plan of a layout.

        Raises:
            LayoutError: A parameter counts output features along one axis here and along another there.
        """
        index: dict[Unit, int] = {}
        terms: dict[tuple[int, ...], None] = {}  # a set that keeps its order
        left_out = []
        for site in layout.sites:
            if site.qk_norm:
                left_out.append(site.name)
                continue
            for head in range(site.query_heads):
                for product in site.head_terms(head):
                    units = (Unit.of(block, ranges) for block, ranges in product)
                    terms.setdefault(tuple(index.setdefault(unit, len(index)) for unit in units))
        axes: dict[str, int] = {}
        for name, axis in (part for unit in index for part in unit.parts()):
            if axes.setdefault(name, axis) != axis:
                raise LayoutError(
                    f"layout counts the output features of {name!r} along axis {axes[name]} and along axis {axis}; "
                    "one parameter can have head rows along one axis only"
                )
        return cls(tuple(index), tuple(terms), tuple(left_out))

    def tables(self, device: torch.device) -> PlanTables:
        """Index tensors of the plan on a device, made once."""
        if device not in self._tables:
            self._tables[device] = PlanTables.of(self).to(device)
        return self._tables[device]

    @cached_property
    def _tables(self) -> dict[torch.device, PlanTables]:
        return {}
