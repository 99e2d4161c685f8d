"""A `Run` -> curves over steps, and the growth of every head.

In: a run. Out: `Curves` that belong in one picture, thinned so that no extreme is lost, and `Growth` of heads, the
largest first. Numbers as text, for all reports of a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from quack_fx.report.run.read import LOGIT, PRODUCT, SCALE, Run

Point = tuple[int, float]
"""A step and a value."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Curves:
    """Curves of one picture.

    Attributes:
        title: What they show.
        about: What that is, in a sentence; empty for the user's own numbers.
        lines: The points of each curve by its name.
    """

    title: str
    about: str
    lines: Mapping[str, Sequence[Point]]

    @property
    def not_finite(self) -> list[int]:
        """Steps at which a value is NaN or infinite."""
        return sorted({step for points in self.lines.values() for step, y in points if not math.isfinite(y)})


@dataclass(frozen=True)
class Growth:
    """What became of one query head.

    Attributes:
        site: Its attention.
        head: Its number.
        first: The product of its norms when the record begins.
        now: The product at the last step.
        logit: Its largest logit at the last step; None where the record has none.
        way: The product over time.
    """

    site: str
    head: int
    first: float
    now: float
    logit: float | None
    way: tuple[Point, ...]

    @property
    def ratio(self) -> float:
        """How many times the first product the last one is."""
        if self.first == 0:
            return 1.0 if self.now == 0 else math.inf * self.now
        return self.now / self.first


_OF_ATTENTION = (
    (
        "largest logit",
        "The largest attention logit of any head since the last step.",
        {"largest": f"{LOGIT}/max"},
    ),
    (
        "norm product",
        "Norms of a head's query and key weights multiplied, times the logit scale: no logit of inputs of norm one is "
        "larger.",
        {"largest": f"{PRODUCT}/max", "median": f"{PRODUCT}/median"},
    ),
    (
        "learning-rate scale",
        "What QuacK multiplies the learning rates of query and key weights with, over all heads.",
        {"largest": f"{SCALE}/max", "median": f"{SCALE}/median", "smallest": f"{SCALE}/min"},
    ),
)


def curves(run: Run) -> list[Curves]:
    """All curves of a run: the user's own numbers, then those of attention that the record has."""
    names = dict.fromkeys(name for record in run.records for name in record.own)
    found = [Curves(n, "", {n: [(r.step, r.own[n]) for r in run.records if n in r.own]}) for n in names]
    for title, about, keys in _OF_ATTENTION:
        lines = {
            name: [(r.step, r.attention[key]) for r in run.records if key in r.attention] for name, key in keys.items()
        }
        if any(lines.values()):
            found.append(Curves(title, about, {name: points for name, points in lines.items() if points}))
    return found


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` points with the smallest and largest value of each stretch, and all that are not finite.

    Of values that are not finite one a stretch is kept.
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 3))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if math.isfinite(point[1])]
        broken = [point for point in stretch if not math.isfinite(point[1])][:1]
        low_high = [min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])] if finite else []
        kept += sorted({*low_high, *broken}, key=lambda point: point[0])
    ends = {points[0], points[-1]} - set(kept)
    return sorted([*kept, *ends], key=lambda point: point[0])


def spread(items: Sequence[_T], most: int) -> list[_T]:
    """At most `most` of some things, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def growth(run: Run) -> list[Growth]:
    """The query heads of a run, those whose product of norms grew most first; NaN counts as more than all."""
    if run.last is None:
        return []
    found = []
    samples = [*run.samples, *([run.last] if run.samples[-1] is not run.last else [])]
    for (site, metric), now in run.last.heads.items():
        if metric != PRODUCT:
            continue
        ways = [(s.step, s.heads[site, metric]) for s in samples if len(s.heads.get((site, metric), ())) == len(now)]
        logits = run.last.heads.get((site, LOGIT), ())
        for head, value in enumerate(now):
            way = tuple((step, values[head]) for step, values in ways)
            logit = logits[head] if head < len(logits) else None
            found.append(Growth(site, head, way[0][1], value, logit, way))
    return sorted(found, key=lambda g: -math.inf if math.isnan(g.ratio) else -g.ratio)


def number(value: float | None) -> str:
    """A number with four digits."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    return f"{value:.4g}"


def site_name(site: str) -> str:
    """The name of an attention, also of the one that is the model itself."""
    return site or "(root)"
