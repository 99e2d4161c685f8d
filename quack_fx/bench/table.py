"""Formats a comparison as a table, for a terminal or a file.

In: a `Comparison`. Out: a rich table and lines of text, or Markdown.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from quack_fx.bench.arms import MEANING
from quack_fx.bench.compare import Comparison


def terminal(comparison: Comparison) -> Table:
    """The table of all ways, for a terminal; `legend` explains the ways."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("way")
    for column in _columns(comparison):
        table.add_column(column, justify="right")
    for name in comparison.ways:
        table.add_row(name, *_cells(comparison, name))
    return table


def legend(comparison: Comparison) -> Table:
    """The meaning of each way."""
    table = Table.grid(padding=(0, 2))
    for name in comparison.ways:
        table.add_row(name, MEANING[name])
    table.add_row()
    return table


def markdown(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    head = ["way", "what", *_columns(comparison)]
    ways = [[name, MEANING[name], *_cells(comparison, name)] for name in comparison.ways]
    table = [head, ["---"] * len(head), *ways]
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([*setting(comparison), "", *lines, "", *(f"- {line}" for line in findings(comparison)), ""])


def setting(comparison: Comparison) -> Iterator[str]:
    """What was measured, and on which machine."""
    c = comparison
    tokens = f", {c.tokens:,} tokens a step" if c.tokens else ""
    yield (
        f"{c.machine}. {c.weights / 1e6:,.1f}M weights, {c.scaled / c.weights:.0%} of them in rows of queries and keys"
        f"{tokens}, AdamW, gradients clipped. {c.rounds} rounds of steps, {c.update_rounds} of updates; "
        "ratios within a round, as median (lower to upper quartile)."
    )


def findings(comparison: Comparison) -> Iterator[str]:
    """The ratios of interest, and the limits of the machine."""
    c = comparison
    for name, reason in c.missing.items():
        yield f"Way {name} ({MEANING[name]}) could not be taken: {reason}."
    if {"plain", "quack"} <= c.ways.keys():
        memory = c.ways["quack"].peak / max(1, c.ways["plain"].peak)
        yield (
            f"QuacK over the same step without it: update {c.ratio('quack', 'plain', 'update')}, "
            f"step {c.ratio('quack', 'plain', 'step')}, peak memory {memory:.3f}{_share(c)}."
        )
        yield from _on_device(c)
    if {"e", "quack", "plain"} <= c.ways.keys():
        eager = f", of an eager model {c.ratio('f', 'a', 'step')}" if {"a", "f"} <= c.ways.keys() else ""
        yield (
            f"QuacK over QK norm: step {c.ratio('quack', 'e', 'step')}. "
            f"QK norm over none: step {c.ratio('e', 'plain', 'step')}{eager}."
        )
    yield (
        f"Limits: {c.update_bytes / 1e6:,.1f} MB at {c.bandwidth / 1e9:,.1f} GB/s (a large copy) make an update of "
        f"{1e3 * c.update_bytes / c.bandwidth:.2f} ms; {c.flops / 1e9:,.1f} Gflop at {c.rate / 1e12:,.2f} Tflop/s (a "
        f"large product of matrices) make a forward and backward of {1e3 * c.flops / c.rate:,.1f} ms."
    )
    yield "MFU is the flops of a step over its time and that rate; attention counts in full, causal or not."


def _share(comparison: Comparison) -> str:
    """What QuacK adds to an update, in percent of a step; it is too little to show in step times."""
    quack, plain = comparison.ways["quack"], comparison.ways["plain"]
    more = quack.update.minus(plain.update)
    low, middle, high = (f"{seconds / plain.step.median:.2%}" for seconds in more)
    return f"; the update takes {1e3 * more[1]:.1f} ms longer, {middle} ({low} to {high}) of a step"


def _on_device(comparison: Comparison) -> Iterator[str]:
    """What QuacK adds to device time; an update timed alone on a GPU is mostly kernel launches."""
    with_quack, without = (comparison.ways[name].update_work for name in ("quack", "plain"))
    if with_quack is not None and without is not None:
        more = with_quack.seconds - without.seconds
        step = comparison.ways["plain"].step.median
        yield (
            f"On the device QuacK's update takes {with_quack.seconds / without.seconds:.3f} of what it takes without, "
            f"{1e6 * more:.0f} us more: {more / step:.2%} of a step."
        )


def _columns(comparison: Comparison) -> list[str]:
    columns = ["step, ms", "step / c"]
    columns += ["tokens/s"] if comparison.tokens else []
    columns += ["MFU", "update, ms", "update / plain", "peak, MB", "first, s"]
    return columns + (["kernels", "of the update", "they take, ms"] if _has_device(comparison) else [])


def _cells(comparison: Comparison, name: str) -> list[str]:
    c, way = comparison, comparison.ways[name]
    seconds = way.step.median
    cells = [f"{1e3 * seconds:.1f}", c.ratio(name, "c", "step")]
    cells += [f"{c.tokens / seconds:,.0f}"] if c.tokens else []
    cells += [
        f"{c.flops / seconds / c.rate:.0%}",
        f"{1e3 * way.update.median:.2f}",
        c.ratio(name, "plain", "update"),
        f"{way.peak / 1e6:.1f}",
        f"{way.first:.1f}",
    ]
    if _has_device(c):
        cells.append("-" if way.work is None else str(way.work.kernels))
        own = way.update_work
        cells += ["-", "-"] if own is None else [str(own.kernels), f"{1e3 * own.seconds:.3f}"]
    return cells


def _has_device(comparison: Comparison) -> bool:
    return any(way.work is not None for way in comparison.ways.values())
