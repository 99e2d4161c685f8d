"""USER: the QK norms that an emitted file takes out of the model, as a generator, short however many layers there are.

In: for each norm module what is to stand in its place. Out: the generator's lines, and the features that the rest of
the file needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from quack_fx.emit.entry import name_literal
from quack_fx.emit.layers import Row, loops, parts
from quack_fx.train.program.names import name_template
from quack_fx.train.program.text import INDENT


class StandIn(NamedTuple):
    """What stands where a norm stood: how many tensors it hands on, and what it multiplies them with."""

    tensors: int = 1
    factor: float = 1.0

    def source(self) -> str:
        """The call that makes it."""
        tensors = [f"tensors={self.tensors}"] if self.tensors != 1 else []
        factor = [f"factor={self.factor!r}"] if self.factor != 1 else []
        return f"PassThrough({', '.join(tensors + factor)})"


def norm_features(stand_ins: Mapping[str, StandIn]) -> frozenset[str]:
    """What the emitted file has to know of them, see `template.py`."""
    found = {"norms"} if stand_ins else set()
    found |= {"factor" for one in stand_ins.values() if one.factor != 1}
    found |= {"tensors" for one in stand_ins.values() if one.tensors != 1}
    return frozenset(found)


def write_norms(stand_ins: Mapping[str, StandIn]) -> list[str]:
    """The generator `qk_norms`: names that differ in numbers alone become a loop over those."""
    groups: dict[tuple[str, StandIn], list[Row]] = {}
    for name, stand_in in stand_ins.items():
        numbers: list[int] = []
        template = name_template(name, numbers)
        groups.setdefault((template, stand_in), []).append(tuple(numbers))
    return [
        "def qk_norms() -> Iterator[tuple[str, PassThrough]]:",
        f'{INDENT}"""Names of the QK norms that are taken out, and what stands in their place."""',
        *(line for rows, entries in _together(groups) for line in _entry(rows, entries)),
    ]


def _together(
    groups: Mapping[tuple[str, StandIn], list[Row]],
) -> Iterator[tuple[list[Row], list[tuple[str, StandIn]]]]:
    """Groups with the same numbers, whose names can stand in one loop."""
    by_rows: dict[tuple[Row, ...], list[tuple[str, StandIn]]] = {}
    for entry, rows in groups.items():
        by_rows.setdefault(tuple(sorted(rows)), []).append(entry)
    for numbers, entries in by_rows.items():
        for part in parts(list(numbers)):
            yield part, entries


def _entry(rows: list[Row], entries: list[tuple[str, StandIn]]) -> list[str]:
    """The lines that yield the names of some rows of numbers."""
    fields, lines = loops(rows)
    pad = INDENT * (1 + sum(line.endswith(":") for line in lines))
    for template, stand_in in entries:
        lines.append(f"{pad}yield {name_literal(template.format(*fields))}, {stand_in.source()}")
    return lines
