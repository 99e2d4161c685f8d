"""USER: the training step of one model as one text.

In: a layout and the shapes of its parameters. Out: source that needs torch alone: what the attentions of the model are
(`write.py`), then what is the same for all models (`parts/`, copied).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files

from quack_fx.layout import QKLayout
from quack_fx.train.program.kinds import kinds_of
from quack_fx.train.program.text import bracketed
from quack_fx.train.program.write import write_kinds

_PARTS = ("quack", "sharded", "look", "adamw", "step")
_CONDITION = re.compile(r"  # if (\w+)$")
"""Stands behind a statement that only programs with a feature have."""


def write_program(layout: QKLayout, shapes: Mapping[str, Sequence[int]], title: str, *, sharded: bool = False) -> str:
    """The training step of a model.

    Arguments:
        layout: Its pairs.
        shapes: Shape of every parameter that the layout names.
        title: Name of the model.
        sharded: Whether its weights may be DTensors.

    Returns:
        Source, stable under `ruff format` at 120 columns.

    Raises:
        LayoutError: The layout does not fit the shapes.
        EmitError: There is no pair.

    Example:
        >>> shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        >>> source = write_program(find_qk_pairs(model, ids), shapes, "GPT")
    """
    kinds = kinds_of(layout, shapes)
    features = {"sharded"} if sharded else set[str]()
    parts = [list(_definitions(part, features)) for part in _PARTS if part != "sharded" or sharded]
    kind, *rest = parts[0]
    model = "\n".join(write_kinds(kinds))
    body = [kind, model, *rest, *(text for part in parts[1:] for text in part)]
    unused = tuple(f"def {name}(" for name in ("largest", "smallest") if f"{name}(" not in model)
    body = [text for text in body if not text.startswith(unused)]
    head = f'"""AdamW with QuacK for {title}."""\n\n{_imports(body)}'
    return "\n\n\n".join([head, *body]) + "\n"


def _definitions(part: str, features: Collection[str]) -> Iterator[str]:
    """The classes and functions of a part, decorators and all."""
    lines, tree = _source(part)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            kept = dict(enumerate(lines[first - 1 : node.end_lineno], first))
            for statement in ast.walk(node):
                only = _CONDITION.search(lines[_last(statement) - 1]) if isinstance(statement, ast.stmt) else None
                if isinstance(statement, ast.stmt) and only is not None and only[1] not in features:
                    for number in range(statement.lineno, _last(statement) + 1):
                        kept.pop(number, None)
            text = "\n".join(_CONDITION.sub("", line) for line in kept.values())
            yield re.sub(r"\n{3,}", "\n\n", text)


def _last(statement: ast.stmt) -> int:
    """Number of the last line of a statement; of one with a body, of its first line."""
    body = getattr(statement, "body", None)
    return statement.lineno if body else (statement.end_lineno or statement.lineno)


@cache
def _source(part: str) -> tuple[list[str], ast.Module]:
    text = files("quack_fx").joinpath(f"train/program/parts/{part}.py").read_text("utf-8")
    return text.splitlines(), ast.parse(text)


def _imports(body: Sequence[str]) -> str:
    """The imports of the parts, as far as their names occur in the text."""
    text = "\n".join(body)
    plain: set[str] = set()
    named: dict[str, dict[str, str | None]] = {}
    for part in _PARTS:
        for node in _source(part)[1].body:
            if isinstance(node, ast.Import):
                plain |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith(("quack_fx", "__")):
                named.setdefault(node.module, {}).update({a.name: a.asname for a in node.names})

    def used(name: str) -> bool:
        return re.search(rf"\b{name}\b", text) is not None

    groups: dict[bool, list[str]] = {False: [], True: []}
    for name in sorted(plain):
        if used(name):
            groups[name == "torch"].append(f"import {name}")
    for module in sorted(named):
        names = sorted(n for n, alias in named[module].items() if used(alias or n))
        if names:
            entries = [f"{n} as {named[module][n]}" if named[module][n] else n for n in names]
            groups[module.startswith("torch")].append("\n".join(bracketed(0, f"from {module} import ", entries, "")))
    blocks = (["from __future__ import annotations"], groups[False], groups[True])
    return "\n\n".join("\n".join(block) for block in blocks if block)
