"""A weight block under construction: the rows of each head, and the block before it in the chain."""

from __future__ import annotations

from dataclasses import dataclass

from quack_fx.find.provenance.flow import NormTag
from quack_fx.find.provenance.projections import Projection
from quack_fx.layout import Role

Rows = set[tuple[int, ...]]
"""Coordinates of rows along the axes of a projection."""

MAX_CHAIN = 4
"""Maximum number of projections in a chain after the first."""


@dataclass(eq=False)
class Block:
    """Rows of one parameter, all multiplied with rows of the same set of parameters.

    Attributes:
        param: Name of the parameter.
        partners: Parameters whose rows these are multiplied with, in the logits or in the chain.
        rows: Rows of each head.
        projection: Product that multiplies data with these rows.
        behind: Block whose features the projection reads, if that block belongs to this attention too.
        parallel: Whether products with other parameters are added to the same features (adapters).
        latent_norms: Norms between this block and the one behind.
        role: Role in the attention.
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
        """Return the block and those behind it, starting at the logits."""
        return [self, *(self.behind.chain() if self.behind is not None else [])]
