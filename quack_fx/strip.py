"""USER: QK norms out of a module tree, and back in.

In: a model and its layout. Out: a `StripReport`; the model's norm modules between projections and logits are replaced,
in place, by modules that hand their input on, and `StripReport.restore` puts the old ones back.

Only a norm that is a module of its own can be taken out this way. A site keeps all its norms when one of them has to
stay, so no site is left with queries and keys treated differently.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from quack_fx.errors import StripError
from quack_fx.layout import AttentionSite, Norm, QKLayout

__all__ = ["LeftSite", "PassThrough", "RemovedNorm", "StripReport", "strip_qk_norm"]


class PassThrough(nn.Module):
    """Stands where a norm stood; takes whatever the norm took and returns the first argument."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `x` itself."""
        return x


@dataclass(frozen=True, slots=True)
class RemovedNorm:
    """A norm module that was taken out.

    Attributes:
        module: Its name.
        kind: What it computed, as in the layout.
        width: Number of features that shared one statistic.
        sites: Names of the attentions that called it.
        keys: Entries of the model's `state_dict` that went with it.
    """

    module: str
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
class StripReport:
    """What was taken out, what was left and why.

    Attributes:
        removed: The norms that are gone.
        left: The sites whose norms stay.
        notes: What to see to now, such as a logit scale that relied on the norm.
        layout: The layout of the model as it is now; its stripped sites have no QK norm and take part in QuacK.
    """

    removed: tuple[RemovedNorm, ...]
    left: tuple[LeftSite, ...]
    notes: tuple[str, ...]
    layout: QKLayout
    _model: nn.Module = field(repr=False, compare=False)
    _originals: dict[str, nn.Module] = field(repr=False, compare=False)

    @property
    def vanished(self) -> tuple[str, ...]:
        """Entries of the model's `state_dict` that are gone."""
        return tuple(key for norm in self.removed for key in norm.keys)

    def restore(self) -> None:
        """Put the norms back; the model computes bitwise what it did before."""
        for name, module in self._originals.items():
            module.train(self._model.get_submodule(name).training)
            self._model.set_submodule(name, module)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the layout."""
        return {
            "removed": [asdict(norm) for norm in self.removed],
            "left": [asdict(site) for site in self.left],
            "notes": list(self.notes),
            "vanished": list(self.vanished),
        }


def strip_qk_norm(model: nn.Module, layout: QKLayout, *, gain: Literal["drop"] = "drop") -> StripReport:
    """Take the QK norms out of a model, in place.

    Do it before the optimizer is built: the gains of the norms are no longer parameters of the model.

    Arguments:
        model: Model the layout was found on.
        layout: Its layout; `qk_norm` of each site says which norms there are.
        gain: What becomes of a norm's gain. "drop": it goes with the norm.

    Returns:
        What was removed and what was left; its `layout` describes the model as it is now. A model without QK norm
        comes back untouched.

    Raises:
        StripError: The layout names a module that the model does not have, or `gain` is not known. The model is
            then unchanged.

    Example:
        >>> from quack_fx.layout import QKLayout
        >>> report = strip_qk_norm(nn.Linear(2, 2), QKLayout())
        >>> report.removed, report.left
        ((), ())
    """
    if gain != "drop":
        raise StripError(f"gain={gain!r} is not known; use gain='drop'")
    normed = [site for site in layout.sites if site.qk_norm]
    reasons = _reasons_to_stay(model, normed)
    going = [site for site in normed if site.name not in reasons]
    removed = tuple(_removals(model, going))
    originals = {norm.module: model.get_submodule(norm.module) for norm in removed}
    for name, module in originals.items():
        model.set_submodule(name, PassThrough().train(module.training))
    return StripReport(
        removed=removed,
        left=tuple(LeftSite(name, reason) for name, reason in reasons.items()),
        notes=tuple(_notes(going)),
        layout=_without_norms(layout, {site.name for site in going}, removed),
        _model=model,
        _originals=originals,
    )


def _reasons_to_stay(model: nn.Module, sites: list[AttentionSite]) -> dict[str, str]:
    """Why a site's norms cannot be taken out, for those where they cannot."""
    reasons: dict[str, str] = {}
    for site in sites:
        for norm in site.qk_norm:
            if reason := _reason_to_stay(model, norm):
                reasons.setdefault(site.name, reason)
    # A norm that a staying site also calls has to stay, and with it every other site that calls it.
    spreading = True
    while spreading:
        staying = {n.module: s.name for s in sites if s.name in reasons for n in s.qk_norm if n.module is not None}
        spreading = False
        for site in sites:
            shared = next((n.module for n in site.qk_norm if n.module in staying), None)
            if shared is not None and site.name not in reasons:
                reasons[site.name] = f"its norm {shared!r} also serves {staying[shared]!r}, which keeps its norms"
                spreading = True
    return reasons


