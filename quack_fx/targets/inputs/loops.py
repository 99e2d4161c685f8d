"""List and dict comprehensions while reading a forward.

In: a comprehension and the frame that contains it. Out: its value.
"""

from __future__ import annotations

import ast
from typing import Protocol

from quack_fx.targets.inputs.uses import UNKNOWN, Data, Items, Value


class Frame(Protocol):
    """What reading a comprehension needs of the function that contains it."""

    scope: dict[str, Value]

    def of(self, node: ast.expr) -> Value:
        """The value of an expression."""

    def assign(self, target: ast.expr, value: Value) -> None:
        """Assign a value to names."""

    def elements(self, value: Value) -> list[Value]:
        """Values of a loop variable."""


def comprehension(frame: Frame, node: ast.ListComp | ast.GeneratorExp | ast.SetComp) -> Value:
    """A list comprehension, read for the first and the last element."""
    before = dict(frame.scope)
    found: list[Value] = []
    generator = node.generators[0]
    for value in frame.elements(frame.of(generator.iter)):
        frame.assign(generator.target, value)
        found.append(frame.of(node.elt))
    frame.scope = before
    return Items(tuple(found)) if any(isinstance(v, Data) for v in found) else UNKNOWN


def same_keys(frame: Frame, node: ast.DictComp) -> Value:
    """A dict with the keys of an argument, `{k: v.to(x) for k, v in batch.items()}`: that argument itself."""
    parts = [inner for inner in ast.walk(node.value) if isinstance(inner, ast.Subscript)]
    for part in parts if isinstance(node.key, ast.Name) else []:
        found = frame.of(part.value) if ast.unparse(part.slice) == ast.unparse(node.key) else UNKNOWN
        if isinstance(found, Data):
            return found
    source = node.generators[0].iter
    if isinstance(source, ast.Call) and isinstance(source.func, ast.Attribute) and source.func.attr == "items":
        return frame.of(source.func.value)
    return UNKNOWN
