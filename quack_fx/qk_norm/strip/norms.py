"""Finds the nodes of a graph that compute QK norms, and the paths from them to the logits.

In: an ATen-level graph. Out: its layout, and a `GraphNorm` for each norm in each call of an attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from quack_fx.find import Attentions, Heads, Logits, NormOp, Product, find_each, indices_of_sites, pairs_of
from quack_fx.graph.dataflow import Dataflow
from quack_fx.graph.walk import walk
from quack_fx.layout import SIDES, AttentionSite, Norm, QKLayout


@dataclass(frozen=True)
class Path:
    """The path from a norm to one product.

    Attributes:
        reader: The node that multiplies queries with keys.
        operand: Its operand that depends on the norm.
        nodes: All nodes from the norm's result to the operand, both included.
        written: Whether one of them is written in place.
    """

    reader: Node
    operand: Node
    nodes: frozenset[Node]
    written: bool


@dataclass(frozen=True)
class GraphNorm:
    """A QK norm in a graph.

    Attributes:
        site: Index of its attention in the layout.
        norm: The norm in the layout.
        ops: Nodes that normalise features, each with the node of its input.
        gains: The nodes that then apply its gain and its bias.
        alone: Whether its result is used for attention logits only.
        paths: Paths from it to the products of its call.
    """

    site: int
    norm: Norm
    ops: tuple[NormOp, ...]
    gains: tuple[NormOp, ...]
    alone: bool
    paths: tuple[Path, ...]


def find_norms(
    graph_module: GraphModule, weights: Mapping[Node, str] | None = None
) -> tuple[QKLayout, tuple[GraphNorm, ...]]:
    """Layout of an ATen-level graph, as `find_in_graph` gives it, and the QK norms of each call of each site.

    The graph comes from torch.export, make_fx or an executable capture: its nodes carry `meta["val"]`.
    """
    finding, layout = find_each(graph_module, weights)
    places = indices_of_sites(layout)
    return layout, tuple(
        norm
        for one, site, heads in finding.understood
        for norm in _norms(finding.attentions, one, places[pairs_of(site)], site, heads)
    )


def _norms(attentions: Attentions, one: Logits, place: int, site: AttentionSite, heads: Heads) -> Iterator[GraphNorm]:
    for side, tags, operands in zip(SIDES, heads.norms, heads.operands, strict=True):
        named = [n for n in site.qk_norm if n.side == side]
        for tag in tags if named else ():  # without a QK norm, the tags are latent norms
            norm = next(n for n in named if (n.kind, n.width, n.weight) == (tag.kind, tag.width, tag.weight))
            alone = attentions.uses.only_logits(tag.ops[0].node, set())
            paths = _paths(attentions.tracer.df, tag.ops, map(_reader, one.products), operands)
            yield GraphNorm(place, norm, tag.ops, tag.gains, alone, tuple(paths))


def results_of(node: Node) -> list[Node]:
    """The nodes of a norm's result: the node itself, or the getitem nodes of its first result if it has several."""
    return [node] if isinstance(node.meta["val"], Tensor) else [user for user in node.users if user.args[1] == 0]


def _reader(product: Product) -> Node:
    """The node of a product that reads its operands."""
    (first, *_) = product.node.all_input_nodes
    return first if product.form == "bilinear" else product.node


def _paths(df: Dataflow, ops: Sequence[NormOp], readers: Iterable[Node], operands: Iterable[Node]) -> Iterator[Path]:
    results = [result for op in ops for result in results_of(op.node)]
    first = min(map(df.index.__getitem__, results))
    for reader, operand in zip(readers, operands, strict=True):
        above = set(walk([operand], lambda node: (n for n in node.all_input_nodes if df.index[n] >= first)))
        nodes = frozenset(walk(above.intersection(results), lambda node: above.intersection(node.users)))  # noqa: B023
        if nodes:  # otherwise the norm precedes another product
            yield Path(reader, operand, nodes, any(df.group[node] in df.writes for node in nodes))
