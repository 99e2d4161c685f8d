"""Python loops over heads, where each softmax of a site computes only some of its heads.

In: a site and one of its softmaxes. Out: the query heads whose claimed rows are all upstream of that softmax, and the
site restricted to them, which is then checked like any other.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

import torch

from quack_fx.layout import AttentionSite, LogitTerm, WeightBlock
from quack_fx.prove.evidence import Rows, all_factors, indices, slice_from
from quack_fx.prove.graph import Graph
from quack_fx.prove.ops import Softmax
from quack_fx.prove.tape import Op


def heads_behind(
    graph: Graph, site: AttentionSite, softmax: Softmax, attention: Set[Op], generator: torch.Generator
) -> tuple[int, ...]:
    """Query heads whose claimed rows, on both sides, are upstream of a softmax."""
    reached = _rows_behind(graph, site, softmax, attention, generator)

    def lies_behind(blocks: Sequence[WeightBlock], head: int) -> bool:
        return all(indices(b.heads[head]) <= reached.get(b.param, frozenset()) for b in blocks)

    return tuple(h for h, k in enumerate(site.head_map) if lies_behind(site.query, h) and lies_behind(site.key, k))


def with_heads(site: AttentionSite, heads: Sequence[int]) -> AttentionSite:
    """A site restricted to some of its query heads."""
    key_heads = sorted({site.head_map[h] for h in heads})
    query, query_numbers = _cut(site.query, heads)
    key, key_numbers = _cut(site.key, key_heads)
    terms = tuple(
        LogitTerm(tuple(query_numbers[i] for i in t.query), tuple(key_numbers[i] for i in t.key))
        for t in site.terms
        if query_numbers.keys() >= set(t.query) and key_numbers.keys() >= set(t.key)
    )
    return replace(
        site,
        query_heads=len(heads),
        key_heads=len(key_heads),
        head_map=tuple(key_heads.index(site.head_map[h]) for h in heads),
        query=query,
        key=key,
        terms=terms,
    )


def _cut(blocks: Sequence[WeightBlock], heads: Sequence[int]) -> tuple[tuple[WeightBlock, ...], dict[int, int]]:
    """Blocks restricted to some heads, without those that none of them reads, and the new index of each kept block."""
    kept = [i for i, b in enumerate(blocks) if any(b.heads[h] for h in heads)]
    cut = tuple(replace(blocks[i], heads=tuple(blocks[i].heads[h] for h in heads)) for i in kept)
    return cut, {old: new for new, old in enumerate(kept)}


def _rows_behind(
    graph: Graph, site: AttentionSite, softmax: Softmax, attention: Set[Op], generator: torch.Generator
) -> dict[str, Rows]:
    """Rows of the claimed parameters that a gradient on all logits of a softmax reaches."""
    axes = {block.param: block.axis for _, block in site.blocks()}
    rows: dict[str, Rows] = {}
    for product in graph.logit_products(softmax):
        for value in product.factors:
            factors = [
                f for f in all_factors(graph.factors(value, product.reader, attention)) if f.params & axes.keys()
            ]
            replay = slice_from(graph, factors, (value, product.reader), through_detach=True)
            seed = torch.randn(value.tensor.shape, generator=generator).to(value.tensor)
            for name, gradient in replay.gradients(value, seed).items():
                if name in axes and axes[name] < gradient.ndim:
                    size = gradient.movedim(axes[name], 0).flatten(1).abs().sum(1)
                    rows[name] = rows.get(name, frozenset()) | frozenset(size.nonzero().flatten().tolist())
    return rows
