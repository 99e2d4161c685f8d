"""What is known about one tensor between the projections and the logits: `Flow`, with norms and statistics."""

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
    """A node of a norm, and the node `x` whose features it normalizes.

    `x` takes the place of `node` when the norm is removed. It is None if the features come from more than one node.
    """

    node: Node
    x: Node | None


@dataclass(frozen=True)
class NormTag:
    """A norm between a projection and the logits.

    Attributes:
        kind: "rms", "layer", "l2", "batch" or "other".
        width: Number of features that share a statistic.
        module: Module that computes exactly this norm, or None.
        weight: Name of its gain, or None.
        features: Labels of the features that it normalizes.
        ops: Nodes that apply it to the features, without its gain and bias.
        gains: Nodes that apply its gain and bias.
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
    """A number computed from groups of features: which features, by which ops, over how many elements each."""

    features: frozenset[int]
    ops: frozenset[str]
    width: int


@dataclass(frozen=True)
class Flow:
    """What is known of one tensor.

    Attributes:
        label: Labels of its elements.
        scale: Product of the scalar factors since the projection; None if one of them is not a known constant.
        norms: Norms since the projection.
        ops: Names of the nonlinearities since the projection.
        statistic: Set if the tensor may be a statistic of features. Its label is then UNKNOWN, except for a sum, which
            may also be used as features.
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
    """Flow of a node whose weight rows are unknown."""
    return Flow(torch.tensor(UNKNOWN).expand(df.shape(node)))


def merged_flow(flows: list[Flow]) -> Flow:
    """Merge flows: the union of their norms and nonlinearities, and their scale if they all have the same."""
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
    """Add a node that applies a gain or bias of the flow's last norm."""
    last = flow.norms[-1]
    return replace(flow, norms=(*flow.norms[:-1], replace(last, weight=weight, gains=(*last.gains, op))))
