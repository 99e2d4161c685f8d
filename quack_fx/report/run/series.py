"""A `Run` as curves over steps, and the growth of every head.

In: a run. Out: the `Curves` of each picture, and the `Growth` of heads, the largest first; also, for all reports of a
run, remarks on the record, and numbers as text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import TypeVar

from quack_fx.report.run.read import LOGIT, PRODUCT, SCALE, Run, RunFile, Sample, summary

Point = tuple[int, float]
"""A step and a value."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Curves:
    """Curves of one picture, by name; `about` says in a sentence what they show, and is empty for the user's own."""

    title: str
    about: str
    lines: Mapping[str, Sequence[Point]]

    @cached_property
    def by_step(self) -> dict[int, dict[str, float]]:
        """For each step, in order, its values by the names of the curves."""
        values: dict[int, dict[str, float]] = {}
        for name, points in self.lines.items():
            for step, value in points:
                values.setdefault(step, {})[name] = value
        return dict(sorted(values.items()))

    @property
    def not_finite(self) -> list[int]:
        """Steps at which a value is NaN or infinite."""
        return [step for step, values in self.by_step.items() if not all(map(math.isfinite, values.values()))]


@dataclass(frozen=True)
class Growth:
    """How the norm product of one query head has grown.

    Attributes:
        site: Its attention.
        head: Its index.
        first: The product at the start of the record.
        now: The product at the last step.
        ratio: `now` divided by `first`; infinite if only `first` is zero.
        logit: Its largest logit at the last step; None if the record has none.
        way: The product over time.
    """

    site: str
    head: int
    first: float
    now: float
    ratio: float
    logit: float | None
    way: tuple[Point, ...]


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


def finite(points: Sequence[Point]) -> list[float]:
    """The values of some points that are finite."""
    return [y for _, y in points if math.isfinite(y)]


def thinned(points: Sequence[Point], limit: int) -> list[Point]:
    """About `limit` points: the ends, and of each stretch the smallest and largest value and one that is not finite."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit // 3))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        whole = [point for point in stretch if math.isfinite(point[1])]
        broken = [point for point in stretch if not math.isfinite(point[1])][:1]
        low_high = [min(whole, key=lambda p: p[1]), max(whole, key=lambda p: p[1])] if whole else []
        kept += sorted({*low_high, *broken}, key=lambda point: point[0])
    ends = {points[0], points[-1]} - set(kept)
    return sorted([*kept, *ends], key=lambda point: point[0])


def spread(items: Sequence[_T], limit: int) -> list[_T]:
    """At most `limit` of some items, evenly spaced, including the first and the last."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def growth(run: Run, limit: int) -> list[Growth]:
    """The `limit` query heads whose norm product grew most, in descending order; NaN comes first."""
    if run.last is None:
        return []
    samples = [*run.samples, *([run.last] if run.samples[-1] is not run.last else [])]
    found = []
    for (site, metric), now in run.last.heads.items():
        if metric == PRODUCT:
            alike = [s for s in samples if len(s.heads.get((site, PRODUCT), ())) == len(now)]
            first = alike[0].heads[site, PRODUCT]
            found += [(_ratio(*pair), site, head, alike) for head, pair in enumerate(zip(now, first, strict=True))]
    found.sort(key=lambda one: (not math.isnan(one[0]), -one[0]))
    return [_growth(*one, run.last) for one in found[:limit]]


def _ratio(now: float, first: float) -> float:
    """`now` divided by `first`; infinite if only `first` is zero."""
    if first == 0:
        return 1.0 if now == 0 else math.inf * now
    return now / first


def _growth(ratio: float, site: str, head: int, samples: Sequence[Sample], last: Sample) -> Growth:
    way = tuple((sample.step, sample.heads[site, PRODUCT][head]) for sample in samples)
    logits = last.heads.get((site, LOGIT), ())
    return Growth(site, head, way[0][1], way[-1][1], ratio, logits[head] if head < len(logits) else None, way)


def remarks(file: RunFile) -> list[str]:
    """What a reader should know about a record: extent, restarts, an incomplete line, values that are not finite."""
    run, said = file.run, []
    records = run.records
    times = [record.time for record in records if math.isfinite(record.time)]
    known = len(times) > 1 and times[-1] >= times[0]
    lasted = f", {timedelta(seconds=round(times[-1] - times[0]))}" if known else ""
    steps = f"step {records[0].step:,}" if len(records) == 1 else f"steps {records[0].step:,} to {records[-1].step:,}"
    said.append(f"{len(records):,} record{'s' * (len(records) != 1)}, {steps}{lasted}")
    if run.restarts:
        again = ", ".join(f"{step:,}" for step in run.restarts[-5:])
        more = f"the last 5 of {len(run.restarts)} times: " if len(run.restarts) > 5 else ""
        said.append(
            f"went on from an earlier step; what was recorded again replaces what was there: {more}step {again}"
        )
    if file.unfinished:
        said.append("the last line is not complete and was left out")
    for picture in curves(run):
        if broken := picture.not_finite:
            times_text = "once" if len(broken) == 1 else f"at {len(broken):,} steps"
            said.append(f"{picture.title} is not finite {times_text}, first at step {broken[0]:,}")
    return said


def fraction(value: float, low: float, high: float) -> float:
    """Where a value is between two others, from 0 to 1. Halves are subtracted, since a difference may overflow."""
    return (value / 2 - low / 2) / (high / 2 - low / 2) if high > low else 0.5


def number(value: float | None) -> str:
    """A number with at most four significant digits."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    return f"{value:.4g}"


def extent(values: Sequence[float]) -> str:
    """Smallest and largest of some numbers, as text; NaN if one is NaN."""
    low, high = number(summary("min", values)), number(summary("max", values))
    return low if low == high else f"{low} to {high}"


def site_name(site: str) -> str:
    """The name of an attention, "(root)" if it is the model itself."""
    return site or "(root)"
