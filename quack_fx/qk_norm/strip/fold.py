"""Folds gains of norms into the projections before them, which keeps learned gains without a norm.

In: a model, the weight rows before each norm to remove, example inputs. Out: rows and biases, multiplied in place, and
a check that the outputs equal those of the model with gains but no statistics. `undo` reverts the fold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from quack_fx.errors import StripError
from quack_fx.qk_norm.call import Inputs, call_of
from quack_fx.qk_norm.strip.gains import Place, RowGain

_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-4}


@torch.no_grad()
def multiply(model: nn.Module, rows: Mapping[Place, RowGain], divided: float, old: dict[Tensor, Tensor]) -> None:
    """Multiply rows and biases by the gains, and add the norm's bias, divided by `divided`, to the biases.

    `old` gets what each parameter was before.
    """
    for (name, axes, at), gain in rows.items():
        weight = model.get_parameter(name)
        if weight not in old:
            old[weight] = weight.clone()
        index: list[Any] = [slice(None)] * weight.dim()
        for axis, coordinate in zip(axes, at, strict=True):
            index[axis] = coordinate
        weight[tuple(index)] *= gain.factor
        if gain.bias is not None:
            bias = model.get_parameter(gain.bias)
            if bias not in old:
                old[bias] = bias.clone()
            bias[at[0]] = bias[at[0]] * gain.factor + gain.offset / divided


@torch.no_grad()
def undo(old: Mapping[Tensor, Tensor]) -> None:
    """Give parameters their old values."""
    for parameter, value in old.items():
        parameter.copy_(value)


def reasons_against(rows: Mapping[str, Mapping[Place, RowGain] | str], modules: Iterable[str]) -> dict[str, str]:
    """For each norm module whose gain cannot be folded, the reason."""
    reasons: dict[str, str] = {}
    owner: dict[Place, str] = {}
    for module in modules:
        gains = rows.get(module, "it did not run on these inputs")
        if isinstance(gains, str):
            reasons[module] = f"the gain of its norm {module!r} cannot be folded: {gains}"
            continue
        for place, gain in gains.items():
            other = owner.setdefault(place, module)
            if other != module:
                reasons[module] = reasons[other] = f"a row of {place[0]!r} passes {other!r} and {module!r}"
            if gain.offset and gain.bias is None:
                reasons[module] = (
                    f"the norm {module!r} adds a bias, and the projection {place[0]!r} has none to fold it into"
                )
    return reasons


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The outputs of a model in evaluation mode."""
    args, kwargs = call_of(inputs)
    training = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            leaves = tree_flatten(model.eval()(*args, **kwargs))[0]
    finally:
        for module, was in training.items():
            module.training = was
    return [x.detach().clone() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def check(expected: Sequence[Tensor], found: Sequence[Tensor], restore: Callable[[], None]) -> None:
    """Refuse folding that has changed the outputs of the model.

    Raises:
        StripError: It has; `restore` was called.
    """
    for a, b in zip(expected, found, strict=True):
        bound = _ROUNDING.get(a.dtype, 2e-2) * float(a.abs().max())
        if not bool((a - b).abs().max() <= bound):
            restore()
            raise StripError(
                "folding the gains changes what the model computes: their rows serve something else, too; "
                "use gain='keep' or gain='drop' (the model is unchanged)"
            )
