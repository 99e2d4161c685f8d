"""Writes the rows of heads as expressions such as `torch.arange(768, 1536).view(12, 64)`.

In: the row ranges of each head. Out: an expression for the indices of the rows, int64 [heads, rows of a head].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from quack_fx.layout import Ranges
from quack_fx.layout.pattern import Loop, loops_of, row_pattern
from quack_fx.train.program.text import Tables, as_ranges


def index_of(heads: Sequence[Ranges], tables: Tables) -> str:
    """An expression for the row indices of each head; all heads have the same number of rows.

    Arguments:
        heads: The ranges of each head.
        tables: Stores long lists as constants of the program.

    Example:
        >>> index_of([((0, 4),), ((12, 16),)], Tables("ROWS"))
        'torch.arange(24).view(2, 12)[:, :4]'
        >>> index_of([((0, 1), (3, 4)), ((1, 2), (2, 3))], Tables("ROWS"))
        'torch.tensor([[0, 3], [1, 2]])'
    """
    pattern = row_pattern(heads)
    if pattern is not None:
        offsets = _rows(pattern.ranges)
        inner = loops_of(offsets)
        text = None if inner is None else _view(pattern.first, [*pattern.loops, *inner], len(heads), len(offsets))
        if text is not None:
            return text
    return f"torch.tensor({tables.text([tables.text(as_ranges(_rows(own))) for own in heads])})"


def _rows(ranges: Ranges) -> list[int]:
    """The row indices in some ranges."""
    return [row for start, stop in ranges for row in range(start, stop)]


def _view(first: int, loops: list[Loop], heads: int, rows: int) -> str | None:
    """Nested loops as a view of consecutive indices; None if they cannot be written as one."""
    if any(step <= 0 for _, step in loops):
        return None
    order = sorted(range(len(loops)), key=lambda i: -loops[i][1])
    ordered = [loops[i] for i in order]
    joined = _joined(ordered) if order == sorted(order) else ordered
    steps = [step for _, step in joined] + [1]
    if any(a % b for a, b in pairwise(steps)):
        return None
    counts = [count for count, _ in joined]
    sizes = [a // b for a, b in pairwise(steps)]  # of all axes except the first
    offsets, rest = [], first % steps[0]
    for step in steps[1:]:
        offsets.append(rest // step)
        rest %= step
    needed = [*counts[1:], 1]
    if any(offset + count > size for offset, count, size in zip(offsets, needed, sizes, strict=True)):
        return None
    begin = first - first % steps[0]
    end = begin + counts[0] * steps[0]
    text = f"torch.arange({f'{begin}, ' if begin else ''}{end})"
    cuts = [_cut(o, n, size) for o, n, size in zip(offsets, needed, sizes, strict=True)]
    shape = [counts[0], *(size for size in sizes if size > 1)]
    if len(shape) > 1:
        text += f".view({', '.join(map(str, shape))})"
        kept = [cut for cut, size in zip(cuts, sizes, strict=True) if size > 1]
        while kept and kept[-1] == ":":
            kept.pop()
        text += f"[:, {', '.join(kept)}]" if kept else ""
        shape = [counts[0], *(n for n, size in zip(needed, sizes, strict=True) if size > 1 and n > 1)]
    return _as_heads(text, shape, order, loops, heads, rows)


def _as_heads(text: str, shape: list[int], order: list[int], loops: list[Loop], heads: int, rows: int) -> str | None:
    """The view reshaped to [heads, rows of a head]."""
    if order == sorted(order):
        if shape == [heads, rows]:
            return text
        return f"{text}.{'reshape' if '[' in text else 'view'}({heads}, {rows})"
    return f"{text}.T" if len(loops) == 2 and shape == [rows, heads] else None


def _joined(loops: list[Loop]) -> list[Loop]:
    """Drop loops of one iteration, and join two loops if the outer stride is the whole length of the inner loop."""
    joined: list[Loop] = []
    for count, step in loops:
        if count == 1:
            continue
        if joined and joined[-1][1] == count * step:
            joined[-1] = (joined[-1][0] * count, step)
        else:
            joined.append((count, step))
    return joined or [(1, 1)]


def _cut(offset: int, count: int, size: int) -> str:
    """A slice or index along one axis, as text."""
    if count == size:
        return ":"
    if count == 1:
        return str(offset)
    return f"{offset or ''}:{offset + count if offset + count < size else ''}"
