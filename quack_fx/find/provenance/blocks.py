"""From heads to weight blocks: rows of each parameter, chains of factors, roles and terms.

In: the `Heads` of one attention. Out: an `AttentionSite`.

A block is a set of rows of one parameter that meets the same partners: MLA's up projection of the query falls into one
block that meets the keys' up projection and one that meets the rotary keys. Behind a block there may be a further
projection, and so on: a chain. It is followed while its data serves this attention alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor
from torch.fx import Node

from quack_fx.find.attention import Logits
from quack_fx.find.provenance.flow import Flow, NormTag
from quack_fx.find.provenance.heads import Heads, Refused, Row, Vector
from quack_fx.find.provenance.join import join_blocks
from quack_fx.find.provenance.labels import UNKNOWN
from quack_fx.find.provenance.projections import Projection
from quack_fx.find.provenance.trace import Tracer
from quack_fx.find.provenance.uses import Uses
from quack_fx.graph.dataflow import factors_of
from quack_fx.layout import AttentionSite, LogitTerm, Norm, Range, Ranges, Role, Side, SiteKind, WeightBlock

_Rows = set[tuple[int, ...]]
_MAX_CHAIN = 4
_T = TypeVar("_T")


@dataclass(eq=False)
class _Block:
    """A block while it is being put together: rows of each head, and the projection behind it."""

    param: str
    partners: frozenset[str]
    rows: list[_Rows]
    projection: Projection
    behind: _Block | None = None
    parallel: bool = False
    latent_norms: tuple[NormTag, ...] = ()
    role: Role = "other"

    def chain(self) -> list[_Block]:
        """The block and what lies behind it."""
        return [self, *(self.behind.chain() if self.behind is not None else [])]


def make_site(tracer: Tracer, logits: Logits, heads: Heads, uses: Uses) -> AttentionSite:
    """The site of one attention.

    Arguments:
        tracer: The one that followed its operands.
        logits: The attention.
        heads: Its heads.
        uses: Tells which norm modules serve logits alone.

    Raises:
        Refused: Rows that are no ranges along one axis of their parameter.
    """
    df = tracer.df
    query = _side(heads, heads.query, [_joined(heads.key[k]) for k in heads.head_map])
    readers: list[list[Vector]] = [[] for _ in heads.key]
    for h, k in enumerate(heads.head_map):
        readers[k].extend(heads.query[h])
    key = _side(heads, heads.key, [_joined(tuple(vectors)) for vectors in readers])
    _follow_chains(tracer, logits, query, key)
    _cut_at_input(tracer, logits, query, key)
    absorbed = _absorbed(tracer, logits, heads, query, key)
    mla = _give_roles_absorbed(query, key, absorbed) if absorbed else _give_roles(query, key)
    query_norms, key_norms = (_of_logits_alone(tracer, uses, norms) for norms in heads.norms)
    query_chains, key_chains = _flat(query), _flat(key)
    blocks = (tuple(_finish(tracer, b) for b in query_chains), tuple(_finish(tracer, b) for b in key_chains))
    site = AttentionSite(
        name=(df.modules(logits.products[-1].node) or ("",))[-1],  # earlier ones may come from an earlier layer
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
    return join_blocks(site)


# ---- direct blocks ---------------------------------------------------------------------------------------------------


def _joined(vectors: tuple[Vector, ...]) -> Vector:
    """Features of several vectors at each place."""
    return tuple(frozenset().union(*places) for places in zip(*vectors, strict=True))


def _side(heads: Heads, own: tuple[tuple[Vector, ...], ...], partners: list[Vector]) -> list[_Block]:
    """Blocks that meet directly in the logits."""
    blocks: dict[tuple[str, frozenset[str], Node], _Block] = {}
    for h, (vectors, partner) in enumerate(zip(own, partners, strict=True)):
        met: dict[Row, set[str]] = {}
        parallel: set[str] = set()
        for vector in vectors:
            for rows, others in zip(vector, partner, strict=True):
                names = {name for name, _ in rows}
                parallel |= names if len(names) > 1 else set()
                for row in sorted(rows):  # sets have no order of their own, layouts must
                    met.setdefault(row, set()).update(name for name, _ in others)
        for (name, place), names_met in met.items():
            projection = heads.projection[name, place]
            key = (name, frozenset(names_met), projection.node)
            block = blocks.get(key)
            if block is None:
                block = _Block(name, key[1], [set() for _ in own], projection)
                blocks[key] = block
            block.rows[h].add(place)
            block.parallel |= name in parallel
    return list(blocks.values())


def _terms(
    query: list[_Block], key: list[_Block], query_chains: list[_Block], key_chains: list[_Block]
) -> tuple[LogitTerm, ...]:
    def indices(block: _Block, chains: list[_Block]) -> tuple[int, ...]:
        return tuple(next(i for i, b in enumerate(chains) if _equal(b, c)) for c in block.chain())

    return tuple(
        dict.fromkeys(
            LogitTerm(indices(q, query_chains), indices(k, key_chains))
            for q in query
            for k in key
            if k.param in q.partners and q.param in k.partners
        )
    )


def _flat(blocks: list[_Block]) -> list[_Block]:
    """Blocks of all chains, each once, those nearest to the input first."""
    flat: list[_Block] = []
    for block in blocks:
        for link in reversed(block.chain()):
            if not any(_equal(link, other) for other in flat):
                flat.append(link)
    return flat


def _equal(a: _Block, b: _Block) -> bool:
    return a.param == b.param and a.rows == b.rows and a.role == b.role


# ---- chains ----------------------------------------------------------------------------------------------------------


def _follow_chains(tracer: Tracer, logits: Logits, query: list[_Block], key: list[_Block]) -> None:
    """Hang upstream projections behind the blocks, where they serve this attention alone, on one side or on both."""
    for blocks in (query, key):
        todo = list(blocks)
        while todo:
            block = todo.pop()
            link, depth = block, 0
            while depth < _MAX_CHAIN and (upstream := _upstream(tracer, logits, link)) is not None:
                flow, reads = upstream
                parts = _by_source(tracer, link, reads)
                if len(parts) > 1:
                    if link is block:  # heads with factors of their own: a block for each factor
                        blocks[blocks.index(block) : blocks.index(block) + 1] = parts
                        todo.extend(parts)
                    break
                behind = _behind(tracer, logits, link, reads)
                if behind is None:
                    break
                link.latent_norms = flow.norms
                link.behind, link, depth = behind, behind, depth + 1


def _cut_at_input(tracer: Tracer, logits: Logits, query: list[_Block], key: list[_Block]) -> None:
    """Cut chains at features that queries, keys and values are all made of: those of the layer before the attention.

    A latent of MLA makes keys and values alone, and one of all three is narrower than what is made of it; an adapter
    stands beside a weight, not before it.
    """
    both = _behind_rows(query).items() & _behind_rows(key).items()
    wide = max((len(set().union(*block.rows)) for block in query), default=0)
    both = {(node, rows) for node, rows in both if len(rows) >= wide}
    shared = {node for node, _ in both & _value_sources(tracer, logits).items()} if both else set()
    for block in (*query, *key):
        if block.behind is not None and not block.parallel and block.behind.projection.node in shared:
            block.behind, block.latent_norms = None, ()


def _behind_rows(blocks: list[_Block]) -> dict[Node, frozenset[tuple[int, ...]]]:
    """For each projection behind some blocks its rows that they read."""
    found: dict[Node, set[tuple[int, ...]]] = {}
    for block in blocks:
        if block.behind is not None and not block.parallel:
            found.setdefault(block.behind.projection.node, set()).update(*block.behind.rows)
    return {node: frozenset(rows) for node, rows in found.items()}


def _value_sources(tracer: Tracer, logits: Logits) -> dict[Node, frozenset[tuple[int, ...]]]:
    """For each projection behind those of the values its rows that they read."""
    found: dict[Node, set[tuple[int, ...]]] = {}
    for node in {projection.x for projection, _ in _value_features(tracer, logits)} & tracer.df.activation:
        flow = tracer.trace([node], lambda n: not tracer.basis.serves_alone(tracer.df, n, logits)).get(node)
        features = tracer.labels.features(flow.label) - {UNKNOWN} if flow is not None else set()
        for projection, i in map(tracer.projections.by_feature, features):
            found.setdefault(projection.node, set()).add(tuple(projection.rows[i].tolist()))
    return {node: frozenset(rows) for node, rows in found.items()}


def _upstream(tracer: Tracer, logits: Logits, block: _Block) -> tuple[Flow, list[set[int]]] | None:
    """What a block multiplies, if it serves this attention alone: its flow, and the features that each head reads."""
    x = block.projection.x
    if x not in tracer.df.activation or not tracer.basis.serves_alone(tracer.df, x, logits):
        return None
    flow = tracer.trace([x], lambda node: not tracer.basis.serves_alone(tracer.df, node, logits)).get(x)
    if flow is None or flow.statistic is not None or flow.ops:  # what bends between two maps makes them two layers
        return None
    features = tracer.labels.features(flow.label)
    if not features or UNKNOWN in features:
        return None
    return flow, _read_by(tracer, block.projection, flow.label, block)


def _by_source(tracer: Tracer, block: _Block, reads: list[set[int]]) -> list[_Block]:
    """The block, cut into one for each upstream parameter where heads have different ones."""
    names = _of_each(reads, lambda own: {p.names[i] for p, i in map(tracer.projections.by_feature, own)})
    distinct = {next(iter(own)) for own in names if len(own) == 1}
    if len(distinct) < 2 or any(len(own) > 1 for own in names):
        return [block]
    return [
        replace(block, rows=[rows if own == {name} else set() for rows, own in zip(block.rows, names, strict=True)])
        for name in sorted(distinct)
    ]


def _behind(tracer: Tracer, logits: Logits, block: _Block, reads: list[set[int]]) -> _Block | None:
    """The projection whose output a block multiplies, if it is a factor of this attention alone."""
    by_feature = tracer.projections.by_feature
    found = set().union(*_of_each(reads, lambda own: {(p.first, p.names[i]) for p, i in map(by_feature, own)}))
    if len(found) != 1:
        return None
    first, name = found.pop()
    source, _ = by_feature(first)
    if not _is_factor(tracer, logits, source, block.projection):
        return None
    rows = _of_each(reads, lambda own: {tuple(source.rows[f - first].tolist()) for f in own})
    return _Block(name, frozenset({block.param}), rows, source)


def _of_each(reads: list[set[int]], of: Callable[[set[int]], set[_T]]) -> list[set[_T]]:
    """What `of` makes of each head's features; heads of a latent share one set, which is looked at once."""
    made = {key: of(own) for key, own in {id(own): own for own in reads}.items()}
    return [made[id(own)] for own in reads]


