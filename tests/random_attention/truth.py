"""What a random model's attention is, known because we laid it out.

In: for each side the `Vectors`: for every head and every place of its head dimension, the paths of weight factors that
feed it. Out: the terms of each head, and the `AttentionSite` that says the same.

The rule is that of the layout: a term is a product of a chain on the query side and a chain on the key side that meet
in the same places of the head dimension; rows of one pair of chains, over all places, make one term.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from quack_fx.layout import AttentionSite, LogitTerm, Norm, Ranges, Role, Side, SiteKind, WeightBlock


@dataclass(frozen=True)
class Link:
    """Rows of one parameter (entries along `axis`), and the bias that shares their numbers."""

    param: str
    axis: int
    rows: frozenset[int]
    bias: str | None = None
    role: Role = "other"


Path = tuple[Link, ...]
"""Factors from the logits outwards: up before down."""
Vectors = tuple[tuple[frozenset[Path], ...], ...]
"""For each head, for each place of the head dimension, the paths whose sum stands there."""


@dataclass(frozen=True)
class Truth:
    """One attention.

    Attributes:
        query: Vectors of the query side, one set for each kind of token (two in joint attention).
        key: The same of the key side.
        head_map: Key head of each query head.
        norms: QK norms.
        latent_norms: Norms between the factors of a chain.
        cross: Whether the sides come from different sequences.
        kind: Kind of site, or None where it is a matter of taste.
        calls: How often it runs.
        name: Module whose forward makes the logits, or None where hooks cannot tell.
        scale: Factor on the product; None where it is not a plain number or not checked.
        unchecked: What is a matter of taste here and is not compared: "roles", "biases", "norms", "kind";
            "pooling": a softmax that pools tokens, which is an additive attention in itself.
        may_refuse: Whether the finder may refuse it by design.
        loops: Whether heads are looped over, so that each head may be a site of its own.
    """

    query: tuple[Vectors, ...]
    key: tuple[Vectors, ...]
    head_map: tuple[int, ...]
    norms: tuple[Norm, ...] = ()
    latent_norms: tuple[Norm, ...] = ()
    cross: bool = False
    kind: SiteKind | None = None
    calls: int = 1
    name: str | None = ""
    scale: float | None = None
    unchecked: frozenset[str] = frozenset()
    may_refuse: bool = False
    loops: bool = False

    def moved(self, module: str, rename: dict[str, str] | None = None) -> Truth:
        """The same attention inside another module; `rename` gives parameters that are tied to others."""
        tied = rename or {}

        def name(old: str) -> str:
            new = f"{module}.{old}" if module else old
            return tied.get(new, new)

        def path(links: Path) -> Path:
            return tuple(replace(x, param=name(x.param), bias=None if x.bias is None else name(x.bias)) for x in links)

        def vectors(all_kinds: tuple[Vectors, ...]) -> tuple[Vectors, ...]:
            return tuple(
                tuple(tuple(frozenset(map(path, place)) for place in head) for head in kind) for kind in all_kinds
            )

        def named(norms: tuple[Norm, ...]) -> tuple[Norm, ...]:
            return tuple(
                replace(n, module=n.module and name(n.module), weight=n.weight and name(n.weight)) for n in norms
            )

        own = self.name if self.name is None else ".".join(filter(None, (module, self.name)))
        return replace(
            self,
            query=vectors(self.query),
            key=vectors(self.key),
            norms=named(self.norms),
            latent_norms=named(self.latent_norms),
            name=own,
        )

    def links(self) -> Iterator[Link]:
        """All factors on both sides."""
        for kind in (*self.query, *self.key):
            for head in kind:
                for place in head:
                    for path in place:
                        yield from path

    # ---- terms -------------------------------------------------------------------------------------------------------

    def head_terms(self, head: int) -> dict[tuple[object, ...], tuple[Path, Path]]:
        """The terms of one query head, each as its two chains with all their rows."""
        terms: dict[tuple[object, ...], tuple[Path, Path]] = {}
        for q in self.query:
            for k in self.key:
                for places in zip(q[head], k[self.head_map[head]], strict=True):
                    for mine in sorted(places[0], key=_names):
                        for yours in sorted(places[1], key=_names):
                            kind = (_names(mine), _names(yours))
                            known = terms.get(kind)
                            terms[kind] = (
                                (mine, yours) if known is None else (_joined(known[0], mine), _joined(known[1], yours))
                            )
        return terms

    def site(self) -> AttentionSite:
        """The site that says the same."""
        per_head = [self.head_terms(h) for h in range(len(self.head_map))]
        kinds = list(dict.fromkeys(kind for terms in per_head for kind in terms))
        key_heads = max(self.head_map) + 1
        blocks: dict[Side, list[WeightBlock]] = {"query": [], "key": []}
        made: list[LogitTerm] = []
        for kind in kinds:
            chains = []
            for i, side in enumerate(("query", "key")):
                heads: list[Path | None] = [None] * (len(self.head_map) if side == "query" else key_heads)
                for h, terms in enumerate(per_head):
                    if kind in terms:
                        heads[h if side == "query" else self.head_map[h]] = terms[kind][i]
                chains.append(tuple(_number(blocks[side], block) for block in _blocks(heads)))  # type: ignore[index]
            made.append(LogitTerm(*chains))
        first = self.query[0][0]
        return AttentionSite(
            name=self.name or "",
            kind=self.kind or "other",
            cross=self.cross,
            calls=self.calls,
            query_heads=len(self.head_map),
            key_heads=key_heads,
            head_dim=len(first),
            head_map=self.head_map,
            query=tuple(blocks["query"]),
            key=tuple(blocks["key"]),
            terms=tuple(dict.fromkeys(made)),
            qk_norm=self.norms,
            latent_norm=self.latent_norms,
            logit_scale=self.scale,
        )


@dataclass
class Expected:
    """What is to be found in a whole model.

    Attributes:
        sites: Its attentions.
        skips: Modules that may have entries among the skipped ones.
    """

    sites: list[Truth] = field(default_factory=list)
    skips: tuple[str, ...] = ()


def _names(path: Path) -> tuple[tuple[str, str, int], ...]:
    return tuple((x.param, x.role, x.axis) for x in path)


def _joined(a: Path, b: Path) -> Path:
    return tuple(replace(x, rows=x.rows | y.rows) for x, y in zip(a, b, strict=True))


def _blocks(heads: Sequence[Path | None]) -> list[WeightBlock]:
    some = next(path for path in heads if path is not None)
    return [
        WeightBlock(
            link.param,
            link.role,
            link.axis,
            tuple(ranges(path[i].rows) if path is not None else () for path in heads),
            link.bias,
        )
        for i, link in enumerate(some)
    ]


def _number(blocks: list[WeightBlock], block: WeightBlock) -> int:
    """Place of a block; blocks of one parameter that do not contradict each other are one."""
    for i, known in enumerate(blocks):
        same = replace(known, heads=block.heads) == block
        if same and all(a == b or not a or not b for a, b in zip(known.heads, block.heads, strict=True)):
            blocks[i] = replace(known, heads=tuple(a or b for a, b in zip(known.heads, block.heads, strict=True)))
            return i
    blocks.append(block)
    return len(blocks) - 1


def ranges(rows: frozenset[int]) -> Ranges:
    """Rows as half-open ranges."""
    starts = sorted(r for r in rows if r - 1 not in rows)
    stops = sorted(r + 1 for r in rows if r + 1 not in rows)
    return tuple(zip(starts, stops, strict=True))
