"""DOOR: the model among the names of a namespace.

In: a `Namespace` and, maybe, a name. Out: a `Recipe` that makes the model. Without a name the first of these that the
file has: a zero-argument factory, a module that the file made, the one nn.Module class that no other class of the file
contains. Classes that the file cannot build do not count where another can be built. Two of a kind are refused: the
user says which.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import networkx as nx
from torch import Tensor, nn

from quack_fx.errors import TargetError
from quack_fx.targets.files import Namespace

_FACTORY = re.compile(
    r"(build|make|create|get|init|load)(_\w+)?_(model|net|network|transformer|lm)|(build|model|make_model)"
)
"""Names of functions that may be called to see what they make; a return annotation makes any name do."""


@dataclass(frozen=True)
class Recipe:
    """How the model is made.

    Attributes:
        text: The expression that makes it, as one would write it in the file; empty where the class of what is
            made says more.
        make: Makes it.
        made: Whether the file has made it already, so that it is what it is.
    """

    text: str
    make: Callable[[], Any]
    made: bool = False


def pick(namespace: Namespace, name: str | None) -> Recipe:
    """The recipe of the model called `name`, or of the one that is clearly meant.

    Raises:
        TargetError: No such name, nothing that is a model, or several.
    """
    if name is not None:
        return _recipe(namespace, name, _lookup(namespace, name))
    own = {n: v for n, v in namespace.names.items() if _defined_here(v, namespace) and not n.startswith("__")}
    factories = [n for n, v in own.items() if isinstance(v, FunctionType) and _makes_model(n, v)]
    ready = [n for n in factories if not _required(own[n])]
    roots = _roots(namespace, own)
    ready_roots = [n for n in roots if _arguments(namespace, own[n]) is not None] or roots
    for names in (ready, _instances(namespace), ready_roots):
        if len(names) == 1:
            return _recipe(namespace, names[0], namespace.names[names[0]])
        if names:
            typed = " or ".join(f"{namespace.source}:{n}" for n in names[:4])
            raise TargetError(f"{namespace.source} has {len(names)} models ({_list(names)}); type {typed}")
    if factories:
        return _recipe(namespace, factories[0], own[factories[0]])  # refuses, with the arguments that it needs
    foreign = [n for n, v in namespace.names.items() if _is_model_class(v) and v.__module__.split(".")[0] != "torch"]
    hint = f"it imports {_list(foreign)}: type {namespace.source}:{foreign[0]}" if foreign else "type --build EXPR"
    raise TargetError(
        f"no model in {namespace.source}: neither a zero-argument factory (build_model) nor an nn.Module; {hint}"
    )


def _lookup(namespace: Namespace, name: str) -> Any:
    first, *rest = name.split(".")
    if first not in namespace.names:
        close = difflib.get_close_matches(first, [n for n in namespace.names if not n.startswith("_")], 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise TargetError(f"no name {first!r} in {namespace.source}{hint}")
    value = namespace.names[first]
    for part in rest:
        if not hasattr(value, part):
            raise TargetError(f"{first!r} of {namespace.source} has no attribute {part!r}")
        value = getattr(value, part)
    return value


def _recipe(namespace: Namespace, name: str, value: Any) -> Recipe:
    """How to get a model out of one named thing."""
    if isinstance(value, nn.Module):
        return Recipe(name, lambda: value, made=True)
    if _is_model_class(value):
        return _construct(namespace, name, value)
    if isinstance(value, type) or not callable(value):
        kind = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise TargetError(f"{name!r} of {namespace.source} is {kind}, not an nn.Module, a class of one or a factory")
    if needed := _required(value):
        raise TargetError(
            f"{name}() of {namespace.source} needs arguments ({_list(needed)}); "
            f'type --build "{name}({", ".join(f"{n}=..." for n in needed)})"'
        )

    def make() -> Any:
        model = value()
        if not isinstance(model, nn.Module):
            raise TargetError(f"{name}() of {namespace.source} gives a {type(model).__name__}, not an nn.Module")
        return model

    return Recipe(f"{name}()", make)


def _construct(namespace: Namespace, name: str, cls: type[nn.Module]) -> Recipe:
    """How to call a model class: with nothing, or with config objects that need nothing themselves."""
    configs = _arguments(namespace, cls)
    if configs is None:
        needed = _required(cls)
        tried = [c for n in needed if (c := _config(namespace, cls, n, alone=len(needed) == 1)) is not None]
        missing = [f"{config} has no default for {_list(_required(made))}" for config, made in tried if _required(made)]
        why = f" ({'; '.join(missing)})" if missing else ""
        raise TargetError(
            f"{name} of {namespace.source} needs arguments ({_list(needed)}) without a default{why}; "
            f'type --build "{name}({", ".join(f"{n}=..." for n in needed)})"'
        )
    text = ", ".join(f"{c}()" if len(configs) == 1 else f"{p}={c}()" for p, (c, _) in configs.items())
    return Recipe(f"{name}({text})", lambda: cls(**{p: c() for p, (_, c) in configs.items()}))


def _arguments(namespace: Namespace, cls: type[nn.Module]) -> dict[str, tuple[str, type]] | None:
    """The config class for each parameter without a default; None where there is none that needs nothing itself."""
    needed = _required(cls)
    configs = {n: _config(namespace, cls, n, alone=len(needed) == 1) for n in needed}
    found = {n: config for n, config in configs.items() if config is not None and not _required(config[1])}
    return found if len(found) == len(needed) else None


def _config(namespace: Namespace, cls: type, parameter: str, alone: bool) -> tuple[str, type] | None:
    """The class of a constructor's parameter: its annotation, or else the one dataclass of the file."""
    try:
        hint = typing.get_type_hints(inspect.getattr_static(cls, "__init__")).get(parameter)
    except Exception:  # annotations may name what was never imported
        hint = None
    for option in (hint, *typing.get_args(hint)):
        if isinstance(option, type) and option.__module__ != "builtins" and not issubclass(option, nn.Module | Tensor):
            known = next((n for n, v in namespace.names.items() if v is option), option.__name__)
            return (known, option) if option.__module__ not in ("types", "typing", "collections.abc") else None
    if hint is not None or not alone:
        return None
    found = {n: v for n, v in namespace.names.items() if isinstance(v, type) and dataclasses.is_dataclass(v)}
    found = {n: v for n, v in found.items() if not issubclass(v, nn.Module)}
    if len(found) > 1:
        found = {n: v for n, v in found.items() if n.startswith(cls.__name__)}
    return next(iter(found.items())) if len(found) == 1 else None


