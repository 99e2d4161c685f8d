"""Writes at computed indices (`index_put`, `index_copy`, `scatter`) and sums at indices (`index_add`, `scatter_add`).

Indices that depend on data (the tokens of an expert) do not say where the values go, so every place along the indexed
axes may hold what it held before or what is written, as in the result of a `where`. Its features are known only if the
values have the same features all along these axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.find.provenance.flow import Flow, merged_flow
from quack_fx.find.provenance.labels import constant_along
from quack_fx.find.provenance.rules.step import Step
from quack_fx.find.provenance.views import PUTS, runs_at_known_indices
from quack_fx.graph.dataflow import Dataflow

_SUMS = frozenset("index_add index_reduce scatter_add scatter_reduce".split())
_ALONG_ONE_AXIS = _SUMS | frozenset({"index_copy", "scatter"})


def writes_anywhere(step: Step) -> bool:
    """Whether a node is a sum at indices, or a write at indices that depend on data."""
    name = step.df.op[step.node].name
    return name in _SUMS or (name in PUTS and not runs_at_known_indices(step.df, step.node))


def write_anywhere(step: Step) -> Flow:
    """Rule for such a node: everywhere along the indexed axes, the features that were there and those of the values."""
    df, node = step.df, step.node
    name = df.op[node].name
    before = step.input(node.args[0])  # type: ignore[arg-type]
    values = node.args[3 if name in _ALONG_ONE_AXIS else 2]
    if not isinstance(values, Node) or not step.carries(values):
        return before
    new = step.input(values)
    label = None
    if name in _ALONG_ONE_AXIS:
        label = _along_one_axis(df, node, new.label)
    elif name != "masked_scatter":
        label = _along_axes(df, node, new.label)
    if label is None:
        return step.unknown()
    return replace(merged_flow([before, new]), label=step.labels.union([before.label, label], df.shape(node)))


def _along_one_axis(df: Dataflow, node: Node, label: Tensor) -> Tensor | None:
    """Labels of the values, with size 1 along the axis that is indexed; None if they are not the same all along it."""
    _, axis, index = node.args[:3]
    rank = len(df.shape(node))
    axis = int(axis) % max(1, rank)  # type: ignore[arg-type]
    written = df.shape(index) if df.op[node].name.startswith("scatter") else label.shape  # type: ignore[arg-type]
    if len(written) != rank or any(n != df.shape(node)[d] for d, n in enumerate(written) if d != axis):
        return None  # the other axes are not written as a whole
    return _one_along(label, [axis])


def _along_axes(df: Dataflow, node: Node, label: Tensor) -> Tensor | None:
    """The same for an `index_put`, which may index several axes; a mask covers as many as it has."""
    indices: Sequence[Node | None] = node.args[1]  # type: ignore[assignment]
    if any(df.constant(i) is not None for i in indices if i is not None):
        return None  # at these axes, it is known where the values go
    axes, width, start = list[int](), 1, 0
    for index in indices:
        is_mask = index is not None and df.value(index).dtype in (torch.bool, torch.uint8)
        end = start + (len(df.shape(index)) if index is not None and is_mask else 1)
        axes += range(start, end) if index is not None else ()
        width = max(width, len(df.shape(index)) if index is not None and not is_mask else 1)
        start = end
    # In the values, the axes of the indices take the place of the indexed axes; they are in front if these are apart.
    first = axes[0] if axes == list(range(axes[0], axes[-1] + 1)) else 0
    places = tuple(range(first, first + width))
    missing = len(df.shape(node)) - len(axes) + width - label.dim()
    one = _one_along(label[(None,) * missing], places)
    if one is None:
        return None
    one = one.squeeze(places)
    for axis in axes:
        one = one.unsqueeze(axis)
    return one


def _one_along(label: Tensor, axes: Sequence[int]) -> Tensor | None:
    """Narrow axes along which the labels are constant to size 1; None if they are not, or if there are no labels."""
    if not label.numel() or not all(constant_along(label, d) for d in axes):
        return None
    for d in axes:
        label = label.narrow(d, 0, 1)
    return label
