"""From heads to weight blocks: the rows of each parameter, and the terms that multiply the blocks.

In: the `Heads` of one attention. Out: an `AttentionSite`.

The rows of a block are all multiplied with rows of the same set of parameters. So MLA's up projection of the query
becomes two blocks: one is multiplied with the keys' up projection, the other with the rotary keys. The data of a
block's projection may come from another projection: a chain (`chains.py`), whose blocks have roles (`roles.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch.fx import Node

from quack_fx.find.attention import Logits, Refused
from quack_fx.find.provenance.block import Block, Rows
from quack_fx.find.provenance.chains import cut_at_input, follow_chains
from quack_fx.find.provenance.flow import NormTag
from quack_fx.find.provenance.heads import Heads
from quack_fx.find.provenance.join import join_blocks
from quack_fx.find.provenance.projections import Projection
from quack_fx.find.provenance.roles import absorbed_in, give_roles, give_roles_absorbed
from quack_fx.find.provenance.trace import Tracer
from quack_fx.find.provenance.uses import Uses
from quack_fx.find.provenance.vectors import Row, Vector
from quack_fx.layout import AttentionSite, LogitTerm, Norm, Side, SiteKind, WeightBlock, merged


def make_site(tracer: Tracer, logits: Logits, heads: Heads, uses: Uses) -> AttentionSite:
    """Build the site of one attention.

    Raises:
        Refused: A head reads rows that are not ranges along one axis of their parameter, or a projection has no tokens.
    """
    df = tracer.df
    empty = _without_tokens(tracer)
    query = _side(heads, heads.query, [_joined(heads.key[k]) for k in heads.head_map])
    readers: list[list[Vector]] = [[] for _ in heads.key]
    for h, k in enumerate(heads.head_map):
        readers[k].extend(heads.query[h])
    key = _side(heads, heads.key, [_joined(tuple(vectors)) for vectors in readers])
    follow_chains(tracer, logits, query, key)
    cut_at_input(tracer, logits, query, key)
    absorbed = absorbed_in(tracer, logits, heads, query, key)
    if absorbed:
        give_roles_absorbed(query, key, absorbed)
    mla = absorbed is not None or give_roles(query, key)
    query_norms, key_norms = (_of_logits_alone(tracer, uses, norms) for norms in heads.norms)
    query_chains, key_chains = _flat(query), _flat(key)
    blocks = (tuple(_finish(tracer, b) for b in query_chains), tuple(_finish(tracer, b) for b in key_chains))
    site = AttentionSite(
        name=df.home(logits.products[-1].node),  # earlier products may come from an earlier layer
        kind=_kind(heads, mla),
        cross=not _same_sequence(tracer, query, key),
        calls=1,
        query_heads=len(heads.query),
        key_heads=len(heads.key),
        head_dim=heads.head_dim,
        head_map=heads.head_map,
        query=blocks[0],
        key=blocks[1],
        terms=_terms(query, key, query_chains, key_chains),
        qk_norm=_norms("query", query_norms) + (() if absorbed else _norms("key", key_norms)),
        latent_norm=_latent_norms("query", query_chains)
        + (_norms("key", heads.norms[1]) if absorbed else _latent_norms("key", key_chains)),
        logit_scale=heads.scale,
    )
    read = {block.param for block in (*site.query, *site.key)}
    for projection in empty:
        if not read.issuperset(projection.names):
            reason = f"with these inputs, {projection.names[0]!r} projects no token at all"
            raise Refused("no-tokens", reason, projection.node)
    return join_blocks(site)


def _without_tokens(tracer: Tracer) -> list[Projection]:
    """Projections between the inputs and the logits that have no tokens with these inputs."""
    df = tracer.df
    empty = [
        n for n in tracer.basis.inside if df.op[n].kind in ("contraction", "convolution") and not df.shape(n).numel()
    ]
    made = [tracer.projections.of(node) for node in sorted(empty, key=df.index.__getitem__)]
    return [one[0] for one in made if one is not None]


# ---- direct blocks ---------------------------------------------------------------------------------------------------


def _joined(vectors: tuple[Vector, ...]) -> Vector:
    """Merge vectors into one: the union of their features at each index."""
    return tuple(frozenset().union(*rows) for rows in zip(*vectors, strict=True))


def _side(heads: Heads, own: tuple[tuple[Vector, ...], ...], partners: list[Vector]) -> list[Block]:
    """Blocks of one side whose features enter the logit product directly."""
    blocks: dict[tuple[str, frozenset[str], Node], Block] = {}
    for h, (vectors, partner) in enumerate(zip(own, partners, strict=True)):
        met: dict[Row, set[str]] = {}
        parallel: set[str] = set()
        for vector in vectors:
            for rows, others in zip(vector, partner, strict=True):
                names = {name for name, _ in rows}
                parallel |= names if len(names) > 1 else set()
                for row in sorted(rows):  # for a deterministic order of blocks
                    met.setdefault(row, set()).update(name for name, _ in others)
        for (name, row_index), names_met in met.items():
            projection = heads.projection[name, row_index]
            key = (name, frozenset(names_met), projection.node)
            block = blocks.get(key)
            if block is None:
                block = Block(name, key[1], [set() for _ in own], projection)
                blocks[key] = block
            block.rows[h].add(row_index)
            block.parallel |= name in parallel
    return list(blocks.values())


def _terms(
    query: list[Block], key: list[Block], query_chains: list[Block], key_chains: list[Block]
) -> tuple[LogitTerm, ...]:
    def indices(block: Block, chains: list[Block]) -> tuple[int, ...]:
        return tuple(next(i for i, b in enumerate(chains) if _equal(b, c)) for c in block.chain())

    return tuple(
        dict.fromkeys(
            LogitTerm(indices(q, query_chains), indices(k, key_chains))
            for q in query
            for k in key
            if k.param in q.partners and q.param in k.partners
        )
    )


def _flat(blocks: list[Block]) -> list[Block]:
    """Blocks of all chains without duplicates, each chain starting at the input."""
    flat: list[Block] = []
    for block in blocks:
        for link in reversed(block.chain()):
            if not any(_equal(link, other) for other in flat):
                flat.append(link)
    return flat


def _equal(a: Block, b: Block) -> bool:
    return a.param == b.param and a.rows == b.rows and a.role == b.role


def _kind(heads: Heads, mla: bool) -> SiteKind:
    if mla:
        return "mla"
    if heads.channels:
        return "other"
    if len(heads.key) == len(heads.query):
        return "mha"
    return "mqa" if len(heads.key) == 1 else "gqa"


# ---- rows ------------------------------------------------------------------------------------------------------------


def _finish(tracer: Tracer, block: Block) -> WeightBlock:
    """Convert a block's rows to ranges along one axis."""
    axes, shape = block.projection.axes, tracer.df.weight_shapes[block.param]
    for i, axis in enumerate(axes):
        if all(_covers(rows, i, axes, shape) for rows in block.rows):
            gathered = block.projection.gathered.get(axis)
            heads = tuple(merged((row, row + 1) for row in _along(rows, i, gathered)) for rows in block.rows)
            return WeightBlock(block.param, block.role, axis, heads, _bias(block) if len(axes) == 1 else None)
    raise Refused(
        "rows-on-two-axes",
        f"a head reads a part of {block.param!r} that is no set of whole rows along one axis",
        block.projection.node,
    )


