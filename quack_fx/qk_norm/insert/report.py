"""The report of an insertion of QK norms, in modules or in a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from quack_fx.layout import QKLayout
from quack_fx.qk_norm.strip.report import LeftSite


@dataclass(frozen=True, slots=True)
class InsertReport:
    """Where norms were added, and where not and why.

    Attributes:
        inserted: Names of the norm modules; in a graph, names of the modules that hold the gains.
        left: The sites without new norms, and why.
        layout: The layout of the model as it is now.
        model: The model with norms: the one that was given, or a new graph that shares its parameters.
    """

    inserted: tuple[str, ...]
    left: tuple[LeftSite, ...]
    layout: QKLayout
    model: nn.Module = field(repr=False, compare=False)
    _restore: Callable[[], None] = field(repr=False, compare=False)

    def restore(self) -> None:
        """Remove the norms; the model then computes bitwise the same as before. Does nothing for a graph, which is a
        copy."""
        self._restore()
