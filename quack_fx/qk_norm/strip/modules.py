"""Removes QK norms from a model's modules, and restores them.

In: a model and its layout. Out: a `StripReport`. Norm modules between projections and logits are replaced, in place, by
modules that return their input; `StripReport.restore` puts the norms back.

Only a norm that is a module of its own can be removed. If one norm of a site must stay, all of its norms stay, so that
queries and keys are treated alike.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.errors import StripError
from quack_fx.layout import AttentionSite, Norm, QKLayout, Side
from quack_fx.qk_norm.call import Inputs, call_of
from quack_fx.qk_norm.report import LeftSite, RemovedNorm, StripReport, with_sharers, without_norms
from quack_fx.qk_norm.strip.fold import check, multiply, outputs, reasons_against, undo
from quack_fx.qk_norm.strip.gains import Place, RowGain, gain_rows
from quack_fx.qk_norm.strip.scale import Scales, scale_back


class PassThrough(nn.Module):
    """Replaces a norm: takes its arguments and returns the tensors that it normalised, times a factor.

    Arguments:
        tensors: Number of tensors to return, the first arguments; several are returned as a tuple.
        factor: Multiplied with them.
    """

    def __init__(self, tensors: int = 1, factor: float = 1.0) -> None:
        super().__init__()
        self.tensors, self.factor = tensors, factor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """The first arguments, times the factor."""
        given = (*args, *kwargs.values())[: self.tensors]
        kept = given if self.factor == 1 else tuple(x * self.factor for x in given)
        return kept[0] if self.tensors == 1 else kept

    def extra_repr(self) -> str:
        """The factor, for `print(model)`."""
        return "" if self.factor == 1 else f"factor={self.factor:.4g}"


class Gain(nn.Module):
    """Replaces a norm whose gain and bias stay, under their names.

    Arguments:
        parameters: The norm's parameters by name: the gain, then the bias if it has one.
        offset: Added to the gain: 1 if the norm multiplies by (1 + gain).
        factor: A further factor of the features.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], offset: float, factor: float = 1.0) -> None:
        super().__init__()
        self.names, self.offset, self.factor, self.tensors = tuple(parameters), offset, factor, 1
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Features times gain, plus bias, in the dtype of the features."""
        weight, *bias = (self.get_parameter(name) for name in self.names)
        y = (x if self.factor == 1 else x * self.factor) * (weight + self.offset if self.offset else weight)
        return (y + bias[0] if bias else y).to(x.dtype)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a removal will do.

    Attributes:
        stand_ins: By name of each norm module to remove, the module that replaces it.
        norms: By the same names, the norm in the layout, and the names of its attentions.
        left: The sites whose norms stay, and why.
        notes: Decisions about logit scales.
        scales: By index of each site to be stripped, the factor of its logits.
    """

    stand_ins: dict[str, PassThrough | Gain]
    norms: dict[str, tuple[Norm, tuple[str, ...]]]
    left: tuple[LeftSite, ...]
    notes: tuple[str, ...]
    scales: dict[int, float]

    def layout(self, layout: QKLayout, vanished: Iterable[str]) -> QKLayout:
        """The layout of the stripped model, without the parameters that have vanished."""
        return without_norms(layout, self.scales, vanished)


