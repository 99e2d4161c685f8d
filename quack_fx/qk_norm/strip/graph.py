"""Removes QK norms from an ATen graph, inline ones too.

In: a `GraphModule` of ATen ops. Out: a `StripReport` whose `model` is a copy of the graph without the norms; it shares
its parameters with the original, which is not changed.

`find_norms` matches, `_reason_to_stay` checks, `_Rewriting` rewrites. If only logits depend on a norm's result, all its
users read its input instead. If it has other uses, too (a batch norm after a fused projection of queries, keys and
values; keys that are also the values), it stays for those, and the nodes from the norm to the logits are copied,
starting from its input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quack_fx.find import NormOp
from quack_fx.graph.copies import copy_graph
from quack_fx.graph.ops import arguments_of, channels_first, op_of
from quack_fx.graph.walk import walk
from quack_fx.layout import AttentionSite, QKLayout, Side
from quack_fx.qk_norm.report import LeftSite, RemovedNorm, StripReport, with_sharers, without_norms
from quack_fx.qk_norm.strip.norms import GraphNorm, Path, find_norms, results_of
from quack_fx.qk_norm.strip.scale import Scales, scale_back


def strip_graph(
    graph_module: GraphModule, *, weights: Mapping[Node, str] | None = None, keep_gain: bool, restore_scale: bool
) -> StripReport:
    """Remove the QK norms from a copy of a graph; if none can be removed, the report's `model` is the graph itself.

    `weights` names the nodes that are parameters, by default those of the graph module. With `keep_gain`, gains and
    biases stay; with `restore_scale`, features are multiplied by the factors of `scale_back`.
    """
    layout, norms = find_norms(graph_module, weights)
    reasons = _reasons_to_stay(layout, norms)
    going = [norm for norm in norms if norm.site not in reasons]
    left = tuple(LeftSite(layout.sites[place].name, reason) for place, reason in reasons.items())
    if not going:
        return StripReport((), left, (), layout, graph_module)
    sites = {place: layout.sites[place] for place in dict.fromkeys(norm.site for norm in going)}
    rewriting = _Rewriting(graph_module, keep_gain)
    scales = {place: scale_back(site) if restore_scale else Scales() for place, site in sites.items()}
    with_factors: list[_Going] = []
    by_operand: dict[tuple[Node, Node], list[_Going]] = {}
    for norm in going:
        factor = 1.0 if _passes_another(norm, going) else scales[norm.site].of(norm.norm.side)
        with_factors.append((norm, factor))
        for path in norm.paths:
            by_operand.setdefault((path.reader, path.operand), []).append((norm, factor))
    for (reader, operand), norms_there in by_operand.items():
        if not all(norm.alone for norm, _ in norms_there):
            rewriting.pass_by(norms_there, reader, operand)
    for norm, factor in with_factors:
        if norm.alone:
            rewriting.take_out(norm, factor)
    stripped = rewriting.done()
    kept = stripped.state_dict().keys()
    gone = [key for key in graph_module.state_dict() if key not in kept]
    return StripReport(
        removed=tuple(_removals(sites.values(), gone)),
        left=left,
        notes=(*(note for one in scales.values() for note in one.notes), *_notes_on_shared(layout, going)),
        layout=without_norms(layout, {place: one.query * one.key for place, one in scales.items()}, gone),
        model=stripped,
    )


def _reasons_to_stay(layout: QKLayout, norms: Sequence[GraphNorm]) -> dict[int, str]:
    """Why the norms of a site cannot be removed, by index of the site."""
    reasons: dict[int, str] = {}
    for norm in norms:
        if reason := _reason_to_stay(norm):
            reasons.setdefault(norm.site, reason)
    uses = [(norm.site, op.node, f"its {norm.norm.side} norm") for norm in norms for op in norm.ops]
    return with_sharers(reasons, uses, layout)


def _reason_to_stay(norm: GraphNorm) -> str | None:
    """Why a norm cannot be removed; None if it can."""
    if any(op.x is None for op in (*norm.ops, *norm.gains)):
        return f"its {norm.norm.side} norm mixes several tensors in one op"
    if norm.alone:
        return None
    for path in norm.paths:
        if reason := _reason_against(path):
            return (
                f"what its {norm.norm.side} norm makes is used outside the logits, too (as values, for example), and "
                f"on its way to them {reason}"
            )
    return None


def _reason_against(path: Path) -> str | None:
    """Why the nodes from a norm to a product cannot be copied; None if they can."""
    if op_of(path.reader).kind == "attention" and path.operand not in path.reader.args[:2]:
        return f"{op_of(path.reader).name!r} takes it by name"
    if path.written:
        return "it is written in place"
    for node in path.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return f"it meets random numbers ({op_of(node).name!r})"
        if any(user.op == "output" for user in node.users):
            return "it is a result of the model"
    return None


def _passes_another(norm: GraphNorm, norms: Iterable[GraphNorm]) -> bool:
    """Whether another norm of the same side follows: only the last one applies the factor of the side."""
    ahead = {node for path in norm.paths for node in path.nodes} - {r for op in norm.ops for r in results_of(op.node)}
    sides = (other for other in norms if (other.site, other.norm.side) == (norm.site, norm.norm.side))
    return any(not ahead.isdisjoint(results_of(other.ops[-1].node)) for other in sides)


_Going = tuple[GraphNorm, float]
"""A norm to remove, and the factor that replaces it."""


def _notes_on_shared(layout: QKLayout, norms: Iterable[GraphNorm]) -> Iterator[str]:
    sides: dict[int, dict[Side, None]] = {}
    for norm in norms:
        if not norm.alone:
            sides.setdefault(norm.site, {})[norm.norm.side] = None
    for place, names in sides.items():
        yield (
            f"{layout.sites[place].name!r}: what its {' norm and its '.join(names)} norm makes is used outside the "
            "logits, too (as values, for example); for that it stays"
        )


def _removals(sites: Iterable[AttentionSite], gone: list[str]) -> Iterator[RemovedNorm]:
    """The norms of some sites: each module once, and each inline norm."""
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
    """A copy of a graph from which norms are removed."""

    def __init__(self, graph_module: GraphModule, keep_gain: bool) -> None:
        self._original, self._keep_gain = graph_module, keep_gain
        self._graph, self._copy = copy_graph(graph_module)
        self._instead: dict[Node, Node] = {}
        self._passed_by: set[Node] = set()
        self._gone: set[Node] = set()

    def take_out(self, norm: GraphNorm, factor: float) -> None:
        """Remove a norm: its users read its input. An op that belongs to several norms is removed once."""
        ops = [op for op in self._ops(norm) if op.node not in self._instead]
        for op in ops:
            assert op.x is not None  # checked by _reason_to_stay
            here = factor if op is ops[-1] else 1.0
            instead = self._put_instead(op.node, self._instead.get(op.x) or self._copy[op.x], here)
            for result in results_of(op.node):
                self._copy[result].replace_all_uses_with(instead)
            self._instead.update(dict.fromkeys((op.node, *results_of(op.node)), instead))

    def pass_by(self, norms: Sequence[_Going], reader: Node, operand: Node) -> None:
        """Compute an operand of a product without norms, from copies of the nodes after them, for this product only."""
        sources: dict[Node, tuple[NormOp, float]] = {}
        path = set[Node]()
        for norm, factor in norms:
            *ops, last = self._ops(norm)
            for op, here in (*((op, 1.0) for op in ops), (last, factor)):
                sources |= {result: sources.get(result, (op, here)) for result in results_of(op.node)}
            path.update(*(own.nodes for own in norm.paths if (own.reader, own.operand) == (reader, operand)))
        laid: dict[Node, Node] = {}
        for node in self._needed(operand, path, sources):
            if node in sources:
                op, factor = sources[node]
                assert op.x is not None  # checked by _reason_to_stay
                laid[node] = self._put_instead(op.node, laid.get(op.x) or self._copy[op.x], factor)
            else:
                with self._graph.inserting_before(self._copy[node]):
                    laid[node] = self._graph.node_copy(node, lambda n: laid.get(n) or self._copy[n])
        product, old, new = self._copy[reader], self._copy[operand], laid[operand]
        operands = 2 if op_of(reader).kind == "attention" else len(product.args)  # the values follow
        product.args = (
            *map_arg(product.args[:operands], lambda n: new if n is old else n),
            *product.args[operands:],
        )
        self._passed_by.add(old)

    def done(self) -> GraphModule:
        """The new graph, without unused nodes."""
        for node in self._instead:
            self._erase(self._copy[node], also_writes=True)
        for old in self._passed_by - self._gone:
            self._erase(old)
        self._graph.lint()
        return GraphModule(self._original, self._graph).train(self._original.training)

    def _ops(self, norm: GraphNorm) -> tuple[NormOp, ...]:
        return norm.ops if self._keep_gain else (*norm.ops, *norm.gains)

    def _needed(self, operand: Node, path: set[Node], sources: Mapping[Node, tuple[NormOp, float]]) -> list[Node]:
        """The nodes of a path that its operand still depends on without the norms, in graph order."""

        def before(node: Node) -> set[Node]:
            source = sources[node][0].x if node in sources else None
            return path.intersection(node.all_input_nodes if source is None else [source])

        needed = set(walk(path & {operand}, before))
        return [node for node in self._original.graph.nodes if node in needed]

    def _put_instead(self, original: Node, x: Node, factor: float) -> Node:
        """The replacement for a norm's result: its input times a factor, in the dtype of the result."""
        node = self._copy[original]
        value = original.meta["val"]
        value = value if isinstance(value, Tensor) else value[0]
        with self._graph.inserting_before(node):
            instead = self._with_native_gain(node, x) if self._keep_gain and op_of(original).kind == "norm" else x
            if factor != 1:
                instead = self._made(torch.ops.aten.mul.Tensor, (instead, factor), instead.meta)
            if instead.meta["val"].dtype != value.dtype:
                meta = {**node.meta, "val": value}
                instead = self._made(torch.ops.aten._to_copy.default, (instead,), meta, dtype=value.dtype)
        return instead

    def _with_native_gain(self, node: Node, x: Node) -> Node:
        """Features times the gain of a fused norm op, plus its bias."""
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

    def _made(self, target: Any, args: tuple[Any, ...], meta: dict[str, Any], **kwargs: Any) -> Node:
        node = self._graph.call_function(target, args, kwargs)
        node.meta = dict(meta)
        return node

    def _erase(self, node: Node, also_writes: bool = False) -> None:
        """Remove an unused node, and the nodes that only it uses."""
        for part in [user for user in node.users if not user.users and op_of(user).name == "getitem"]:
            self._remove(part)  # one of several results
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
