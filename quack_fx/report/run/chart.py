"""Curves as SVG.

In: `Curves`. Out: an SVG element with axes and a description in words. The browser shows the numbers of the step under
the pointer. Where a value is not finite, its curve has a gap, and a cross marks the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

from quack_fx.report.run.series import Curves, Point, finite, fraction, number, spread, thinned

STYLE = """
svg.chart, svg.heat { width: 100%; height: auto; display: block; }
.chart text, .heat text { fill: var(--soft); font-size: 11px; }
.chart .grid, .heat .grid { stroke: var(--line); stroke-width: 1; }
.chart polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.chart .c0 { stroke: var(--query); } .chart .c1 { stroke: var(--key); } .chart .c2 { stroke: var(--mark); }
.chart .c1 { stroke-dasharray: 7 3; } .chart .c2 { stroke-dasharray: 2 3; }
.chart .broken { stroke: var(--mark); stroke-width: 2; }
.chart .hit, .heat .hit { fill: transparent; } .chart .hit:hover, .heat .hit:hover { fill: var(--soft); opacity: .2; }
"""

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 220, 62, 14, 12, 26
MOST_POINTS, _MOST_HITS = 300, 64


def chart(curves: Curves) -> str:
    """The picture of some curves."""
    lines = {name: thinned(points, MOST_POINTS) for name, points in curves.lines.items()}
    x = _Across(min(curves.by_step), max(curves.by_step))
    y = _Up([value for points in lines.values() for value in finite(points)])
    parts = [f'<svg class="chart" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-label="{escape(in_words(curves))}">']
    parts += [*_x_axis(x), *_y_axis(y)]
    parts += [_line(points, x, y, f"c{i % 3}") for i, points in enumerate(lines.values())]
    for step in spread(curves.not_finite, 40):
        parts.append(f'<path class="broken" d="M{x(step) - 3:.1f} {_TOP}l6 6m0 -6l-6 6"/>')
    return "".join([*parts, *_hits(curves, x), "</svg>"])


def in_words(curves: Curves) -> str:
    """What a picture shows, for those who do not see it."""
    said = []
    for name, points in curves.lines.items():
        if values := finite(points):
            first, last, low, high = map(number, (values[0], values[-1], min(values), max(values)))
            said.append(f"{name} from {first} to {last}, between {low} and {high}")
        else:
            said.append(f"{name}: no finite value")
    broken = f"; not finite at {len(curves.not_finite)} steps" if curves.not_finite else ""
    return f"{curves.title} over steps {min(curves.by_step)} to {max(curves.by_step)}: {'; '.join(said)}{broken}"


class _Across:
    """Steps -> x coordinates."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def __call__(self, step: float) -> float:
        inner = _WIDTH - _LEFT - _RIGHT
        return _LEFT + (inner * (step - self.low) / (self.high - self.low) if self.high > self.low else inner / 2)

    def ticks(self) -> list[float]:
        return [tick for tick in nice_ticks(self.low, self.high, 6) if tick == round(tick)] or [self.low]


class _Up:
    """Values -> y coordinates; logarithmic if they are positive and span more than a factor of 50."""

    def __init__(self, values: Sequence[float]) -> None:
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        self.log = low > 0 and high / low > 50
        if low == high:  # a constant is drawn in the middle
            low, high = low - (abs(low) * 0.05 or 1.0), high + (abs(high) * 0.05 or 1.0)
        self.low, self.high = (math.log10(low), math.log10(high)) if self.log else (low, high)

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * fraction(at, self.low, self.high)

    def ticks(self) -> list[float]:
        if not self.log:
            return nice_ticks(self.low, self.high, 5)
        return spread([10.0**n for n in range(math.ceil(self.low), math.floor(self.high) + 1)], 6)


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """About as many round numbers between two values as asked for."""
    rough = high / about - low / about
    if rough == 0 or not math.isfinite(rough):
        return [low]
    unit = 10.0 ** math.floor(math.log10(rough))
    size = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    return [n * size for n in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]


def _x_axis(x: _Across) -> list[str]:
    y = _HEIGHT - _BOTTOM
    labels = [f'<text x="{x(t):.1f}" y="{y + 17}" text-anchor="middle">{int(t):,}</text>' for t in x.ticks()]
    return [f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>', *labels]


def _y_axis(y: _Up) -> list[str]:
    parts = [f'<text x="{_LEFT + 6}" y="{_TOP + 8}">log scale</text>'] if y.log else []
    for tick in y.ticks():
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    return parts


def _line(points: Sequence[Point], x: _Across, y: _Up, look: str) -> str:
    """One curve, with gaps where it is not finite; a single point between gaps is a dot."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    drawn = []
    for piece in pieces:
        places = [f"{x(step):.1f},{y(value):.1f}" for step, value in piece]
        if len(places) == 1:
            cx, cy = places[0].split(",")
            drawn.append(f'<circle class="{look}" cx="{cx}" cy="{cy}" r="2.5"/>')
        elif places:
            drawn.append(f'<polyline class="{look}" points="{" ".join(places)}"/>')
    return "".join(drawn)


def _hits(curves: Curves, x: _Across) -> list[str]:
    """Columns that show the numbers of a step under the pointer."""
    shown = spread(list(curves.by_step.items()), _MOST_HITS)
    ends = [_LEFT, *((x(a) + x(b)) / 2 for (a, _), (b, _) in pairwise(shown)), _WIDTH - _RIGHT]
    parts = []
    for (step, values), (left, right) in zip(shown, pairwise(ends), strict=True):
        told = escape(", ".join(f"{name} {number(value)}" for name, value in values.items()))
        parts.append(
            f'<rect class="hit" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}"><title>step {step:,}: {told}</title></rect>'
        )
    return parts


def sparkline(points: Sequence[Point]) -> str:
    """A small curve without axes, for a table cell."""
    shown = [point for point in thinned(points, 40) if math.isfinite(point[1])]
    if len(shown) < 2:
        return ""
    low, high = min(finite(shown)), max(finite(shown))
    start, end = shown[0][0], shown[-1][0]
    places = " ".join(
        f"{80 * (step - start) / (end - start):.1f},{18 - 16 * fraction(y, low, high):.1f}" for step, y in shown
    )
    return (
        '<svg class="chart" style="width:80px" viewBox="0 0 80 20" aria-hidden="true">'
        f'<polyline class="c0" points="{places}"/></svg>'
    )