def plan_strip(
    model: nn.Module,
    layout: QKLayout,
    *,
    keep_gain: bool = False,
    restore_scale: bool = True,
    against: Mapping[str, str] | None = None,
) -> Plan:
    """Decide which norm modules of a model can be removed, and what replaces them.

    With `keep_gain`, gains and biases stay; with `restore_scale`, features are multiplied by the factors of
    `scale_back`. `against` has reasons to keep norm modules, by their name.

    Raises:
        StripError: The layout names a module that the model does not have.
    """
    made: dict[str, PassThrough | Gain] = {}
    reasons: dict[int, str] = {}
    uses: list[tuple[int, str, str]] = []
    for place, site in enumerate(layout.sites):
        for norm in site.qk_norm:
            stand_in = (against or {}).get(str(norm.module)) or _stand_in(model, site, norm, keep_gain)
            if isinstance(stand_in, str):
                reasons.setdefault(place, stand_in)
            else:
                made.setdefault(str(norm.module), stand_in)
            if norm.module is not None:
                uses.append((place, norm.module, f"its norm {norm.module!r}"))
    reasons = with_sharers(reasons, uses, layout)
    going = {place: site for place, site in enumerate(layout.sites) if site.qk_norm and place not in reasons}
    if restore_scale:
        scales = {place: scale_back(site) for place, site in going.items()}
    else:  # the constant factors of L2 norms are removed with them
        scales = {place: Scales() if keep_gain else _without_numbers(site, made) for place, site in going.items()}
    norms: dict[str, tuple[Norm, tuple[str, ...]]] = {}
    factors: dict[str, set[float]] = {}
    for place, site in going.items():
        for norm in site.qk_norm:
            assert norm.module is not None  # sites with inline norms keep them
            first, names = norms.get(norm.module, (norm, ()))
            norms[norm.module] = first, tuple(dict.fromkeys((*names, site.name)))
            factors.setdefault(norm.module, set()).add(_factor(site, norm, scales[place]))
    unclear = []
    for name, wanted in factors.items():
        if len(wanted) == 1:
            made[name].factor *= wanted.pop()
        else:
            unclear.append(f"{name!r}: its attentions want different scales; set them by hand")
    return Plan(
        stand_ins={name: made[name] for name in norms},
        norms=norms,
        left=tuple(LeftSite(layout.sites[place].name, reason) for place, reason in reasons.items()),
        notes=(*(note for one in scales.values() for note in one.notes), *unclear),
        scales={place: one.query * one.key for place, one in scales.items()},
    )


def strip_modules(
    model: nn.Module, layout: QKLayout, *, keep_gain: bool, restore_scale: bool, fold_with: Inputs | None = None
) -> StripReport:
    """Remove the QK norms of a model, in place.

    Raises:
        StripError: The layout names a module that the model does not have, or folding would change the model.
    """
    against: dict[str, str] = {}
    rows: dict[str, dict[Place, RowGain] | str] = {}
    if fold_with is not None:
        args, kwargs = call_of(fold_with)
        rows = gain_rows(model, args, kwargs)
        against = reasons_against(rows, {str(n.module): None for s in layout.sites for n in s.qk_norm if n.module})
    plan = plan_strip(model, layout, keep_gain=keep_gain, restore_scale=restore_scale, against=against)
    originals = {name: model.get_submodule(name) for name in plan.stand_ins}
    names = {name: first for first, module in originals.items() for name in _names_of(module, model)}
    before = list(model.state_dict(keep_vars=True))
    old: dict[Tensor, Tensor] = {}
    for name, first in names.items():
        model.set_submodule(name, plan.stand_ins[first].train(originals[first].training))

    def restore() -> None:
        undo(old)
        for name, first in names.items():
            originals[first].train(model.get_submodule(name).training)
            model.set_submodule(name, originals[first])

    if fold_with is not None:
        expected = outputs(model, fold_with)
        for name, first in names.items():
            gain = plan.stand_ins[first]
            model.set_submodule(name, PassThrough(gain.tensors, gain.factor).train(originals[first].training))
        for first in originals:
            gains = rows[first]
            assert not isinstance(gains, str)  # a norm with such a reason stays
            multiply(model, gains, plan.stand_ins[first].factor, old)
        check(expected, outputs(model, fold_with), restore)
    after = model.state_dict(keep_vars=True).keys()
    gone = [key for key in before if key not in after]

    return StripReport(
        removed=tuple(
            RemovedNorm(name, norm.kind, norm.width, sites, tuple(key for key in gone if key.startswith(f"{name}.")))
            for name, (norm, sites) in plan.norms.items()
        ),
        left=plan.left,
        notes=plan.notes,
        layout=plan.layout(layout, gone),
        model=model,
        restore=restore,
    )


# ---- reasons to keep -------------------------------------------------------------------------------------------------


def _stand_in(model: nn.Module, site: AttentionSite, norm: Norm, keep_gain: bool) -> PassThrough | Gain | str:
    """The module that replaces a norm, or the reason why the norm must stay."""
    if norm.module is None:
        return (
            f"its {norm.side} norm is no module of its own (it is written inline, or its module serves more than the "
            "logits); take it out of a graph of the model"
        )
    try:
        module = model.get_submodule(norm.module)
    except AttributeError:
        raise StripError(
            f"the layout names the norm {norm.module!r}, which {type(model).__name__} does not have; "
            "find the pairs again on this model"
        ) from None
    if norm.module == "":
        return f"its {norm.side} norm is the whole model"
    names = _names_of(module, model)
    if len({id(model.get_submodule(name.rpartition(".")[0])) for name in names}) > 1:
        other = next(name for name in names if name != norm.module)
        return f"its {norm.side} norm {norm.module!r} is also registered as {other!r}"
    required = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if keep_gain or norm.kind == "l2":
        form = _form(module, norm)
        if form is None:
            return f"what its {norm.side} norm {norm.module!r} multiplies features with cannot be told"
        parameters, offset, number = form
        return Gain(parameters, offset, number) if keep_gain and parameters else PassThrough(factor=number)
    if len(required) == 1:
        return PassThrough()
    if _serves_both_sides(site, norm) and len(required) == 2 and _norms_each(module, norm.width):
        return PassThrough(tensors=2)
    return (
        f"its {norm.side} norm {norm.module!r} takes more than one tensor ({', '.join(required)}), "
        "and what it returns is not clear"
    )


