"""Trace equal layers once.

In: the site of one attention, the nodes it was derived from, and another attention of the same graph. Out: the other
attention's site, by renaming, if its nodes are the same ops on the same shapes, connected in the same way; else None,
and the other attention is traced too.

Nodes of two attentions correspond if they are at the same distance from the softmax. Their arguments must correspond
one by one: as nodes, as parameters of equal shape, or as equal constants. So must their users, because a chain of
projections depends on what else reads a tensor. Attentions that then differ only in names have the same layout.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node
from torch.utils._pytree import tree_flatten

from quack_fx.find.attention import Logits
from quack_fx.find.provenance.basis import Basis, serves_alone
from quack_fx.graph.dataflow import Dataflow
from quack_fx.graph.walk import walk
from quack_fx.layout import AttentionSite, renamed

_LARGEST = 6000
"""Maximum number of nodes to compare; an attention with more nodes is traced again."""


class Repeats:
    """The attentions traced so far, to recognize equal ones."""

    def __init__(self, df: Dataflow) -> None:
        self._df = df
        self._known: list[tuple[Logits, AttentionSite, list[Node], dict[Node, bool]]] = []

    def remember(self, logits: Logits, site: AttentionSite, basis: Basis) -> None:
        """Keep a site with the nodes it was derived from."""
        nodes = self._with_weights(basis.inside)
        if len(nodes) <= _LARGEST:
            self._known.append((logits, site, nodes, basis.alone))

    def find(self, logits: Logits) -> AttentionSite | None:
        """Return the site of an attention that equals a known one, or None."""
        for known, site, nodes, alone in reversed(self._known):
            if _arrangement(self._df, known) == _arrangement(self._df, logits):
                match = _Match(self._df, self._df.index[logits.end] - self._df.index[known.end])
                if match.all(nodes) and match.logits(known, logits) and match.alone(alone, logits):
                    return renamed(site, lambda name: match.names.get(name, name))  # noqa: B023
        return None

    def _with_weights(self, looked_at: set[Node]) -> list[Node]:
        """Add the nodes from which the weights are computed."""
        df = self._df
        nodes = walk(looked_at, lambda node: filter(df.is_weight, node.all_input_nodes))
        return sorted(nodes, key=df.index.__getitem__)


def _arrangement(df: Dataflow, logits: Logits) -> tuple[object, ...]:
    end = df.index[logits.end]
    products = tuple((p.form, df.index[p.node] - end) for p in logits.products)
    return (products, logits.axis, len(logits.path), df.index[logits.output] - end)


class _Match:
    """Comparison of two subgraphs at a fixed distance in the graph; collects corresponding names."""

    def __init__(self, df: Dataflow, distance: int) -> None:
        self._df = df
        self._distance = distance
        self._inside: set[Node] = set()
        self._outside: dict[Node, Node] = {}
        self.names: dict[str, str] = {}

    def all(self, nodes: list[Node]) -> bool:
        """Whether every node corresponds to the node at this distance."""
        self._inside = set(nodes)
        return all(self._same_node(node) for node in nodes)

    def logits(self, known: Logits, other: Logits) -> bool:
        """Whether the nodes between the logit products and the softmax correspond."""
        return {self._image(n) for n in known.path} == set(other.path)

    def alone(self, answers: Mapping[Node, bool], other: Logits) -> bool:
        """Whether `serves_alone` has the same answers for the corresponding nodes of the other attention."""
        images = {n: self._image(n) if n in self._inside else self._outside.get(n) for n in answers}
        return all(
            image is not None and serves_alone(self._df, image, other, set()) == answers[n]
            for n, image in images.items()
        )

    def _image(self, node: Node) -> Node | None:
        i = self._df.index[node] + self._distance
        return self._df.nodes[i] if 0 <= i < len(self._df.nodes) else None

    def _same_node(self, node: Node) -> bool:
        df, image = self._df, self._image(node)
        if image is None or node.op != image.op:
            return False
        if node.op != "call_function":
            return self._same_outside(node, image)
        ours, ours_spec = tree_flatten((node.args, dict(node.kwargs)))
        theirs, theirs_spec = tree_flatten((image.args, dict(image.kwargs)))
        return (
            node.target is image.target
            and df.shape(node) == df.shape(image)
            and ours_spec == theirs_spec
            and all(self._same_argument(a, b) for a, b in zip(ours, theirs, strict=True))
            and self._same_users(node, image)
            and self._same_modules(node, image)
        )

    def _same_argument(self, a: object, b: object) -> bool:
        if not isinstance(a, Node) or not isinstance(b, Node):
            return type(a) is type(b) and a == b
        if a in self._inside:
            return self._image(a) is b
        return self._same_outside(a, b)

    def _same_outside(self, a: Node, b: Node) -> bool:
        """Whether nodes outside the subgraphs correspond: parameters or data of the same shape, or equal constants."""
        df = self._df
        if df.shape(a) != df.shape(b):
            return False
        if a in df.weights or b in df.weights:
            return a in df.weights and b in df.weights and self._pair(df.weights[a], df.weights[b])
        if a in df.activation or b in df.activation:
            if self._outside.setdefault(a, b) is not b:
                return False
            return a in df.activation and b in df.activation and (a in df.from_input) == (b in df.from_input)
        if a is b:
            return True
        ours, theirs = df.constant(a), df.constant(b)
        if ours is None or theirs is None:
            return ours is theirs and (a in df.from_weight) == (b in df.from_weight) and self._same_unknown(a, b)
        return torch.equal(ours, theirs)

    def _same_unknown(self, a: Node, b: Node) -> bool:
        """Whether constants of unknown value correspond: results of the same op, or buffers (caches) of each layer."""
        if a.op == b.op == "get_attr":
            return self._pair(str(a.target), str(b.target))
        return a.target == b.target

    def _same_users(self, node: Node, image: Node) -> bool:
        """Whether both nodes have the same number of users, and the inspected ones correspond."""
        users = [u for u in node.users if u in self._inside]
        return len(node.users) == len(image.users) and all(self._image(u) in image.users for u in users)

    def _same_modules(self, node: Node, image: Node) -> bool:
        ours, theirs = self._df.modules(node), self._df.modules(image)
        return len(ours) == len(theirs) and all(self._pair(a, b) for a, b in zip(ours, theirs, strict=True))

    def _pair(self, ours: str, theirs: str) -> bool:
        return self.names.setdefault(ours, theirs) == theirs