def _read_by(tracer: Tracer, projection: Projection, given: Tensor, block: _Block) -> list[set[int]]:
    """Upstream features that each head's rows of a projection are multiplied with.

    All of them, mostly; but an up projection of its own for each head (absorbed MLA), or a grouped convolution, meets
    the features of that head alone.
    """
    made = tracer.projections.of(projection.node)
    everything = tracer.labels.features(given)
    pairs = [] if made is None else tracer.projections.pairs(projection, made[1], given)
    if len({source for _, source in pairs}) < 2:  # a latent is read whole
        return [everything if own else set() for own in block.rows]
    met: dict[int, set[int]] = {}
    for feature, source in pairs:
        met.setdefault(feature, set()).update(tracer.labels.members(source))
    place = {tuple(row): projection.first + i for i, row in enumerate(projection.rows.tolist())}
    return [
        set().union(*(met.get(place[row], everything) if row in place else everything for row in own)) if own else set()
        for own in block.rows
    ]


def _is_factor(tracer: Tracer, logits: Logits, source: Projection, projection: Projection) -> bool:
    """Whether an upstream projection is a factor of this attention's weights and not a layer of its own before it.

    Its output must serve this attention alone, and it must run inside the module that holds the attention, where
    modules are known.
    """
    df = tracer.df
    home = df.common_module([logits.products[0].node, projection.node])
    if home and home not in df.modules(source.node):
        return False
    return tracer.basis.serves_alone(df, source.node, logits)


