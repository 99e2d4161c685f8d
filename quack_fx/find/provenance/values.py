"""The values of an attention, and the projections behind them."""

from __future__ import annotations

from torch.fx import Node

from quack_fx.find.attention import Logits
from quack_fx.find.provenance.labels import UNKNOWN
from quack_fx.find.provenance.projections import Projection
from quack_fx.find.provenance.trace import Tracer
from quack_fx.graph.dataflow import factors_of
from quack_fx.graph.walk import walk


def values_of(tracer: Tracer, logits: Logits) -> list[Node]:
    """Value operands, of all iterations of a loop: the factor of the output that does not depend on the softmax."""
    if logits.parts:
        return [value for part in logits.parts for value in values_of(tracer, part)]
    df, output = tracer.df, logits.output
    if df.op[output].kind == "attention":
        return [n for n in output.args[2:3] if isinstance(n, Node)]
    summed = output if df.op[output].name == "mul" else output.args[0]
    factors = (factors_of(df, output) or tuple(summed.all_input_nodes))[:2]  # type: ignore[union-attr]
    return [n for n in factors if n is not None and not _is_behind(tracer, logits.end, n)]


def value_features(tracer: Tracer, logits: Logits) -> list[tuple[Projection, int]]:
    """Known features that the values depend on, each as its projection and index in it."""
    values = values_of(tracer, logits)
    flows = tracer.trace(values)
    features = set().union(*(tracer.labels.features(flows[n].label) for n in values if n in flows)) - {UNKNOWN}
    return [tracer.projections.by_feature(feature) for feature in features]


def _is_behind(tracer: Tracer, start: Node, node: Node) -> bool:
    df, first = tracer.df, tracer.df.index[start]
    return start in walk([node], lambda one: (n for n in df.reads(one) if df.index[n] >= first))
