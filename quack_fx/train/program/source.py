"""Assembles the source of a program.

In: a layout, the shapes of its parameters, the optimizers. Out: source code that needs only torch: first the part that
`write.py` writes for the model's attentions, then code that is the same for every model, copied from `parts/`.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files

from quack_fx.layout import QKLayout
from quack_fx.train.program.about import about
from quack_fx.train.program.kinds import Kind, kinds_of
from quack_fx.train.program.text import bracketed
from quack_fx.train.program.write import StandIn, write_kinds, write_norms

OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw": ("AdamW",),
    "adam": ("Adam",),
    "sgd": ("SGD",),
    "muon": ("Muon", "AdamW"),
    "lion": ("Lion",),
}
"""The optimizer classes (of torch.optim, or Lion) behind each name that users choose."""

PARTS_OF = {"AdamW": "adamw", "Adam": "adamw", "SGD": "sgd", "Muon": "muon", "Lion": "lion"}
"""The file in `parts/` with the arithmetic of each optimizer."""

_CONDITION = re.compile(r"  # if (not )?(\w+)$")
"""Trailing comment of a statement that is copied only into programs with (or without) a feature."""


def write_program(
    layout: QKLayout,
    shapes: Mapping[str, Sequence[int]],
    title: str,
    optimizers: Sequence[str] = OPTIMIZERS["adamw"],
    *,
    tau: float = 1.0,
    features: Collection[str] = (),
    stand_ins: Mapping[str, StandIn] | None = None,
) -> str:
    """The training step of a model.

    Arguments:
        layout: The model's layout; without pairs, the program is a plain training step.
        shapes: Shape of every parameter that the layout names.
        title: Name of the model.
        optimizers: The optimizer classes that the program supports, keys of `PARTS_OF`.
        tau: Default of the step's `tau`.
        features: "sharded" if weights may be DTensors, "masters" if half-precision weights are updated through fp32
            copies.
        stand_ins: The replacement of each QK norm module that the program removes.

    Returns:
        The source, which `ruff format` at 120 columns does not change.

    Raises:
        LayoutError: The layout does not fit the shapes.

    Example:
        >>> shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        >>> source = write_program(find_qk_pairs(model, ids), shapes, "GPT")
    """
    kinds = kinds_of(layout, shapes)
    stand_ins = stand_ins or {}
    features = _features({*features, "norms"} if stand_ins else set(features), kinds, shapes, optimizers)
    names = list(dict.fromkeys(PARTS_OF[optimizer] for optimizer in optimizers))
    left_out = {"sharded", "masters", "norms"} - features
    every = ("quack", "sharded", "norms", "change", *names, "masters", "step")
    parts = [part for part in every if part not in left_out]
    texts = {part: list(_definitions(part, features)) for part in parts}
    kind, *rest = texts.pop("quack")
    model = "\n".join(write_kinds(kinds, "ends" in features))
    last = texts.pop("step")
    if tau != 1.0:
        last = [text.replace("tau: float | Tensor = 1.0", f"tau: float | Tensor = {tau!r}") for text in last]
    written = [model, *(["\n".join(write_norms(stand_ins))] if stand_ins else [])]
    intro = about(layout, kinds, title, optimizers, bool(stand_ins))
    steps = _steps(optimizers)
    copied = [*rest, *(text for own in texts.values() for text in own)]
    body = [*written, *_used(copied, [intro, *written, steps, *last]), steps, *last]
    head = f"{intro}\n\n{_imports(parts, [kind, *body])}\n\n{kind}"
    return "\n\n\n".join([head, *body]) + "\n"


def _features(
    asked: set[str], kinds: Sequence[Kind], shapes: Mapping[str, Sequence[int]], optimizers: Sequence[str]
) -> set[str]:
    """The features asked for, and those that follow from the optimizers and the sizes of the weights."""
    found = set(asked)
    # With Adam, `change` handles only weights with heads; with other optimizers, all. A rank's shard may be small.
    if asked & {"sharded", "masters"} or set(optimizers) - {"Adam", "AdamW"}:
        found |= {"others", "small"}
    if all(math.prod(shapes[name]) <= _most_small() for kind in kinds for name in kind.names()):
        found.add("small")
    elif "sharded" not in asked and any(kind.ends() for kind in kinds):  # a rank's shard may hold any rows
        found.add("ends")
    return found


def _used(copied: Sequence[str], others: Sequence[str]) -> list[str]:
    """The copied definitions, without functions that are not used."""
    kept = list(copied)
    for text in copied[::-1]:  # callees precede their callers
        name = re.match(r"def (\w+)", text)
        rest = [other for other in (*kept, *others) if other != text]
        if name and not any(re.search(rf"\b{name[1]}[(,:}}]", other) for other in rest):
            kept.remove(text)
    return kept


def _steps(optimizers: Sequence[str]) -> str:
    """The source of `STEPS`, which maps optimizer classes to functions."""
    kinds = [(f"torch.optim.{name}" if name != "Lion" else name, PARTS_OF[name]) for name in optimizers]
    entries = [f"{kind}: step_{part}" for kind, part in kinds]
    return "\n".join(bracketed(0, "STEPS: dict[type[Optimizer], Callable[..., None]] = {", entries, "}"))


def _definitions(part: str, features: Collection[str]) -> Iterator[str]:
    """The constants and type aliases of a part as one text, then each of its classes and functions."""
    lines, tree = _source(part)
    short = [line for node in tree.body if isinstance(node, ast.Assign) for line in _with_comment(lines, node.lineno)]
    if kept_short := [_CONDITION.sub("", line) for line in short if _is_kept(line, features)]:
        yield "\n".join(kept_short)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name != "qk_norms":
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            kept = dict(enumerate(lines[first - 1 : node.end_lineno], first))
            for piece in ast.walk(node):
                if isinstance(piece, ast.stmt | ast.arg) and not _is_kept(lines[_last(piece) - 1], features):
                    for number in range(piece.lineno, _last(piece) + 1):
                        kept.pop(number, None)
            text = "\n".join(_CONDITION.sub("", line) for line in kept.values())
            yield re.sub(r"\n{3,}", "\n\n", text)


def _with_comment(lines: Sequence[str], number: int) -> Sequence[str]:
    """The line with the given number, preceded by the comment above it."""
    first = number - 1
    while lines[first - 1].startswith("#"):
        first -= 1
    return lines[first:number]


def _is_kept(line: str, features: Collection[str]) -> bool:
    """Whether a statement, given its last line, belongs in a program with these features."""
    only = _CONDITION.search(line)
    return only is None or (only[2] in features) != bool(only[1])


def _last(piece: ast.stmt | ast.arg) -> int:
    """Number of a statement's last line; of its first line if it has a body."""
    body = getattr(piece, "body", None)
    return piece.lineno if body else (piece.end_lineno or piece.lineno)


