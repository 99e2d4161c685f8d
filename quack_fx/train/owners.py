"""Which weight rows contribute to the logits of exactly one query head.

In: a layout and the number of rows of its parameters. Out: for every row, the head that it belongs to. Rows of a key
head with several query heads, of a down projection, or of a layer that is called several times belong to no head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quack_fx.layout import AttentionSite, QKLayout, Ranges, WeightBlock, merged

SHARED = -2
_FREE = -1


@dataclass(frozen=True)
class Unit:
    """The rows of one head in a weight, and in its bias.

    Attributes:
        names: The weight and its bias, if it has one, each with the axis of its rows.
        ranges: The rows.
    """

    names: tuple[tuple[str, int], ...]
    ranges: Ranges

    @classmethod
    def of(cls, block: WeightBlock, ranges: Ranges) -> Unit:
        """The rows of a block that a head uses."""
        bias = () if block.bias is None else ((block.bias, 0),)
        return cls(((block.param, block.axis), *bias), merged(ranges))


class Owners:
    """The head that each row belongs to.

    Arguments:
        layout: The layout.
        sizes: Number of rows of every parameter in it.

    Attributes:
        rows: For each parameter, the head of each row, numbered across all sites, [rows]; SHARED if there are several.
        first: For each site, the number of its first head.

    Example:
        >>> Owners(layout, {"q.weight": 4, "k.weight": 2}).rows["q.weight"]
        tensor([0, 0, 1, 1])
    """

    def __init__(self, layout: QKLayout, sizes: Mapping[str, int]) -> None:
        self.rows: dict[str, Tensor] = {name: torch.full((size,), _FREE) for name, size in sizes.items()}
        self.first: list[int] = []
        count = 0
        for site in layout.sites:
            self.first.append(count)
            for head in range(site.query_heads):
                for product in site.head_terms(head):
                    for block, ranges in product:
                        self._use(Unit.of(block, ranges), count + head)
            count += site.query_heads
        self.heads = count

    def _use(self, unit: Unit, head: int) -> None:
        for name, _ in unit.names:
            for start, stop in unit.ranges:
                known = self.rows[name][start:stop]
                known[(known != head) & (known != _FREE)] = SHARED
                known[known == _FREE] = head

    def has(self, unit: Unit, head: int) -> bool:
        """Whether all rows of a unit belong to this head alone."""
        return all(bool((self.rows[name][a:b] == head).all()) for name, _ in unit.names for a, b in unit.ranges)


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
