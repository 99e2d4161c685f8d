"""The other operand of an elementwise op on features: factors, gains of norms, biases."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from quack_fx.find.provenance.flow import Flow, NormOp, NormTag, with_gain
from quack_fx.find.provenance.labels import UNKNOWN
from quack_fx.find.provenance.rules.step import Step
from quack_fx.graph.walk import walk


def with_weights(step: Step, name: str, flow: Flow, x: Node | None) -> Flow:
    """Apply factors, gains of norms and added biases to the flow; `x` is the node that holds the features."""
    df, node = step.df, step.node
    others = [a for a in node.args if not (isinstance(a, Node) and step.carries(a))]
    if name in ("mul", "div"):
        for other in others:
            if isinstance(other, bool | int | float):
                flow = replace(flow, scale=_times(flow.scale, other, name))
            elif isinstance(other, Node):
                flow = _times_node(step, name, flow, other, x)
    elif name == "add":
        for other in others:
            if not isinstance(other, Node) or not df.is_weight(other):
                continue
            if flow.norms and _is_bias_of(step, flow.norms[-1], other, x):
                flow = with_gain(flow, flow.norms[-1].weight, NormOp(node, x))
            elif not flow.norms and step.outside == UNKNOWN:
                step.projections.add_bias(flow.label, other)
    return flow


def _is_bias_of(step: Step, norm: NormTag, bias: Node, x: Node | None) -> bool:
    """Whether a weight added to a norm's result is its bias: added in the norm's module, or right after its gain."""
    df = step.df
    if norm.module is not None:
        return norm.module in df.modules(step.node)
    last = norm.gains[-1].node if norm.gains else None
    return last is not None and last is x and any(df.shape(n) == df.shape(bias) for n in last.all_input_nodes)


def _times_node(step: Step, name: str, flow: Flow, other: Node, x: Node | None) -> Flow:
    df = step.df
    if _is_rotation(step, other):
        return flow
    if df.is_weight(other):
        names = _gain_names(step, other)
        if flow.norms and flow.norms[-1].weight is None and len(names) == 1:
            return with_gain(flow, next(iter(names)), NormOp(step.node, x))
        return replace(flow, scale=None) if not flow.norms else flow
    if df.shape(other).numel() == 1:
        number = df.constant(other)
        return replace(flow, scale=None if number is None else _times(flow.scale, float(number), name))
    return flow


def _is_rotation(step: Step, node: Node) -> bool:
    """Whether a node is the sine or cosine of (possibly learned) angles: a rotation preserves norms."""
    df = step.df
    while df.op[node].kind == "view" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return df.op[node].name in ("sin", "cos", "polar")


def _gain_names(step: Step, node: Node) -> set[str]:
    """Parameters that a gain is computed from, for example as (1 + gain) or by a cast."""
    df = step.df
    behind = walk([node], lambda n: df.from_weight.intersection(n.all_input_nodes))
    return {df.weights[n] for n in behind if n in df.weights}


def _times(scale: float | None, number: float, name: str) -> float | None:
    if scale is None or number == 0:
        return None
    return scale * number if name == "mul" else scale / number
