"""Products of data with weights or constants: projections, rotations, pooling, mixing of heads."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from quack_fx.find.provenance.flow import Flow
from quack_fx.find.provenance.labels import UNKNOWN, constant_along, reshape
from quack_fx.find.provenance.rules.step import Step
from quack_fx.graph.dataflow import factors_of, is_depthwise


def product(step: Step) -> Flow:
    """Rule for products: a projection, or one that keeps the features of its data (rotation, pooling, mixed heads)."""
    df, node = step.df, step.node
    if step.outside != UNKNOWN:
        return _mixed_heads(step)
    if is_depthwise(df, node):
        return _depthwise(step)
    sides = factors_of(df, node)
    if sides is None:
        return step.unknown()
    left, right, bias = sides
    constants = [n for n in (left, right) if df.is_constant(n)]
    if any(map(df.is_zero, constants)):
        return step.nothing()
    if step.mixes_tokens(node):
        return _by_matrix(step, left, right)
    if not constants or any(map(df.is_weight, (left, right))):
        # Position embeddings times a weight are a projection like any other.
        made = step.projections.of(node)
        return step.unknown() if made is None else Flow(made[1])
    if bias is not None and bias in df.activation:
        return step.unknown()
    return _by_matrix(step, left, right)


def _by_matrix(step: Step, left: Node, right: Node) -> Flow:
    """Data times a matrix of constants (rotation, pooling), or times a weight that mixes tokens."""
    df, node = step.df, step.node
    data_left = left in df.activation
    flow = step.input(left if data_left else right)
    if df.op[node].kind == "convolution" or df.shape(node).numel() == 0 or flow.label.dim() < 2:
        return step.unknown()
    axis = -1 if data_left or df.op[node].name == "linear" else -2
    label = flow.label
    if constant_along(label, axis % label.dim()):
        label = label.narrow(axis, 0, 1)
    else:
        label = step.labels.union_along(label, [axis])
    return replace(flow, label=label.expand(df.shape(node)))


def _mixed_heads(step: Step) -> Flow:
    """A product with a weight that mixes heads and keeps the number of logits: each label stays at its index."""
    shape = step.df.shape(step.node)
    for argument in step.node.all_input_nodes:
        flow = step.flows.get(argument)
        if flow is not None and not flow.empty and flow.label.numel() == shape.numel():
            return replace(flow, label=reshape(flow.label, shape))
    return step.nothing()


def _depthwise(step: Step) -> Flow:
    """A depthwise convolution acts as a gain per channel: the channels keep their features, if these are known."""
    df, node = step.df, step.node
    x = step.input(node.args[0])  # type: ignore[arg-type]
    if UNKNOWN in step.labels.features(x.label) or x.empty:
        return step.unknown()
    label = step.labels.union_along(x.label, list(range(2, x.label.dim())))
    return replace(x, label=label.expand(df.shape(node)))
