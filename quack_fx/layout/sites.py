"""The layout: frozen dataclasses that say which weight rows produce which attention logits.

The finder fills a layout in; optimizers, training programs, proofs and reports read it. It loads from JSON anywhere:
this file imports only the errors and the standard library.

The logits of query head `h` of a site are a sum of *terms*. A term is a product of weight blocks: a chain on the query
side times a chain on the key side, both for the same features of the head. Plain multi-head attention has one term,
W_Q^h times W_K^h. DeepSeek's MLA has two: W_uq^h W_dq times W_uk^h W_dkv, and W_qr^h W_dq times W_kr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from types import UnionType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from quack_fx.errors import LayoutError

SCHEMA = 1

Range = tuple[int, int]
"""Half-open range [start, stop) of rows."""
Ranges = tuple[Range, ...]


def merged(ranges: Iterable[Range]) -> Ranges:
    """Sort ranges and join those that overlap or touch.

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


class Json:
    """Base class of the dataclasses in this file. Their JSON form mirrors their fields."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; `from_dict` restores the object from it exactly."""
        return {f.name: _written(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """Build the object from its JSON form.

        Raises:
            LayoutError: A field is missing, has the wrong type or contradicts another field. The message names it.
        """
        what = _NAMES[cls.__name__]
        if not isinstance(d, Mapping):
            raise LayoutError(f"a {what} is a JSON object, not {type(d).__name__}")
        read: dict[str, Any] = {}
        for name, kind in _field_types(cls).items():  # type: ignore[arg-type]
            if name not in d:
                raise LayoutError(f"{what} {d.get('name', d.get('param', ''))!r} has no field {name!r}")
            read[name] = _read(kind, d[name], f"field {name!r} of a {what}")
        made = cls(**read)
        made.check()
        return made

    def check(self) -> None:
        """Raise if a field has the right type but an invalid value."""


_NAMES = {"WeightBlock": "block", "LogitTerm": "term", "Norm": "norm", "AttentionSite": "site"}
_NAMES |= {"Skipped": "skipped entry", "QKLayout": "layout"}
"""Name of each class in error messages."""


@lru_cache
def _field_types(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _written(value: Any) -> Any:
    if isinstance(value, Json):
        return value.to_dict()
    return [_written(part) for part in value] if isinstance(value, tuple) else value


def _read(kind: Any, value: Any, where: str) -> Any:
    """Convert a JSON value to the declared type of a field; `where` names the field in errors.

    Raises:
        LayoutError: The value has another type.
    """
    origin, options = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Json):
        return kind.from_dict(value)
    if origin is tuple and isinstance(value, list) and (options[-1] is ... or len(options) == len(value)):
        kinds = options if options[-1] is not ... else options[:1] * len(value)
        return tuple(_read(one, part, where) for one, part in zip(kinds, value, strict=True))
    if origin is Literal and value in options:
        return value
    plain = options if origin is UnionType else (kind,)
    if float in plain and type(value) is int:
        return float(value)
    if origin is not tuple and type(value) in plain:
        return value
    names = ("null" if t is type(None) else getattr(t, "__name__", str(t)) for t in plain)
    need = "one of " + ", ".join(options) if origin is Literal else " or ".join(names)
    if origin is tuple:
        need = "list" if options[-1] is ... else f"list of {len(options)}"
    raise LayoutError(f"{where} is {value!r}; need {need}")


@dataclass(frozen=True, slots=True)
class WeightBlock(Json):
    """The rows of one parameter that one side of an attention uses, per head.

    Attributes:
        param: Fully qualified name of the parameter (the first name of a tied parameter).
        role: "q"/"k" for plain projections; "dq", "uq", "qr", "dkv", "uk", "kr" as in MLA
            (down, up, rope; query, key-value); "other" for example for the branches of low-rank adapters.
        axis: Output-feature axis of the parameter: 0 for `nn.Linear`, 1 for GPT-2's `Conv1D`.
        heads: Half-open ranges along `axis` for each head. Empty for a head that does not use the block; the same for
            every head if all heads share the block.
        bias: Fully qualified name of the bias for the same rows, or None.
    """

    param: str
    role: Role
    axis: int
    heads: tuple[Ranges, ...]
    bias: str | None = None

    def check(self) -> None:
        """Raise if a range or the axis is one that no parameter can have."""
        for start, stop in (r for ranges in self.heads for r in ranges):
            if not 0 <= start < stop:
                raise LayoutError(f"block of {self.param!r} has the range [{start}, {stop}]; need 0 <= start < stop")
        if self.axis < 0:
            raise LayoutError(f"block of {self.param!r} has axis {self.axis}; need an axis counted from 0")


@dataclass(frozen=True, slots=True)
class LogitTerm(Json):
    """One product of blocks in the logits, for all query heads that have it.

    Query head `h` has the term if every query block has rows for head `h` and every key block has rows for head
    `head_map[h]`.

    Attributes:
        query: Indices into the site's `query` blocks, starting at the logits (uq before dq).
        key: Indices into the site's `key` blocks, in the same order.
    """

    query: tuple[int, ...]
    key: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Norm(Json):
    """A norm between a projection and the logits (QK norm), or between two projections of a chain (latent norm).

    Attributes:
        side: Side of the logit product that it is on.
        kind: "rms", "layer", "l2", "batch", or "other".
        width: Number of features that share one statistic, for example the head dimension or the full width.
        module: Name of the module that computes exactly this norm, or None for a norm written inline.
        weight: Name of its gain parameter, or None.
    """

    side: Side
    kind: NormKind
    width: int
    module: str | None = None
    weight: str | None = None


@dataclass(frozen=True, slots=True)
class AttentionSite(Json):
    """One attention of the model: the weight blocks behind its logits, and how they are multiplied.

    Attributes:
        name: Module whose forward computes the logits; "" for the root.
        kind: "mha", "gqa", "mqa", "mla", or "other" for logits that compare channels over all tokens (XCiT).
        cross: Whether queries and keys come from different sequences (cross-attention).
        calls: Number of times the site runs in one forward pass (more than 1 for a shared layer).
        query_heads: Number of query heads.
        key_heads: Number of key heads.
        head_dim: Width of one head in the logit product; the number of channels if the logits compare channels.
        head_map: The key head that each query head reads.
        query: Blocks of the query side, each with one entry of `heads` per query head.
        key: Blocks of the key side, each with one entry of `heads` per key head.
        terms: Products of blocks whose sum is the logit.
        qk_norm: Norms between the projections and the logits.
        latent_norm: Norms between the factors of a latent projection.
        logit_scale: Factor on the product of queries and keys, for example 1/sqrt(head_dim); None if it is learned or
            not a plain number.
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
        """Raise if fields contradict each other."""
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
        """Yield all blocks with their side, query side first."""
        for block in self.query:
            yield "query", block
        for block in self.key:
            yield "key", block

    def head_terms(self, head: int) -> Iterator[tuple[tuple[WeightBlock, Ranges], ...]]:
        """Yield the terms of one query head, each as its blocks with the rows of this head."""
        key_head = self.head_map[head]
        for term in self.terms:
            product = [(self.query[i], self.query[i].heads[head]) for i in term.query]
            product += [(self.key[i], self.key[i].heads[key_head]) for i in term.key]
            if all(ranges for _, ranges in product):
                yield tuple(product)


def with_parameters(site: AttentionSite, rename: Callable[[str], str]) -> AttentionSite:
    """Rename the parameters in a site's blocks."""

    def blocks(old: tuple[WeightBlock, ...]) -> tuple[WeightBlock, ...]:
        return tuple(replace(b, param=rename(b.param), bias=None if b.bias is None else rename(b.bias)) for b in old)

    return replace(site, query=blocks(site.query), key=blocks(site.key))


def renamed(site: AttentionSite, rename: Callable[[str], str]) -> AttentionSite:
    """Rename a site's module, parameters and norms."""

    def norms(old: tuple[Norm, ...]) -> tuple[Norm, ...]:
        pairs = [(n, [None if name is None else rename(name) for name in (n.module, n.weight)]) for n in old]
        return tuple(replace(n, module=module, weight=weight) for n, (module, weight) in pairs)

    site = with_parameters(site, rename)
    return replace(site, name=rename(site.name), qk_norm=norms(site.qk_norm), latent_norm=norms(site.latent_norm))


@dataclass(frozen=True, slots=True)
class Skipped(Json):
    """An attention, or something similar, that was left out of the sites.

    Attributes:
        name: Module in which it was seen.
        code: Machine-readable reason, for example "additive-attention".
        reason: The reason as one sentence for users.
    """

    name: str
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class QKLayout(Json):
    """All query/key pairs of a model.

    Attributes:
        sites: The attentions whose weight rows are known.
        skipped: All other attentions, each with the reason.
        untouched: Parameters that the example inputs never reached; nothing is known about them.

    Example:
        >>> layout = QKLayout(sites=(), skipped=(), untouched=())
        >>> QKLayout.from_dict(layout.to_dict()) == layout
        True
    """

    sites: tuple[AttentionSite, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    untouched: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; `QKLayout.from_dict(layout.to_dict()) == layout`."""
        return {"schema": SCHEMA, **Json.to_dict(self)}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Self:
        """Build a layout from its JSON form.

        Raises:
            LayoutError: The schema is unknown, or a field is missing, has the wrong type or contradicts another field.
        """
        if isinstance(d, Mapping) and d.get("schema") != SCHEMA:
            raise LayoutError(f"layout has schema {d.get('schema')!r}; this version reads schema {SCHEMA}")
        return Json.from_dict.__func__(cls, d)  # type: ignore[attr-defined, no-any-return]