def _names_of(module: nn.Module, model: nn.Module) -> list[str]:
    """All names of a module: it may have several parents, and several names in one."""
    return [name for name, other in model.named_modules(remove_duplicate=False) if other is module]


@torch.no_grad()
def _norms_each(module: nn.Module, width: int) -> bool:
    """Whether a module of two tensors returns both, in order, each normalised independently of the other."""
    like = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), torch.zeros(()))
    if like.is_meta:
        return False
    a, b = (torch.randn(2, 3, width).to(like) for _ in range(2))
    try:
        one, two = module(a, b), module(4 * a, b)
    except Exception:
        return False
    if not isinstance(one, tuple) or len(one) != 2 or any(y.shape != a.shape for y in one):
        return False
    other = module(a, 4 * b)
    straight = all(((y * x).sum(-1) > 0).all() for x, y in zip((a, b), one, strict=True))
    pairs = ((one[0], two[0]), (one[1], other[1]))
    sizeless = all(torch.allclose(y, of_longer, rtol=2e-2, atol=1e-3) for y, of_longer in pairs)
    apart = torch.equal(one[1], two[1]) and torch.equal(one[0], other[0])
    return bool(straight and sizeless and apart)


@torch.no_grad()
def _form(module: nn.Module, norm: Norm) -> tuple[dict[str, nn.Parameter], float, float] | None:
    """Gain and bias, offset and number of a norm that computes x / statistic * number * (offset + gain) + bias, from
    its output for features of mean 0 and RMS 1; None if it has another form."""
    own = dict(module.named_parameters())
    gain = next((n for n in own if norm.weight is not None and norm.weight.endswith(f".{n}")), None)
    if (gain is None and own) or len(own) > 2 or any("." in n or p.is_meta for n, p in own.items()):
        return None
    parameters = {} if gain is None else {gain: own.pop(gain), **own}
    weight, bias = (*parameters.values(), None, None)[:2]
    shape = (norm.width,) if weight is None else weight.shape
    if math.prod(shape) % 2:
        return None
    x = torch.tensor([1.0, -1.0]).repeat(2, math.prod(shape) // 2).view(2, *shape)
    training = module.training
    try:
        y = module.eval()(x if weight is None else x.to(weight)).float()
    except Exception:
        return None
    finally:
        module.train(training)
    statistic = math.sqrt(norm.width) if norm.kind == "l2" else 1.0
    for offset in (0.0, 1.0):
        scaled = x / statistic * (1 if weight is None else weight.float() + offset)
        rest = y if bias is None else y - bias.float()
        number = float((rest * scaled).sum() / scaled.square().sum().clamp_min(1e-12))
        if number and torch.allclose(rest, number * scaled, rtol=2e-2, atol=1e-3):
            return parameters, offset, 1.0 if abs(number - 1) < 1e-3 else number
    return None


# ---- factors of the replacements -------------------------------------------------------------------------------------


def _without_numbers(site: AttentionSite, stand_ins: Mapping[str, PassThrough | Gain]) -> Scales:
    """Scales that cancel the constant factors of the replacements, so that these return their input."""
    sides: dict[Side, float] = {"query": 1.0, "key": 1.0}
    for norm in site.qk_norm:
        sides[norm.side] = 1 / stand_ins[str(norm.module)].factor
    return Scales(sides["query"], sides["key"])


def _factor(site: AttentionSite, norm: Norm, scales: Scales) -> float:
    """The factor of a norm's replacement: for both sides it is applied twice, so the square root of the product."""
    return math.sqrt(scales.query * scales.key) if _serves_both_sides(site, norm) else scales.of(norm.side)


def _serves_both_sides(site: AttentionSite, norm: Norm) -> bool:
    return {n.side for n in site.qk_norm if n.module == norm.module} == {"query", "key"}
