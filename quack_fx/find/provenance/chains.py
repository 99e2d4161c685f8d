"""Chains of projections: those before a block's projection whose output is used by this attention only.

In: the blocks whose features are multiplied in the logits. Each gets, in place, the block behind it and the norms in
between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import Tensor
from torch.fx import Node

from quack_fx.find.attention import Logits
from quack_fx.find.provenance.block import MAX_CHAIN, Block
from quack_fx.find.provenance.flow import Flow
from quack_fx.find.provenance.labels import UNKNOWN
from quack_fx.find.provenance.projections import Projection
from quack_fx.find.provenance.trace import Tracer
from quack_fx.find.provenance.values import value_features

_T = TypeVar("_T")


def follow_chains(tracer: Tracer, logits: Logits, query: list[Block], key: list[Block]) -> None:
    """Attach to each block the upstream projections that only this attention uses, on one side or on both."""
    for blocks in (query, key):
        todo = list(blocks)
        while todo:
            block = todo.pop()
            link, depth = block, 0
            while depth < MAX_CHAIN and (upstream := _upstream(tracer, logits, link)) is not None:
                flow, reads = upstream
                parts = _by_source(tracer, link, reads)
                if len(parts) > 1:
                    if link is block:  # heads read different upstream parameters: one block for each
                        blocks[blocks.index(block) : blocks.index(block) + 1] = parts
                        todo.extend(parts)
                    break
                behind = _behind(tracer, logits, link, reads)
                if behind is None:
                    break
                link.latent_norms = flow.norms
                link.behind, link, depth = behind, behind, depth + 1


def cut_at_input(tracer: Tracer, logits: Logits, query: list[Block], key: list[Block]) -> None:
    """Cut chains at a projection that queries, keys and values all read: it is a layer before the attention.

    MLA's latent stays in its chain: it is read by keys and values only or, if by all three, is narrower than the
    queries. Adapters stay too: they are added to a weight.
    """
    both = _behind_rows(query).items() & _behind_rows(key).items()
    wide = max((len(set().union(*block.rows)) for block in query), default=0)
    both = {(node, rows) for node, rows in both if len(rows) >= wide}
    shared = {node for node, _ in both & _value_sources(tracer, logits).items()} if both else set()
    for block in (*query, *key):
        if block.behind is not None and not block.parallel and block.behind.projection.node in shared:
            block.behind, block.latent_norms = None, ()


def _behind_rows(blocks: list[Block]) -> dict[Node, frozenset[tuple[int, ...]]]:
    """Rows that blocks read of each projection directly behind them."""
    found: dict[Node, set[tuple[int, ...]]] = {}
    for block in blocks:
        if block.behind is not None and not block.parallel:
            found.setdefault(block.behind.projection.node, set()).update(*block.behind.rows)
    return {node: frozenset(rows) for node, rows in found.items()}


def _value_sources(tracer: Tracer, logits: Logits) -> dict[Node, frozenset[tuple[int, ...]]]:
    """Rows that the value projections read of each projection behind them."""
    found: dict[Node, set[tuple[int, ...]]] = {}
    for node in {projection.x for projection, _ in value_features(tracer, logits)} & tracer.df.activation:
        flow = tracer.trace([node], lambda n: not tracer.basis.serves_alone(tracer.df, n, logits)).get(node)
        features = tracer.labels.features(flow.label) - {UNKNOWN} if flow is not None else set()
        for projection, i in map(tracer.projections.by_feature, features):
            found.setdefault(projection.node, set()).add(tuple(projection.rows[i].tolist()))
    return {node: frozenset(rows) for node, rows in found.items()}


def _upstream(tracer: Tracer, logits: Logits, block: Block) -> tuple[Flow, list[set[int]]] | None:
    """Flow of the data that a block's projection reads, and its features that each head reads.

    None if the data is also used outside this attention, or is not the (possibly normalized) output of projections.
    """
    x = block.projection.x
    if x not in tracer.df.activation or not tracer.basis.serves_alone(tracer.df, x, logits):
        return None
    flow = tracer.trace([x], lambda node: not tracer.basis.serves_alone(tracer.df, node, logits)).get(x)
    if flow is None or flow.statistic is not None or flow.ops:  # a nonlinearity in between separates two layers
        return None
    features = tracer.labels.features(flow.label)
    if not features or UNKNOWN in features:
        return None
    return flow, _read_by(tracer, block.projection, flow.label, block)


def _by_source(tracer: Tracer, block: Block, reads: list[set[int]]) -> list[Block]:
    """Split a block by upstream parameter, if each head reads one and heads differ."""
    names = _of_each(reads, lambda own: {p.names[i] for p, i in map(tracer.projections.by_feature, own)})
    distinct = {next(iter(own)) for own in names if len(own) == 1}
    if len(distinct) < 2 or any(len(own) > 1 for own in names):
        return [block]
    return [
        replace(block, rows=[rows if own == {name} else set() for rows, own in zip(block.rows, names, strict=True)])
        for name in sorted(distinct)
    ]


def _behind(tracer: Tracer, logits: Logits, block: Block, reads: list[set[int]]) -> Block | None:
    """Block of the projection behind `block`, if there is exactly one and only this attention uses it; else None."""
    by_feature = tracer.projections.by_feature
    found = set().union(*_of_each(reads, lambda own: {(p.first, p.names[i]) for p, i in map(by_feature, own)}))
    if len(found) != 1:
        return None
    first, name = found.pop()
    source, _ = by_feature(first)
    if not _is_factor(tracer, logits, source, block.projection):
        return None
    rows = _of_each(reads, lambda own: {tuple(source.rows[f - first].tolist()) for f in own})
    return Block(name, frozenset({block.param}), rows, source)


def _of_each(reads: list[set[int]], of: Callable[[set[int]], set[_T]]) -> list[set[_T]]:
    """Apply `of` to each head's features, once for a set that several heads share (a latent)."""
    made = {key: of(own) for key, own in {id(own): own for own in reads}.items()}
    return [made[id(own)] for own in reads]


def _read_by(tracer: Tracer, projection: Projection, given: Tensor, block: Block) -> list[set[int]]:
    """Upstream features that each head's rows of a projection are multiplied with.

    These are mostly all features. With an up projection per head (absorbed MLA) or a grouped convolution they are only
    the features of the same head.
    """
    made = tracer.projections.of(projection.node)
    everything = tracer.labels.features(given)
    pairs = [] if made is None else tracer.projections.pairs(projection, made[1], given)
    if len({source for _, source in pairs}) < 2:  # every head reads the whole latent
        return [everything if own else set() for own in block.rows]
    met: dict[int, set[int]] = {}
    for feature, source in pairs:
        met.setdefault(feature, set()).update(tracer.labels.members(source))
    feature_of = {tuple(row): projection.first + i for i, row in enumerate(projection.rows.tolist())}
    return [
        set().union(*(met.get(feature_of[row], everything) if row in feature_of else everything for row in own))
        if own
        else set()
        for own in block.rows
    ]


def _is_factor(tracer: Tracer, logits: Logits, source: Projection, projection: Projection) -> bool:
    """Whether an upstream projection is part of this attention rather than a separate layer before it.

    Only this attention may use its output and, if the graph records modules, it must run inside the module of the
    attention.
    """
    df = tracer.df
    home = df.common_module([logits.products[0].node, projection.node])
    if home and home not in df.modules(source.node):
        return False
    return tracer.basis.serves_alone(df, source.node, logits)
