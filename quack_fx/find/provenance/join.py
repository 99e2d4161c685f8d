"""Join blocks that are parts of one block, and drop terms that no head has.

In: a site with more blocks than necessary, because different heads multiply the same rows with different parameters
(each head is a module, or each stream has its own weights). Out: the same site with as few blocks as possible. The
products of every head stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

from quack_fx.layout import SIDES, AttentionSite, LogitTerm, Ranges, Side, WeightBlock

_Product = tuple[tuple[str, ...], tuple[tuple[str, Ranges], ...]]


def join_blocks(site: AttentionSite) -> AttentionSite:
    """Drop terms that no head has, then join blocks until no two can be joined."""
    site = replace(site, terms=tuple(t for t in site.terms if _is_there(site, t)))
    products = _products(site)
    for side in SIDES:
        while (shorter := next(_joined(site, side, products), None)) is not None:
            site = shorter
    return site


def _is_there(site: AttentionSite, term: LogitTerm) -> bool:
    return any(
        all(site.query[i].heads[h] for i in term.query) and all(site.key[i].heads[k] for i in term.key)
        for h, k in enumerate(site.head_map)
    )


def _joined(site: AttentionSite, side: Side, products: list[set[_Product]]) -> Iterator[AttentionSite]:
    """Yield the site with two blocks joined, for each pair whose joining leaves every head's products the same."""
    blocks = getattr(site, side)
    for (i, a), (j, b) in combinations(enumerate(blocks), 2):
        whole = _whole(a, b)
        if whole is None or any({i, j} <= set(getattr(t, side)) for t in site.terms):
            continue
        number = [i if n == j else n - (n > j) for n in range(len(blocks))]
        left = (*blocks[:i], whole, *blocks[i + 1 : j], *blocks[j + 1 :])
        terms = tuple(dict.fromkeys(_renumbered(t, side, number) for t in site.terms))
        shorter = replace(site, query=left, terms=terms) if side == "query" else replace(site, key=left, terms=terms)
        if _products(shorter) == products:
            yield shorter


def _renumbered(term: LogitTerm, side: Side, number: Sequence[int]) -> LogitTerm:
    if side == "query":
        return replace(term, query=tuple(number[n] for n in term.query))
    return replace(term, key=tuple(number[n] for n in term.key))


def _whole(a: WeightBlock, b: WeightBlock) -> WeightBlock | None:
    """Join two blocks; None if they differ in more than rows, or some head reads different rows in each."""
    if replace(a, heads=()) != replace(b, heads=()):
        return None
    if any(ours and theirs and ours != theirs for ours, theirs in zip(a.heads, b.heads, strict=True)):
        return None
    return replace(a, heads=tuple(ours or theirs for ours, theirs in zip(a.heads, b.heads, strict=True)))


def _products(site: AttentionSite) -> list[set[_Product]]:
    """For each query head, the products whose sum is its logits, independent of block indices."""
    queries = set(map(id, site.query))
    return [
        {
            (
                tuple("query" if id(block) in queries else "key" for block, _ in term),
                tuple((block.param, rows) for block, rows in term),
            )
            for term in site.head_terms(head)
        }
        for head in range(site.query_heads)
    ]
