"""Parameters and annotations of a class or factory.

Parameters include those of a base class to whose constructor it passes `*args` and `**kwargs`.
"""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from quack_fx.targets.source import tree_of_function


def required(function: Callable[..., Any]) -> list[str]:
    """Names of the parameters without a default."""
    return [p.name for p in parameters(function) if p.default is p.empty]


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Parameters that may be given by name, including those that a constructor passes on to its base class."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):
        return []
    own = [p for p in found if not is_variable(p)]
    if not isinstance(function, type) or not any(p.kind is p.VAR_KEYWORD for p in found):
        return own
    bases = (base for base in function.__mro__[1:] if "__init__" in vars(base))
    base = next((base for base in bases if base not in (nn.Module, object)), None)
    if base is None or (given := _passed_on(function)) is None:
        return own
    count, names = given
    names |= {p.name for p in own}
    by_place = any(p.kind is p.VAR_POSITIONAL for p in found)
    behind = [p for p in parameters(base)[count:] if p.name not in names]
    return own + [p.replace(kind=p.KEYWORD_ONLY) if by_place else p for p in behind]


def is_variable(parameter: inspect.Parameter) -> bool:
    """Whether a parameter is `*args` or `**kwargs`."""
    return parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def _passed_on(made: type) -> tuple[int, set[str]] | None:
    """What a constructor passes to that of its base class beside its own `**kwargs`: the number of positional
    arguments, and the names of the others. None where it does not pass `**kwargs` on."""
    owner = next(base for base in made.__mro__ if "__init__" in vars(base))
    for node in ast.walk(tree_of_function(vars(owner)["__init__"])):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__init__"):
            continue
        if any(keyword.arg is None for keyword in node.keywords):
            before = [a for a in node.args if not isinstance(a, ast.Starred)]
            by_super = isinstance(node.func.value, ast.Call)
            return len(before) - (not by_super), {k.arg for k in node.keywords if k.arg}
    return None


def own_methods(model: nn.Module) -> dict[str, Callable[..., Any]]:
    """Methods of a model other than its forward and those of nn.Module, by name."""
    members = inspect.getmembers(type(model), inspect.isfunction)
    return {name: method for name, method in members if name != "forward" and not hasattr(nn.Module, name)}


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of a function, or of a class's constructor; empty where a name in them is not defined."""
    made = inspect.getattr_static(function, "__init__", None) if isinstance(function, type) else function
    for owner in (made, function):
        try:
            if hints := typing.get_type_hints(owner):
                return hints
        except Exception:  # annotations may name what was never imported
            continue
    return {}


_COMMON = frozenset("builtins types typing collections torch argparse pathlib enum numpy".split())
"""Packages whose classes are no one's configs or states."""


def is_users_class(option: Any) -> bool:
    """Whether an annotation is a class that may be a config: no module or tensor, none of Python, torch or numpy."""
    if not isinstance(option, type) or typing.get_origin(option) is not None or issubclass(option, nn.Module | Tensor):
        return False
    return option.__module__.split(".")[0] not in _COMMON


def plain_type(hint: Any) -> Any:
    """The built-in type of an annotation, or None: `list[int]` -> list."""
    hint = inner_hint(hint)
    return hint if hint in (int, float, str, bool, dict, list, tuple) else typing.get_origin(hint)


def inner_hint(hint: Any) -> Any:
    """`Optional[int]` -> int."""
    options = [o for o in typing.get_args(hint) if o is not type(None)]
    is_union = type(None) in typing.get_args(hint)
    return options[0] if is_union and len(options) == 1 else hint
