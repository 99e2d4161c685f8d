"""Reports about removing and adding QK norms, and what removal from modules and from graphs shares.

In: what was done to modules or a graph. Out: `StripReport`, `InsertReport`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from quack_fx.layout import QKLayout


def _nothing() -> None:
    """The `restore` of a rewritten graph, whose original is unchanged; no lambda, so that its report can be pickled."""


@dataclass(frozen=True, slots=True)
class RemovedNorm:
    """A removed norm.

    Attributes:
        module: Name of its module; None for an inline norm.
        kind: What it computes, as in the layout.
        width: Number of features that share a statistic.
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
    """An attention that is left unchanged, and why."""

    site: str
    reason: str


class Left(Exception):
    """Why an attention or a norm is left unchanged."""


@dataclass(frozen=True, slots=True)
class LogitChange:
    """The logits of an attention on the example inputs, before and after the removal.

    Attributes:
        site: Name of the attention.
        before: Standard deviation of the logits with the norms.
        after: Standard deviation of the logits without them.
    """

    site: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class StripReport:
    """What was removed, and what stays and why.

    Attributes:
        removed: The removed norms.
        left: The sites whose norms stay.
        notes: Decisions about logit scales, and what the user should check.
        layout: Layout of the stripped model; QuacK now scales the stripped sites.
        logits: Standard deviations of the logits of stripped sites; empty without example inputs.
        model: The stripped model: the given one, or a new graph that shares its parameters.
        restore: Puts the norms back: the model then computes bitwise the same as before. No effect on a graph (a copy).
    """

    removed: tuple[RemovedNorm, ...]
    left: tuple[LeftSite, ...]
    notes: tuple[str, ...]
    layout: QKLayout
    model: nn.Module = field(repr=False, compare=False)
    restore: Callable[[], None] = field(default=_nothing, repr=False, compare=False)
    logits: tuple[LogitChange, ...] = ()

    @property
    def vanished(self) -> tuple[str, ...]:
        """Entries of the model's `state_dict` that were removed."""
        return tuple(dict.fromkeys(key for norm in self.removed for key in norm.keys))

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
        inserted: Names of the norm modules; in a graph, of the modules that hold the gains.
        left: The sites without new norms, and why.
        layout: Layout of the model with norms.
        model: The model with norms: the given one, or a new graph that shares its parameters.
        restore: Removes the norms: the model then computes bitwise the same as before. No effect on a graph (a copy).
    """

    inserted: tuple[str, ...]
    left: tuple[LeftSite, ...]
    layout: QKLayout
    model: nn.Module = field(repr=False, compare=False)
    restore: Callable[[], None] = field(default=_nothing, repr=False, compare=False)


def with_sharers(
    reasons: Mapping[int, str], uses: Sequence[tuple[int, Hashable, str]], layout: QKLayout
) -> dict[int, str]:
    """Extend the reasons to keep norms to all sites that share a norm with a site that keeps its norms.

    A use is the index of a site, the module or node of a norm that it uses, and what to call that norm.
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
    """The layout of the stripped model; `stripped` has by index of each stripped site the factor of its logits."""
    gone, sites = set(vanished), list(layout.sites)
    for i, factor in stripped.items():
        scale = sites[i].logit_scale
        sites[i] = replace(sites[i], qk_norm=(), logit_scale=None if scale is None else scale * factor)
    return replace(
        layout,
        sites=tuple(sites),
        untouched=tuple(name for name in layout.untouched if name not in gone),
    )
