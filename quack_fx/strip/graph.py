"""QK norms out of an ATen graph, those written inline too.

In: a `GraphModule` of ATen ops. Out: a `StripReport` whose `model` is a copy of the graph in which features go past
their norms; it shares its parameters with the original, which is not changed.

Rules in the order of a rewriter: `find_norms` matches, `_reason_to_stay` checks, `_Rewriting` rewrites.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quack_fx.find import GraphNorm, find_norms
from quack_fx.graph_copy import copy_graph
from quack_fx.layout import AttentionSite, QKLayout
from quack_fx.opset import arguments_of, channels_first, op_of
from quack_fx.strip.report import LeftSite, RemovedNorm, StripReport, nothing_to_restore, with_sharers, without_norms
from quack_fx.strip.scale import Scales, scale_back


def strip_graph(
    graph_module: GraphModule, *, weights: Mapping[Node, str] | None = None, keep_gain: bool, restore_scale: bool
) -> StripReport:
    """Take the QK norms out of a copy of a graph.

    Arguments:
        graph_module: The graph; its nodes carry `meta["val"]`.
        weights: Names of the nodes that are parameters; those of the graph module by default.
        keep_gain: Whether gains and biases stay.
        restore_scale: Whether features are multiplied with what `scale_back` says.

    Returns:
        The account, with the new graph as its `model`. A graph without QK norm is given back itself.
    """
    layout, norms = find_norms(graph_module, weights)
    reasons = _reasons_to_stay(layout, norms)
    going = [norm for norm in norms if norm.site not in reasons]
    left = tuple(LeftSite(layout.sites[place].name, reason) for place, reason in reasons.items())
    if not going:
        return StripReport((), left, (), layout, graph_module, nothing_to_restore)
    sites = {place: layout.sites[place] for place in dict.fromkeys(norm.site for norm in going)}
    rewriting = _Rewriting(graph_module)
    scales = {place: scale_back(site) if restore_scale else Scales() for place, site in sites.items()}
    for norm in going:
        rewriting.take_out(norm, keep_gain, scales[norm.site].of(norm.norm.side))
    stripped = rewriting.done()
    gone = graph_module.state_dict().keys() - stripped.state_dict().keys()
    removed = tuple(_removals(sites.values(), [key for key in graph_module.state_dict() if key in gone]))
    return StripReport(
        removed=removed,
        left=left,
        notes=tuple(note for one in scales.values() for note in one.notes),
        layout=without_norms(layout, {place: one.query * one.key for place, one in scales.items()}, gone),
        model=stripped,
        _restore=nothing_to_restore,
    )


def _reasons_to_stay(layout: QKLayout, norms: Sequence[GraphNorm]) -> dict[int, str]:
    """Why a site's norms cannot be taken out, for the places of those where they cannot."""
    reasons: dict[int, str] = {}
    for norm in norms:
        if reason := _reason_to_stay(norm):
            reasons.setdefault(norm.site, reason)
    uses = [(norm.site, op.node, f"its {norm.norm.side} norm") for norm in norms for op in norm.ops]
    return with_sharers(reasons, uses, layout)


def _reason_to_stay(norm: GraphNorm) -> str | None:
    """Why one norm cannot be taken out, or None when it can."""
    if any(op.x is None for op in (*norm.ops, *norm.gains)):
        return f"its {norm.norm.side} norm mixes several tensors in one op"
    if not norm.alone:
        return f"what its {norm.norm.side} norm makes is used outside the logits, too (as values, for example)"
    return None


def _removals(sites: Iterable[AttentionSite], gone: list[str]) -> Iterator[RemovedNorm]:
    """The norms of some sites, each module once, inline ones one by one."""
    by_module: dict[Any, RemovedNorm] = {}
    for place, site in enumerate(sites):
        for i, norm in enumerate(site.qk_norm):
            key = norm.module if norm.module is not None else (place, i)
            known = by_module.get(key)
            inside = tuple(k for k in gone if k == norm.weight or (norm.module and k.startswith(f"{norm.module}.")))
            names = (site.name,) if known is None else tuple(dict.fromkeys((*known.sites, site.name)))
            by_module[key] = RemovedNorm(norm.module, norm.kind, norm.width, names, inside)
    yield from by_module.values()


