"""USER: where the rows of every head lie, as expressions in the number of the head.

In: ranges of rows, head by head. Out: start and stop of each range as `a * h + b * g + c`, where `h` is the query head
and `g` the key head that it reads; or nothing, where the rows follow no such rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from quack_fx.emit.source import linear, slice_of
from quack_fx.layout import Ranges


class Rule(NamedTuple):
    """Where a block's rows lie for each of several heads.

    Attributes:
        pieces: Slices, as expressions.
        varies: Whether they depend on the head at all.
        uses_group: Whether they depend on `g`.
    """

    pieces: tuple[str, ...]
    varies: bool
    uses_group: bool


def key_head(heads: list[int], keys: list[int]) -> tuple[str, list[int]]:
    """The key heads of some query heads as an expression in `h`, and as numbers.

    Where no short expression says it, the numbers are all 0: rules then have to do without them.
    """
    if len(set(keys)) == 1:
        return str(keys[0]), keys
    pairs = list(zip(heads, keys, strict=True))
    ratio = next((n for n in range(1, max(heads) + 1) if all(k == h // n for h, k in pairs)), 0)
    if ratio:
        return f"h // {ratio}", keys
    modulus = max(keys) + 1
    if all(k == h % modulus for h, k in pairs):
        return f"h % {modulus}", keys
    text = f"{tuple(keys) if heads == list(range(len(heads))) else dict(pairs)}[h]"
    return (text, keys) if len(text) <= 60 else ("", [0] * len(keys))


def rule_of(ranges: list[Ranges], heads: list[int], groups: list[int]) -> Rule | None:
    """The rows of every head as slices in `h` and `g`, or None where they follow no linear rule.

    Arguments:
        ranges: Rows of each head.
        heads: Number of each head, `h`.
        groups: Number of the key head that it reads, `g`.
    """
    progressions = [_progressions(pieces) for pieces in ranges]
    if len({tuple((length, step) for _, length, step in pieces) for pieces in progressions}) > 1:
        return None
    slices, factors = [], []
    for p, (_, length, step) in enumerate(progressions[0]):
        fit = _fit_line([pieces[p][0] for pieces in progressions], heads, groups)
        if fit is None:
            return None
        h, g, start = fit
        ends = [linear({"h": h, "g": g}, end) for end in (start, start + (length - 1) * step + 1)]
        slices.append(slice_of(*ends, *([str(step)] if step > 1 else [])))
        factors.append((h, g))
    return Rule(tuple(slices), any(h or g for h, g in factors), any(g for _, g in factors))


def _progressions(ranges: Ranges) -> tuple[tuple[int, int, int], ...]:
    """Ranges as (first row, number of rows, step): three or more evenly spaced single rows become one."""
    found: list[tuple[int, int, int]] = []
    left = list(ranges)
    while left:
        start, stop = left[0]
        step, count = (left[1][0] - start, 1) if len(left) > 1 else (1, 1)
        while count < len(left) and all(
            b - a == 1 and a == start + n * step for n, (a, b) in enumerate(left[: count + 1])
        ):
            count += 1
        if count > 2:
            found.append((start, count, step))
            left = left[count:]
        else:
            found.append((start, stop - start, 1))
            left = left[1:]
    return tuple(found)


def _fit_line(values: list[int], heads: list[int], groups: list[int]) -> tuple[int, int, int] | None:
    """Integers (a, b, c) with values = a * heads + b * groups + c, the simplest there are, or None."""
    if len(set(values)) == 1:
        return 0, 0, values[0]
    for a in (_slope(values, heads), 0, _slope_within(values, heads, groups)):
        if a is None:
            continue
        rest = [value - a * head for value, head in zip(values, heads, strict=True)]
        b = 0 if len(set(rest)) == 1 else _slope(rest, groups)
        if b is None:
            continue
        rest = [value - b * group for value, group in zip(rest, groups, strict=True)]
        if len(set(rest)) == 1:
            return a, b, rest[0]
    return None


def _slope(values: Sequence[int], at: Sequence[int]) -> int | None:
    """Slope between the first point and the next one elsewhere, if it is whole."""
    for value, x in zip(values, at, strict=True):
        if x != at[0]:
            slope, remainder = divmod(value - values[0], x - at[0])
            return None if remainder else slope
    return None


def _slope_within(values: Sequence[int], heads: Sequence[int], groups: Sequence[int]) -> int | None:
    """Slope along the heads of the first group."""
    first = [(value, head) for value, head, group in zip(values, heads, groups, strict=True) if group == groups[0]]
    return _slope(*zip(*first, strict=True)) if len(first) > 1 else None