# ---- roles -----------------------------------------------------------------------------------------------------------


def _give_roles(query: list[_Block], key: list[_Block]) -> bool:
    """Name the blocks' parts; whether this is MLA."""
    latent_key = [b for b in key if b.behind is not None and not b.parallel]
    latent_query = [b for b in query if b.behind is not None and not b.parallel]
    mla = bool(latent_key)
    for side, plain, up, down in ((query, "q", "uq", "dq"), (key, "k", "uk", "dkv")):
        for block in side:
            adapter = block.parallel and any(b.behind is not None for b in side)
            if adapter:
                block.role = plain if block.behind is None else "other"  # type: ignore[assignment]
                for link in block.chain()[1:]:
                    link.role = "other"
                continue
            block.role = plain  # type: ignore[assignment]
            if mla or block in latent_query:
                block.role = up  # type: ignore[assignment]
            for link in block.chain()[1:]:
                link.role = down  # type: ignore[assignment]
    if mla:
        rotary = {b.param for b in key if b.behind is None and not b.parallel}
        uk = {b.param for b in latent_key}
        for block in key:
            if block.behind is None and not block.parallel:
                block.role = "kr"
        for block in query:
            if block.partners & rotary and not block.partners & uk:
                block.role = "qr"
    return mla


def _absorbed(
    tracer: Tracer, logits: Logits, heads: Heads, query: list[_Block], key: list[_Block]
) -> tuple[list[_Block], list[_Block]] | None:
    """Absorbed MLA: the keys' up projection is multiplied to the queries, and meets the latent that the values are.

    Returns:
        The up projections of the keys on the query side, and the latents that they meet; None where it is not absorbed.
    """
    if len(heads.key) > 1 or len(heads.query) == 1:
        return None
    values = _value_rows(tracer, logits)
    latents = [b for b in key if b.behind is None and b.rows[0] and {(b.param, row) for row in b.rows[0]} <= values]
    ups = [q for q in query if any(k.param in q.partners and q.param in k.partners for k in latents)]
    return (ups, latents) if _are_of_each_head(ups) else None


