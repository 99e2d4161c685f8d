"""Infers example inputs from the signature of a model's forward, its source and its layers.

In: a model. Out: candidates (`Inputs`), likeliest first: 2 sequences of 4 tokens. `Attempts` puts them in the order in
which to try them, with further candidates from the errors of failed ones. Parameters with a default keep it. What an
argument must be follows from the layer that the forward passes it to; where the source does not show that, the first
argument is assumed to be the input of the model's first layer.

    reading.py     reads the source of a forward: what it does with each argument
    calls.py       calls and operators while reading
    uses.py        what is recorded about an argument
    layers.py      what a layer takes as input
    arguments.py   candidates for one argument, from its use, and from dtype and axes that its name and annotation state
    pretrained.py  candidates for the models of transformers
    made.py        methods of the model that make arguments (`init_hidden`), or must run first (`setup_caches`)
    repair.py      from the error of a forward to inputs that avoid it
    measure.py     from a size that does not fit to the size of the inputs that does
    changes.py     changes of shape for all tensors of the inputs
    longer.py      longer sequences, if parts of an attention run on those only
    values.py      the values, and Python expressions for them
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from quack_fx.errors import TargetError
from quack_fx.targets.failure import cause_of
from quack_fx.targets.inputs.arguments import LIMIT, TIME, Context, options, signature
from quack_fx.targets.inputs.changes import LARGEST
from quack_fx.targets.inputs.made import maker_of
from quack_fx.targets.inputs.measure import Budget
from quack_fx.targets.inputs.pretrained import is_pretrained, pretrained_inputs
from quack_fx.targets.inputs.reading import read_uses
from quack_fx.targets.inputs.repair import Attempts, asks_for_more, failing_names, retry, unmet_names
from quack_fx.targets.inputs.values import BATCH, TOKENS, Array, Group, Inputs, Spec, cheapest_first, named
from quack_fx.targets.sizes.signatures import is_variable

__all__ = ["LIMIT", "Attempts", "Budget", "Inputs", "infer", "retry", "with_optional"]

_CONDITION = re.compile(rf"{TIME.pattern}|class_(ids?|labels?)|classes")
"""Parameters that are optional in the signature of many diffusion models, though their forward needs them."""

ROOM = 8 * LARGEST
"""Elements of all candidates together, which are all in memory until they are tried."""


def infer(model: nn.Module, name: str) -> list[Inputs]:
    """Example inputs that the forward may take, likeliest first; at least one. Errors call the model `name`."""
    if is_pretrained(model):
        return [named((), kwargs) for kwargs in pretrained_inputs(model, BATCH, TOKENS)]
    wanted = _wanted(model)
    if not wanted:
        return [named((), {})]
    optional = [p for p in signature(model) if p.default is None and p not in wanted]
    conditions = [p for p in optional if _CONDITION.fullmatch(p.name.lower())]
    found = _several(model, wanted)
    found += _candidates(model, wanted, LIMIT // 2 if conditions else LIMIT)
    if conditions:
        found += _candidates(model, [*wanted, *conditions], LIMIT // 2)
    if not found:
        raise TargetError(
            f"no inputs can be inferred for forward{inspect.signature(model.forward)} of {name}; "
            'give them, for example --inputs "torch.randn(2, 16, 64)"'
        )
    return found


def _several(model: nn.Module, wanted: list[inspect.Parameter]) -> list[Inputs]:
    """Inputs with several arguments (images and text) for a forward that requires none and passes several to layers."""
    if wanted[0].default is not None:
        return []
    optional = [p for p in signature(model) if p.default is None]
    uses = read_uses(model, [p.name for p in optional])
    given = [p for p in optional if uses[p.name].taken]
    return _candidates(model, given, 3) if len(given) > 1 else []


def with_optional(model: nn.Module, given: Inputs, error: BaseException) -> list[Inputs]:
    """Inputs with one more optional argument, for a forward that failed on `given` because an argument is None; those
    first whose new argument occurs in the failed statement."""
    cause = cause_of(error)
    parameters = signature(model)
    optional = [p for p in parameters if p.default is None and p.name not in given.kwargs]
    unmet = unmet_names(cause)
    failing = unmet or failing_names(cause)
    failed = [p for p in optional if p.name in failing]
    if not failed and not asks_for_more(cause):
        return []
    filled = [p for p in parameters if (p.default is p.empty or p.name in given.kwargs) and not is_variable(p)]
    # Reading stopped at the check that failed, so all arguments are inferred again.
    return [
        inputs if unmet else named(given.args, {**given.kwargs, p.name: inputs.kwargs[p.name]}, given.names)
        for p in (failed or optional)[:4]
        for inputs in _candidates(model, [*filled, p], 2)
        if p.name in inputs.kwargs
    ]


def _wanted(model: nn.Module) -> list[inspect.Parameter]:
    """Parameters that get an argument: the required ones, or else the first whose default is None."""
    parameters = signature(model)
    if required := [p for p in parameters if p.default is p.empty and not is_variable(p)]:
        return required
    return [p for p in parameters if p.default is None or is_variable(p)][:1]


def _candidates(model: nn.Module, parameters: list[inspect.Parameter], limit: int) -> list[Inputs]:
    """Inputs with a value for each of these parameters."""
    makers = {p.name: maker for p in parameters if p.default is p.empty and (maker := maker_of(model, p)) is not None}
    inferred = [p for p in parameters if p.name not in makers]
    if not inferred:
        makers, inferred = {}, parameters
    uses = read_uses(model, [p.name for p in inferred])
    # The argument that sets the sizes of the others: the first that is passed to a layer or has parts, or the first.
    first = next((p for p in inferred if uses[p.name].taken or uses[p.name].parts), inferred[0])
    found: list[Inputs] = []
    seen: set[str] = set()
    room = ROOM
    for data in options(first.name, first.annotation, uses[first.name], Context(model)):
        leading = _array(data)
        tokens = (leading.tokens if isinstance(leading, Array) else None) or TOKENS
        context = Context(model, leading)
        others = [options(p.name, p.annotation, uses[p.name], context) for p in inferred if p is not first]
        for combined in cheapest_first([[data], *others], max(limit // 2, limit - len(found))):
            count = sum(spec.count(tokens) for spec in combined)
            if count > min(LARGEST, room):
                continue
            room -= count
            chosen = iter(combined[1:])
            made = {p.name: (combined[0] if p is first else next(chosen)).make(tokens) for p in inferred}
            try:
                made |= {name: make(made) for name, make in makers.items()}
            except Exception:  # the method does not take these values
                continue
            inputs = _assign(parameters, made)
            if inputs.text not in seen:
                seen.add(inputs.text)
                found.append(inputs)
        if len(found) >= limit:
            break
    return found[:limit]


def _array(data: Spec) -> Spec:
    """The leading array: for a group, that of its first array."""
    while isinstance(data, Group):
        data = next((part for _, part in data.parts if isinstance(part, Array)), data.parts[0][1])
    return data


def _assign(parameters: list[inspect.Parameter], made: Mapping[str, Any]) -> Inputs:
    """The inputs that pass these values to their parameters."""
    args: list[Any] = []
    names: list[str] = []
    kwargs: dict[str, Any] = {}
    for parameter in parameters:
        value = made[parameter.name]
        if parameter.kind is parameter.VAR_KEYWORD and isinstance(value, Mapping):
            kwargs.update(value)
        elif parameter.kind is parameter.VAR_POSITIONAL and isinstance(value, tuple | list):
            args += value
            names += [""] * len(value)
        elif parameter.kind is parameter.KEYWORD_ONLY or parameter.default is None:
            kwargs[parameter.name] = value
        else:
            args.append(value)
            names.append(parameter.name)
    return named(tuple(args), kwargs, names)
