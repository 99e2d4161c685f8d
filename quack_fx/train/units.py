"""Units, the rows of one head in one block: which head alone uses them, and their index in a program's numbers.

In: a layout and its model. Out: for every row, the head that it belongs to, and for every unit, its index among the
norms, factors and scales of all blocks, flattened and concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from quack_fx.layout import AttentionSite, QKLayout
from quack_fx.layout.fit import with_bare_names
from quack_fx.train.program.kinds import Unit, kinds_of, tensors_of

SHARED = -2
_FREE = -1


class Owners:
    """The head that each row belongs to: the only one whose logits it contributes to.

    Rows of a key head with several query heads, of a down projection, or of a layer that is called several times belong
    to no head.

    Arguments:
        layout: The layout.
        params: The parameters that it names.

    Attributes:
        axes: The axis of the rows of each parameter.
        rows: For each parameter, the head of each row, numbered across all sites, [rows]; SHARED if there are several.
        first: For each site, the number of its first head.

    Example:
        >>> Owners(layout, layout_params(layout, model)).rows["q.weight"]
        tensor([0, 0, 1, 1])
    """

    def __init__(self, layout: QKLayout, params: Mapping[str, Tensor]) -> None:
        blocks = [block for site in layout.sites for _, block in site.blocks()]
        self.axes = {name: axis for block in blocks for name, axis in tensors_of(block)}
        self.rows = {name: torch.full((params[name].shape[axis],), _FREE) for name, axis in self.axes.items()}
        self.first: list[int] = []
        count = 0
        for site in layout.sites:
            self.first.append(count)
            for head in range(site.query_heads):
                for product in site.head_terms(head):
                    for part in product:
                        self._use(Unit.of(*part), count + head)
            count += site.query_heads

    def _use(self, unit: Unit, head: int) -> None:
        for known in self._parts(unit):
            known[(known != head) & (known != _FREE)] = SHARED
            known[known == _FREE] = head

    def has(self, unit: Unit, head: int) -> bool:
        """Whether all rows of a unit belong to this head alone."""
        return all(bool((known == head).all()) for known in self._parts(unit))

    def _parts(self, unit: Unit) -> Iterator[Tensor]:
        """The entries of `rows` for the rows of a unit."""
        for name in unit.names:
            yield from (self.rows[name][start:stop] for start, stop in unit.ranges)


def nearest(site: AttentionSite, head: int) -> Iterator[tuple[Unit | None, Unit | None]]:
    """For each term of a head, the query and key rows next to the logits (up projections, not down projections)."""
    key_head = site.head_map[head]
    for term in site.terms:
        sides = ((site.query, term.query, head), (site.key, term.key, key_head))
        if all(blocks[i].heads[h] for blocks, chain, h in sides for i in chain):
            query, key = (
                Unit.of(blocks[chain[0]], blocks[chain[0]].heads[h]) if chain else None for blocks, chain, h in sides
            )
            yield query, key


def places_of(layout: QKLayout, model: nn.Module) -> tuple[QKLayout, dict[Unit, int]]:
    """Indices of all units that the rule scales.

    Arguments:
        layout: The layout.
        model: The model it fits.

    Returns:
        The layout with the parameter names of the program; the index of each unit in `in_a_row`.

    Example:
        >>> layout, places = places_of(layout, model)
        >>> places[Unit("layers.0.q.weight", None, ((0, 64),))]
        0
    """
    layout, params = with_bare_names(layout, model)
    places: dict[Unit, int] = {}
    # The same order as in the program, which is written from these kinds.
    for kind in kinds_of(layout, {name: tuple(param.shape) for name, param in params.items()}):
        own = [kind.names(numbers) for numbers in kind.instances]
        for block in kind.blocks:
            for names in own:
                weight, *bias = (names[i] for i in block.tensors)
                for ranges in block.heads:
                    places[Unit(weight, bias[0] if bias else None, ranges)] = len(places)
    return layout, places


def in_a_row(by_block: Sequence[Sequence[Tensor]]) -> Tensor:
    """The numbers of all heads as one flat tensor, on one device."""
    each = [numbers.flatten() for blocks in by_block for numbers in blocks]
    return torch.cat([numbers.to(each[0].device) for numbers in each])


def by_block(row: Tensor, like: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Split a flat tensor into tensors for each block, shaped like those in `like`; the inverse of `in_a_row`."""
    parts = iter(row.split([numbers.numel() for blocks in like for numbers in blocks]))
    return [[next(parts).view(numbers.shape).to(numbers.device) for numbers in blocks] for blocks in like]
