"""The figures of docs/stability.md.

In: panels. Out: the text of SVG files, which use the colours of the site if they are part of a page.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.stability.records import Record
from benchmarks.stability.summary import Panel, curve

_INK = "#3d4654"
_STYLES = {
    "none": ("#6b7280", "-"),
    "qk-norm": ("#7c4dbe", "-"),
    "qk-clip 30": ("#c2417a", "-"),
    "qk-clip 100": ("#c2417a", "--"),
    "constant 0.1": ("#c08a1e", "--"),
    "compositional 1": ("#2a5fb0", "-"),
    "quack 0.01": ("#17786d", ":"),
    "quack 0.1": ("#17786d", "--"),
    "quack 1": ("#17786d", "-"),
    "quack 10": ("#17786d", "-."),
}
"""Colour and line style of each method: the colour shows its kind, dashes its number."""


def loss_by_lr(panels: Sequence[Panel]) -> str:
    """Validation loss over the learning rate: means over seeds, with bars from the lowest to the highest seed.

    Points at which a seed diverged are left out.
    """
    figure, axes = _figure(panels, "learning rate", "validation loss", [panel.title for panel in panels])
    for ax, panel in zip(axes, panels, strict=True):
        ax.set_xscale("log")
        for method in panel.methods:
            points = {lr: panel.point(method, lr) for lr in panel.lrs}
            sound = {lr: point for lr, point in points.items() if point.records and not point.diverged}
            means = [point.loss.mean for point in sound.values()]
            seeds = [[record.result.loss for record in point.records.values()] for point in sound.values()]
            below = [mean - min(losses) for mean, losses in zip(means, seeds, strict=True)]
            above = [max(losses) - mean for mean, losses in zip(means, seeds, strict=True)]
            colour, dashes = _STYLES[method.name]
            ax.errorbar(
                [*sound], means, (below, above), label=method.name, color=colour, linestyle=dashes, linewidth=1.3,
                marker="o", markersize=2.5, elinewidth=0.8, capsize=1.5,
            )  # fmt: skip
    return _svg(figure, axes, "loss")


def over_steps(
    panels: Sequence[Panel], lrs: Sequence[float], what: str, take: Callable[[Record], Sequence[float]]
) -> str:
    """A curve over steps at one learning rate of each panel: geometric means over seeds, on a logarithmic axis.

    Arguments:
        panels: The panels.
        lrs: The learning rate to show for each panel.
        what: Label of the curve.
        take: Returns the curve of a record.
    """
    titles = [f"{panel.title}, lr {lr:g}" for panel, lr in zip(panels, lrs, strict=True)]
    figure, axes = _figure(panels, "step", what, titles)
    for ax, panel, lr in zip(axes, panels, lrs, strict=True):
        ax.set_yscale("log")
        for method in panel.methods:
            steps, values = curve(panel.point(method, lr), take)
            colour, dashes = _STYLES[method.name]
            ax.plot(steps, values, label=method.name, color=colour, linestyle=dashes, linewidth=1.3)
    return _svg(figure, axes, what)


def _figure(panels: Sequence[Panel], x: str, y: str, titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure with two panels per row."""
    rows = (len(panels) + 1) // 2
    figure, grid = pyplot.subplots(rows, 2, figsize=(9.5, 0.8 + 3.0 * rows), squeeze=False, layout="constrained")
    axes = [*grid.flat]
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(title, fontsize=9, color=_INK)
        ax.set_xlabel(x, fontsize=8, color=_INK)
        ax.set_ylabel(y, fontsize=8, color=_INK)
        ax.tick_params(which="both", labelsize=7.5, colors=_INK)
        ax.grid(alpha=0.25, linewidth=0.5)
        for spine in ax.spines.values():
            spine.set_color(_INK)
            spine.set_linewidth(0.6)
    for ax in axes[len(panels) :]:
        ax.remove()
    return figure, axes[: len(panels)]


def _svg(figure: Figure, axes: Sequence[Axes], name: str) -> str:
    """A figure as SVG text, with one legend below; deterministic."""
    labels = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    order = [label for label in _STYLES if label in labels]
    figure.legend(
        [labels[label] for label in order], order, loc="outside lower center", ncols=6, fontsize=8, frameon=False,
        labelcolor=_INK,
    )  # fmt: skip
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    svg = text.getvalue()
    # In a page, the figure uses the page's text colour (light on dark pages), and its styles apply only to itself.
    return svg[svg.index("<svg") :].replace(_INK, f"var(--qf-ink, {_INK})").replace("*{stroke", "#figure_1 *{stroke")