class _Rewriting:
    """A copy of a graph from which norms are taken out."""

    def __init__(self, graph_module: GraphModule) -> None:
        self._original = graph_module
        self._graph, self._copy = copy_graph(graph_module)
        self._instead: dict[Node, Node] = {}
        self._gone: set[Node] = set()

    def take_out(self, norm: GraphNorm, keep_gain: bool, factor: float) -> None:
        """Let features go past a norm; an op that several norms share is passed once."""
        ops = [op for op in (*norm.ops, *(() if keep_gain else norm.gains)) if op.node not in self._instead]
        for op in ops:
            assert op.x is not None  # checked by _reason_to_stay
            here = factor if op is ops[-1] else 1.0
            instead = self._put_instead(op.node, self._now(op.x), keep_gain, here)
            self._instead.update(dict.fromkeys((op.node, *_results(op.node)), instead))

    def done(self) -> GraphModule:
        """The new graph, without what nobody reads any more."""
        for node in self._instead:
            self._erase(self._copy[node], also_writes=True)
        self._graph.lint()
        return GraphModule(self._original, self._graph).train(self._original.training)

    def _now(self, node: Node) -> Node:
        """What stands for a node of the original now."""
        return self._instead.get(node) or self._copy[node]

    def _put_instead(self, original: Node, x: Node, keep_gain: bool, factor: float) -> Node:
        """Let everybody who reads a norm's result read its input, in the same type and times a number."""
        node = self._copy[original]
        value = original.meta["val"]
        value = value if isinstance(value, Tensor) else value[0]
        with self._graph.inserting_before(node):
            instead = self._with_native_gain(node, x) if keep_gain and op_of(original).kind == "norm" else x
            if factor != 1:
                instead = self._made(torch.ops.aten.mul.Tensor, (instead, factor), instead.meta)
            if _dtype(instead) != value.dtype:
                copied = torch.ops.aten._to_copy.default
                instead = self._graph.call_function(copied, (instead,), {"dtype": value.dtype})
                instead.meta = {**node.meta, "val": value}
        for result in map(self._copy.__getitem__, _results(original)):
            result.replace_all_uses_with(instead)
        return instead

    def _with_native_gain(self, node: Node, x: Node) -> Node:
        """Features times the gain that a norm op applies by itself, plus its bias."""
        given = arguments_of(node)
        for name, op in (("weight", torch.ops.aten.mul.Tensor), ("bias", torch.ops.aten.add.Tensor)):
            operand = weight = given.get(name)
            if not isinstance(weight, Node):
                continue
            if channels_first(node):
                shape = [-1] + [1] * (x.meta["val"].dim() - 2)
                operand = self._made(torch.ops.aten.view.default, (weight, shape), weight.meta)
            x = self._made(op, (x, operand), x.meta)
        return x

    def _made(self, target: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Node:
        node = self._graph.call_function(target, args)
        node.meta = dict(meta)
        return node

    def _erase(self, node: Node, also_writes: bool = False) -> None:
        """Remove a node that nobody reads, and what was computed for it alone."""
        for part in [user for user in node.users if not user.users and op_of(user).name == "getitem"]:
            self._remove(part)  # of several results
        kept = node.users or node.op in ("placeholder", "output") or (node.is_impure() and not also_writes)
        if node in self._gone or kept:
            return
        inputs = node.all_input_nodes
        self._remove(node)
        for argument in inputs:
            self._erase(argument)

    def _remove(self, node: Node) -> None:
        self._graph.erase_node(node)
        self._gone.add(node)


def _results(node: Node) -> list[Node]:
    """The nodes that are a norm's result: itself, or the first of several that it gives."""
    return [node] if isinstance(node.meta["val"], Tensor) else [user for user in node.users if user.args[1] == 0]


def _dtype(node: Node) -> torch.dtype:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.dtype
