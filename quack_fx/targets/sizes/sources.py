"""Finds sizes of a model in its repository: in training scripts, config classes and config files.

In: the files of a repository. Out: `Source`s. Nothing is run: Python is parsed, and values are constants (numbers,
strings, lists of them), arithmetic on them, and names with such a value in the same file.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any, Literal

import torch

from quack_fx.targets.packages import files_of, python_files
from quack_fx.targets.source import ARITHMETIC, assignments, assignments_in, parsed, read_name, text_of

DATA_FILES, READ_ME = 300, 20
"""The most data files and the most Markdown files that are read."""

_CODE = re.compile(r"^```(?:python|py)\n(.*?)^```", re.MULTILINE | re.DOTALL)

Kind = Literal["call", "options", "class", "dict", "assignments", "file"]
"""A call of the model, also in Markdown; the options of an `argparse` parser; fields of a class; a dict; assignments to
one object (`config.n_layer = 12`) or to the names of a file; a JSON or YAML file."""


@dataclass(frozen=True)
class Source:
    """Values by name that stand in one place of a repository.

    `where` is file and line, for reports ("run.py:12"). `mentions` tells whether the file names the class or function
    that is to be called; `of` is the name of the class, object or callee.
    """

    kind: Kind
    where: str
    values: Mapping[str, Any] = field(repr=False)
    mentions: bool = False
    of: str = ""

    def has(self, wanted: set[str]) -> set[str]:
        """The wanted names that it has a value for."""
        return wanted & self.values.keys()


def sources(
    repository: Path, near: Path, callee: str, callees: Mapping[str, tuple[str, ...]], words: set[str]
) -> list[Source]:
    """All sources of a repository, those of the files nearest to `near` first.

    `callee` is the class or function that is to be called; `callees` has the parameters, in order, of that and of its
    config classes, by name. A file that names no callee and less than two of the `words`, for which values are wanted,
    is skipped.
    """

    def shown(path: Path) -> str:
        return str(path.relative_to(repository)) if path.is_relative_to(repository) else path.name

    found: list[Source] = []
    for path in python_files(repository, near):
        text = text_of(path)
        if any(name in text for name in callees) or sum(word in text for word in words) > 1:
            mentions = path == near or callee in text or f"import {near.stem}" in text or f".{near.stem} " in text
            found += _in_python(parsed(text), shown(path), mentions, callees)
    for path in itertools.islice(files_of(repository, ".md"), READ_ME):
        text = text_of(path)
        for block in _CODE.findall(text) if any(name in text for name in callees) else ():
            inside = _in_python(parsed(dedent(block)), shown(path), True, callees)
            found += [source for source in inside if source.kind == "call"]  # other values are examples
    for path in itertools.islice(files_of(repository, ".json", ".yaml", ".yml"), DATA_FILES):
        found += _in_data(path, shown(path), callee)
    return found


def _in_python(
    tree: ast.Module, shown: str, mentions: bool, callees: Mapping[str, tuple[str, ...]]
) -> Iterator[Source]:
    options, assigned = _options(tree), _assignments(tree)
    names = dict(assigned.pop("", {}))
    if options:
        yield Source("options", f"{shown} (options)", options, mentions)
    for owner, values in assigned.items():
        if len(values) > 1:
            yield Source("assignments", f"{shown} ({owner}.*)", values, mentions, owner)
    if len(names) > 2:
        yield Source("assignments", shown, names, mentions)
    scope = {**{n: v for values in assigned.values() for n, v in values.items()}, **options, **names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            values = _fields(node, scope)
            if len(values) > 1:
                yield Source("class", f"{shown}:{node.lineno} ({node.name})", values, mentions, node.name)
        elif isinstance(node, ast.Dict) or (isinstance(node, ast.Call) and read_name(node.func) == "dict"):
            values = _pairs(node, scope)
            if len(values) > 1:
                yield Source("dict", f"{shown}:{node.lineno}", values, mentions)
        elif isinstance(node, ast.Call) and (name := read_name(node.func)) in callees:
            values = _arguments(node, callees[name], scope, _dicts(tree, scope))
            if values:
                yield Source("call", f"{shown}:{node.lineno}", values, True, name)


def _options(tree: ast.Module) -> dict[str, Any]:
    """Defaults of the options that a file adds to a parser."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and read_name(node.func) in ("add_argument", "add_arg", "option")):
            continue
        flags = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        given = {k.arg: k.value for k in node.keywords if k.arg}
        flag = next((f for f in flags if f.startswith("--")), flags[0] if flags else "")
        named = given.get("dest")
        name = named.value if isinstance(named, ast.Constant) else flag.lstrip("-").replace("-", "_")
        action = given.get("action")
        if "default" in given:
            value = value_of(given["default"], {})
        elif isinstance(action, ast.Constant) and action.value in ("store_true", "store_false"):
            value = action.value == "store_false"
        else:
            continue
        if name and value is not UNKNOWN:
            found[str(name)] = value
    return found


