"""Roles of blocks: plain projections, and the projections of MLA, absorbed or not.

In: the blocks of both sides with their chains. Out: whether the attention is MLA. Each block's role is set in place.
"""

from __future__ import annotations

from quack_fx.find.attention import Logits
from quack_fx.find.provenance.block import MAX_CHAIN, Block
from quack_fx.find.provenance.heads import Heads
from quack_fx.find.provenance.trace import Tracer
from quack_fx.find.provenance.values import value_features
from quack_fx.find.provenance.vectors import Row
from quack_fx.layout import Role


def give_roles(query: list[Block], key: list[Block]) -> bool:
    """Set the role of each block; return whether this is MLA."""
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


def absorbed_in(
    tracer: Tracer, logits: Logits, heads: Heads, query: list[Block], key: list[Block]
) -> tuple[list[Block], list[Block]] | None:
    """Detect absorbed MLA: the keys' up projection is applied to the queries, and the latent is both keys and values.

    Returns:
        The keys' up projections, which are on the query side, and the latents that they are multiplied with; None if
        this is not absorbed MLA.
    """
    if len(heads.key) > 1 or len(heads.query) == 1:
        return None
    found = value_features(tracer, logits)
    values: set[Row] = {(projection.names[i], tuple(projection.rows[i].tolist())) for projection, i in found}
    latents = [b for b in key if b.behind is None and b.rows[0] and {(b.param, row) for row in b.rows[0]} <= values]
    ups = [q for q in query if any(k.param in q.partners and q.param in k.partners for k in latents)]
    return (ups, latents) if _are_of_each_head(ups) else None


def _are_of_each_head(blocks: list[Block]) -> bool:
    """Whether the heads of some blocks read disjoint upstream rows, and so share no latent."""
    behind = [{(b.behind.param, row) for row in rows} for b in blocks if b.behind is not None for rows in b.behind.rows]
    behind = [rows for rows in behind if rows]
    return len(behind) > 1 and sum(map(len, behind)) == len(set().union(*behind))


def give_roles_absorbed(query: list[Block], key: list[Block], absorbed: tuple[list[Block], list[Block]]) -> None:
    """Set the role of each block of absorbed MLA."""
    ups, latents = absorbed
    for block in query:
        roles: tuple[Role, ...] = ("uk", "uq", "dq") if block in ups else ("qr", "dq")
        for link, role in zip(block.chain(), (*roles, *["other"] * MAX_CHAIN), strict=False):
            link.role = role  # type: ignore[assignment]
    for block in key:
        block.role = "dkv" if block in latents else "kr"
