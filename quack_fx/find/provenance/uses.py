"""Determine whether all of a norm's result ends in attention logits, as queries or keys.

In: the tracer of a graph and all logits found in it. Out: `Uses`, which answers for a node or for all calls of a
module. A norm whose result is also used as values, or by the next layer, is more than a QK norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.find.attention import Logits
from quack_fx.find.provenance.projections import Projection
from quack_fx.find.provenance.trace import Tracer
from quack_fx.graph.dataflow import factors_of
from quack_fx.graph.ops import SOFTMAX


class Uses:
    """How results are used in one graph."""

    def __init__(self, tracer: Tracer, logits: Iterable[Logits]) -> None:
        self._tracer, self._df = tracer, tracer.df
        products = [p for one in logits for p in one.products]
        self._products = {p.node for p in products}
        self._fused = {p.node: (p.left, p.right) for p in products if p.form.startswith("fused")}
        """Queries and keys of fused attention, whose values enter the same op."""

    def only_logits(self, node: Node, walked: set[Node]) -> bool:
        """Whether everything computed from a node ends in logits or is returned by the model (a key cache).

        Arguments:
            node: The node.
            walked: Set to which the inspected nodes are added.
        """
        if isinstance(self._df.value(node), list | tuple):  # a norm that also returns its statistics
            return all(self.only_logits(user, walked) for user in node.users if user.args[1] == 0)

        def is_other(source: Node, user: Node) -> bool | None:
            if user in self._products:
                uses = [a for a in (*user.args, *user.kwargs.values()) if a is source]
                return user in self._fused and len(uses) > sum(x is source for x in self._fused[user])  # also a value
            return False if user.op == "output" else self._makes_more(user) or None

        seen, others = self._read_from(node, is_other)
        walked.update(seen)
        everything = torch.ones(()).expand(self._df.shape(node))
        return not others or (node not in others and not self._arrives(node, everything, seen, others))

    def pass_all(self, projection: Projection, features: frozenset[int], gates: Set[Node]) -> bool:
        """Whether every use of some features of a projection goes through one of the nodes `gates`."""

        def is_other(_: Node, user: Node) -> bool | None:
            if user in gates:
                return False
            return user.op == "output" or user in self._products or self._makes_more(user) or None

        seen, others = self._read_from(projection.node, is_other)
        made = self._tracer.projections.of(projection.node)
        if made is None or not others:
            return not others
        return not self._arrives(projection.node, torch.isin(made[1], torch.tensor(sorted(features))), seen, others)

    def _read_from(self, node: Node, is_other: Callable[[Node, Node], bool | None]) -> tuple[set[Node], list[Node]]:
        """Walk forward from a node to its uses.

        Arguments:
            node: The node.
            is_other: Classifies a node and one of its users: another use (True), the wanted use (False), or neither
                (None), in which case the walk goes on through the user.

        Returns:
            The nodes that were walked, and those that have another use.
        """
        df, todo, seen = self._df, [node], {node}
        others: list[Node] = []
        while todo:
            source = todo.pop()
            for user in source.users:
                other = is_other(source, user)
                if other:
                    others.append(source)
                elif other is None and user not in seen:
                    todo.append(user)
                    seen.add(user)
                    if df.op[user].inplace:
                        # Later readers of this memory read what was written.
                        todo += [n for n in df.nodes[df.index[user] :] if df.group.get(n) is df.group[user]]
        return seen, others

    def _arrives(self, node: Node, marked: Tensor, path: set[Node], others: list[Node]) -> bool:
        """Whether marked (nonzero) elements of a node reach one of the nodes `others`."""
        mark = self._tracer.labels.new_features(1)
        flows = self._tracer.carry(node, (marked != 0) * mark, path)
        labels = self._tracer.labels
        return any(other not in flows or labels.features(flows[other].label) for other in others)

    def module_norms_logits_alone(self, module: str, walked: set[Node]) -> bool:
        """Whether everything that a module computes, in every call, ends in logits.

        Arguments:
            module: Name of the module.
            walked: Set to which the inspected nodes are added.
        """
        nodes = self._nodes_of.get(module, [])
        walked.update(nodes)
        inside = set(nodes)
        given_out = [n for n in nodes if any(user not in inside for user in n.users)]
        return all(self.only_logits(node, walked) for node in given_out)

    @cached_property
    def _nodes_of(self) -> dict[str, list[Node]]:
        """Nodes that ran in each module."""
        found: dict[str, list[Node]] = {}
        for node in self._df.nodes:
            for module in self._df.modules(node):
                found.setdefault(module, []).append(node)
        return found

    def _makes_more(self, node: Node) -> bool:
        """Whether a node is more than a view, a rotation or an elementwise function of its data."""
        df = self._df
        op = df.op[node]
        if op.kind == "contraction":  # with a constant operand it is a rotation or pools tokens
            return not any(df.is_constant(n) for n in (factors_of(df, node) or (node, node))[:2] if n is not None)
        return op.kind in ("convolution", "attention", "layer") or op.name in SOFTMAX