def _required(function: Callable[..., Any]) -> list[str]:
    """Parameters without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _defined_here(value: Any, namespace: Namespace) -> bool:
    return getattr(value, "__module__", None) == namespace.module


def _is_model_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _makes_model(name: str, function: FunctionType) -> bool:
    if _FACTORY.fullmatch(name):
        return True
    try:
        return _is_model_class(typing.get_type_hints(function).get("return"))
    except Exception:
        return False


def _instances(namespace: Namespace) -> list[str]:
    """Modules that the file made, without those that are part of another."""
    made = {n: v for n, v in namespace.names.items() if isinstance(v, nn.Module)}
    parts = {id(part) for v in made.values() for part in v.modules() if part is not v}
    unique = {id(v): n for n, v in reversed(made.items()) if id(v) not in parts}
    return [n for n in made if n in unique.values()]


def _roots(namespace: Namespace, own: dict[str, Any]) -> list[str]:
    """Model classes with a forward that no other class of the file builds on or uses."""
    classes = {n for n, v in own.items() if _is_model_class(v) and v.__name__ == n}
    uses = nx.DiGraph()
    uses.add_nodes_from(classes)
    if namespace.file is not None:
        for name, node in _definitions(ast.parse(namespace.file.read_bytes()).body):
            uses.add_edges_from((name, other) for other in _names_in(node) if other != name and other in own)
    contained = {inner for cls in classes for inner in nx.descendants(uses, cls) if not nx.has_path(uses, inner, cls)}
    return [
        n
        for n in own
        if n in classes - contained and own[n].forward is not nn.Module.forward and not inspect.isabstract(own[n])
    ]


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Classes and functions at the top of a file, those under `if` and `try` included."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _definitions(getattr(node, field, []))


def _names_in(node: ast.AST) -> Iterator[str]:
    """Names that a definition uses; asking `isinstance` is not using."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
        return
    if isinstance(node, ast.Name):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from _names_in(child)


def _list(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
