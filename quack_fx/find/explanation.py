"""Explain one attention: where its logits are computed, the nodes walked back to the weights, and where that stopped.

In: the logits of an attention (or a near miss), and the `Trail` that the tracer recorded. Out: an `Explanation`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.find.attention import Logits, NearMiss, Refused
from quack_fx.find.provenance.heads import Heads
from quack_fx.find.provenance.trail import Trail
from quack_fx.graph.dataflow import Dataflow, factors_of
from quack_fx.graph.walk import walk
from quack_fx.layout import AttentionSite
from quack_fx.layout.walk import Explanation, Held, Walk, WalkedNode

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in [^\n]*(?:\n    (?P<code>[^\n]+))?')
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


def explain_site(df: Dataflow, trail: Trail, logits: Logits, site: AttentionSite, heads: Heads) -> Explanation:
    """Explain an attention whose site was found."""
    wanted = {block.param for _, block in site.blocks()}
    products = {node for node in _projections(df, trail) if wanted.intersection(_weights_of(df, node))}
    sides = [("query", node) for node in heads.operands[0]] + [("key", node) for node in heads.operands[1]]
    walks = _walks(df, trail, logits, dict((node, side) for side, node in reversed(sides)), products)
    return Explanation(site.name, *_logits(df, logits), walks, site=site)


def explain_refusal(df: Dataflow, trail: Trail, logits: Logits, refusal: Refused) -> Explanation:
    """Explain an attention that was refused; its walks lead to the node at which its rows were lost."""
    stopped = refusal.node
    path, output = _logits(df, logits)
    return Explanation(
        name=df.home(logits.products[-1].node),
        logits=path,
        output=output,
        walks=_walks(df, trail, logits, {}, {stopped} if stopped in trail.held else _projections(df, trail)),
        code=refusal.code,
        reason=refusal.reason,
        stopped=_walked(df, stopped, trail.held.get(stopped)),
        reads=tuple(_walked(df, n, trail.held[n]) for n in dict.fromkeys(df.reads(stopped)) if n in trail.held),
    )


def explain_miss(df: Dataflow, miss: NearMiss) -> Explanation:
    """Explain a near miss, for which there was no walk."""
    return Explanation(df.home(miss.node), code=miss.code, reason=miss.reason, stopped=_walked(df, miss.node))


def _logits(df: Dataflow, logits: Logits) -> tuple[tuple[WalkedNode, ...], WalkedNode]:
    """Nodes from the products to the softmax, and the product of attention weights and values."""
    path = sorted({*(p.node for p in logits.products), *logits.path, logits.end}, key=df.index.__getitem__)
    return tuple(_walked(df, node) for node in path), _walked(df, logits.output)


def _projections(df: Dataflow, trail: Trail) -> set[Node]:
    return {node for node in trail.held if _weights_of(df, node)}


def _walks(
    df: Dataflow, trail: Trail, logits: Logits, sides: dict[Node, str], ends: Collection[Node]
) -> tuple[Walk, ...]:
    """For each operand, the walked nodes from it back to `ends`; the operand alone if it depends on none of them."""
    found: dict[tuple[str, Node], Walk] = {}
    for product in logits.products:
        for operand, default in ((product.left, "left"), (product.right, "right")):
            side = sides.get(operand, default)
            behind = _between(df, trail, operand, ends)
            nodes = tuple(_walked(df, node, trail.held.get(node)) for node in behind)
            found.setdefault((side, operand), Walk(side, product.node.name, nodes))  # type: ignore[arg-type]
    return tuple(sorted(found.values(), key=lambda walk: ("query", "key", "left", "right").index(walk.operand)))


def _between(df: Dataflow, trail: Trail, operand: Node, ends: Iterable[Node]) -> Sequence[Node]:
    """Walked nodes on all paths from an operand back to `ends`, latest first."""
    behind = walk([operand], lambda node: (n for n in df.reads(node) if n in trail.held))
    kept = {operand}
    for node in sorted(behind, key=df.index.__getitem__):
        if node in ends or any(argument in kept and argument is not operand for argument in df.reads(node)):
            kept.add(node)
    return sorted(kept, key=df.index.__getitem__, reverse=True)


def _walked(df: Dataflow, node: Node, held: Held | None = None) -> WalkedNode:
    return WalkedNode(
        name=node.name,
        op=df.op[node].name,
        shape=tuple(map(int, df.shape(node))),
        module=df.home(node),
        source=source_of(node),
        held=held if isinstance(df.value(node), Tensor) else None,  # each of several results has its own node
        weight=_weights_of(df, node),
    )


def _weights_of(df: Dataflow, node: Node) -> tuple[str, ...]:
    """Parameters behind the weight operand of a product."""
    sides = factors_of(df, node) if df.op[node].kind in ("contraction", "convolution") else None
    factors = [n for n in (sides or ())[:2] if n is not None and df.is_weight(n)]
    behind = walk(factors, lambda node: filter(df.is_weight, node.all_input_nodes))
    return tuple(dict.fromkeys(df.weights[node] for node in behind if node in df.weights))


def source_of(node: Node) -> str | None:
    """Return the line of Python that ran a node: the innermost frame outside torch; None without a stack trace.

    Paths are relative to the current folder or to site-packages.

    Example:
        >>> source_of(node)
        'model.py:12: q = self.q_proj(x)'
    """
    frames = [frame for frame in _FRAME.finditer(node.stack_trace or "") if not frame["file"].startswith(_TORCH)]
    if not frames:
        return None
    last = frames[-1]
    file = last["file"].rpartition(f"{os.sep}site-packages{os.sep}")[2].removeprefix(f"{Path.cwd()}{os.sep}")
    return f"{file}:{last['line']}" + (f": {last['code'].strip()}" if last["code"] else "")
