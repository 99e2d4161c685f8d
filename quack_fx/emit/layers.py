"""USER: the numbers in the names of equal layers as loops.

In: for every site of one kind the numbers in its parameters' names, [(0,), (1,), (2,)] for three layers. Out: the
nested `for` lines that run through them, and what stands for each number in the names.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import prod

from quack_fx.emit.source import linear, loop
from quack_fx.train.program.text import bracketed

Row = tuple[int, ...]
"""The numbers in the names of one site."""

VARIABLES = "ijmn"


def parts(rows: list[Row]) -> list[list[Row]]:
    """Split rows of numbers into few parts that nested loops can run through; one part if it would take many.

    A part has one number, or one difference of two numbers, in common: layers that read the keys of layer 19, layers
    that read those of the layer below.
    """
    left, parts = rows, []
    while left:
        best = max(filter(_is_grid, _candidates(left)), key=len)
        parts.append(best)
        left = [row for row in left if row not in set(best)]
    return sorted(parts) if len(parts) <= max(2, len(rows) // 4) else [rows]


def _candidates(rows: list[Row]) -> Iterator[list[Row]]:
    """Subsets of the rows that may be grids; one of them is."""
    yield rows
    yield rows[:1]
    columns = range(len(rows[0]))
    for a in columns:
        same_rest: dict[tuple[Row, ...], list[Row]] = {}
        for value in sorted({row[a] for row in rows}):
            same = [row for row in rows if row[a] == value]
            yield same
            same_rest.setdefault(tuple(row[:a] + row[a + 1 :] for row in same), []).extend(same)
        yield from same_rest.values()
    for a, b in combinations(columns, 2):
        for difference in {row[b] - row[a] for row in rows}:
            yield [row for row in rows if row[b] - row[a] == difference]


def _is_grid(rows: list[Row]) -> bool:
    """Whether the rows are all combinations of the values in their independent columns."""
    independent, _ = _independent(rows)
    return prod(len({row[column] for row in rows}) for column in independent) == len(rows)


def _independent(rows: list[Row]) -> tuple[list[int], dict[int, tuple[int | None, int]]]:
    """Columns that vary by themselves, and each column as (independent column or None, plus a constant)."""
    independent: list[int] = []
    meaning: dict[int, tuple[int | None, int]] = {}
    for column in range(len(rows[0])):
        offsets = {row[column] for row in rows}
        if len(offsets) == 1:
            meaning[column] = (None, offsets.pop())
            continue
        for other in independent:
            offsets = {row[column] - row[other] for row in rows}
            if len(offsets) == 1:
                meaning[column] = (other, offsets.pop())
                break
        else:
            independent.append(column)
            meaning[column] = (column, 0)
    return independent, meaning


def loops(rows: list[Row]) -> tuple[list[str], list[str]]:
    """Text for every field of the names, and the `for` lines around the entry, one level of indentation each."""
    independent, meaning = _independent(rows)
    letters = {column: VARIABLES[n] if n < len(VARIABLES) else f"i{n}" for n, column in enumerate(independent)}
    fields = []
    for column in range(len(rows[0])):
        base, constant = meaning[column]
        fields.append(str(constant) if base is None else f"{{{linear({letters[base]: 1}, constant)}}}")
    if _is_grid(rows):
        lines = []
        for depth, column in enumerate(independent, start=1):
            lines += loop(depth, letters[column], sorted({row[column] for row in rows}))
        return fields, lines
    tuples = [str(tuple(row[column] for column in independent)) for row in rows]
    return fields, bracketed(1, f"for {', '.join(letters.values())} in [", tuples, "]:")
