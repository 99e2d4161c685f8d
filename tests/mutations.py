"""Wrong layouts made out of right ones, and when two layouts mean the same.

In: a layout with a right site. Out: `mutations`, named layouts each wrong in one way, and `meaning`, which tells a
mutation that changed nothing (the rows of a parameter that is one head, moved round by a head) from one that did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from quack_fx.layout import AttentionSite, LogitTerm, Norm, QKLayout, Side, WeightBlock

SIDES: tuple[Side, Side] = ("query", "key")

Mutation = Callable[[AttentionSite], Iterator[tuple[str, AttentionSite]]]


def mutations(layout: QKLayout, at: int, model: nn.Module) -> Iterator[tuple[str, QKLayout]]:
    """Layouts with one mistake in the site at an index, or about it, the wrong site first.

    Arguments:
        layout: A right layout.
        at: Index of the site.
        model: Its model.

    Yields:
        What was done, and the layout. Some mean the same as the right one; `meaning` tells which.
    """
    site = layout.sites[at]
    others = tuple(s for i, s in enumerate(layout.sites) if i != at)
    for mutation in MUTATIONS:
        for name, wrong in mutation(site):
            yield f"{mutation.__name__}{name}", replace(layout, sites=(wrong, *others))
    for side in SIDES:
        for other in others:
            if len(other.query) == len(site.query) and len(other.key) == len(site.key) and other.terms == site.terms:
                borrowed = replace(site, **{side: getattr(other, side)}) if _fits(site, other) else None
                if borrowed is not None:
                    yield f"{side}_rows_of_{other.name}", replace(layout, sites=(borrowed, *others))
                    break
    yield "site_dropped", replace(layout, sites=others)
    if false := _false_site(site, model):
        yield "site_that_is_no_attention", replace(layout, sites=(false, *layout.sites))
    yield "site_twice", replace(layout, sites=(replace(site, name=_another_module(site, model)), *layout.sites))


def meaning(layout: QKLayout, model: nn.Module) -> Any:
    """What a layout says, whatever the order of blocks, terms and ranges: equal for layouts that are the same.

    Logits of a head are a sum of products of rows; so each head is the multiset of its terms, and a term the multisets
    of weight elements on its two sides. Rows that a block names for a head count even where no term has them.
    Rows that are the whole of a parameter are the whole of it along either axis.
    rms and l2 differ by a constant.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def multiset(things: Iterable[Any]) -> Any:
        return frozenset(Counter(things).items())

    def rows(block: WeightBlock, ranges: tuple[tuple[int, int], ...]) -> Any:
        chosen = frozenset(i for start, stop in ranges for i in range(start, stop))
        axis = None if len(chosen) == shapes[block.param][block.axis] else block.axis
        return block.param, axis, None if axis is None else chosen, (block.bias, chosen) if block.bias else None

    def of_site(site: AttentionSite) -> Any:
        heads = []
        for head in range(site.query_heads):
            terms = []
            for term in site.terms:
                own = [(site.query[i], site.query[i].heads[head]) for i in term.query]
                other = [(site.key[i], site.key[i].heads[site.head_map[head]]) for i in term.key]
                if all(ranges for _, ranges in own + other):
                    terms.append(tuple(multiset(rows(*block) for block in side) for side in (own, other)))
            reads = [(b, b.heads[head]) for b in site.query], [(b, b.heads[site.head_map[head]]) for b in site.key]
            named = tuple(frozenset(rows(b, ranges) for b, ranges in side if ranges) for side in reads)
            heads.append((multiset(terms), named))
        norms = {
            (name, n.side, "rms" if n.kind == "l2" else n.kind, n.width, n.module, n.weight)
            for name in ("qk_norm", "latent_norm")
            for n in getattr(site, name)
        }
        return site.name, site.calls, site.head_dim, tuple(heads), frozenset(norms)

    return Counter(map(of_site, layout.sites))


# ---- rows ------------------------------------------------------------------------------------------------------------