def _value_rows(tracer: Tracer, logits: Logits) -> set[Row]:
    """Rows of the projections that the values are made of, as far as they are known."""
    found = _value_features(tracer, logits)
    return {(projection.names[i], tuple(projection.rows[i].tolist())) for projection, i in found}


def _value_features(tracer: Tracer, logits: Logits) -> list[tuple[Projection, int]]:
    """The features that the values are made of, each with its projection, as far as they are known."""
    values = [value for part in logits.parts or (logits,) for value in values_of(tracer, part)]
    flows = tracer.trace(values)
    features = set().union(*(tracer.labels.features(flows[n].label) for n in values if n in flows)) - {UNKNOWN}
    return [tracer.projections.by_feature(feature) for feature in features]


def values_of(tracer: Tracer, logits: Logits) -> list[Node]:
    """What a softmax weighs: the factor of its output that it does not lie behind."""
    df, output = tracer.df, logits.output
    if df.op[output].kind == "attention":
        return [n for n in output.args[2:3] if isinstance(n, Node)]
    summed = output if df.op[output].name == "mul" else output.args[0]
    factors = (factors_of(df, output) or tuple(summed.all_input_nodes))[:2]  # type: ignore[union-attr]
    return [n for n in factors if n is not None and not _is_behind(tracer, logits.end, n)]


def _is_behind(tracer: Tracer, start: Node, node: Node) -> bool:
    """Whether a node is made from another one."""
    index, todo, seen = tracer.df.index, [node], set[Node]()
    while todo:
        one = todo.pop()
        if one is start:
            return True
        if one not in seen and index[one] > index[start]:
            seen.add(one)
            todo.extend(tracer.df.reads(one))
    return False


def _are_of_each_head(blocks: list[_Block]) -> bool:
    """Whether blocks map the output of each head's own rows: no latent that heads share lies behind them."""
    behind = [{(b.behind.param, row) for row in rows} for b in blocks if b.behind is not None for rows in b.behind.rows]
    behind = [rows for rows in behind if rows]
    return len(behind) > 1 and sum(map(len, behind)) == len(set().union(*behind))


def _give_roles_absorbed(query: list[_Block], key: list[_Block], absorbed: tuple[list[_Block], list[_Block]]) -> bool:
    """Name the parts of absorbed MLA; always true: it is MLA."""
    ups, latents = absorbed
    for block in query:
        roles: tuple[Role, ...] = ("uk", "uq", "dq") if block in ups else ("qr", "dq")
        for link, role in zip(block.chain(), (*roles, *["other"] * _MAX_CHAIN), strict=False):
            link.role = role  # type: ignore[assignment]
    for block in key:
        block.role = "dkv" if block in latents else "kr"
    return True


def _kind(heads: Heads, mla: bool) -> SiteKind:
    if mla:
        return "mla"
    if heads.channels:
        return "other"
    if len(heads.key) == len(heads.query):
        return "mha"
    return "mqa" if len(heads.key) == 1 else "gqa"


# ---- rows ------------------------------------------------------------------------------------------------------------


def _finish(tracer: Tracer, block: _Block) -> WeightBlock:
    """The block with its rows as ranges along one axis."""
    axes, shape = block.projection.axes, tracer.df.weight_shapes[block.param]
    for i, axis in enumerate(axes):
        if all(_covers(rows, i, axes, shape) for rows in block.rows):
            gathered = block.projection.gathered.get(axis)
            heads = tuple(_ranges(_along(rows, i, gathered)) for rows in block.rows)
            return WeightBlock(block.param, block.role, axis, heads, _bias(block) if len(axes) == 1 else None)
    raise Refused(
        "rows-on-two-axes", f"a head reads a part of {block.param!r} that is no set of whole rows along one axis"
    )


