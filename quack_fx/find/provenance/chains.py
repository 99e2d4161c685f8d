"""Chains of factors: projections before a block's projection, as long as their output is used by this attention alone.

In: the blocks that meet in the logits. Out: nothing; each block gets the block behind it and the norms in between.
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
    """Attach upstream projections to the blocks, if this attention alone uses them, on one side or on both."""
    for blocks in (query, key):
        todo = list(blocks)
        while todo:
            block = todo.pop()
            link, depth = block, 0
            while depth < MAX_CHAIN and (upstream := _upstream(tracer, logits, link)) is not None:
                flow, reads = upstream
                parts = _by_source(tracer, link, reads)
                if len(parts) > 1:
                    if link is block:  # each head has its own factor: one block per factor
                        blocks[blocks.index(block) : blocks.index(block) + 1] = parts
                        todo.extend(parts)
                    break
                behind = _behind(tracer, logits, link, reads)
                if behind is None:
                    break
                link.latent_norms = flow.norms
                link.behind, link, depth = behind, behind, depth + 1


def cut_at_input(tracer: Tracer, logits: Logits, query: list[Block], key: list[Block]) -> None:
    """Cut chains at features that queries, keys and values all depend on: those of the layer before the attention.

    A latent of MLA is used for keys and values only, and one for all three is narrower than the queries. An adapter is
    added to a weight, and is not a layer before it.
    """
    both = _behind_rows(query).items() & _behind_rows(key).items()
    wide = max((len(set().union(*block.rows)) for block in query), default=0)
    both = {(node, rows) for node, rows in both if len(rows) >= wide}
    shared = {node for node, _ in both & _value_sources(tracer, logits).items()} if both else set()
    for block in (*query, *key):
        if block.behind is not None and not block.parallel and block.behind.projection.node in shared:
            block.behind, block.latent_norms = None, ()


def _behind_rows(blocks: list[Block]) -> dict[Node, frozenset[tuple[int, ...]]]:
    """For each projection behind some blocks, the rows of it that they read."""
    found: dict[Node, set[tuple[int, ...]]] = {}
    for block in blocks:
        if block.behind is not None and not block.parallel:
            found.setdefault(block.behind.projection.node, set()).update(*block.behind.rows)
    return {node: frozenset(rows) for node, rows in found.items()}


def _value_sources(tracer: Tracer, logits: Logits) -> dict[Node, frozenset[tuple[int, ...]]]:
    """For each projection behind those of the values, the rows of it that they read."""
    found: dict[Node, set[tuple[int, ...]]] = {}
    for node in {projection.x for projection, _ in value_features(tracer, logits)} & tracer.df.activation:
        flow = tracer.trace([node], lambda n: not tracer.basis.serves_alone(tracer.df, n, logits)).get(node)
        features = tracer.labels.features(flow.label) - {UNKNOWN} if flow is not None else set()
        for projection, i in map(tracer.projections.by_feature, features):
            found.setdefault(projection.node, set()).add(tuple(projection.rows[i].tolist()))
    return {node: frozenset(rows) for node, rows in found.items()}


def _upstream(tracer: Tracer, logits: Logits, block: Block) -> tuple[Flow, list[set[int]]] | None:
    """The data of a block's projection, if this attention alone uses it: its flow, and the features each head reads."""
    x = block.projection.x
    if x not in tracer.df.activation or not tracer.basis.serves_alone(tracer.df, x, logits):
        return None
    flow = tracer.trace([x], lambda node: not tracer.basis.serves_alone(tracer.df, node, logits)).get(x)
    if flow is None or flow.statistic is not None or flow.ops:  # with a nonlinearity in between they are two layers
        return None
    features = tracer.labels.features(flow.label)
    if not features or UNKNOWN in features:
        return None
    return flow, _read_by(tracer, block.projection, flow.label, block)


def _by_source(tracer: Tracer, block: Block, reads: list[set[int]]) -> list[Block]:
    """The block, split by upstream parameter if heads have different ones."""
    names = _of_each(reads, lambda own: {p.names[i] for p, i in map(tracer.projections.by_feature, own)})
    distinct = {next(iter(own)) for own in names if len(own) == 1}
    if len(distinct) < 2 or any(len(own) > 1 for own in names):
        return [block]
    return [
        replace(block, rows=[rows if own == {name} else set() for rows, own in zip(block.rows, names, strict=True)])
        for name in sorted(distinct)
    ]


def _behind(tracer: Tracer, logits: Logits, block: Block, reads: list[set[int]]) -> Block | None:
    """The block of the projection before a block, if it is a factor of this attention alone."""
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
    """`of` applied to each head's features; it is computed once for a set that several heads read (a latent)."""
    made = {key: of(own) for key, own in {id(own): own for own in reads}.items()}
    return [made[id(own)] for own in reads]


def _read_by(tracer: Tracer, projection: Projection, given: Tensor, block: Block) -> list[set[int]]:
    """The upstream features that each head's rows of a projection are multiplied with.

    Mostly all of them. An up projection per head (absorbed MLA) or a grouped convolution is multiplied with the
    features of its own head only.
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
    """Whether an upstream projection is a factor of this attention, and not a separate layer before it.

    This attention alone must use its output, and it must run inside the module that holds the attention, if the graph
    knows modules.
    """
    df = tracer.df
    home = df.common_module([logits.products[0].node, projection.node])
    if home and home not in df.modules(source.node):
        return False
    return tracer.basis.serves_alone(df, source.node, logits)
