"""Removes the QK norms of a model: from its modules, in place, or from a copy of its ATen graph.

In: a model and its layout, or a graph. Out: a `StripReport`: the removed norms, those that stay and why, what the user
should check, the new layout, and `restore`.

    modules.py   replaces norm modules by modules that return their input
    fold.py      multiplies gains into the weight rows before them
    gains.py     finds these rows
    graph.py     removes norms from a copy of a graph, inline ones too
    norms.py     finds the norms of a graph
    scale.py     the logit scale without the norm
    spread.py    standard deviation of the logits, before and after
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn
from torch.fx import GraphModule

from quack_fx.errors import StripError
from quack_fx.find import Pairs, pairs_of
from quack_fx.layout import QKLayout
from quack_fx.qk_norm.call import Inputs, call_of, refuse_wrapped
from quack_fx.qk_norm.report import LeftSite, LogitChange, RemovedNorm, StripReport
from quack_fx.qk_norm.strip.graph import strip_graph
from quack_fx.qk_norm.strip.modules import PassThrough, strip_modules
from quack_fx.qk_norm.strip.spread import Spread, logit_spread

__all__ = ["LeftSite", "LogitChange", "PassThrough", "RemovedNorm", "StripReport", "strip_qk_norm"]


def strip_qk_norm(
    model: nn.Module,
    layout: QKLayout | None = None,
    *,
    gain: Literal["drop", "keep", "fold"] = "drop",
    scale: Literal["restore", "keep"] = "restore",
    inputs: Inputs | None = None,
) -> StripReport:
    """Remove the QK norms of a model: from its modules in place, or from a copy of its graph.

    Call it before creating the optimizer: the gains of the norms are then no longer parameters of the model.

    Arguments:
        model: The model that the layout was found on; or an ATen-level `GraphModule` (from torch.export, make_fx, or
            `quack_fx.capture(..., executable=True)`), whose norms may be inline. A norm of a graph whose result is also
            used outside the logits stays for that use. A graph is not changed: the report's `model` is a stripped copy
            that shares its parameters.
        layout: Layout of the model; `qk_norm` of each site lists its norms. A graph needs none.
        gain: What happens to the gain and the bias of a norm. "drop": they are removed with the norm. "keep": only the
            division by the statistic is removed; gain and bias are still applied. "fold": like "keep", but the gain is
            multiplied into the weight rows and biases of the projection, once and in place, and the outputs are
            compared with those of "keep". For modules only.
        scale: "restore": if the model relied on the norm to bound its logits (a logit scale above 1/sqrt(head_dim), an
            L2 norm instead of an RMS norm), features are multiplied by a constant that keeps logits at their usual
            scale; `notes` lists each constant. "keep": no constant is applied.
        inputs: Example inputs of the forward, a tuple or a dict of keyword arguments; `gain="fold"` needs them. The
            report then has the standard deviation of the logits before and after, and a note on each norm of values,
            which stays.

    Returns:
        What was removed and what stays, and the layout of the stripped model. A model without QK norms is unchanged.

    Raises:
        StripError: The layout names a module that the model does not have, a model is given without a layout, an option
            is unknown, or folding changes the outputs of the model. The model is then unchanged.

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
    """The report with the measured logits, and with notes on norms of values."""
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
