"""What the rule for a kind of op is given: one node and the flows of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.find.provenance.flow import Flow
from quack_fx.find.provenance.labels import NOTHING, UNKNOWN, Labels
from quack_fx.find.provenance.projections import Projections
from quack_fx.graph.dataflow import Dataflow


@dataclass(frozen=True)
class Step:
    """One node that is run on labels.

    Attributes:
        df: The graph's dataflow.
        labels: Registry of labels.
        projections: Projections of the graph.
        mixes_tokens: Function that says whether a product with a weight sums each feature over tokens.
        node: The node.
        flows: Flows of the nodes that were run before.
        outside: Label of arguments that were not run: UNKNOWN, or NOTHING when given labels are carried.
    """

    df: Dataflow
    labels: Labels
    projections: Projections
    mixes_tokens: Callable[[Node], bool]
    node: Node
    flows: Mapping[Node, Flow]
    outside: int

    def full(self, value: int) -> Tensor:
        """Label tensor of the node's shape, filled with one label."""
        return torch.tensor(value).expand(self.df.shape(self.node))

    def nothing(self) -> Flow:
        """Flow of a node that holds no features."""
        return Flow(self.full(NOTHING))

    def unknown(self) -> Flow:
        """Flow of a node that holds data whose rows are unknown."""
        return Flow(self.full(UNKNOWN))

    def input(self, node: Node) -> Flow:
        """Flow of an argument."""
        known = self.flows.get(node)
        if known is not None:
            return known
        value = self.outside if node in self.df.activation else NOTHING
        return Flow(torch.tensor(value).expand(self.df.shape(node)))

    def carries(self, node: Node) -> bool:
        """Whether an argument may hold features."""
        return node in self.df.activation or node in self.flows
