"""A recorded run as rich renderables for a terminal.

In: a run as far as it was read. Out: a summary, which `quack-fx report` prints once and `quack-fx watch` repeatedly:
loss and the user's other numbers, the largest logit, norm products, learning-rate scales, the heads that grew most.
Colours carry no meaning of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from quack_fx.report.run.read import RunFile
from quack_fx.report.run.series import Point, curves, finite, fraction, growth, number, remarks, site_name
from quack_fx.report.terminal import DIM, facts_grid, wide_table

_BARS = "▁▂▃▄▅▆▇█"
_NOT_FINITE = "!"
_COURSE, _GAP = "Over time", 3
_MOST_GROWN, _MOST_WIDTH, _MOST_TITLE = 8, 48, 40


@dataclass(frozen=True)
class Summary:
    """A run in a few lines, as a rich renderable that fits the width it is given.

    A live one also fits the height, and says how long ago the last step was recorded.
    """

    file: RunFile
    live: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.file.run.records:
            yield Text(f"waiting for the first record in {self.file.path}", DIM)
            return
        yield self._head()
        rows = self._rows()
        yield _table("Number", ["First", "Now", "Smallest", "Largest"], rows, options.max_width)
        room = options.max_height - 12 - len(rows) if self.live else _MOST_GROWN
        grown = growth(self.file.run, max(0, min(_MOST_GROWN, room)))
        if grown:
            yield Text()
            heads = [
                _Row(site_name(g.site), [str(g.head), number(g.first), number(g.now), number(g.ratio)], g.way)
                for g in grown
            ]
            yield _table("Heads that grew most", ["Head", "First", "Now", "Times"], heads, options.max_width)

    def _head(self) -> RenderableType:
        grid = facts_grid("run", str(self.file.path))
        for text in remarks(self.file):
            grid.add_row("", Text(text))
        last = self.file.run.records[-1].time
        if self.live and math.isfinite(last):
            grid.add_row("last", Text(f"{max(0, round(time.time() - last)):,} s ago; Ctrl-C ends the view"))
        return Group(grid, Text())

    def _rows(self) -> list[_Row]:
        rows = []
        for picture in curves(self.file.run):
            for name, points in picture.lines.items():
                title = picture.title if len(picture.lines) == 1 else f"{name} {picture.title}"
                values = finite(points)
                ends = [number(min(values)), number(max(values))] if values else ["", ""]
                rows.append(_Row(title, [number(points[0][1]), number(points[-1][1]), *ends], points))
        return rows


@dataclass(frozen=True)
class _Row:
    """A row of a table: its title, numbers as text, its curve."""

    title: str
    numbers: Sequence[str]
    points: Sequence[Point]


def _table(title: str, names: Sequence[str], rows: Sequence[_Row], width: int) -> Table:
    """A table that never cuts numbers: curves get the width that is left; if that is too little, titles are cut."""
    each = [max([len(name), *(len(row.numbers[i]) for row in rows)]) for i, name in enumerate(names)]
    left = width - sum(each) - _GAP * len(names)
    longest = min(_MOST_TITLE, max([len(title), *(len(row.title) for row in rows)]))
    room = left - longest - _GAP
    table = wide_table()
    table.add_column(title, overflow="ellipsis", no_wrap=True, width=min(longest, max(1, left)))
    for name, size in zip(names, each, strict=True):
        table.add_column(name, justify="right", no_wrap=True, width=size)
    drawn = min(_MOST_WIDTH, room) if room >= len(_COURSE) else 0
    if drawn:
        table.add_column(_COURSE, no_wrap=True, width=max(drawn, len(_COURSE)))
    for row in rows:
        course = [spark(row.points, drawn)] if drawn else []
        table.add_row(Text(row.title), *map(Text, row.numbers), *course)
    return table


def spark(points: Sequence[Point], width: int) -> str:
    """A curve in characters: each shows the mean of some steps, or "!" if one of them is not finite.

    Example:
        >>> spark([(0, 1.0), (1, 2.0), (2, float("nan")), (3, 8.0)], 4)
        '▁▂!█'
    """
    size = min(width, len(points))
    cells: list[float] = []
    for i in range(size):
        stretch = [y for _, y in points[i * len(points) // size : (i + 1) * len(points) // size]]
        cells.append(math.fsum(y / len(stretch) for y in stretch) if all(map(math.isfinite, stretch)) else math.nan)
    whole = [y for y in cells if math.isfinite(y)]
    low, high = min(whole, default=0.0), max(whole, default=0.0)
    top = len(_BARS) - 1
    return "".join(_NOT_FINITE if math.isnan(y) else _BARS[round(top * fraction(y, low, high))] for y in cells)
