"""Arguments that a method of the model makes: hidden states, memories, the carry of a recurrence.

In: a model and a parameter of its forward. Out: a function from the other arguments to this one, which calls that
method: `model.initial_carry(batch)`, `model.init_hidden(2)`. The method is recognised by its return annotation or name.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.targets.inputs.changes import each_in
from quack_fx.targets.inputs.values import BATCH, TOKENS
from quack_fx.targets.sizes.made_up import made_up
from quack_fx.targets.sizes.signatures import hints_of, own_methods, required

_MAKES = (
    r"_*(get_|make_|create_|generate_|build_|allocate_)?"
    r"(init|initial|initialize|empty|new|zero|fresh|begin|start|make|create)"
)

Maker = Callable[[Mapping[str, Any]], Any]


def maker_of(model: nn.Module, parameter: inspect.Parameter) -> Maker | None:
    """The function that makes an argument from the others; None where no method of the model does."""
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return None
    wanted = hints_of(type(model).forward).get(parameter.name)
    stem = re.escape(parameter.name.lower().rstrip("s"))
    named = re.compile(rf"{_MAKES}_(\w+_)?{stem}s?")
    for name, method in own_methods(model).items():
        returned = hints_of(method).get("return")
        if (_is_own_class(wanted) and returned is wanted) or named.fullmatch(name.lower()):
            return _calling(getattr(model, name))
    return None


def _is_own_class(hint: Any) -> bool:
    if not isinstance(hint, type) or typing.get_origin(hint) is not None or issubclass(hint, Tensor | nn.Module):
        return False
    return hint.__module__.split(".")[0] not in ("builtins", "typing", "torch", "collections", "numpy")


def _calling(method: Callable[..., Any]) -> Maker:
    def make(others: Mapping[str, Any]) -> Any:
        hints = hints_of(method)
        given: dict[str, Any] = {}
        for name in required(method):
            if name in others:
                given[name] = others[name]
            elif re.search(r"batch|bsz|(^|_)bs$|^b$|^n$", name.lower()):
                given[name] = BATCH
            elif re.search(r"len|tokens|^t$", name.lower()):
                given[name] = TOKENS
            else:
                given[name] = made_up(name, hints.get(name))
        with torch.no_grad():
            return each_in(method(**given), lambda x: torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else None)

    return make
