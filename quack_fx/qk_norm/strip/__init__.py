"""QK norms out of a model: out of its module tree, in place, or out of an ATen graph of it.

In: a model and its layout, or a graph. Out: a `StripReport`: what is gone, what stays and why, what to see to now, the
layout of what is left, and `restore`.

    modules.py   norm modules replaced by modules that hand their input on
    fold.py      gains folded into the projections, and gains.py which rows those are
    graph.py     norms taken out of a copy of a graph, inline ones too, and norms.py where they stand in it
    scale.py     what a logit scale has to be once the norm is gone
    spread.py    how far logits spread, before and after
    report.py    the account that both ways give
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn
from torch.fx import GraphModule

from quack_fx.errors import StripError
from quack_fx.find import Pairs, pairs_of
from quack_fx.layout import QKLayout
from quack_fx.qk_norm.call import Inputs, call_of
from quack_fx.qk_norm.strip.graph import strip_graph
from quack_fx.qk_norm.strip.modules import PassThrough, strip_modules
from quack_fx.qk_norm.strip.report import LeftSite, LogitChange, RemovedNorm, StripReport
from quack_fx.qk_norm.strip.spread import Spread, logit_spread
from quack_fx.qk_norm.wrapped import refuse_wrapped

__all__ = ["LeftSite", "LogitChange", "PassThrough", "RemovedNorm", "StripReport", "strip_qk_norm"]


def strip_qk_norm(
    model: nn.Module,
    layout: QKLayout | None = None,
    *,
    gain: Literal["drop", "keep", "fold"] = "drop",
    scale: Literal["restore", "keep"] = "restore",
    inputs: Inputs | None = None,
) -> StripReport:
    """Take the QK norms out of a model: of its modules in place, or of a copy of its graph.

    Do it before the optimizer is built: the gains of the norms are no longer parameters of the model.

    Arguments:
        model: The model that the layout was found on; or an ATen-level `GraphModule` (of torch.export, of make_fx, of
            `quack_fx.capture(..., executable=True)`), whose norms may be written inline, and may serve more than the
            logits: they stay for that. A graph is not changed: the report's `model` is the stripped one, and its
            parameters are those of the original.
        layout: Layout of the model; `qk_norm` of each site says which norms there are. A graph needs none.
        gain: What becomes of the gain (and the bias) of a norm. "drop": it goes with the norm. "keep": only the
            statistic goes, features are still multiplied with it. "fold": the same, but the rows of the projection are
            multiplied with it, once and in place (its bias, too); what comes out is compared with "keep". For modules.
        scale: "restore": where logits would grow because the model left the norm to bound them (a logit scale above
            1/sqrt(head_dim), an L2 norm in place of an RMS norm), features are multiplied with a number that brings
            them back to what training expects. "keep": nothing is multiplied. `notes` tells each such decision.
        inputs: Example inputs of the forward, a tuple or a dict of named ones. `gain="fold"` needs them; with them, the
            report tells how far logits spread before and after, and which norms act on values (those stay).

    Returns:
        What was removed and what was left; its `layout` describes the model as it is now. A model without QK norm
        comes back untouched.

    Raises:
        StripError: The layout names a module that the model does not have, a model comes without a layout, an option
            is not known, or a folding changes what the model computes. The model is then unchanged.

    Example:
        >>> from quack_fx.layout import QKLayout
        >>> report = strip_qk_norm(nn.Linear(2, 2), QKLayout())
        >>> report.removed, report.left
        ((), ())
    """
    if gain not in ("drop", "keep", "fold"):
        raise StripError(f"gain={gain!r} is not known; use gain='drop', gain='keep' or gain='fold'")
    if scale not in ("restore", "keep"):
        raise StripError(f"scale={scale!r} is not known; use scale='restore' or scale='keep'")
    if gain == "fold" and isinstance(model, GraphModule):
        raise StripError("a graph shares its weights with the original: use gain='keep' or gain='drop' for it")
    if gain == "fold" and inputs is None:
        raise StripError("gain='fold' follows the gains to their rows: give example inputs, inputs=(...)")
    if layout is None and not isinstance(model, GraphModule):
        raise StripError("give the layout of the model, quack_fx.find_qk_pairs(model, *example_args)")
    refuse_wrapped(model)
    before = _spread(model, inputs)
    if isinstance(model, GraphModule):
        report = strip_graph(model, keep_gain=gain == "keep", restore_scale=scale == "restore")
    else:
        assert layout is not None
        report = strip_modules(
            model,
            layout,
            keep_gain=gain != "drop",
            restore_scale=scale == "restore",
            fold_with=inputs if gain == "fold" else None,
        )
    return _with_numbers(report, before, _spread(report.model, inputs) if report.removed else {})


def _spread(model: nn.Module, inputs: Inputs | None) -> dict[Pairs, Spread]:
    if inputs is None or any(p.is_meta for p in model.parameters()):
        return {}
    args, kwargs = call_of(inputs)
    return logit_spread(model, args, kwargs)


def _with_numbers(report: StripReport, before: dict[Pairs, Spread], after: dict[Pairs, Spread]) -> StripReport:
    """The report with what was measured, and with the norms on values, which are none of ours."""
    stripped = {name for norm in report.removed for name in norm.sites}
    changes, notes = [], list(report.notes)
    for site in report.layout.sites:
        old, new = before.get(pairs_of(site)), after.get(pairs_of(site))
        if old is not None and new is not None and site.name in stripped:
            changes.append(LogitChange(site.name, old.std, new.std))
        if old is not None and site.name in stripped:
            names = " and ".join(f"{kind} norm{f' {module!r}' if module else ''}" for kind, module in old.value_norms)
            notes += [f"{site.name!r}: its values pass a norm, too ({names}), which stays"] if names else []
    return replace(report, logits=tuple(changes), notes=tuple(notes))
