"""A block while it is being put together: rows of each head, and the projection behind it."""

from __future__ import annotations

from dataclasses import dataclass

from quack_fx.find.provenance.flow import NormTag
from quack_fx.find.provenance.projections import Projection
from quack_fx.layout import Role

Rows = set[tuple[int, ...]]
"""Coordinates of rows along the axes of a projection."""

MAX_CHAIN = 4
"""How many projections a chain has behind its first."""


@dataclass(eq=False)
class Block:
    """Rows of one parameter that meet the same partners.

    Attributes:
        param: The parameter.
        partners: Parameters that the rows meet in the logits, or in the block before.
        rows: For each head its rows.
        projection: What makes features of the rows.
        behind: The block whose features the projection reads, if it is a factor of this attention.
        parallel: Whether other parameters make the same features, added up (adapters).
        latent_norms: Norms between this block and the one behind.
        role: Its part.
    """

    param: str
    partners: frozenset[str]
    rows: list[Rows]
    projection: Projection
    behind: Block | None = None
    parallel: bool = False
    latent_norms: tuple[NormTag, ...] = ()
    role: Role = "other"

    def chain(self) -> list[Block]:
        """The block and what lies behind it."""
        return [self, *(self.behind.chain() if self.behind is not None else [])]
