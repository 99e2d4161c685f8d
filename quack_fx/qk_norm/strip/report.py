"""The account of a removal: what is gone, what stays and why, what to see to now.

In: what a way of removal did. Out: `StripReport`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from quack_fx.layout import AttentionSite, QKLayout


@dataclass(frozen=True, slots=True)
class RemovedNorm:
    """A norm that was taken out.

    Attributes:
        module: Name of its module; None for one that was written inline.
        kind: What it computed, as in the layout.
        width: Number of features that shared one statistic.
        sites: Names of the attentions that it was for.
        keys: Entries of the model's `state_dict` that went with it.
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
    """What the removal did to the logits of an attention, on the example inputs.

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
    """What was taken out, what was left and why.

    Attributes:
        removed: The norms that are gone.
        left: The sites whose norms stay.
        notes: What was decided about logit scales, and what to see to now.
        layout: The layout of the model as it is now; its stripped sites have no QK norm and take part in QuacK.
        logits: How far the logits of stripped sites spread, before and after; empty without example inputs.
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
        """Entries of the model's `state_dict` that are gone."""
        return tuple(dict.fromkeys(key for norm in self.removed for key in norm.keys))

    def restore(self) -> None:
        """Put the norms back; the model computes bitwise what it did before. A graph was not changed to begin with."""
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
    """Sites that keep their norms, and those that share one with them, and so on: they have to keep theirs, too.

    Arguments:
        reasons: Why some sites keep their norms, by place.
        uses: Place of a site, a thing that it uses for a norm (its module, a node), and what to call that norm.
        layout: The layout.

    Returns:
        The reasons of all that keep them.
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
        stripped: Places of the sites that have none any more, each with what its logits were multiplied with instead.
        vanished: Parameters that are gone.
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
