"""What an op does to features: one rule for each kind of op.

In: a `Step`, a node with the flows of its arguments. Out: its `Flow`.

    step.py         what a rule is given: a node and the flows of its arguments
    products.py     projections and other products
    views.py        view ops, and getitem
    reductions.py   reductions and pooling
    writes.py       writes at indices that depend on data
    elementwise.py  all other ops, including
    norms.py          features times a statistic of themselves: norms
    weights.py        features with factors, gains and biases
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from quack_fx.find.provenance.flow import Flow
from quack_fx.find.provenance.labels import UNKNOWN
from quack_fx.find.provenance.rules.elementwise import elementwise
from quack_fx.find.provenance.rules.norms import ADDING, norm_op
from quack_fx.find.provenance.rules.products import product
from quack_fx.find.provenance.rules.reductions import pooled, reduction
from quack_fx.find.provenance.rules.step import Step
from quack_fx.find.provenance.rules.views import part, view
from quack_fx.find.provenance.rules.writes import write_anywhere, writes_anywhere
from quack_fx.graph.ops import Kind

__all__ = ["ADDING", "RULES", "Step", "flow_of"]


def _lookup(step: Step) -> Flow:
    """A lookup by position is a parameter, like a slice of one; a lookup by token id is unknown data."""
    return step.unknown() if step.node in step.df.from_input else step.nothing()


def _input(step: Step) -> Flow:
    """A buffer (a key cache before anything is written into it) holds no features; any other input is unknown data."""
    is_buffer = step.node.op == "get_attr" and step.node not in step.df.weights
    return step.nothing() if is_buffer else step.unknown()


RULES: Mapping[Kind, Callable[[Step], Flow]] = {
    "contraction": product,
    "convolution": product,
    "view": view,
    "getitem": part,
    "reduction": reduction,
    "pooling": pooled,
    "norm": norm_op,
    "softmax": elementwise,
    "elementwise": elementwise,
    "factory": Step.nothing,
    "lookup": _lookup,
    "input": _input,
    "attention": Step.unknown,
    "layer": Step.unknown,
}
"""The rule for each kind of op."""


def flow_of(step: Step) -> Flow:
    """Return the flow of a step's node."""
    df, node = step.df, step.node
    if node not in df.activation and df.group[node] not in df.writes:
        return step.unknown() if df.is_given(node) and step.outside == UNKNOWN else step.nothing()
    return write_anywhere(step) if writes_anywhere(step) else RULES[df.op[node].kind](step)
