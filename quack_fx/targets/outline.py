"""What a Python file defines, and which of its definitions use which.

In: a `Namespace`. Out: names of model classes (`roots`, `varied`) and of functions that return a model (`makers`).
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import networkx as nx
from torch import nn

from quack_fx.targets.files import Namespace, defines
from quack_fx.targets.source import assignments_in, names_in, parsed, read_name, tree_of, tree_of_function
from quack_fx.targets.world.inert import Inert, InertModule


def defined_here(value: Any, namespace: Namespace) -> bool:
    """Whether the file itself defines a class or function."""
    return getattr(value, "__module__", None) == namespace.module


def is_model_class(value: Any) -> bool:
    """Whether a value is a subclass of nn.Module."""
    return isinstance(value, type) and issubclass(value, nn.Module)


def own_names(namespace: Namespace) -> dict[str, Any]:
    """What the file itself defines."""
    return {n: v for n, v in namespace.names.items() if defined_here(v, namespace) and not n.startswith("__")}


def instances(namespace: Namespace) -> list[str]:
    """Modules that the file has built, without submodules of others."""
    made = {n: v for n, v in namespace.names.items() if isinstance(v, nn.Module) and not isinstance(v, InertModule)}
    parts = {id(part) for v in made.values() for part in v.modules() if part is not v}
    unique = {id(v): n for n, v in reversed(made.items()) if id(v) not in parts}
    return [n for n in made if n in unique.values()]


def roots(namespace: Namespace) -> list[str]:
    """Model classes that have a forward and that no other class of the file uses or derives from. Classes without a
    constructor of their own count only where there are no others."""
    own = own_names(namespace)
    classes = {n for n, v in own.items() if is_model_class(v) and v.__name__ == n}
    uses = _class_uses(namespace)
    uses.add_nodes_from(classes)
    contained = {inner for cls in classes for inner in nx.descendants(uses, cls) if not nx.has_path(uses, inner, cls)}
    found = [n for n in own if n in classes - contained and _runs(own[n])]
    return [n for n in found if own[n].__init__ is not nn.Module.__init__] or found


def varied(namespace: Namespace, names: list[str]) -> list[str]:
    """Models of the file from which these classes derive."""
    own = own_names(namespace)
    bases = {base for name in names if isinstance(own.get(name), type) for base in own[name].__mro__[1:]}
    return [n for n, v in own.items() if is_model_class(v) and v in bases and _runs(v)]


_VERBS = {"build", "make", "create", "get", "load", "new", "init"}


def sizes_of_one(namespace: Namespace, names: list[str]) -> bool:
    """Whether names are one model in several sizes: classes with the same base class and no method but a constructor,
    or functions that return what the same name makes and whose own names begin with the same word."""
    if namespace.file is None:
        return False
    nodes = dict(_definitions(tree_of(namespace.file).body))
    if all(isinstance(nodes.get(name), ast.FunctionDef) for name in names):
        made = {frozenset(_returns_of(nodes[name])) for name in names}  # type: ignore[arg-type]
        words = {re.split(r"_|\d", name)[0] for name in names}
        return len(made) == len(words) == 1 and len(made.pop()) == 1 and words.isdisjoint(_VERBS)
    bases = {tuple(getattr(namespace.names[name], "__bases__", ())) for name in names}
    return len(bases) == 1 and all(_only_constructs(nodes.get(name)) for name in names)


def _only_constructs(node: ast.AST | None) -> bool:
    """Whether the only method of a class is a constructor that passes constants to the one of its base class."""
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
    if [method.name for method in methods] != ["__init__"]:
        return False
    given = [c for c in ast.walk(methods[0]) if isinstance(c, ast.Call) and read_name(c.func) == "__init__"]
    values = [v for c in given for v in (*c.args, *(k.value for k in c.keywords))]
    return any(isinstance(part, ast.Constant) for value in values for part in ast.walk(value))


def contains(namespace: Namespace, name: str) -> set[str]:
    """Classes and functions of the file that one of them uses, directly or indirectly."""
    uses = _class_uses(namespace)
    return set(nx.descendants(uses, name)) if name in uses else set()


def makers(namespace: Namespace, of: str | None = None) -> dict[str, str]:
    """Functions of the file that build and return a model of the class `of`, or of any, each with the class's name."""
    made = {n: v for n, v in namespace.names.items() if _is_own_model(n, v, namespace) and of in (None, n)}
    found: dict[str, str] = {}
    if namespace.file is None:
        return found
    functions = [n for _, n in _definitions(tree_of(namespace.file).body) if not isinstance(n, ast.ClassDef)]
    for _ in functions:  # a function that returns what another one built counts, too
        before = len(found)
        for node in functions:
            value = namespace.names.get(node.name)
            called = _returns_of(node) & (made.keys() | found.keys())
            if node.name not in found and called and isinstance(value, FunctionType):
                first = min(called)
                found[node.name] = found.get(first, first)
        if len(found) == before:
            break
    return found


def makers_in(text: str, of: str) -> list[str]:
    """Top-level functions of another file that return a model of this class; none where importing it may run more."""
    tree = parsed(text)
    if not all(defines(node) or _is_idle(node) for node in tree.body):
        return []
    return [n for n, node in _definitions(tree.body) if not isinstance(node, ast.ClassDef) and of in _returns_of(node)]


def _is_idle(node: ast.stmt) -> bool:
    """Whether a statement does nothing on import: a docstring, or `if __name__ == "__main__"`."""
    if isinstance(node, ast.If):
        return "__name__" in names_in(node.test)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_own_model(name: str, value: Any, namespace: Namespace) -> bool:
    """Whether a name is a model class that is not one of torch's own layers."""
    known = is_model_class(value) and not value.__module__.startswith("torch.")
    return known and value.__name__ == name and not isinstance(value, Inert)


def _returns_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Names of callables whose result a function returns: `return Net(...)`, or `net = Net(...); return net`."""
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
    names = {value.id for value in returned if isinstance(value, ast.Name)}
    returned += [v for name, v in assignments_in(function) if isinstance(name, ast.Name) and name.id in names]
    return {v.func.id for v in returned if isinstance(v, ast.Call) and isinstance(v.func, ast.Name)}


def _runs(model: Any) -> bool:
    """Whether a class has a forward that does not only raise."""
    if inspect.isabstract(model) or model.forward is nn.Module.forward:
        return False
    functions = tree_of_function(model.forward).body
    body = functions[0].body if functions and isinstance(functions[0], ast.FunctionDef) else []
    return not body or not isinstance(body[-1], ast.Raise)


def _class_uses(namespace: Namespace) -> nx.DiGraph[str]:
    """Graph with an edge from each definition of a file to those that it names."""
    uses: nx.DiGraph[str] = nx.DiGraph()
    if namespace.file is not None:
        for name, node in _definitions(tree_of(namespace.file).body):
            uses.add_edges_from(
                (name, other)
                for other in _names_in(node)
                if other != name and defined_here(namespace.names.get(other), namespace)
            )
    return uses


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _definitions(body: list[ast.stmt]) -> Iterator[tuple[str, Definition]]:
    """Top-level classes and functions of a file, also inside `if`, `try` and `with`."""
    for node in body:
        if isinstance(node, Definition):
            yield node.name, node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for field in ("body", "orelse", "finalbody"):
                yield from _definitions(getattr(node, field, []))


def _names_in(node: ast.AST) -> Iterator[str]:
    """Names that a definition uses; arguments of `isinstance` do not count."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
        return
    if isinstance(node, ast.Name):
        yield node.id
    for child in ast.iter_child_nodes(node):
        yield from _names_in(child)
