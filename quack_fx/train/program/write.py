"""Writes the part of a program that depends on the model.

In: `Kind`s. Out: the lines of each kind's functions for weights, rows and factors, then the lines of `KINDS`. In: what
stands in for the QK norms that a program removes. Out: the lines of the generator that names them.
"""

from __future__ import annotations

import builtins
import keyword
import re
import textwrap
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from quack_fx.train.program.kinds import Kind
from quack_fx.train.program.rows import index_of
from quack_fx.train.program.rule import factor_lines
from quack_fx.train.program.text import (
    INDENT,
    WIDTH,
    Tables,
    as_ranges,
    bracketed,
    common_prefix,
    even_runs,
    name_template,
    quoted,
    range_of,
    unique_name,
    variable_names,
)

_LETTERS = "ijkmpqrstuvwxyz"
_RESERVED = {"at", "n", "self", *_LETTERS, *keyword.kwlist, *dir(builtins)}


def write_kinds(kinds: Sequence[Kind], ends: bool = False) -> list[str]:
    """The lines of each kind's class and functions, and of the table `KINDS`.

    Arguments:
        kinds: The kinds.
        ends: Whether the table has the rows before the values, for weights that end with those.

    Example:
        >>> print("\\n".join(write_kinds(kinds_of(layout, shapes))))
    """
    names = _kind_names(kinds)
    lines: list[str] = []
    table: list[list[str]] = []
    for kind, name in zip(kinds, names, strict=True):
        tables = Tables(f"{name.upper()}_TABLE")
        own = _kind_lines(kind, name, tables)
        axes = [f"{quoted(v)}: {t.axis}" for v, t in zip(_variables(kind), kind.tensors, strict=True) if t.axis]
        entries = [_numbers(_fields_of(kind.instances)[1], tables)]
        entries += [f"{name.lower()}_{part}" for part in ("weights", "rows", "factors")]
        entries += [str(_mark_of(kind))]
        entries += [f"axes={{{', '.join(axes)}}}"] if axes else []
        if ends and (stops := kind.ends()):
            entries.append(f"ends={{{', '.join(f'{quoted(_variables(kind)[t])}: {end}' for t, end in stops.items())}}}")
        table.append(entries)
        lines += [*tables.lines, *own]
    if not table:
        return ["KINDS: tuple[Kind, ...] = ()"]
    calls = ", ".join(f"Kind({', '.join(entries)})" for entries in table)
    if len(f"KINDS = [{calls}]") <= WIDTH:
        return [*lines, f"KINDS = [{calls}]"]
    return [*lines, "KINDS = [", *(line for entries in table for line in bracketed(1, "Kind(", entries, "),")), "]"]


