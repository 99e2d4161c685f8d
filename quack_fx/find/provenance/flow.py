"""What is known about one tensor between the projections and the logits.

In: nothing. Out: `Flow`, plain frozen data, with norms and statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.find.provenance.labels import UNKNOWN, compact
from quack_fx.graph.dataflow import Dataflow
from quack_fx.layout import NormKind


@dataclass(frozen=True)
class NormOp:
    """A node of a norm, and the node whose features it normalises, which would take its place without the norm.

    `x` is None where the features come from more than one node.
    """

    node: Node
    x: Node | None


@dataclass(frozen=True)
class NormTag:
    """A norm between a projection and the logits.

    Attributes:
        kind: "rms", "layer", "l2", "batch" or "other".
        width: Number of features that share a statistic.
        module: Module that computes it and nothing else.
        weight: Name of its gain.
        features: Labels of the features that it normalises.
        ops: Nodes that apply it to the features, without its gain and its bias.
        gains: Nodes that apply its gain and its bias.
    """

    kind: NormKind
    width: int
    module: str | None
    weight: str | None = None
    features: frozenset[int] = frozenset()
    ops: tuple[NormOp, ...] = ()
    gains: tuple[NormOp, ...] = ()


@dataclass(frozen=True)
class Statistic:
    """A number computed from whole groups of features: from which ones, by which ops, over how many elements."""

    features: frozenset[int]
    ops: frozenset[str]
    width: int


@dataclass(frozen=True)
class Flow:
    """What is known of one tensor.

    Attributes:
        label: Labels of its elements.
        scale: Product of the plain numbers it was multiplied with since the projection; None where not a plain number.
        norms: Norms since the projection.
        ops: Names of the nonlinearities since the projection.
        statistic: Set if the tensor may be a statistic of features. Its label is UNKNOWN then, except for sums, which
            are features as well.
        centring: Nodes that subtracted a mean; they belong to the norm that follows.
    """

    label: Tensor
    scale: float | None = 1.0
    norms: tuple[NormTag, ...] = ()
    ops: frozenset[str] = frozenset()
    statistic: Statistic | None = None
    centring: tuple[NormOp, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether it holds neither features nor unknown data."""
        return self.statistic is None and not bool(compact(self.label).any())


def unknown_flow(df: Dataflow, node: Node) -> Flow:
    """Data whose weight rows are unknown, in the shape of a node."""
    return Flow(torch.tensor(UNKNOWN).expand(df.shape(node)))


def merged_flow(flows: list[Flow]) -> Flow:
    """One flow for several tensors: the union of their norms and nonlinearities, and their scale if it is the same."""
    flows = [f for f in flows if not f.empty] or flows
    if len(flows) == 1:
        return flows[0]
    scales = {f.scale for f in flows}
    norms: dict[NormTag, None] = {}
    for f in flows:
        norms.update(dict.fromkeys(f.norms))
    statistics = [f.statistic for f in flows]
    return Flow(
        label=flows[0].label if flows else torch.zeros(1, dtype=torch.int64),
        scale=scales.pop() if len(scales) == 1 else None,
        norms=tuple(norms),
        ops=frozenset().union(*(f.ops for f in flows)),
        centring=tuple(dict.fromkeys(op for f in flows for op in f.centring)),
        statistic=statistics[0] if statistics and all(s is not None for s in statistics) else None,
    )


def with_gain(flow: Flow, weight: str | None, op: NormOp) -> Flow:
    """The flow with one more node that applies a gain, or a bias, of its last norm."""
    last = flow.norms[-1]
    return replace(flow, norms=(*flow.norms[:-1], replace(last, weight=weight, gains=(*last.gains, op))))
