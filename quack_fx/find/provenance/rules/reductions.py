"""Reductions over axes and pooling over windows: their results are statistics of features, or features themselves."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.find.provenance.flow import Flow, Statistic
from quack_fx.find.provenance.labels import NOTHING, UNKNOWN, constant_along
from quack_fx.find.provenance.rules.step import Step
from quack_fx.graph.ops import pooled_axes

_SUMS = frozenset("sum mean nansum".split())
_PICKS = frozenset("amax amin max min cumsum cumprod".split())
"""Reductions whose (first) result depends on only some of the elements."""

_OF_SIZE = frozenset("pow abs square exp".split())
"""Ops after which a mean or sum is a statistic of the features rather than their average."""


def reduction(step: Step, of: Node | None = None, part: int = 0) -> Flow:
    """Rule for a reduction. If the node is a getitem, `of` is the reduction and `part` the index of its result."""
    df, node = step.df, of or step.node
    value, source = df.value(step.node), node.args[0]
    x = step.input(source) if isinstance(source, Node) else step.unknown()
    if not isinstance(value, Tensor):
        return x  # `views.part` handles its results
    if not value.is_floating_point():
        return step.nothing()  # indices, not features
    unknown = torch.tensor(UNKNOWN).expand(value.shape)
    features = step.labels.features(x.label)
    if x.statistic is not None and UNKNOWN in features:
        return replace(x, label=unknown)
    if UNKNOWN in features or not features or not x.label.numel():
        return Flow(unknown if features else torch.tensor(NOTHING).expand(value.shape))
    name = df.op[node].name
    dims = _reduced_dims(node, x.label.dim())
    label = None
    if dims is not None and not (x.ops & _OF_SIZE) and (name in _SUMS or (name in _PICKS and part == 0)):
        if all(constant_along(x.label, d) for d in dims):
            label = _without(x.label, dims, value.shape)
            if label is not None:
                return replace(x, label=label)
        elif name in _SUMS:
            # Either the mean that a norm subtracts, or a rotation by small matrices: its use decides.
            label = _without(step.labels.union_along(x.label, dims), dims, value.shape)
    width = x.label.numel() // max(1, value.numel())
    statistic = Statistic(frozenset(features), x.ops | {name}, width)
    return replace(x, label=unknown if label is None else label, statistic=statistic)


def pooled(step: Step, of: Node | None = None) -> Flow:
    """Rule for pooling: labels that are constant along the pooled axes stay. `of` as in `reduction`."""
    df, node = step.df, of or step.node
    x = step.input(node.args[0])  # type: ignore[arg-type]
    axes = range(x.label.dim() - pooled_axes(df.op[node]), x.label.dim())
    if isinstance(df.value(step.node), list | tuple):
        return x  # `views.part` handles its results
    if x.statistic is not None or not all(constant_along(x.label, d) for d in axes):
        return step.unknown()
    for d in axes:
        x = replace(x, label=x.label.narrow(d, 0, 1))
    return replace(x, label=x.label.expand(df.shape(step.node)))


def _without(label: Tensor, dims: list[int], shape: torch.Size) -> Tensor | None:
    """Reduce labels that are constant along `dims` to `shape`; None if that has another number of axes."""
    for d in sorted(dims, reverse=True):
        label = label.narrow(d, 0, 1)
        label = label if label.dim() == len(shape) else label.select(d, 0)
    return label.expand(shape) if label.dim() == len(shape) else None


def _reduced_dims(node: Node, rank: int) -> list[int] | None:
    """Axes that a reduction runs over; None if its second argument does not say."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(rank))
    if isinstance(dims, list | tuple) and all(isinstance(d, int) for d in dims):
        return [int(d) % rank for d in dims]
    return None
