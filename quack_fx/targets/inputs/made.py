"""Methods of the model that prepare a call of its forward.

`maker_of` finds a method that makes an argument (`model.init_hidden(2)`), by its return annotation or its name.
`set_up` calls methods that set attributes which the forward asserts not to be None (`setup_caches(max_batch_size)`),
with arguments made up from their names.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from quack_fx.targets.inputs.changes import each_in
from quack_fx.targets.inputs.values import BATCH, TOKENS
from quack_fx.targets.sizes.made_up import made_up
from quack_fx.targets.sizes.signatures import hints_of, is_users_class, is_variable, own_methods, required
from quack_fx.targets.sizes.uses import asserted
from quack_fx.targets.source import assignments_in, tree_of_function

_MAKES = (
    r"_*(get_|make_|create_|generate_|build_|allocate_)?"
    r"(init|initial|initialize|empty|new|zero|fresh|begin|start|make|create)"
)

Maker = Callable[[Mapping[str, Any]], Any]


def maker_of(model: nn.Module, parameter: inspect.Parameter) -> Maker | None:
    """The function that makes an argument from the others; None where no method of the model does."""
    if is_variable(parameter):
        return None
    wanted = hints_of(type(model).forward).get(parameter.name)
    stem = re.escape(parameter.name.lower().rstrip("s"))
    named = re.compile(rf"{_MAKES}_(\w+_)?{stem}s?")
    for name, method in own_methods(model).items():
        returned = hints_of(method).get("return")
        if (is_users_class(wanted) and returned is wanted) or named.fullmatch(name.lower()):
            return _calling(getattr(model, name))
    return None


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


def set_up(model: nn.Module) -> list[str]:
    """Call the methods that the forward of a model depends on; returns the calls as text."""
    done: list[str] = []
    for name in asserted(tree_of_function(model.forward)):
        if getattr(model, name, 0) is None and (method := _setter(model, name)) is not None:
            hints = hints_of(method)
            given = {n: made_up(n, hints.get(n)) for n in required(method)}
            method(**given)
            done.append(f"{method.__name__}({', '.join(f'{n}={v!r}' for n, v in given.items())})")
    return done


def named_in_error(model: nn.Module, message: str) -> str:
    """The method of the model's modules that an error says to call first ("Please call rope_init()"); "" if none."""
    for name in _CALL_FIRST.findall(message):
        if any(name in own_methods(module) for module in model.modules()):
            return str(name)
    return ""


def call_on_all(model: nn.Module, method: str) -> None:
    """Call a method without arguments on all modules of a model that have it."""
    for module in list(model.modules()):
        if method in own_methods(module):
            getattr(module, method)()


_CALL_FIRST = re.compile(r"\b[Cc]all (?:\w+\.)*`?(\w+)\(\)")


def _setter(model: nn.Module, attribute: str) -> Callable[..., Any] | None:
    for name, function in own_methods(model).items():
        targets = [target for target, _ in assignments_in(tree_of_function(function))]
        if any(isinstance(target, ast.Attribute) and target.attr == attribute for target in targets):
            return getattr(model, name)  # type: ignore[no-any-return]
    return None
