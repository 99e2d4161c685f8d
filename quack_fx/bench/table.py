"""USER: a comparison as a table, for a terminal or for a file.

In: a `Comparison`. Out: a rich table and lines of text, or Markdown.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from rich import box
from rich.table import Table

from quack_fx.bench.arms import MEANING
from quack_fx.bench.compare import Comparison, Way
from quack_fx.bench.measure import Times


def terminal(comparison: Comparison) -> Table:
    """The table of all ways, for a terminal."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in _columns(comparison):
        side: Literal["left", "right"] = "left" if column in ("way", "what") else "right"
        table.add_column(column, justify=side, no_wrap=column == "way", overflow="fold")
    for row in _rows(comparison):
        table.add_row(*row)
    return table


def markdown(comparison: Comparison) -> str:
    """All of it as Markdown."""
    columns = _columns(comparison)
    table = [columns, ["---"] * len(columns), *_rows(comparison)]
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([*setting(comparison), "", *lines, "", *(f"- {line}" for line in findings(comparison)), ""])


def setting(comparison: Comparison) -> Iterator[str]:
    """What was measured, and where."""
    c = comparison
    tokens = f", {c.tokens:,} tokens a step" if c.tokens else ""
    yield (
        f"{c.machine}. {c.weights / 1e6:,.1f}M weights, {c.scaled / c.weights:.0%} of them in rows of queries and keys"
        f"{tokens}, AdamW, gradients clipped. {c.rounds} rounds of steps, more of updates; ratios within a round, "
        "as median (lower to upper quartile)."
    )


def findings(comparison: Comparison) -> Iterator[str]:
    """What follows from the table, and the limits."""
    c = comparison
    for name, reason in c.missing.items():
        yield f"Way {name} ({MEANING[name]}) could not be taken: {reason}."
    if {"plain", "quack"} <= c.ways.keys():
        memory = c.ways["quack"].peak / max(1, c.ways["plain"].peak)
        yield (
            f"QuacK over the same step without it: update {c.ratio('quack', 'plain', _update)}, "
            f"step {c.ratio('quack', 'plain', _step)}, peak memory {memory:.3f}."
        )
    if {"whole", "quack"} <= c.ways.keys():
        memory = c.ways["whole"].peak / max(1, c.ways["quack"].peak)
        yield f"As one graph over as a few: step {c.ratio('whole', 'quack', _step)}, peak memory {memory:.3f}."
    if {"e", "quack"} <= c.ways.keys():
        yield f"QuacK over QK norm: step {c.ratio('quack', 'e', _step)}."
    yield (
        f"Limits: {c.update_bytes / 1e6:,.1f} MB at {c.bandwidth / 1e9:,.1f} GB/s (a large copy) make an update of "
        f"{1e3 * c.update_bytes / c.bandwidth:.2f} ms; {c.flops / 1e9:,.1f} Gflop at {c.rate / 1e12:,.2f} Tflop/s (a "
        f"large product of matrices) make a forward and backward of {1e3 * c.flops / c.rate:,.1f} ms."
    )
    if "quack" in c.ways:
        seconds = c.ways["quack"].step.median
        tokens = f", {c.tokens / seconds:,.0f} tokens/s" if c.tokens else ""
        yield f"Our step with QuacK reaches {c.flops / seconds / c.rate:.0%} of that rate{tokens}."


def _step(way: Way) -> Times:
    return way.step


def _update(way: Way) -> Times | None:
    return way.update


def _columns(comparison: Comparison) -> list[str]:
    kernels = ["kernels"] if any(way.kernels is not None for way in comparison.ways.values()) else []
    return ["way", "what", "step, ms", "step / c", "update, ms", "update / plain", "peak, MB", "first, s", *kernels]


def _rows(comparison: Comparison) -> Iterator[list[str]]:
    for name, way in comparison.ways.items():
        yield [
            name,
            MEANING[name],
            f"{1e3 * way.step.median:.1f}",
            comparison.ratio(name, "c", _step),
            "-" if way.update is None else f"{1e3 * way.update.median:.2f}",
            comparison.ratio(name, "plain", _update),
            f"{way.peak / 1e6:.1f}",
            f"{way.first:.1f}",
            *([] if way.kernels is None else [str(way.kernels)]),
        ]
