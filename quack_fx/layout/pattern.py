"""Per-head rows and head maps as formulas of the head index; names split at their numbers.

In: the row ranges of each head, or the key head that each query head reads. Out: a formula, or None. Reports show it
as text, training programs as torch code. Names that differ only in their numbers belong to repeated layers.
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
"""Key head of query head h: h; or h // n, with n query heads per key head; or h % n, with n key heads."""


@dataclass(frozen=True, slots=True)
class RowPattern:
    """Per-head rows that differ only by an offset.

    Attributes:
        first: First row of head 0.
        loops: The first row of each head, as one loop or two nested loops (outer first); empty for a single head.
        ranges: Ranges of a head relative to its first row, the same for all heads.
    """

    first: int
    loops: tuple[Loop, ...]
    ranges: Ranges


def row_pattern(heads: Sequence[Ranges]) -> RowPattern | None:
    """Return the rows of all heads as one formula, or None if there is none.

    Arguments:
        heads: Ranges of each head; no head may be empty.

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
    """Return a sequence as at most two nested loops (outer first), or None if it is not of that form.

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
    """Return the map from query head to key head as a formula, or None if there is none.

    Arguments:
        heads: The key head of each query head.
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
    """Split a name into the texts around its numbers, and the numbers.

    Arguments:
        name: Name of a parameter or module.
        inside: Also split at numbers inside a segment ("conv2"), instead of only at segments that are numbers.

    Example:
        >>> split_name("layers.3.conv2.weight"), split_name("conv2.weight", inside=True)
        ((('layers.', '.conv2.weight'), (3,)), (('conv', '.weight'), (2,)))
    """
    parts = (_NUMBER if inside else _SEGMENT).split(name)
    return tuple(parts[::2]), tuple(map(int, parts[1::2]))


def joined_name(texts: Sequence[str], numbers: Iterable[object]) -> str:
    """Join what `split_name` split; the numbers may be placeholders."""
    return "".join(f"{text}{number}" for text, number in zip_longest(texts, numbers, fillvalue=""))