def _mark_of(kind: Kind) -> int:
    """A number that identifies the meaning of a kind's saved initial factors in a checkpoint."""
    blocks = [(block.role, block.heads, [kind.tensors[i].axis for i in block.tensors]) for block in kind.blocks]
    digest = blake2b(repr(("frobenius", blocks, kind.terms)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 12  # exact in a float64


def _kind_names(kinds: Sequence[Kind]) -> list[str]:
    """A class name for every kind: Mha, Gqa, Mla2."""
    names: list[str] = []
    for kind in kinds:
        name = re.sub(r"\W", "", kind.title.split(",")[0].split(" across")[0]).capitalize()
        names.append(name if name not in names else f"{name}{sum(n.rstrip('0123456789') == name for n in names) + 1}")
    return names


def _kind_lines(kind: Kind, name: str, tables: Tables) -> list[str]:
    """The class and the three functions of one kind."""
    count = len(kind.instances)
    variables, blocks = _variables(kind), _block_names(kind)
    attentions = f"{count} attentions" if count > 1 else "one attention"
    entries = [quoted(block) for block in blocks]
    fields = bracketed(0, f"{name} = namedtuple(", [quoted(name), f"[{', '.join(entries)}]"], ")")
    if max(map(len, fields)) > WIDTH:
        fields = [f"{name} = namedtuple(", f"{INDENT}{quoted(name)},", *bracketed(1, "[", entries, "],"), ")"]
    told = "; a number for every head of each block"
    title = textwrap.shorten(kind.title, WIDTH - len(f"# {attentions}: {told}"), placeholder=" and others")
    lines = [f"# {attentions}: {title}{told}", *fields]
    parts = (
        lines,
        _weights_lines(kind, name.lower(), variables),
        _rows_lines(kind, name, variables, blocks, tables),
        _factors_lines(kind, name, blocks, tables),
    )
    return [line for part in parts for line in (*part, "", "")]


def _weights_lines(kind: Kind, low: str, variables: Sequence[str]) -> list[str]:
    fields, rows = _fields_of(kind.instances)
    letters = ", ".join(f"{letter}: int" for letter in _LETTERS[: len(rows[0])])
    texts = [tensor.name.format(*fields) for tensor in kind.tensors]
    lines = [f"def {low}_weights({letters}) -> dict[str, tuple[str, int]]:"]
    lines += [f'{INDENT}"""Name and number of rows of each weight and bias of one attention."""']

    def entries() -> list[str]:
        each = zip(variables, texts, kind.tensors, strict=True)
        return [f"{quoted(variable)}: ({_named(text)}, {tensor.count})" for variable, text, tensor in each]

    prefix = common_prefix(texts)
    if prefix and max(map(len, entries())) > WIDTH - 2 * len(INDENT) - 1:
        lines.append(f"{INDENT}at = {_named(prefix)}")
        texts = ["{at}" + text.removeprefix(prefix) for text in texts]
    return lines + bracketed(1, "return {", entries(), "}")


def _rows_lines(kind: Kind, name: str, variables: Sequence[str], blocks: Sequence[str], tables: Tables) -> list[str]:
    lines = [f"def {name.lower()}_rows() -> {name}:"]
    lines += [f'{INDENT}"""The rows of the heads of each block, [heads, rows of a head], and their weights."""']
    entries = []
    for block, own in zip(blocks, kind.blocks, strict=True):
        where = ", ".join(quoted(variables[t]) for t in own.tensors)
        entries.append(f"{block}=({index_of(own.heads, tables)}, {where})")
    return [*lines, f"{INDENT}return {name}(", *(f"{INDENT * 2}{entry}," for entry in entries), f"{INDENT})"]


def _factors_lines(kind: Kind, name: str, blocks: Sequence[str], tables: Tables) -> list[str]:
    latent = any(len(term.factors) > 2 for term in kind.terms)
    summary = f"Algorithm {2 if latent else 1} of the paper, for all heads at once; n has the norms of the blocks."
    lines = [f"def {name.lower()}_factors(n: {name}) -> {name}:", f'{INDENT}"""{summary}"""']
    return [*lines, f"{INDENT}return {name}(", *factor_lines(kind, blocks, tables), f"{INDENT})"]


# ---- QK norms --------------------------------------------------------------------------------------------------------


class StandIn(NamedTuple):
    """The replacement of a norm module: the number of inputs that it returns, and a factor on them."""

    tensors: int = 1
    factor: float = 1.0

    def source(self) -> str:
        """The expression that creates it."""
        tensors = [f"tensors={self.tensors}"] if self.tensors != 1 else []
        factor = [f"factor={self.factor!r}"] if self.factor != 1 else []
        return f"PassThrough({', '.join(tensors + factor)})"


def write_norms(stand_ins: Mapping[str, StandIn]) -> list[str]:
    """The lines of the generator `qk_norms`; names that differ only in numbers become a loop over the numbers."""
    groups: dict[tuple[str, StandIn], list[tuple[int, ...]]] = {}
    for name, stand_in in stand_ins.items():
        numbers: list[int] = []
        template = name_template(name, numbers)
        groups.setdefault((template, stand_in), []).append(tuple(numbers))
    together: dict[tuple[tuple[int, ...], ...], list[tuple[str, StandIn]]] = {}
    for entry, rows in groups.items():
        together.setdefault(tuple(sorted(rows)), []).append(entry)
    tables = Tables("QK_NORMS")
    lines = [
        "def qk_norms() -> Iterator[tuple[str, PassThrough]]:",
        f'{INDENT}"""Names of the QK norms that are taken out, and what stands in their place."""',
    ]
    for instances, entries in together.items():
        fields, rows = _fields_of(instances)
        loop = _loop_over(rows, tables)
        lines += [f"{INDENT}{loop}"] if loop else []
        pad = INDENT * (2 if loop else 1)
        lines += [
            f"{pad}yield {_named(template.format(*fields))}, {stand_in.source()}" for template, stand_in in entries
        ]
    return [*tables.lines, *lines]


# ---- names -----------------------------------------------------------------------------------------------------------


def _block_names(kind: Kind) -> list[str]:
    """A name for every block: its role, or the name of its weight if the role is "other" or not unique."""
    roles = [block.role for block in kind.blocks]
    variables = _variables(kind)
    names: list[str] = []
    for block in kind.blocks:
        name = block.role if roles.count(block.role) == 1 and block.role != "other" else variables[block.tensors[0]]
        names.append(unique_name(name, names))
    return names


def _variables(kind: Kind) -> list[str]:
    """A name for every tensor, taken from the module that holds it."""
    return variable_names([tensor.name for tensor in kind.tensors], _RESERVED, biases=True)


def _named(text: str) -> str:
    """A name as a string literal, or as an f-string if it has fields (single braces; other braces are doubled)."""
    fields = "{" in text.replace("{{", "").replace("}}", "")
    return quoted(text, fields=True) if fields else quoted(text.replace("{{", "{").replace("}}", "}"))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _fields_of(instances: Sequence[tuple[int, ...]]) -> tuple[list[str], list[tuple[int, ...]]]:
    """A format field for each number in the names, and for each instance the numbers that vary independently."""
    columns: list[int] = []
    fields = []
    for column in range(len(instances[0])):
        values = [own[column] for own in instances]
        if len(set(values)) == 1:
            fields.append(str(values[0]))
            continue
        for place, other in enumerate(columns):
            offsets = {value - own[other] for value, own in zip(values, instances, strict=True)}
            if len(offsets) == 1:
                offset = offsets.pop()
                sign = "" if offset == 0 else f" {'+' if offset > 0 else '-'} {abs(offset)}"
                fields.append(f"{{{_LETTERS[place]}{sign}}}")
                break
        else:
            columns.append(column)
            fields.append(f"{{{_LETTERS[len(columns) - 1]}}}")
    return fields, [tuple(own[column] for column in columns) for own in instances]


def _loop_over(rows: Sequence[tuple[int, ...]], tables: Tables) -> str:
    """The first line of a loop over numbers, `for i in range(12):`; empty if no numbers vary."""
    if not rows[0]:
        return ""
    if len(rows[0]) == 1:
        values = [value for (value,) in rows]
        even = len(values) > 1 and len(even_runs(values)) == 1
        return f"for i in {range_of(values) if even else tables.text(as_ranges(values))}:"
    return f"for {', '.join(_LETTERS[: len(rows[0])])} in {tables.text([str(row) for row in rows])}:"


def _numbers(rows: Sequence[tuple[int, ...]], tables: Tables) -> str:
    """The numbers of each attention as an expression: `[(i,) for i in range(12)]`."""
    if len(rows[0]) == 1 and len(rows) > 2:
        return f"[(i,) {_loop_over(rows, tables)[:-1]}]"
    return tables.text([str(row) for row in rows])
