"""Writes the generator of QK norms that a program removes from the model, with a loop over equal layers.

In: the replacement of each norm module. Out: the lines of the generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from quack_fx.train.program.names import name_template
from quack_fx.train.program.text import INDENT, Tables
from quack_fx.train.program.write import fields_of, loop_over, named


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
        fields, rows = fields_of(instances)
        loop = loop_over(rows, tables)
        lines += [f"{INDENT}{loop}"] if loop else []
        pad = INDENT * (2 if loop else 1)
        lines += [
            f"{pad}yield {named(template.format(*fields))}, {stand_in.source()}" for template, stand_in in entries
        ]
    return [*tables.lines, *lines]
