"""The nodes of a graph at which the queries and keys of an attention are complete.

In: an ATen-level graph. Out: its layout, and for each attention the operands of its query-key products before scaling,
where all features of a head are in one tensor, also for MLA, joint attention and low-rank adapters; or the reason why
there is no such node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx import GraphModule, Node

from quack_fx.find import Attentions, Heads, Logits, Product, find_each, indices_of_sites, pairs_of
from quack_fx.graph.dataflow import Dataflow
from quack_fx.graph.ops import op_of
from quack_fx.layout import SIDES, QKLayout, Side
from quack_fx.qk_norm.report import Left


@dataclass(frozen=True)
class Operand:
    """The features of one side of a product.

    Attributes:
        side: Side of the product.
        x: The node with the features, before factors that all features share.
        reader: The node that reads `x`.
        axis: Axis of `x` that counts features, from the end.
        width: Number of consecutive features of a head on that axis.
    """

    side: Side
    x: Node
    reader: Node
    axis: int
    width: int


def find_operands(graph_module: GraphModule) -> tuple[QKLayout, dict[int, tuple[Operand, ...]], dict[int, str]]:
    """Layout of an ATen-level graph, and by index of each site the operands of all its calls and products.

    For other sites the last result has the reason why no node has all features of a head. The graph comes from
    torch.export, make_fx or an executable capture: its nodes carry `meta["val"]`.
    """
    finding, layout = find_each(graph_module)
    places = indices_of_sites(layout)
    found: dict[int, tuple[Operand, ...]] = {}
    reasons: dict[int, str] = {}
    for one, site, heads in finding.understood:
        place = places[pairs_of(site)]
        try:
            if place not in reasons:
                found[place] = (*found.get(place, ()), *_operands(finding.attentions, one, heads))
        except Left as reason:
            reasons[place] = str(reason)
    # The two attentions of a cross-attention in both directions may share an operand.
    readers: dict[tuple[Node, Node], set[int]] = {}
    for place in found.keys() - reasons.keys():
        for operand in found[place]:
            readers.setdefault((operand.reader, operand.x), set()).add(place)
    shared = {place for of in readers.values() if len(of) > 1 for place in of}
    return layout, found, reasons | dict.fromkeys(shared, "another attention has the same product")


def _operands(attentions: Attentions, one: Logits, heads: Heads) -> Iterator[Operand]:
    df = attentions.tracer.df
    if heads.channels:
        raise Left("its logits compare channels, not features of tokens")
    for product, query, key in zip(one.products, *heads.operands, strict=True):
        if query is key:
            raise Left("its queries and keys are the same features")
        for side, node in zip(SIDES, (query, key), strict=True):
            axis = _axis(df, product, left=node is product.left)
            if df.shape(node)[axis] != heads.head_dim:
                raise Left("its logits are the sum of products with a part of the features each")
            operand = _before_factors(df, Operand(side, node, product.node, axis, heads.head_dim))
            scale = attentions.tracer.trace([operand.x])[operand.x].scale
            if scale is None:
                raise Left(f"its {side} features have no one scale (a learned factor, parts scaled unlike)")
            if scale != 1:
                raise Left(f"its {side} features are multiplied with {scale:.4g} too early for a norm behind it")
            if operand.reader is not product.node and not attentions.uses.only_logits(operand.reader, set()):
                raise Left(f"its {side} features are used outside the logits, too")
            yield operand


def _axis(df: Dataflow, product: Product, left: bool) -> int:
    """Axis of an operand that a product sums over, from the end."""
    if product.form == "bilinear":
        raise Left("its logits are sums that are written out, not a product of matrices")
    if left or product.form != "matmul":
        return -1
    return -min(2, len(df.shape(product.right)))


def _before_factors(df: Dataflow, operand: Operand) -> Operand:
    """The operand before factors that all its features share, such as a scale or a temperature."""
    found = here = operand
    while (source := _source_of(df, here.x, here.axis)) is not None:
        x, axis = source
        is_factor = op_of(here.x).kind == "elementwise"
        here = replace(here, x=x, reader=here.x, axis=axis)
        if is_factor:
            found = here
    return found


def _is_shared(df: Dataflow, factor: object, axis: int) -> bool:
    """Whether a factor is the same for all features."""
    return not isinstance(factor, Node) or len(df.shape(factor)) < -axis or df.shape(factor)[axis] == 1


def _source_of(df: Dataflow, node: Node, axis: int) -> tuple[Node, int] | None:
    """The node before a view op or a factor, and its axis of features; None for other ops."""
    name, args = op_of(node).name, node.args
    if df.group[node] in df.writes:
        return None
    if name in ("mul", "div"):
        for x, factor in [(args[0], args[1])] + ([(args[1], args[0])] if name == "mul" else []):
            if isinstance(x, Node) and df.shape(x) == df.shape(node) and _is_shared(df, factor, axis):
                return x, axis
        return None
    source = args[0] if args else None
    if not isinstance(source, Node):
        return None
    old, new = df.shape(source), df.shape(node)
    if name in ("clone", "contiguous", "alias", "detach", "_to_copy", "expand"):
        return (source, axis) if len(old) >= -axis and old[axis] == new[axis] else None
    if name in ("t", "numpy_T", "mT", "transpose"):
        a, b = (args[1], args[2]) if name == "transpose" else (-1, -2)
        moved = {int(d) % len(new) - len(new) for d in (a, b)}  # type: ignore[arg-type]
        return (source, (moved - {axis}).pop() if axis in moved and len(moved) == 2 else axis)
    if name == "permute":
        return source, int(args[1][axis]) % len(old) - len(old)  # type: ignore[index, arg-type]
    if name in ("view", "_unsafe_view", "reshape"):
        behind = new[axis:].numel()
        same = [d for d in range(-len(old), 0) if old[d] == new[axis] and old[d:].numel() == behind]
        split = [
            d
            for d in range(-len(old), 0)
            if old[d] % new[axis] == 0 and old[d:].numel() == behind * old[d] // new[axis]
        ]
        return (source, (same or split)[-1]) if same or split else None
    return None
