"""Text and syntax trees of the user's files and functions, and what several readers look for in them.

A file that cannot be read has no text, and source that cannot be parsed has an empty tree.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any

LARGEST = 400_000
"""The most bytes of a file that is read as text; larger files are data."""

ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
"""The operators that are evaluated while source is read."""


def text_of(file: Path) -> str:
    """The text of a file; "" where it cannot be read or is too large."""
    try:
        return file.read_text("utf-8", errors="ignore") if file.stat().st_size <= LARGEST else ""
    except OSError:
        return ""


def parsed(text: str | bytes) -> ast.Module:
    """The syntax tree of a text."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return ast.Module([], [])


def tree_of(file: Path) -> ast.Module:
    """The syntax tree of a file, parsed again only when the file changes. Callers must not modify it."""
    try:
        state = file.stat()
        return _tree_of_version(file, state.st_mtime_ns, state.st_size)
    except OSError:
        return ast.Module([], [])


@lru_cache(maxsize=256)
def _tree_of_version(file: Path, changed: int, size: int) -> ast.Module:
    return parsed(file.read_bytes())


def tree_of_function(function: Callable[..., Any] | CodeType) -> ast.Module:
    """The syntax tree of a function's source, as the only statement of a module."""
    try:
        return parsed(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def names_in(node: ast.AST) -> set[str]:
    """The variables that occur in a tree."""
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def read_name(node: ast.AST | None) -> str:
    """The name that an expression reads: `x`, `config.x`, `self.config.x`, `config["x"]`; "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        return node.slice.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("lower", "upper"):
        return read_name(node.func.value)
    return ""


def assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The targets of an assignment statement, each with its value; nothing for any other node."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=False)
            else:
                yield target, node.value
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        yield node.target, node.value


def assignments_in(tree: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The targets of all assignments in a tree, each with its value."""
    for node in ast.walk(tree):
        yield from assignments(node)
