"""The report of a removal of QK norms, and what both ways of removal share.

In: what was removed from modules or a graph. Out: `StripReport`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from quack_fx.layout import AttentionSite, QKLayout


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
    _restore: Callable[[], None] = field(repr=False, compare=False)
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


def nothing_to_restore() -> None:
    """`restore` of a rewritten graph: the original was not changed."""


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
    gone = set(vanished)
    return replace(
        layout,
        sites=tuple(_bare(s, stripped[i]) if i in stripped else s for i, s in enumerate(layout.sites)),
        untouched=tuple(name for name in layout.untouched if name not in gone),
    )


def _bare(site: AttentionSite, factor: float) -> AttentionSite:
    scale = None if site.logit_scale is None else site.logit_scale * factor
    return replace(site, qk_norm=(), logit_scale=scale)
