"""The layout, plain frozen data about which weight rows make which attention logits.

In: nothing; finders fill it in. Out: what every user of the layout (factors, optimizers, emission, reports) reads.
This file imports nothing of the other rooms and no torch, so a layout can be read anywhere, also from its JSON.

How to read it. The logits of query head `h` of a site are a sum of *terms*. A term is a product of weight blocks: those
of a chain on the query side and those of a chain on the key side that meet in the same head dimensions. For plain
multi-head attention there is one term, W_Q^h times W_K^h. For DeepSeek's MLA there are two, W_uq^h W_dq times
W_uk^h W_dkv, and W_qr^h W_dq times W_kr.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from quack_fx.errors import LayoutError

SCHEMA = 1

Range = tuple[int, int]
"""Half-open range [start, stop) of rows."""
Ranges = tuple[Range, ...]


def merged(ranges: Iterable[Range]) -> Ranges:
    """The same rows in ascending order, neighbours joined.

    Example:
        >>> merged(((4, 8), (0, 4), (9, 10)))
        ((0, 8), (9, 10))
    """
    found: list[Range] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


Role = Literal["q", "k", "dq", "uq", "qr", "dkv", "uk", "kr", "other"]
SiteKind = Literal["mha", "gqa", "mqa", "mla", "other"]
Side = Literal["query", "key"]
SIDES: tuple[Side, Side] = ("query", "key")
NormKind = Literal["rms", "layer", "l2", "batch", "other"]


@dataclass(frozen=True, slots=True)
class WeightBlock:
    """The rows of one parameter that take part in one side of an attention, head by head.

    Attributes:
        param: Fully qualified name of the parameter (the first one where parameters are tied).
        role: Part the block plays: "q"/"k" for plain projections; "dq", "uq", "qr", "dkv", "uk", "kr" as in MLA
            (down, up, rope; query, key-value); "other" for the branches of low-rank adapters and the like.
        axis: Axis of the parameter that counts output features: 0 for `nn.Linear`, 1 for GPT-2's `Conv1D`.
        heads: For each head, the half-open ranges along `axis`. Empty for a head that does not read this block; the
            same range again and again for a block that all heads share.
        bias: Fully qualified name of the bias whose entries belong to the same rows, or None.
    """

    param: str
    role: Role
    axis: int
    heads: tuple[Ranges, ...]
    bias: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form of the block; `from_dict` reads it back."""
        return {
            "param": self.param,
            "role": self.role,
            "axis": self.axis,
            "heads": [[list(r) for r in ranges] for ranges in self.heads],
            "bias": self.bias,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> WeightBlock:
        """Block from its JSON form.

        Raises:
            LayoutError: A field is missing or has the wrong type, an axis is negative or a range is empty.
        """
        heads = tuple(tuple((int(r[0]), int(r[1])) for r in ranges) for ranges in _get(d, "heads", list, "block"))
        for start, stop in (r for ranges in heads for r in ranges):
            if not 0 <= start < stop:
                raise LayoutError(
                    f"block of {d.get('param')!r} has the range [{start}, {stop}]; need 0 <= start < stop"
                )
        axis = _get(d, "axis", int, "block")
        if axis < 0:
            raise LayoutError(f"block of {d.get('param')!r} has axis {axis}; need an axis counted from 0")
        return cls(
            param=_get(d, "param", str, "block"),
            role=_choice(_get(d, "role", str, "block"), Role, "role"),
            axis=axis,
            heads=heads,
            bias=_get(d, "bias", (str, type(None)), "block"),
        )


@dataclass(frozen=True, slots=True)
class LogitTerm:
    """One product of blocks in the logits; it stands for all query heads that follow the pattern.

    The term exists for query head `h` where every block named here has rows: query blocks at head `h`, key blocks at
    head `head_map[h]`.

    Attributes:
        query: Indices into the site's `query` blocks, from the logits outwards (uq before dq).
        key: Indices into the site's `key` blocks, likewise.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form of the term."""
        return {"query": list(self.query), "key": list(self.key)}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> LogitTerm:
        """Term from its JSON form."""
        return cls(tuple(_get(d, "query", list, "term")), tuple(_get(d, "key", list, "term")))


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation between a projection and the logits (QK norm), or between two factors (latent norm).

    Attributes:
        side: Side of the product that it acts on.
        kind: "rms", "layer", "l2", "batch", or "other".
        width: Number of features that share one statistic: the head dimension or the full width, for example.
        module: Name of the module that computes it and nothing else, or None for a norm written inline.
        weight: Name of its gain parameter, or None.
    """

    side: Side
    kind: NormKind
    width: int
    module: str | None = None
    weight: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form of the norm."""
        return {"side": self.side, "kind": self.kind, "width": self.width, "module": self.module, "weight": self.weight}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Norm:
        """Norm from its JSON form."""
        return cls(
            side=_choice(_get(d, "side", str, "norm"), Side, "side"),
            kind=_choice(_get(d, "kind", str, "norm"), NormKind, "norm kind"),
            width=_get(d, "width", int, "norm"),
            module=_get(d, "module", (str, type(None)), "norm"),
            weight=_get(d, "weight", (str, type(None)), "norm"),
        )


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention of the model: the blocks behind its logits and how they are multiplied.

    Attributes:
        name: Module whose forward makes the logits; "" for the root.
        kind: "mha", "gqa", "mqa", "mla", or "other": its logits compare channels over all tokens (XCiT).
        cross: Whether queries and keys come from different sequences.
        calls: How often the site runs in one forward pass (a shared layer runs more than once).
        query_heads: Number of query heads.
        key_heads: Number of key heads.
        head_dim: Width of one head in the logit product; the number of channels where those are compared.
        head_map: For each query head, the key head that it reads.
        query: Blocks of the query side, each with one entry of `heads` per query head.
        key: Blocks of the key side, each with one entry of `heads` per key head.
        terms: Products of blocks whose sum is the logit.
        qk_norm: QK norms on the way from the projections to the logits.
        latent_norm: Norms between the factors of a latent projection; never QK norm.
        logit_scale: Factor on the product of queries and keys, for example 1/sqrt(head_dim); None where it is learned
            or not a plain number.
    """

    name: str
    kind: SiteKind
    cross: bool
    calls: int
    query_heads: int
    key_heads: int
    head_dim: int
    head_map: tuple[int, ...]
    query: tuple[WeightBlock, ...]
    key: tuple[WeightBlock, ...]
    terms: tuple[LogitTerm, ...]
    qk_norm: tuple[Norm, ...] = ()
    latent_norm: tuple[Norm, ...] = ()
    logit_scale: float | None = None

    def __post_init__(self) -> None:
        """Refuse a site that contradicts itself."""
        where = f"site {self.name!r}"
        if len(self.head_map) != self.query_heads:
            raise LayoutError(f"{where}: head_map has {len(self.head_map)} entries for {self.query_heads} query heads")
        if any(not 0 <= k < self.key_heads for k in self.head_map):
            raise LayoutError(f"{where}: head_map names a key head outside 0..{self.key_heads - 1}")
        for side, blocks, heads in (("query", self.query, self.query_heads), ("key", self.key, self.key_heads)):
            for block in blocks:
                if len(block.heads) != heads:
                    raise LayoutError(
                        f"{where}: {side} block of {block.param!r} has {len(block.heads)} heads, not {heads}"
                    )
        for term in self.terms:
            for side, indices, n in (("query", term.query, len(self.query)), ("key", term.key, len(self.key))):
                if any(not 0 <= i < n for i in indices):
                    raise LayoutError(f"{where}: a term names {side} block {max(indices)}, but there are {n}")

    def blocks(self) -> Iterator[tuple[Side, WeightBlock]]:
        """All blocks with their side, query side first."""
        for block in self.query:
            yield "query", block
        for block in self.key:
            yield "key", block

    def head_terms(self, head: int) -> Iterator[tuple[tuple[WeightBlock, Ranges], ...]]:
        """The terms of one query head, each as the blocks of the product with the rows that this head uses."""
        key_head = self.head_map[head]
        for term in self.terms:
            product = [(self.query[i], self.query[i].heads[head]) for i in term.query]
            product += [(self.key[i], self.key[i].heads[key_head]) for i in term.key]
            if all(ranges for _, ranges in product):
                yield tuple(product)

    def to_dict(self) -> dict[str, Any]:
        """JSON form of the site."""
        return {
            "name": self.name,
            "kind": self.kind,
            "cross": self.cross,
            "calls": self.calls,
            "query_heads": self.query_heads,
            "key_heads": self.key_heads,
            "head_dim": self.head_dim,
            "head_map": list(self.head_map),
            "query": [b.to_dict() for b in self.query],
            "key": [b.to_dict() for b in self.key],
            "terms": [t.to_dict() for t in self.terms],
            "qk_norm": [n.to_dict() for n in self.qk_norm],
            "latent_norm": [n.to_dict() for n in self.latent_norm],
            "logit_scale": self.logit_scale,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> AttentionSite:
        """Site from its JSON form.

        Raises:
            LayoutError: A field is missing, has the wrong type or contradicts another.
        """
        scale = _get(d, "logit_scale", (int, float, type(None)), "site")
        return cls(
            name=_get(d, "name", str, "site"),
            kind=_choice(_get(d, "kind", str, "site"), SiteKind, "site kind"),
            cross=_get(d, "cross", bool, "site"),
            calls=_get(d, "calls", int, "site"),
            query_heads=_get(d, "query_heads", int, "site"),
            key_heads=_get(d, "key_heads", int, "site"),
            head_dim=_get(d, "head_dim", int, "site"),
            head_map=tuple(_get(d, "head_map", list, "site")),
            query=tuple(WeightBlock.from_dict(b) for b in _get(d, "query", list, "site")),
            key=tuple(WeightBlock.from_dict(b) for b in _get(d, "key", list, "site")),
            terms=tuple(LogitTerm.from_dict(t) for t in _get(d, "terms", list, "site")),
            qk_norm=tuple(Norm.from_dict(n) for n in _get(d, "qk_norm", list, "site")),
            latent_norm=tuple(Norm.from_dict(n) for n in _get(d, "latent_norm", list, "site")),
            logit_scale=None if scale is None else float(scale),
        )


@dataclass(frozen=True, slots=True)
class Skipped:
    """An attention, or something close to one, that is not among the sites, and why.

    Attributes:
        name: Module in which it was seen.
        code: Short machine-readable reason, for example "additive-attention".
        reason: One sentence that a user understands.
    """

    name: str
    code: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"name": self.name, "code": self.code, "reason": self.reason}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Skipped:
        """From its JSON form."""
        return cls(*(_get(d, key, str, "skipped entry") for key in ("name", "code", "reason")))


@dataclass(frozen=True, slots=True)
class QKLayout:
    """All query/key pairs of a model.

    Attributes:
        sites: The attentions whose weight rows are known.
        skipped: What looked like attention and is not in `sites`, each with its reason.
        untouched: Parameters that the example inputs never reached; nothing is known about them.

    Example:
        >>> layout = QKLayout(sites=(), skipped=(), untouched=())
        >>> QKLayout.from_dict(layout.to_dict()) == layout
        True
    """

    sites: tuple[AttentionSite, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    untouched: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """JSON form, lossless: `QKLayout.from_dict(layout.to_dict()) == layout`."""
        return {
            "schema": SCHEMA,
            "sites": [s.to_dict() for s in self.sites],
            "skipped": [s.to_dict() for s in self.skipped],
            "untouched": list(self.untouched),
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> QKLayout:
        """Layout from its JSON form.

        Raises:
            LayoutError: It is not a layout of a schema known here, or it contradicts itself.
        """
        if not isinstance(d, Mapping):
            raise LayoutError(f"a layout is a JSON object, not {type(d).__name__}")
        if d.get("schema") != SCHEMA:
            raise LayoutError(f"layout has schema {d.get('schema')!r}; this version reads schema {SCHEMA}")
        return cls(
            sites=tuple(AttentionSite.from_dict(s) for s in _get(d, "sites", list, "layout")),
            skipped=tuple(Skipped.from_dict(s) for s in _get(d, "skipped", list, "layout")),
            untouched=tuple(_get(d, "untouched", list, "layout")),
        )


def _get(d: Mapping[str, Any], key: str, types: type | tuple[type, ...], what: str) -> Any:
    """Field of a JSON object, checked for presence and type."""
    if not isinstance(d, Mapping):
        raise LayoutError(f"a {what} is a JSON object, not {type(d).__name__}")
    if key not in d:
        raise LayoutError(f"{what} {d.get('name', d.get('param', ''))!r} has no field {key!r}")
    value = d[key]
    wanted = types if isinstance(types, tuple) else (types,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join("null" if t is type(None) else t.__name__ for t in wanted)
        raise LayoutError(f"field {key!r} of a {what} is {value!r}; need {names}")
    return value


def _choice(value: str, literal: Any, what: str) -> Any:
    """A string that must be one of a Literal's values."""
    if value not in get_args(literal):
        raise LayoutError(f"{what} {value!r} is not one of {', '.join(get_args(literal))}")
    return value
