"""Elementwise ops: every element keeps its features; the other operand may be a statistic, a factor or a bias."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.find.provenance.flow import Flow, merged_flow
from quack_fx.find.provenance.labels import UNKNOWN, shrink
from quack_fx.find.provenance.rules.norms import LINEAR, of_statistics, with_statistics
from quack_fx.find.provenance.rules.step import Step
from quack_fx.find.provenance.rules.weights import with_weights
from quack_fx.graph.ops import SOFTMAX

_BOUNDED = SOFTMAX | frozenset("sin cos polar".split())
"""Ops whose result is attention weights or a rotation, whatever their input."""


def elementwise(step: Step) -> Flow:
    """Rule for every op that no other rule handles: each element depends on the elements at the same index."""
    df, node, labels = step.df, step.node, step.labels
    value = df.value(node)
    if isinstance(value, list | tuple):
        value = value[0]
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return step.nothing()
    name = df.op[node].name
    inputs = [n for n in node.all_input_nodes if step.carries(n)]
    flows = [f for f in map(step.input, inputs) if not f.empty]
    flows = _told_apart(step, _without_weights(name, flows))
    labelled = [f for f in flows if f.statistic is None]
    statistics = [f.statistic for f in flows if f.statistic is not None]
    if not labelled:
        return of_statistics(step, name, flows) if statistics else step.nothing()
    try:
        label = labels.union([f.label for f in labelled], value.shape)
    except RuntimeError:
        return step.unknown()  # not elementwise after all
    merged = merged_flow(labelled)
    features = [labels.features(f.label) for f in labelled]
    if name in ("mul", "div") and len(labelled) > 1 and any(f != features[0] for f in features):
        return step.unknown()  # one projection gates another, so the result depends on both
    result = replace(merged, label=shrink(label))
    if name == "mul" and _is_outer(step, inputs):
        return step.unknown()
    x = _only_data(step, inputs)
    if statistics:
        result = with_statistics(step, name, result, statistics, frozenset().union(*features), x)
    if name not in LINEAR or (name in ("mul", "div") and len(inputs) > 1 and len(labelled) > 1):
        result = replace(result, ops=result.ops | {name})
    if name == "mul" and len(node.all_input_nodes) == 1 and len(node.args) > 1 and isinstance(node.args[1], Node):
        result = replace(result, ops=result.ops | {"pow"})  # x * x
    return with_weights(step, name, result, x)


def _only_data(step: Step, inputs: list[Node]) -> Node | None:
    """Return the only argument that holds the result's features, or None if there are several."""
    holds = {n: flow for n in inputs if not (flow := step.input(n)).empty}
    data = [n for n, flow in holds.items() if flow.statistic is None]
    if not data:
        data = [n for n, flow in holds.items() if UNKNOWN not in step.labels.features(flow.label)]
    return data[0] if len(data) == 1 else None


def _is_outer(step: Step, inputs: list[Node]) -> bool:
    """Whether the node is an outer product with a weight, which spreads one feature over many elements."""
    df = step.df
    shapes = [df.shape(n) for n in inputs]
    for other in step.node.all_input_nodes:
        if other not in inputs and df.is_weight(other):
            for d, n in enumerate(reversed(df.shape(other))):
                if n > 1 and all(len(shape) <= d or shape[-1 - d] == 1 for shape in shapes):
                    return True
    return False


def _without_weights(name: str, flows: list[Flow]) -> list[Flow]:
    """Drop rotations and attention weights, which multiply features but hold none."""
    others = [f for f in flows if not f.ops & _BOUNDED]
    return others if name == "mul" and others else flows


def _told_apart(step: Step, flows: list[Flow]) -> list[Flow]:
    """Treat sums as features if the other operand is a statistic, because a statistic is never normalized."""
    if all(f.statistic is not None for f in flows):
        known = [UNKNOWN not in step.labels.features(f.label) for f in flows]
        if any(known) and not all(known):
            return [replace(f, statistic=None) if k else f for f, k in zip(flows, known, strict=True)]
    return flows
