"""Record the nodes that a site was derived from, so that an equal attention need not be traced again.

In: the nodes that the finder inspects. Out: the nodes and properties that another attention must share to get the same
site (`repeat.py`), and all nodes that were inspected (`left_out.py`).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from torch.fx import Node

from quack_fx.find.attention import Logits
from quack_fx.graph.dataflow import Dataflow


@dataclass
class Basis:
    """What one site was derived from.

    Attributes:
        inside: Nodes whose op, arguments and users matter.
        ends: Nodes at which the backward walk stopped.
        alone: For some nodes, whether everything computed from them ends in the attention.
        walked: Nodes inspected for `alone`; they matter only through that answer.
    """

    inside: set[Node] = field(default_factory=set)
    ends: set[Node] = field(default_factory=set)
    alone: dict[Node, bool] = field(default_factory=dict)
    walked: set[Node] = field(default_factory=set)

    def all_nodes(self) -> set[Node]:
        """All nodes that were inspected."""
        return self.inside | self.ends | self.walked

    def serves_alone(self, df: Dataflow, node: Node, logits: Logits) -> bool:
        """Cached `serves_alone` for this attention."""
        if node not in self.alone:
            self.alone[node] = serves_alone(df, node, logits, self.walked)
        return self.alone[node]


def serves_alone(df: Dataflow, node: Node, logits: Logits, walked: set[Node]) -> bool:
    """Whether everything computed from a node ends in the output of an attention or its siblings.

    The inspected nodes are added to `walked`.
    """
    ends = {logits.output, *logits.siblings}
    end = max(df.index[output] for output in ends)
    seen: set[Node] = set()
    # In execution order, because the deciding node is mostly in the same layer.
    todo = [(0, node)]
    while todo:
        for user in heapq.heappop(todo)[1].users:
            if user in seen or user in ends or user.op == "output":
                continue
            seen.add(user)
            walked.add(user)
            if df.index[user] > end and df.op[user].kind in _MAKES_MORE:
                return False
            if len(seen) > 4000:
                return False
            heapq.heappush(todo, (df.index[user], df.open(user)))
            if df.op[user].inplace:
                between = df.nodes[df.index[user] : end]
                for n in between:
                    if df.group.get(n) is df.group[user]:
                        heapq.heappush(todo, (df.index[n], n))
    return True


_MAKES_MORE = ("contraction", "convolution", "attention", "softmax", "layer")
"""Kinds of op that, if they run after the attention, show that a tensor is used for more than the attention."""