def _roll(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return values[1:] + values[:1]


def _moved(block: WeightBlock, by: int) -> WeightBlock:
    """The block with every range of every head moved."""
    return replace(block, heads=tuple(tuple((a + by, b + by) for a, b in ranges) for ranges in block.heads))


def _each_block(site: AttentionSite) -> Iterator[tuple[str, WeightBlock, Callable[[WeightBlock], AttentionSite]]]:
    """Every block with a label, and the site with another in its place."""
    for side in SIDES:
        blocks: tuple[WeightBlock, ...] = getattr(site, side)
        for i, block in enumerate(blocks):

            def put(new: WeightBlock, side: Side = side, i: int = i) -> AttentionSite:
                now: tuple[WeightBlock, ...] = getattr(site, side)
                return replace(site, **{side: (*now[:i], new, *now[i + 1 :])})

            yield f" {side} {i}", block, put


def rows_of_the_next_head(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    for name, block, put in _each_block(site):
        yield name, put(replace(block, heads=_roll(block.heads)))


def rows_one_further(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    """All rows moved by one, down where there is room, else up."""
    for name, block, put in _each_block(site):
        lowest = min((a for ranges in block.heads for a, _ in ranges), default=0)
        yield name, put(_moved(block, -1 if lowest else 1))


def rows_of_one_head_one_further(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    for name, block, put in _each_block(site):
        if block.heads[-1] and block.heads[-1][0][0]:
            yield name, put(replace(block, heads=(*block.heads[:-1], _moved(block, -1).heads[-1])))


def rows_cut_short(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    for name, block, put in _each_block(site):
        if block.heads[0]:
            (*before, (start, stop)) = block.heads[0]
            kept = (*before, (start, stop - 1)) if stop - start > 1 else tuple(before)
            if kept:
                yield name, put(replace(block, heads=(kept, *block.heads[1:])))


def all_heads_read_all_rows(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    for name, block, put in _each_block(site):
        everything = tuple(r for ranges in block.heads for r in ranges)
        yield name, put(replace(block, heads=(everything,) * len(block.heads)))


def other_axis(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    for name, block, put in _each_block(site):
        yield name, put(replace(block, axis=1 - block.axis if block.axis < 2 else 0))


def sides_swapped(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    if site.query_heads == site.key_heads:
        terms = tuple(LogitTerm(t.key, t.query) for t in site.terms)
        yield "", replace(site, query=site.key, key=site.query, terms=terms)


# ---- heads -----------------------------------------------------------------------------------------------------------


def head_map_rolled(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    yield "", replace(site, head_map=_roll(site.head_map))
    yield " by reversal", replace(site, head_map=site.head_map[::-1])


def two_heads_taken_for_one(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    """Half as many heads, each made of two, neighbours or not."""
    if site.query_heads != site.key_heads or site.query_heads % 2 or site.head_map != tuple(range(site.query_heads)):
        return
    half = site.query_heads // 2
    ways = {"": lambda h: (h[::2], h[1::2]), " far apart": lambda h: (h[:half], h[half:])}
    for name, split in ways.items():

        def merged(blocks: tuple[WeightBlock, ...], split: Any = split) -> tuple[WeightBlock, ...]:
            pairs = (zip(*split(b.heads), strict=True) for b in blocks)
            heads = (tuple(a + b if a != b else a for a, b in two) for two in pairs)
            return tuple(replace(b, heads=h) for b, h in zip(blocks, heads, strict=True))

        yield (
            name,
            replace(
                site,
                query_heads=half,
                key_heads=half,
                head_map=tuple(range(half)),
                head_dim=2 * site.head_dim,
                query=merged(site.query),
                key=merged(site.key),
            ),
        )


def head_dim_wrong(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    yield " doubled", replace(site, head_dim=2 * site.head_dim)
    yield " short by one", replace(site, head_dim=site.head_dim - 1)


def one_call_more(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    yield "", replace(site, calls=site.calls + 1)


# ---- blocks and terms ------------------------------------------------------------------------------------------------


def block_dropped(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    """The site without one of its blocks; terms that name it lose it, or go with it where it was their only one."""
    for side in SIDES:
        blocks: tuple[WeightBlock, ...] = getattr(site, side)
        for index in range(len(blocks)) if len(blocks) > 1 else ():
            kept = [i for i in range(len(blocks)) if i != index]
            terms = []
            for term in site.terms:
                chain = tuple(kept.index(i) for i in getattr(term, side) if i != index)
                if chain:
                    terms.append(replace(term, **{side: chain}))
            kept_blocks = {side: tuple(blocks[i] for i in kept)}
            yield f" {side} {index}", replace(site, **kept_blocks, terms=tuple(terms))


def term_dropped(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    for i in range(len(site.terms)):
        yield f" {i}", replace(site, terms=site.terms[:i] + site.terms[i + 1 :])


def chains_crossed(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    """The query chain of one term with the key chain of another, and the reverse."""
    if len(site.terms) == 2:
        a, b = site.terms
        yield "", replace(site, terms=(LogitTerm(a.query, b.key), LogitTerm(b.query, a.key)))


def block_forgotten_in_a_term(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    for i, term in enumerate(site.terms):
        for side in SIDES:
            chain = getattr(term, side)
            if len(chain) > 1:
                wrong = replace(term, **{side: chain[:-1]})
                yield f" {i} {side}", replace(site, terms=(*site.terms[:i], wrong, *site.terms[i + 1 :]))


def block_in_another_chain(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    """Parallel chains with a block of one moved to the other: W and B A become W A and B."""
    for side in SIDES:
        chains = sorted({getattr(t, side) for t in site.terms}, key=len)
        if len(chains) == 2 and len(chains[0]) == 1 and len(chains[1]) == 2 and chains[0][0] not in chains[1]:
            (w,), (b, a) = chains
            now = {chains[0]: (w, a), chains[1]: (b,)}
            yield (
                f" {side}",
                replace(site, terms=tuple(replace(t, **{side: now[getattr(t, side)]}) for t in site.terms)),
            )


# ---- biases and norms ------------------------------------------------------------------------------------------------


def bias_wrong(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    """The bias forgotten, or that of another block."""
    biases = {b.bias for _, b in site.blocks() if b.bias}
    for name, block, put in _each_block(site):
        if block.bias:
            yield f"{name} forgotten", put(replace(block, bias=None))
        for other in sorted(biases - {block.bias}):
            yield f"{name} taken for {other}", put(replace(block, bias=other))


def qk_norm_wrong(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    """A norm forgotten or invented, of another width or kind, or with the module and the gain of the other side."""
    for side in SIDES:
        here = [n for n in site.qk_norm if n.side == side]
        rest = tuple(n for n in site.qk_norm if n.side != side)
        if not here:
            yield f" {side} invented", replace(site, qk_norm=(*rest, Norm(side, "rms", site.head_dim)))
            continue
        yield f" {side} forgotten", replace(site, qk_norm=rest)
        wider = tuple(replace(n, width=2 * n.width) for n in here)
        yield f" {side} of another width", replace(site, qk_norm=(*rest, *wider))
        other_kind = tuple(replace(n, kind="layer" if n.kind != "layer" else "rms") for n in here)
        yield f" {side} of another kind", replace(site, qk_norm=(*rest, *other_kind))
        if len(here) == len(rest) == 1:
            for field in ("module", "weight"):
                if getattr(here[0], field) != getattr(rest[0], field):
                    wrong = replace(here[0], **{field: getattr(rest[0], field)})
                    yield f" {side} with the other side's {field}", replace(site, qk_norm=(*rest, wrong))


def latent_norm_wrong(site: AttentionSite) -> Iterator[tuple[str, AttentionSite]]:
    for side in SIDES:
        rest = tuple(n for n in site.latent_norm if n.side != side)
        if len(rest) < len(site.latent_norm):
            yield f" {side} forgotten", replace(site, latent_norm=rest)
        else:
            yield f" {side} invented", replace(site, latent_norm=(*rest, Norm(side, "rms", site.head_dim)))


MUTATIONS: tuple[Mutation, ...] = (
    rows_of_the_next_head,
    rows_one_further,
    rows_of_one_head_one_further,
    rows_cut_short,
    all_heads_read_all_rows,
    other_axis,
    sides_swapped,
    head_map_rolled,
    two_heads_taken_for_one,
    head_dim_wrong,
    one_call_more,
    block_dropped,
    term_dropped,
    chains_crossed,
    block_forgotten_in_a_term,
    block_in_another_chain,
    bias_wrong,
    qk_norm_wrong,
    latent_norm_wrong,
)


# ---- sites -----------------------------------------------------------------------------------------------------------


def _fits(site: AttentionSite, other: AttentionSite) -> bool:
    """Whether the blocks of another site can stand in this one's place."""
    pairs = zip((b for _, b in site.blocks()), (b for _, b in other.blocks()), strict=True)
    return all(len(a.heads) == len(b.heads) and a.param != b.param for a, b in pairs)


def _false_site(site: AttentionSite, model: nn.Module) -> AttentionSite | None:
    """A site made of two matrices that are no queries and keys."""
    used = {b.param for _, b in site.blocks()}
    free = [
        n for n, p in model.named_parameters() if p.ndim == 2 and n not in used and min(p.shape) >= site.query_heads
    ]
    if len(free) < 2:
        return None

    def block(param: str, role: Any) -> WeightBlock:
        return WeightBlock(param, role, 0, tuple(((h, h + 1),) for h in range(site.query_heads)))

    heads = site.query_heads
    return AttentionSite(
        name=free[0].rpartition(".")[0],
        kind="mha",
        cross=False,
        calls=1,
        query_heads=heads,
        key_heads=heads,
        head_dim=1,
        head_map=tuple(range(heads)),
        query=(block(free[0], "q"),),
        key=(block(free[1], "k"),),
        terms=(LogitTerm((0,), (0,)),),
    )


def _another_module(site: AttentionSite, model: nn.Module) -> str:
    """Name of a module that does not make the logits."""
    leaves = (name for name, module in model.named_modules() if not list(module.children()))
    return next((name for name in leaves if name != site.name), "elsewhere")
