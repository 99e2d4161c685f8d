"""One node, as the rule for its kind of op sees it.

In: the graph, the flows so far. Out: `Step`, which gives the flows of a node's arguments, and those that hold nothing.
"""

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
    """A node that is run on labels.

    Attributes:
        df: The graph.
        labels: Sets of features.
        projections: The projections met so far.
        mixes_tokens: Whether a product with a weight sums features over tokens, each by itself.
        node: The node.
        flows: Flows of the nodes that were run before.
        outside: Label of data that comes in from elsewhere: UNKNOWN, or NOTHING where labels of our own are carried.
    """

    df: Dataflow
    labels: Labels
    projections: Projections
    mixes_tokens: Callable[[Node], bool]
    node: Node
    flows: Mapping[Node, Flow]
    outside: int

    def full(self, value: int) -> Tensor:
        """One label everywhere, in the shape of the node."""
        return torch.tensor(value).expand(self.df.shape(self.node))

    def nothing(self) -> Flow:
        """The node holds no features."""
        return Flow(self.full(NOTHING))

    def unknown(self) -> Flow:
        """The node holds data of which no row is known."""
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
