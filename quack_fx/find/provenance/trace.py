"""Trace operands of a logit product to the projections that they depend on.

In: nodes of a graph. Out: the `Flow` of each: labels that say which projection features every element holds, and what
lies in between (norms, factors, nonlinearities). A backward walk collects the nodes up to the nearest projections;
these nodes are then run forward on labels, each by the rule for its kind of op (`rules/`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.find.provenance.basis import Basis
from quack_fx.find.provenance.flow import Flow, unknown_flow
from quack_fx.find.provenance.labels import NOTHING, UNKNOWN, Labels, constant_along
from quack_fx.find.provenance.projections import Projections
from quack_fx.find.provenance.rules import ADDING, Step, flow_of
from quack_fx.find.provenance.trail import Trail
from quack_fx.graph.dataflow import Dataflow, factors_of, is_depthwise

_LARGEST_SLICE = 3000
"""Maximum number of nodes of one backward walk, which without projections would reach the model's inputs."""


class Tracer:
    """Follows labels through one graph."""

    def __init__(self, df: Dataflow) -> None:
        self.df = df
        self.labels = Labels()
        self.projections = Projections(df, self.labels)
        self.basis = Basis()
        """The nodes that the results depend on; replaced for each attention."""
        self.trail: Trail | None = None
        """If set, records the weight rows behind each node, for an explanation."""
        self._token_mixing: dict[Node, bool] = {}

    def trace(self, targets: Iterable[Node], outside: Callable[[Node], bool] | None = None) -> dict[Node, Flow]:
        """Compute the flows of `targets` and of all nodes between them and the projections behind them.

        Arguments:
            targets: Nodes of interest.
            outside: Predicate of nodes at which the backward walk stops; they hold unknown data.

        Returns:
            Flow of every node that was run.
        """
        nodes, ends = self._slice(list(targets), outside)
        flows = {end: unknown_flow(self.df, end) for end in ends}
        if outside is not None:
            # A floating-point model input that is added in between counts as unknown data.
            reads = {n for node in nodes for n in node.all_input_nodes if self.df.is_given(n)}
            added = (n for n in reads if any(self.df.op[user].name in ADDING for user in n.users))
            flows.update((n, unknown_flow(self.df, n)) for n in added)
        self.basis.ends.update(flows)
        if self.trail is not None:
            for end, flow in flows.items():
                self.trail.visit(end, flow)
        return self._run(nodes, flows, UNKNOWN)

    def carry(self, source: Node, label: Tensor, path: Iterable[Node]) -> dict[Node, Flow]:
        """Carry given labels forward from one node.

        Arguments:
            source: Node whose result carries `label`.
            label: Label tensor of its shape.
            path: Later nodes through which to carry the labels. Other inputs of these nodes carry no labels. Products
                on the path keep the labels of their data (heads mixed after the logit product).

        Returns:
            Flows of the nodes on the path.
        """
        path = sorted(set(path) - {source}, key=self.df.index.__getitem__)
        self.basis.inside.add(source)
        return self._run(path, {source: self._window(source, Flow(label))}, NOTHING)

    def where_unknown(self, flows: dict[Node, Flow], operands: Iterable[Node]) -> Node | None:
        """Return the first node between the projections and some operands at which features were lost, or None."""
        df, todo, seen = self.df, list(operands), set[Node]()
        lost: list[Node] = []
        while todo:
            node = todo.pop()
            flow = flows.get(node)
            if node in seen or flow is None:
                continue
            seen.add(node)
            several = isinstance(df.value(node), list | tuple)  # its results are labeled, it is not
            if several or UNKNOWN in self.labels.features(flow.label):
                lost += [] if several else [node]
                todo.extend(df.reads(node))
        return min(lost, key=df.index.__getitem__, default=None)

    def _run(self, nodes: list[Node], flows: dict[Node, Flow], outside: int) -> dict[Node, Flow]:
        self.basis.inside.update(nodes)
        trail = self.trail if outside == UNKNOWN else None  # the labels of `carry` do not stand for weight rows
        for node in nodes:
            step = Step(self.df, self.labels, self.projections, self.mixes_tokens, node, flows, outside)
            flow = flow_of(step)
            if node in self.df.writes.get(self.df.group[node], ()):
                self._write(node, flow, flows)
            else:
                flows[node] = self._window(node, flow)
            if trail is not None:
                trail.visit(node, flows[node])
        return flows

    def _slice(self, targets: list[Node], outside: Callable[[Node], bool] | None) -> tuple[list[Node], list[Node]]:
        """Nodes to run, in order, starting at the projections; and nodes at which the walk stopped before any."""
        df, todo = self.df, deque(targets)
        needed: set[Node] = set()
        ends: list[Node] = []
        while todo:
            node = todo.popleft()
            if node in needed:
                continue
            needed.add(df.open(node))
            if node not in df.activation or self._ends_here(node):
                continue
            if len(needed) > _LARGEST_SLICE or (outside is not None and outside(node)):
                ends.append(node)
            else:
                todo.extend(n for n in df.reads(node) if n in df.activation or df.group[n] in df.writes)
        return sorted(needed.difference(ends), key=df.index.__getitem__), ends

    def _ends_here(self, node: Node) -> bool:
        """Whether the backward walk ends at this node: a projection, a lookup, or data that cannot be traced."""
        kind = self.df.op[node].kind
        if kind in ("lookup", "attention", "input"):
            return True
        if kind == "convolution":
            return not is_depthwise(self.df, node)
        if kind == "contraction":
            sides = factors_of(self.df, node)
            constant = sides is not None and any(self.df.is_constant(n) for n in sides[:2])
            return not constant and not self.mixes_tokens(node)
        return False

    def mixes_tokens(self, node: Node) -> bool:
        """Whether a product with a weight sums each feature of a projection over tokens (Linformer).

        Its result then holds the same features: the fewer keys depend on the same rows.
        """
        if node not in self._token_mixing:
            self._token_mixing[node] = self._finds_token_mixing(node)
        return self._token_mixing[node]

    def _finds_token_mixing(self, node: Node) -> bool:
        df = self.df
        operands = self.projections.operands(node) if df.op[node].kind == "contraction" else None
        if operands is None or operands[0] not in df.activation:
            return False
        x, _, on_left, _ = operands
        axis = -2 if on_left and len(df.shape(x)) > 1 else -1
        if df.shape(x)[axis] == 1 or not self._is_view_of_projection(x):
            return False
        label = self.trace([x])[x].label
        others = [d for d in range(label.dim()) if d != axis % label.dim()]
        known = UNKNOWN not in self.labels.features(label)
        return known and constant_along(label, axis) and not all(constant_along(label, d) for d in others)

    def _is_view_of_projection(self, node: Node) -> bool:
        """Whether a node is the result of a projection, with only view ops and additions of a bias in between."""
        df = self.df
        while df.op[node].kind != "contraction":
            data = [n for n in node.all_input_nodes if n in df.activation]
            kept = df.op[node].kind in ("view", "getitem") or df.op[node].name == "add"
            if len(data) != 1 or not kept or node in df.writes:
                return False
            node = data[0]
        return self.projections.operands(node) is not None

    def _window(self, node: Node, flow: Flow) -> Flow:
        """Materialize the labels of memory that is later written in place, so that its views can share them."""
        df = self.df
        if df.group[node] is not node or node not in df.writes:
            return flow
        value = df.value(node)
        if not isinstance(value, Tensor):
            return flow
        whole = torch.empty_strided(value.shape, value.stride(), dtype=torch.int64).copy_(flow.label)
        return replace(flow, label=whole)

    def _write(self, node: Node, flow: Flow, flows: dict[Node, Flow]) -> None:
        target: Node = node.args[0]  # type: ignore[assignment]
        before = flows.get(target)
        if before is None:
            flows[node] = flow
            return
        if any(
            stride == 0 and size > 1 for size, stride in zip(before.label.shape, before.label.stride(), strict=True)
        ):
            # The labels of this memory are expanded and cannot be written to: from here on its contents are unknown.
            for other in flows:
                if self.df.group[other] is self.df.group[node]:
                    flows[other] = unknown_flow(self.df, other)
            flows[node] = unknown_flow(self.df, node)
            return
        before.label.copy_(flow.label)
        flows[node] = replace(flow, label=before.label)
        # All other views of this memory now hold the written data, with its norms and nonlinearities.
        group = self.df.group[node]
        for other, old in flows.items():
            if other is not node and self.df.group[other] is group:
                ops = old.ops | flow.ops
                norms = old.norms + tuple(n for n in flow.norms if n not in old.norms)
                flows[other] = replace(old, ops=ops, norms=norms)
