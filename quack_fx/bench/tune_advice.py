"""Conclusions from short training runs.

In: outcomes. Out: their table, and lines that say what to train with, by how much it was better, and whether the
difference is larger than the spread over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from quack_fx.bench.tune import Arm, Outcome, Plan

_SURE = 2.0
"""A difference counts if it is larger than this many standard errors."""


@dataclass(frozen=True)
class Point:
    """One way to train at one learning rate.

    Attributes:
        arm: The way to train.
        lr: The learning rate.
        losses: Loss of each seed; not finite if the run diverged.
    """

    arm: Arm
    lr: float
    losses: dict[int, float]

    @property
    def sound(self) -> bool:
        """Whether there are runs, and none diverged."""
        return bool(self.losses) and all(map(math.isfinite, self.losses.values()))

    @property
    def mean(self) -> float:
        """Mean loss."""
        return statistics.fmean(self.losses.values())

    def __str__(self) -> str:
        if not self.losses:
            return "-"
        if not self.sound:
            return "diverged"
        return _with_spread(list(self.losses.values()))


def points_of(outcomes: Sequence[Outcome], plan: Plan) -> list[list[Point]]:
    """Outcomes by arm and ascending learning rate; includes points without runs.

    A seed with missing runs counts only if no seed is complete: means over different seeds cannot be compared.
    """
    runs = Counter(outcome.seed for outcome in outcomes)
    whole = {seed for seed, number in runs.items() if number == len(plan.arms) * len(plan.lrs)}
    found: dict[tuple[Arm, float], dict[int, float]] = {}
    for outcome in (outcome for outcome in outcomes if not whole or outcome.seed in whole):
        found.setdefault((outcome.arm, outcome.lr), {})[outcome.seed] = outcome.loss
    return [[Point(arm, lr, found.get((arm, lr), {})) for lr in sorted(plan.lrs)] for arm in plan.arms]


def table(outcomes: Sequence[Outcome], plan: Plan) -> Table:
    """Losses of the held-out batches, with the best of each arm in bold, for a terminal."""
    shown = Table(box=box.SIMPLE, pad_edge=False)
    shown.add_column("held-out loss at lr")
    for lr in sorted(plan.lrs):
        shown.add_column(f"{lr:g}", justify="right")
    for row in points_of(outcomes, plan):
        best = _best(row)
        shown.add_row(row[0].arm.name, *(f"[bold]{point}[/]" if point is best else str(point) for point in row))
    return shown


def markdown(outcomes: Sequence[Outcome], plan: Plan) -> str:
    """The table and the advice as Markdown."""
    lines = ["| held-out loss at lr | " + " | ".join(f"{lr:g}" for lr in sorted(plan.lrs)) + " |"]
    lines += ["| --- |" + " ---: |" * len(plan.lrs)]
    lines += [f"| {row[0].arm.name} | {' | '.join(map(str, row))} |" for row in points_of(outcomes, plan)]
    return "\n".join([*lines, "", *(f"- {line}" for line in advice(outcomes, plan)), ""])


def advice(outcomes: Sequence[Outcome], plan: Plan) -> Iterator[str]:
    """What to train with, according to these runs."""
    rows = points_of(outcomes, plan)
    bests = [best for row in rows if (best := _best(row)) is not None]
    if not bests:
        yield "no run ended with a finite loss: nothing can be told; try lower learning rates (--lr) or more --minutes"
        return
    best = min(bests, key=lambda point: point.mean)
    plain = next((point for point in bests if point.arm.kind == "none"), None)
    seeds = f"{len(best.losses)} seed{'s' if len(best.losses) > 1 else ''}"
    yield f"lowest loss: {best.arm.name}, lr {best.lr:g}: {best} ({seeds})"
    missing = [point for row in rows for point in row if not point.losses]
    if missing:
        yield f"not run: {len(missing)} of {sum(map(len, rows))} points of the table; they may be better"
    if plain is None:
        yield "there is no sound run without QuacK and QK norm to compare with"
    else:
        others = sorted((point for point in bests if point is not plain), key=lambda point: point.mean)
        yield from (_against(other, plain) for other in others)
    if len(plan.lrs) > 1 and best.lr in (min(plan.lrs), max(plan.lrs)):
        where = "lower" if best.lr == min(plan.lrs) else "higher"
        yield f"lr {best.lr:g} is at the end of the range: a {where} one may be better; give --lr"
    for row in rows:
        if broken := [f"{point.lr:g}" for point in row if point.losses and not point.sound]:
            yield f"{row[0].arm.name} diverged at lr {', '.join(broken)}"
    yield f"these are runs of {plan.steps} steps: what a long run ends with may differ"


def _against(point: Point, plain: Point) -> str:
    """Compare an arm with plain training, each at its best learning rate, seed by seed."""
    differences = [loss - plain.losses[seed] for seed, loss in point.losses.items() if seed in plain.losses]
    text = f"{point.arm.name} (lr {point.lr:g}) against none (lr {plain.lr:g}): "
    if len(differences) < 2:
        return text + f"{point.mean - plain.mean:+.3f}; one seed cannot tell"
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    told = abs(mean) > _SURE * error and len({difference > 0 for difference in differences}) == 1
    verdict = ("better" if mean < 0 else "worse") + " at every seed" if told else "cannot tell"
    return text + f"{_with_spread(differences, '+')}, {verdict}"


def _best(row: Sequence[Point]) -> Point | None:
    """The point with the lowest mean loss among those at which no run diverged."""
    return min((point for point in row if point.sound), key=lambda point: point.mean, default=None)


def _with_spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and, for two or more values, standard deviation."""
    text = f"{statistics.fmean(values):{sign}.3f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.3f}"