def _along(rows: _Rows, i: int, gathered: Mapping[int, tuple[int, ...]] | None) -> set[int]:
    """Coordinates of rows along axis i."""
    firsts = {row[i] for row in rows}
    return firsts if gathered is None else {one for first in firsts for one in gathered[first]}


def _covers(rows: _Rows, i: int, axes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether the rows are whole slices along axis i."""
    others = 1
    for j, axis in enumerate(axes):
        others *= shape[axis] if j != i else 1
    return len(rows) == len({row[i] for row in rows}) * others


def _ranges(rows: set[int]) -> Ranges:
    ranges: list[Range] = []
    for row in sorted(rows):
        if ranges and ranges[-1][1] == row:
            ranges[-1] = (ranges[-1][0], row + 1)
        else:
            ranges.append((row, row + 1))
    return tuple(ranges)


def _bias(block: _Block) -> str | None:
    """Bias that belongs to all the block's rows."""
    rows = set().union(*block.rows)
    found = {
        block.projection.biases[i]
        for i, place in enumerate(block.projection.rows.tolist())
        if tuple(place) in rows and block.projection.names[i] == block.param
    }
    return found.pop() if len(found) == 1 else None


def _of_logits_alone(tracer: Tracer, uses: Uses, tags: tuple[NormTag, ...]) -> tuple[NormTag, ...]:
    """Norms without the modules whose results are used as values, too, or outside attention."""
    looked_at = tracer.basis.inside
    shared = {t.module for t in tags if t.module and not uses.module_norms_logits_alone(t.module, looked_at)}
    return tuple(replace(tag, module=None) if tag.module in shared else tag for tag in tags)


def _norms(side: Side, tags: tuple[NormTag, ...]) -> tuple[Norm, ...]:
    return tuple(dict.fromkeys(Norm(side, t.kind, t.width, t.module, t.weight) for t in tags))


def _latent_norms(side: Side, chains: list[_Block]) -> tuple[Norm, ...]:
    return tuple(dict.fromkeys(norm for block in chains for norm in _norms(side, block.latent_norms)))


# ---- self or cross ---------------------------------------------------------------------------------------------------


def _same_sequence(tracer: Tracer, query: list[_Block], key: list[_Block]) -> bool:
    """Whether queries and keys are made from the same tokens: what they read has a common source."""
    reached = tuple({block.chain()[-1].projection.x for block in side} for side in (query, key))
    fresh = [set(side) for side in reached]
    df = tracer.df
    # Both sides walk back together and stop where they meet, so that self-attention never walks far.
    while not reached[0] & reached[1] and any(fresh):
        for side, nodes in enumerate(fresh):
            tracer.basis.inside.update(nodes)
            behind = {n for node in nodes if _same_tokens(tracer, df.open(node)) for n in node.all_input_nodes}
            fresh[side] = {n for n in behind if n in df.activation or n in df.from_input} - reached[side]
            reached[side].update(fresh[side])
    return bool(reached[0] & reached[1])


def _same_tokens(tracer: Tracer, node: Node) -> bool:
    """Whether what a node reads is another form of the same tokens, and not the data of a product."""
    if tracer.df.op[node].kind == "contraction":  # a computed rotation of each token (OFT), and no projection
        return tracer.projections.operands(node) is not None and tracer.projections.of(node) is None
    return tracer.df.op[node].kind not in ("convolution", "attention", "softmax")


def merge_calls(sites: list[AttentionSite]) -> list[AttentionSite]:
    """Sites with the same blocks are one site that runs several times (shared layers, tied parameters)."""
    merged: dict[object, AttentionSite] = {}
    for site in sites:
        key = (site.query, site.key, site.terms)
        known = merged.get(key)
        merged[key] = site if known is None else _called_again(known, site)
    return list(merged.values())


def _called_again(site: AttentionSite, call: AttentionSite) -> AttentionSite:
    """A site with one more call, which may be of another module with norms of its own (tied stacks)."""

    def both(one: tuple[Norm, ...], other: tuple[Norm, ...]) -> tuple[Norm, ...]:
        return tuple(dict.fromkeys((*one, *other)))

    return replace(
        site,
        calls=site.calls + 1,
        qk_norm=both(site.qk_norm, call.qk_norm),
        latent_norm=both(site.latent_norm, call.latent_norm),
    )