def _reason_to_stay(model: nn.Module, norm: Norm) -> str | None:
    """Why one norm cannot be taken out, or None when it can."""
    if norm.module is None:
        return f"its {norm.side} norm is written inline, not as a module of its own"
    try:
        module = model.get_submodule(norm.module)
    except AttributeError:
        raise StripError(
            f"the layout names the norm {norm.module!r}, which {type(model).__name__} does not have; "
            "find the pairs again on this model"
        ) from None
    if norm.module == "":
        return f"its {norm.side} norm is the whole model"
    parents = {id(model.get_submodule(n.rpartition(".")[0])) for n, m in _all_names(model) if m is module}
    if len(parents) > 1:
        others = [name for name, m in _all_names(model) if m is module and name != norm.module]
        return f"its {norm.side} norm {norm.module!r} is also registered as {others[0]!r}"
    required = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if len(required) > 1:
        names = ", ".join(p.name for p in required)
        return f"its {norm.side} norm {norm.module!r} takes more than one tensor ({names})"
    return None


def _all_names(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from ((name, module) for name, module in model.named_modules(remove_duplicate=False) if name)


def _removals(model: nn.Module, sites: list[AttentionSite]) -> Iterator[RemovedNorm]:
    """The norm modules of some sites, each once, in the order of the layout."""
    norms: dict[str, Norm] = {}
    callers: dict[str, list[str]] = {}
    for site in sites:
        for norm in site.qk_norm:
            assert norm.module is not None  # sites with inline norms stay
            norms.setdefault(norm.module, norm)
            names = callers.setdefault(norm.module, [])
            if site.name not in names:
                names.append(site.name)
    keys = list(model.state_dict(keep_vars=True))
    for name, norm in norms.items():
        own = tuple(key for key in keys if key.startswith(f"{name}."))
        yield RemovedNorm(name, norm.kind, norm.width, tuple(callers[name]), own)


def _notes(sites: list[AttentionSite]) -> Iterator[str]:
    """Sites whose logit scale relied on the norm: 1/sqrt(head_dim) has to come back."""
    for site in sites:
        usual = 1 / math.sqrt(site.head_dim)
        if site.logit_scale is None:
            yield f"{site.name!r}: its logit scale is learned or unknown; without the norm {usual:.4g} is usual"
        elif site.logit_scale > 1.01 * usual:
            yield f"{site.name!r}: logits are scaled by {site.logit_scale:.4g}; without the norm {usual:.4g} is usual"


def _without_norms(layout: QKLayout, stripped: set[str], removed: tuple[RemovedNorm, ...]) -> QKLayout:
    """The layout of the stripped model."""
    gone = {key for norm in removed for key in norm.keys}
    return replace(
        layout,
        sites=tuple(replace(site, qk_norm=()) if site.name in stripped else site for site in layout.sites),
        untouched=tuple(name for name in layout.untouched if name not in gone),
    )