def _along(rows: Rows, i: int, gathered: Mapping[int, tuple[int, ...]] | None) -> set[int]:
    firsts = {row[i] for row in rows}
    return firsts if gathered is None else {one for first in firsts for one in gathered[first]}


def _covers(rows: Rows, i: int, axes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether the rows are whole slices along axis i."""
    others = 1
    for j, axis in enumerate(axes):
        others *= shape[axis] if j != i else 1
    return len(rows) == len({row[i] for row in rows}) * others


def _bias(block: Block) -> str | None:
    """Bias that all the block's rows have in common, or None."""
    rows = set().union(*block.rows)
    found = {
        block.projection.biases[i]
        for i, row in enumerate(block.projection.rows.tolist())
        if tuple(row) in rows and block.projection.names[i] == block.param
    }
    return found.pop() if len(found) == 1 else None


def _of_logits_alone(tracer: Tracer, uses: Uses, tags: tuple[NormTag, ...]) -> tuple[NormTag, ...]:
    """Set a norm's module to None if its results are also used as values or outside attention."""
    looked_at = tracer.basis.inside
    shared = {t.module for t in tags if t.module and not uses.module_norms_logits_alone(t.module, looked_at)}
    return tuple(replace(tag, module=None) if tag.module in shared else tag for tag in tags)


def _norms(side: Side, tags: tuple[NormTag, ...]) -> tuple[Norm, ...]:
    return tuple(dict.fromkeys(Norm(side, t.kind, t.width, t.module, t.weight) for t in tags))


def _latent_norms(side: Side, chains: list[Block]) -> tuple[Norm, ...]:
    return tuple(dict.fromkeys(norm for block in chains for norm in _norms(side, block.latent_norms)))


# ---- self or cross ---------------------------------------------------------------------------------------------------


def _same_sequence(tracer: Tracer, query: list[Block], key: list[Block]) -> bool:
    """Whether queries and keys are computed from the same tokens: their inputs have a common source."""
    reached = tuple({block.chain()[-1].projection.x for block in side} for side in (query, key))
    fresh = [set(side) for side in reached]
    df = tracer.df
    # Both sides walk back in step and stop where they meet, so the walk is short for self-attention.
    while not reached[0] & reached[1] and any(fresh):
        for side, nodes in enumerate(fresh):
            tracer.basis.inside.update(nodes)
            behind = {n for node in nodes if _same_tokens(tracer, df.open(node)) for n in node.all_input_nodes}
            fresh[side] = {n for n in behind if n in df.activation or n in df.from_input} - reached[side]
            reached[side].update(fresh[side])
    return bool(reached[0] & reached[1])


def _same_tokens(tracer: Tracer, node: Node) -> bool:
    """Whether a node's inputs hold the same tokens as its output, so that the walk goes on through it."""
    if tracer.df.op[node].kind == "contraction":  # yes for a computed rotation of each token (OFT), no for a projection
        return tracer.projections.operands(node) is not None and tracer.projections.of(node) is None
    return tracer.df.op[node].kind not in ("convolution", "attention", "softmax")


def merge_calls(sites: list[AttentionSite]) -> list[AttentionSite]:
    """Merge sites with the same blocks into one site with several calls (shared layers, tied parameters)."""
    merged: dict[object, AttentionSite] = {}
    for site in sites:
        key = (site.query, site.key, site.terms)
        known = merged.get(key)
        merged[key] = site if known is None else _called_again(known, site)
    return list(merged.values())


def _called_again(site: AttentionSite, call: AttentionSite) -> AttentionSite:
    """Add a call to a site. The call may be from another module that has its own norms (tied stacks)."""

    def both(one: tuple[Norm, ...], other: tuple[Norm, ...]) -> tuple[Norm, ...]:
        return tuple(dict.fromkeys((*one, *other)))

    return replace(
        site,
        calls=site.calls + 1,
        qk_norm=both(site.qk_norm, call.qk_norm),
        latent_norm=both(site.latent_norm, call.latent_norm),
    )