def _assignments(tree: ast.Module) -> dict[str, dict[str, Any]]:
    """Values that are assigned to attributes, by the name of the object, and at the top level of a file, under ""."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for node in _certain(tree.body):
        for target, value in assignments(node):
            if isinstance(target, ast.Name):
                _set(found[""], target.id, value, found[""])
    for target, value in assignments_in(tree):
        owner = read_name(target.value) if isinstance(target, ast.Attribute) else ""
        if isinstance(target, ast.Attribute) and owner not in ("", "self", "torch"):
            known = value_of(value, found[""])
            if known is not UNKNOWN:
                found[owner][target.attr] = known
    return found


def _set(found: dict[str, Any], name: str, node: ast.expr, scope: Mapping[str, Any]) -> None:
    """Add the value of an expression under a name, if it is known."""
    if (value := value_of(node, scope)) is not UNKNOWN:
        found[name] = value


def _certain(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements of a file, also inside `if True:`."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Constant) and node.test.value:
            yield from _certain(node.body)


def _fields(node: ast.ClassDef, scope: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a class's fields: assigned in its body or in __init__, or defaults of __init__."""
    found: dict[str, Any] = {}
    for statement in node.body:
        for target, value in assignments(statement):
            if isinstance(target, ast.Name):
                _set(found, target.id, _default_of_field(value), {**scope, **found})
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            arguments = statement.args
            positional = [*arguments.posonlyargs, *arguments.args]
            defaults = zip(positional[::-1], arguments.defaults[::-1], strict=False)
            local: dict[str, Any] = {}
            for argument, default in [*defaults, *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]:
                if default is not None:
                    _set(local, argument.arg, default, scope)
            for target, value in itertools.chain.from_iterable(map(assignments, statement.body)):
                if isinstance(target, ast.Attribute):
                    _set(found, target.attr, value, {**scope, **local})
            found = {**local, **found}
    return found


def _default_of_field(node: ast.expr) -> ast.expr:
    """`field(default=3)` -> 3."""
    if isinstance(node, ast.Call) and read_name(node.func) in ("field", "Field"):
        return next((k.value for k in node.keywords if k.arg == "default"), node.args[0] if node.args else node)
    return node


def _pairs(node: ast.Dict | ast.Call, scope: Mapping[str, Any]) -> dict[str, Any]:
    pairs: list[tuple[Any, ast.expr]]
    if isinstance(node, ast.Dict):
        pairs = [(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
    else:
        pairs = [(k.arg, k.value) for k in node.keywords if k.arg]
    return {k: known for k, v in pairs if isinstance(k, str) and (known := value_of(v, scope)) is not UNKNOWN}


def _dicts(tree: ast.Module, scope: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = [(name, value) for name, value in assignments_in(tree) if isinstance(value, ast.Dict | ast.Call)]
    return {n.id: values for n, v in found if isinstance(n, ast.Name) and (values := _pairs(v, scope))}


def _arguments(
    node: ast.Call, parameters: tuple[str, ...], scope: Mapping[str, Any], dicts: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """The arguments of a call by parameter, as far as their values are known."""
    found: dict[str, Any] = {}
    given: list[tuple[str, ast.expr]] = []
    for name, value in zip(parameters, node.args, strict=False):
        if isinstance(value, ast.Starred):
            break
        given.append((name, value))
    for keyword in node.keywords:
        if keyword.arg is None:
            found |= {n: v for n, v in dicts.get(read_name(keyword.value), {}).items() if n in parameters}
        else:
            given.append((keyword.arg, keyword.value))
    return found | {n: v for n, node in given if (v := value_of(node, scope)) is not UNKNOWN}


UNKNOWN: Any = object()
"""Stands for a value that is not a constant."""

_SAME = ("int", "float", "FieldReference")
"""Calls whose result is their argument, as far as sizes are concerned."""


def value_of(node: ast.expr, scope: Mapping[str, Any]) -> Any:
    """The value of a constant expression; else `UNKNOWN`."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Attribute(attr=name) if read_name(node.value) == "torch":
            kind = getattr(torch, name, UNKNOWN)
            return kind if isinstance(kind, torch.dtype) else UNKNOWN
        case ast.Name() | ast.Attribute() | ast.Subscript():
            return scope.get(read_name(node), UNKNOWN)
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            items = [value_of(item, scope) for item in elements]
            return UNKNOWN if UNKNOWN in items else items if isinstance(node, ast.List) else tuple(items)
        case ast.Dict() if all(isinstance(key, ast.Constant) for key in node.keys):
            values = [value_of(value, scope) for value in node.values]
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            return UNKNOWN if UNKNOWN in values else dict(zip(keys, values, strict=True))
        case ast.Call(args=[argument]) if read_name(node.func) in _SAME:
            return value_of(argument, scope)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = value_of(operand, scope)
            return -value if isinstance(value, int | float) else UNKNOWN
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            left, right = value_of(node.left, scope), value_of(node.right, scope)
            if all(isinstance(v, int | float) and abs(v) < 1 << 40 for v in (left, right)):
                with suppress(ArithmeticError):
                    return ARITHMETIC[type(node.op)](left, right)
    return UNKNOWN


def _in_data(path: Path, shown: str, callee: str) -> Iterator[Source]:
    """The dicts of a JSON or YAML file: each by itself, and all of them together."""
    text = text_of(path)
    try:
        data = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except Exception:  # the file is not what its ending says
        return
    parts = [{str(k): v for k, v in part.items() if _is_plain(v)} for part in _dicts_in(data)]
    for part in [p for p in parts if len(p) > 1]:
        yield Source("file", shown, part, callee in text)
    if len(parts) > 1:
        yield Source("file", shown, {k: v for part in reversed(parts) for k, v in part.items()})


def _yaml(text: str) -> Any:
    """YAML, if a reader is installed; else None."""
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        return None
    return yaml.safe_load(text)


def _dicts_in(data: Any, depth: int = 0) -> Iterator[dict[Any, Any]]:
    if isinstance(data, dict) and depth < 6:
        yield data
        for value in data.values():
            yield from _dicts_in(value, depth + 1)


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return "${" not in value
    items = value if isinstance(value, list) else [value]
    return all(isinstance(v, bool | int | float | str | None) for v in items)
