"""Rows of heads, and which head each query head reads, as formulas of the head's number.

In: for each head the ranges of its rows, or the head that it reads. Out: the formula, or None where there is none. The
report spells it in words, the generator as torch code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from quack_fx.layout.sites import Ranges

Loop = tuple[int, int]
"""How many numbers, and how far apart."""

MapPattern = Literal["own", "blocks", "cycle"]
"""Head h reads head h; head h // n, where n heads each read one; or head h % n, where there are n to read."""


@dataclass(frozen=True, slots=True)
class RowPattern:
    """Rows of heads that all have the same form.

    Attributes:
        first: First row of head 0.
        loops: One loop through the first rows of the heads, or two nested ones, the outer one first; none for one head.
        ranges: The ranges of each head, counted from its first row.
    """

    first: int
    loops: tuple[Loop, ...]
    ranges: Ranges


def row_pattern(heads: Sequence[Ranges]) -> RowPattern | None:
    """The rows of all heads as one formula.

    Arguments:
        heads: The ranges of each head; none is without rows.

    Example:
        >>> row_pattern([((0, 4),), ((12, 16),), ((24, 28),)])
        RowPattern(first=0, loops=((3, 12),), ranges=((0, 4),))
        >>> row_pattern([((0, 4),), ((0, 4),), ((4, 8),), ((4, 8),)]).loops
        ((2, 4), (2, 0))
    """
    starts = [ranges[0][0] for ranges in heads]
    forms = {tuple((a - start, b - start) for a, b in ranges) for start, ranges in zip(starts, heads, strict=True)}
    loops = loops_of(starts)
    return RowPattern(starts[0], loops, forms.pop()) if loops is not None and len(forms) == 1 else None


def loops_of(values: Sequence[int]) -> tuple[Loop, ...] | None:
    """Nested loops that run through some numbers, from their first; the outermost first; at most two.

    Example:
        >>> loops_of([0, 1, 8, 9, 16, 17]), loops_of([5]), loops_of([0, 1, 3])
        (((3, 8), (2, 1)), (), None)
    """
    if len(values) == 1:
        return ()
    step = values[1] - values[0]
    count = next((i for i in range(1, len(values)) if values[i] - values[i - 1] != step), len(values))
    if count == len(values):
        return ((count, step),)
    firsts = values[::count]
    whole = len(values) % count == 0
    if not whole or any(values[i] - values[i - i % count] != step * (i % count) for i in range(len(values))):
        return None
    distance = firsts[1] - firsts[0]
    even = all(b - a == distance for a, b in pairwise(firsts))
    return ((len(firsts), distance), (count, step)) if even else None


def map_pattern(heads: Sequence[int], count: int) -> MapPattern | None:
    """Which head each of many heads reads, as a formula.

    Arguments:
        heads: The head that each reads.
        count: How many there are to read.

    Example:
        >>> map_pattern((0, 0, 1, 1), 2), map_pattern((0, 1, 0, 1), 2), map_pattern((1, 0), 2)
        ('blocks', 'cycle', None)
    """
    n, read = len(heads), tuple(heads)
    if read == tuple(range(n)):
        return "own"
    if n % count == 0 and read == tuple(h // (n // count) for h in range(n)):
        return "blocks"
    return "cycle" if read == tuple(h % count for h in range(n)) else None
