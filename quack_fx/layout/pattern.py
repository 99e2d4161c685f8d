"""Rows of heads, and key heads of query heads, as formulas of the head's index; names as texts around numbers.

In: for each head the ranges of its rows, or the key head that it reads. Out: the formula, or None where there is none.
Reports show it as text, training programs as torch code. Names that differ only in their numbers are those of equal
layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Literal

from quack_fx.layout.sites import Ranges

Loop = tuple[int, int]
"""Count and step of a sequence of numbers."""

_SEGMENT = re.compile(r"(?<![^.])(\d+)(?![^.])")
_NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d*)(?!\d)")

MapPattern = Literal["own", "blocks", "cycle"]
"""Query head h reads key head h; or h // n, for n query heads to a key head; or h % n, for n key heads."""


@dataclass(frozen=True, slots=True)
class RowPattern:
    """Rows of heads that are equal but for an offset.

    Attributes:
        first: First row of head 0.
        loops: The first rows of the heads as one loop, or as two nested ones, the outer one first; none for one head.
        ranges: The ranges of each head, relative to its first row.
    """

    first: int
    loops: tuple[Loop, ...]
    ranges: Ranges


def row_pattern(heads: Sequence[Ranges]) -> RowPattern | None:
    """The rows of all heads as one formula.

    Arguments:
        heads: The ranges of each head; each has some.

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
    """A sequence of numbers as at most two nested loops, the outer one first; None where it is not.

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
    """Which key head each query head reads, as a formula.

    Arguments:
        heads: For each query head its key head.
        count: Number of key heads.

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


def split_name(name: str, *, inside: bool = False) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The texts around the numbers of a name, and the numbers.

    Arguments:
        name: Of a parameter or a module.
        inside: Whether a number inside a segment counts, too ("conv2"), and not only one that is a segment.

    Example:
        >>> split_name("layers.3.conv2.weight"), split_name("conv2.weight", inside=True)
        ((('layers.', '.conv2.weight'), (3,)), (('conv', '.weight'), (2,)))
    """
    parts = (_NUMBER if inside else _SEGMENT).split(name)
    return tuple(parts[::2]), tuple(map(int, parts[1::2]))


def joined_name(texts: Sequence[str], numbers: Iterable[object]) -> str:
    """The name of texts with numbers, or what stands for them, in between."""
    return "".join(f"{text}{number}" for text, number in zip_longest(texts, numbers, fillvalue=""))
