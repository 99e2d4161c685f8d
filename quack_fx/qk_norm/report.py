"""The reports of a removal and of an insertion of QK norms, and what both ways of removal share.

In: what was done to modules or a graph. Out: `StripReport`, `InsertReport`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from quack_fx.layout import QKLayout


def _nothing() -> None:
    """`restore` of a rewritten graph: the original was not changed."""


@dataclass(frozen=True, slots=True)
class RemovedNorm:
    """A removed norm.

    Attributes:
        module: Name of its module; None for one that was written inline.
        kind: What it computed, as in the layout.
        width: Number of features that shared one statistic.
        sites: Names of its attentions.
        keys: Entries of the model's `state_dict` that were removed with it.
    """

    module: str | None
    kind: str
    width: int
    sites: tuple[str, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LeftSite:
    """An attention whose QK norms stay, and why."""

    site: str
    reason: str


@dataclass(frozen=True, slots=True)
class LogitChange:
    """The logits of an attention on the example inputs, before and after the removal.

    Attributes:
        site: Its name.
        before: Their standard deviation with the norms.
        after: Their standard deviation without.
    """

    site: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class StripReport:
    """What was removed, what stays and why.

    Attributes:
        removed: The removed norms.
        left: The sites whose norms stay.
        notes: Decisions about logit scales, and what the user should check.
        layout: The layout of the model as it is now; its stripped sites have no QK norm and take part in QuacK.
        logits: Standard deviations of the logits of stripped sites; empty without example inputs.
        model: The stripped model: the one that was given, or a new graph that shares its parameters.
    """

    removed: tuple[RemovedNorm, ...]
    left: tuple[LeftSite, ...]
    notes: tuple[str, ...]
    layout: QKLayout
    model: nn.Module = field(repr=False, compare=False)
    _restore: Callable[[], None] = field(default=_nothing, repr=False, compare=False)
    logits: tuple[LogitChange, ...] = ()

    @property
    def vanished(self) -> tuple[str, ...]:
        """Entries of the model's `state_dict` that were removed."""
        return tuple(dict.fromkeys(key for norm in self.removed for key in norm.keys))

    def restore(self) -> None:
        """Put the norms back; the model then computes bitwise the same as before. Does nothing for a graph, a copy."""
        self._restore()

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the layout."""
        return {
            "removed": [asdict(norm) for norm in self.removed],
            "left": [asdict(site) for site in self.left],
            "notes": list(self.notes),
            "logits": [asdict(change) for change in self.logits],
            "vanished": list(self.vanished),
        }


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
    _restore: Callable[[], None] = field(default=_nothing, repr=False, compare=False)

    def restore(self) -> None:
        """Remove the norms; the model then computes bitwise the same as before. Does nothing for a graph, which is a
        copy."""
        self._restore()


def with_sharers(
    reasons: Mapping[int, str], uses: Sequence[tuple[int, Hashable, str]], layout: QKLayout
) -> dict[int, str]:
    """The reasons of sites that keep their norms, and of all sites that share a norm with one that does.

    Arguments:
        reasons: By index of a site, why it keeps its norms.
        uses: Index of a site, the module or node of a norm that it uses, and what to call that norm.
        layout: The layout.

    Returns:
        The reasons of all sites that keep their norms.
    """
    reasons = dict(reasons)
    spreading = True
    while spreading:
        staying = {thing: place for place, thing, _ in uses if place in reasons}
        spreading = False
        for place, thing, norm in uses:
            if place not in reasons and thing in staying:
                other = layout.sites[staying[thing]].name
                reasons[place] = f"{norm} also serves {other!r}, which keeps its norms"
                spreading = True
    return reasons


def without_norms(layout: QKLayout, stripped: Mapping[int, float], vanished: Iterable[str]) -> QKLayout:
    """The layout of the stripped model.

    Arguments:
        layout: The one with norms.
        stripped: By index of each site without norms, the factor of its logits.
        vanished: Parameters that were removed.
    """
    gone, sites = set(vanished), list(layout.sites)
    for i, factor in stripped.items():
        scale = sites[i].logit_scale
        sites[i] = replace(sites[i], qk_norm=(), logit_scale=None if scale is None else scale * factor)
    return replace(
        layout,
        sites=tuple(sites),
        untouched=tuple(name for name in layout.untouched if name not in gone),
    )
