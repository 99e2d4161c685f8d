"""Aggregates runs: mean and spread over seeds for each point of the grid.

In: records. Out: `Point`s and comparisons, as numbers; report.py and plots.py show them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.stability.grid import METHODS, Method
from benchmarks.stability.records import Record

CLOSE = 0.1
"""A learning rate works with a method if the loss is at most this much above the best loss of all methods."""


_SMALL = 1e-12
"""Replaces zero on a logarithmic axis."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds.

    Attributes:
        mean: The mean; NaN without seeds.
        deviation: Standard deviation over seeds; None for fewer than two seeds.
        seeds: Number of seeds.
    """

    mean: float
    deviation: float | None
    seeds: int

    def __format__(self, spec: str) -> str:
        """Mean and deviation, both in the number format `spec` (".3f" if empty); only the mean shows a plus sign."""
        if self.seeds == 0:
            return "-"
        spec = spec or ".3f"
        return f"{self.mean:{spec}}" + ("" if self.deviation is None else f" ± {self.deviation:{spec.lstrip('+')}}")

    def __str__(self) -> str:
        return f"{self}"


def spread(values: Iterable[float]) -> Spread:
    """Mean and standard deviation of some numbers."""
    numbers = list(values)
    if not numbers:
        return Spread(math.nan, None, 0)
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(statistics.fmean(numbers), deviation, len(numbers))


@dataclass(frozen=True)
class Point:
    """All seeds of one point of the grid.

    Attributes:
        records: The records, by seed.
    """

    records: dict[int, Record] = field(default_factory=dict)

    @property
    def diverged(self) -> int:
        """Number of seeds whose run diverged."""
        return sum(record.result.diverged is not None for record in self.records.values())

    @property
    def loss(self) -> Spread:
        """Validation loss of the seeds that did not diverge."""
        return spread(r.result.loss for r in self.records.values() if r.result.diverged is None)

    def __str__(self) -> str:
        """The validation loss, or how many seeds diverged."""
        return f"diverged ({self.diverged} of {len(self.records)})" if self.diverged else str(self.loss)

    @property
    def largest(self) -> float:
        """Largest logit of all seeds."""
        return max((record.result.largest for record in self.records.values()), default=math.nan)

    @property
    def change(self) -> Spread:
        """Mean change of a logit per step, over the second half of the points of a run."""
        halves = (r.result.curves.change[len(r.result.curves.change) // 2 :] for r in self.records.values())
        return spread(statistics.fmean(half) for half in halves if half)


@dataclass(frozen=True)
class Panel:
    """The runs with one attention, optimizer and number of steps.

    Attributes:
        attention: The attention.
        optimizer: The optimizer.
        steps: Steps of a run.
        points: The points, by method and learning rate.
    """

    attention: str
    optimizer: str
    steps: int
    points: dict[tuple[Method, float], Point]

    @property
    def title(self) -> str:
        """A title for the panel."""
        return f"{self.attention.upper()}, {'Muon' if self.optimizer == 'muon' else 'AdamW'}, {self.steps:,} steps"

    @property
    def methods(self) -> list[Method]:
        """Its methods, in table order."""
        return sorted({method for method, _ in self.points}, key=_rank)

    @property
    def lrs(self) -> list[float]:
        """Its learning rates, ascending."""
        return sorted({lr for _, lr in self.points})

    @property
    def seeds(self) -> int:
        """The largest number of seeds at a point."""
        return max(len(point.records) for point in self.points.values())

    def point(self, method: Method, lr: float) -> Point:
        """A point of the grid; without records if it was not run."""
        return self.points.get((method, lr), Point())

    def best(self, method: Method) -> float | None:
        """The learning rate with the lowest mean loss among those at which no seed diverged, or None."""
        sound = [lr for lr in self.lrs if self.point(method, lr).loss.seeds and not self.point(method, lr).diverged]
        return min(sound, key=lambda lr: self.point(method, lr).loss.mean, default=None)

    def close(self, method: Method) -> list[float]:
        """The learning rates at which a method's loss is at most `CLOSE` above the best loss of all methods."""
        bests = [(m, lr) for m in self.methods if (lr := self.best(m)) is not None]
        lowest = min((self.point(*best).loss.mean for best in bests), default=math.nan)
        points = [(lr, self.point(method, lr)) for lr in self.lrs]
        return [lr for lr, p in points if p.loss.seeds and not p.diverged and p.loss.mean <= lowest + CLOSE]

    def difference(self, one: Method, other: Method, lr: Callable[[Method], float | None]) -> Spread:
        """Loss of one method minus that of another, seed by seed, each at the learning rate returned by `lr`."""
        at = [(method, lr(method)) for method in (one, other)]
        points = [Point() if own is None else self.point(method, own) for method, own in at]
        sound = [{s: r.result.loss for s, r in p.records.items() if r.result.diverged is None} for p in points]
        return spread(sound[0][seed] - sound[1][seed] for seed in sound[0].keys() & sound[1].keys())


def panels(records: Iterable[Record]) -> list[Panel]:
    """Group records into panels, sorted by steps, Muon first, then attention."""
    found: dict[tuple[str, str, int], dict[tuple[Method, float], Point]] = {}
    for record in records:
        run = record.run
        own = found.setdefault((run.attention, run.optimizer, run.steps), {})
        own.setdefault((run.method, run.lr), Point()).records[run.seed] = record
    panels = [Panel(*key, points) for key, points in found.items()]
    return sorted(panels, key=lambda p: (p.steps, p.optimizer != "muon", p.attention))


def curve(point: Point, take: Callable[[Record], Sequence[float]]) -> tuple[list[int], list[float]]:
    """Steps, and the geometric mean of a curve over seeds, up to the end of the shortest."""
    curves = [take(record) for record in point.records.values()]
    steps = min((record.result.curves.step for record in point.records.values()), key=len, default=[])
    means = [statistics.geometric_mean(max(value, _SMALL) for value in values) for values in zip(*curves, strict=False)]
    return steps, means


def _rank(method: Method) -> tuple[int, float, float]:
    """Sort key that groups methods by kind, in the order of `METHODS`."""
    kinds = list(dict.fromkeys(own.kind for own in METHODS))
    return (kinds.index(method.kind), method.tau, method.threshold)
