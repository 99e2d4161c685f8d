"""DOOR: the model among the names of a namespace.

In: a `Namespace` and, maybe, a name. Out: `Recipe`s that make the model, the likeliest first. Without a name the first
of these that the file has: a zero-argument factory, a module that the file made, the one nn.Module class that no other
class of the file contains, a factory with arguments. Of several of a kind the one counts that the repository uses most;
where none stands out, the user says which. What a class or factory needs and has no default of, `sizes` finds or makes
up.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import networkx as nx
from torch import nn

from quack_fx.errors import TargetError
from quack_fx.targets.files import Namespace, without
from quack_fx.targets.packages import python_files, repository_of
from quack_fx.targets.sizes import Call, calls
from quack_fx.targets.sizes.plans import needs_nothing, required
from quack_fx.targets.sizes.sources import PARSED
from quack_fx.targets.world import World
from quack_fx.targets.world.inert import InertModule

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
        call: The call with which it is made, where the file does not say with which values.
    """

    text: str
    make: Callable[[], Any]
    made: bool = False
    call: Call | None = None


def pick(namespace: Namespace, name: str | None, world: World) -> Iterator[Recipe]:
    """Recipes of the model called `name`, or of the one that is clearly meant: the likeliest first.

    Arguments:
        namespace: What the target's file defines.
        name: The name behind the colon, if one was typed.
        world: What the file found around it.

    Raises:
        TargetError: No such name, nothing that is a model, or several.
    """
    if name is not None:
        yield from _recipes(namespace, name, _lookup(namespace, name), world)
        return
    own = {n: v for n, v in namespace.names.items() if _defined_here(v, namespace) and not n.startswith("__")}
    factories = [n for n, v in own.items() if isinstance(v, FunctionType) and _makes_model(n, v)]
    ready = [n for n in factories if not required(own[n])]
    roots = _roots(namespace, own)
    ready_roots = [n for n in roots if needs_nothing(n, own[n], namespace.names)] or roots
    for names in (ready, _instances(namespace), ready_roots, factories):
        chosen = names if len(names) < 2 else _most_used(namespace, names, world)
        if len(chosen) == 1:
            if len(names) > 1:
                others = _list([n for n in names if n != chosen[0]])
                world.notes.append(f"{chosen[0]} was taken of the models in {namespace.source}; others: {others}")
            yield from _recipes(namespace, chosen[0], namespace.names[chosen[0]], world)
            return
        if names:
            typed = " or ".join(f"{namespace.source}:{n}" for n in names[:4])
            raise TargetError(f"{namespace.source} has {len(names)} models ({_list(names)}); type {typed}")
    foreign = [n for n, v in namespace.names.items() if _is_model_class(v) and v.__module__.split(".")[0] != "torch"]
    hint = f"it imports {_list(foreign)}: type {namespace.source}:{foreign[0]}" if foreign else "type --build EXPR"
    raise TargetError(
        f"no model in {namespace.source}: neither a zero-argument factory (build_model) nor an nn.Module"
        f"{without(world)}; {hint}"
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


def _recipes(namespace: Namespace, name: str, value: Any, world: World) -> Iterator[Recipe]:
    """How to get a model out of one named thing."""
    if isinstance(value, nn.Module):
        yield Recipe(name, lambda: value, made=True)
        return
    if not callable(value) or (isinstance(value, type) and not _is_model_class(value)):
        kind = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise TargetError(f"{name!r} of {namespace.source} is {kind}, not an nn.Module, a class of one or a factory")

    if not required(value):
        yield Recipe(f"{name}()", partial(_checked, value, name, namespace))
        return
    for call in calls(name, value, namespace.names, namespace.file, world.own_files()):
        yield Recipe(call.text, partial(_checked, call, name, namespace), call=call)


def _checked(make: Callable[[], Any], name: str, namespace: Namespace) -> Any:
    """What a class or factory makes, if it is a model."""
    model = make()
    if not isinstance(model, nn.Module):
        raise TargetError(f"{name}() of {namespace.source} gives a {type(model).__name__}, not an nn.Module")
    return model


def _most_used(namespace: Namespace, names: list[str], world: World) -> list[str]:
    """Of several models the one that the repository means most: it is imported elsewhere, or called like the file,
    or made of more of the file's classes than any other. All of them where none stands out."""
    stem = namespace.file.stem if namespace.file is not None else ""
    used = _uses_elsewhere(namespace, names)

    def parts(name: str) -> int:
        value = namespace.names[name]
        return len(_contains(namespace, name)) if isinstance(value, type) else 0

    def called_alike(name: str) -> bool:
        return _plain(name) == _plain(stem)

    for measure in (called_alike, used.__getitem__, parts):
        best = max(map(measure, names))
        first = [n for n in names if measure(n) == best]
        if len(first) == 1 and best:
            return first
        names = first
    return names


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _uses_elsewhere(namespace: Namespace, names: list[str]) -> Counter[str]:
    """In how many other files of the repository each name stands."""
    found: Counter[str] = Counter()
    if namespace.file is None:
        return found
    words = {name: re.compile(rf"\b{re.escape(name)}\b") for name in names}
    for path in python_files(repository_of(namespace.file, namespace.file.parent), namespace.file)[:PARSED]:
        if path == namespace.file:
            continue
        try:
            text = path.read_text("utf-8", errors="ignore")
        except OSError:
            continue
        if namespace.file.stem in text:
            found.update(name for name, word in words.items() if word.search(text))
    return found


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
    made = {n: v for n, v in namespace.names.items() if isinstance(v, nn.Module) and not isinstance(v, InertModule)}
    parts = {id(part) for v in made.values() for part in v.modules() if part is not v}
    unique = {id(v): n for n, v in reversed(made.items()) if id(v) not in parts}
    return [n for n in made if n in unique.values()]


def _roots(namespace: Namespace, own: dict[str, Any]) -> list[str]:
    """Model classes with a forward that no other class of the file builds on or uses."""
    classes = {n for n, v in own.items() if _is_model_class(v) and v.__name__ == n}
    uses = _class_uses(namespace)
    uses.add_nodes_from(classes)
    contained = {inner for cls in classes for inner in nx.descendants(uses, cls) if not nx.has_path(uses, inner, cls)}
    return [
        n
        for n in own
        if n in classes - contained and own[n].forward is not nn.Module.forward and not inspect.isabstract(own[n])
    ]


def _contains(namespace: Namespace, name: str) -> set[str]:
    """Classes and functions of the file that one uses, those that they use included."""
    uses = _class_uses(namespace)
    return set(nx.descendants(uses, name)) if name in uses else set()


def _class_uses(namespace: Namespace) -> nx.DiGraph[str]:
    """Which definition of a file names which other."""
    uses: nx.DiGraph[str] = nx.DiGraph()
    if namespace.file is not None:
        for name, node in _definitions(ast.parse(namespace.file.read_bytes()).body):
            uses.add_edges_from(
                (name, other)
                for other in _names_in(node)
                if other != name and _defined_here(namespace.names.get(other), namespace)
            )
    return uses


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