def _most_small() -> int:
    """The number of elements up to which `parts/change.py` calls a weight small; importing it would import torch."""
    (line,) = (line for line in _source("change")[0] if line.startswith("SMALL = "))
    return int(line.split()[2])


@cache
def _source(part: str) -> tuple[list[str], ast.Module]:
    text = files("quack_fx").joinpath(f"train/program/parts/{part}.py").read_text("utf-8")
    return text.splitlines(), ast.parse(text)


def _imports(parts: Sequence[str], body: Sequence[str]) -> str:
    """The imports of the parts, limited to names that the text uses."""
    text = "\n".join(body)
    plain: set[str] = set()
    named: dict[str, set[str]] = {}
    for node in (node for part in parts for node in _source(part)[1].body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            used = {ast.unparse(a) for a in node.names if re.search(rf"\b{a.asname or a.name}\b", text)}
            if isinstance(node, ast.Import):
                plain |= used
            elif node.module and used and not node.module.startswith(("quack_fx", "__")):
                named.setdefault(node.module, set()).update(used)
    groups: dict[bool, list[str]] = {False: [], True: []}
    for name in sorted(plain):
        groups[name == "torch"].append(f"import {name}")
    for module, names in sorted(named.items()):
        line = "\n".join(bracketed(0, f"from {module} import ", sorted(names), ""))
        groups[module.startswith("torch")].append(line)
    blocks = (["from __future__ import annotations"], groups[False], groups[True])
    return "\n\n".join("\n".join(block) for block in blocks if block)
