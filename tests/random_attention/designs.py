"""Designs of attention: which tensors queries, keys and values are made from, and how.

In: a draft. Out: the `Sides` of one attention, ready for the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from quack_fx.layout import Role, SiteKind

from .latent import latent_attention, low_rank, merged_adapter, refined_heads, with_adapter, with_branch
from .logits import Pairs
from .projections import Operand, Want, projected, single
from .source import Draft, Value
from .way import NORMS, clamped, normed, rotated, scaled, shifted_in_time, thinned, with_head_bias, with_null


@dataclass
class Sides:
    """Queries, keys and values of one attention, before the logits."""

    pairs: Pairs
    v: Operand
    cross: bool = False
    kind: SiteKind | None = None
    unchecked: frozenset[str] = frozenset()
    keep: int | None = None
    batch: str = "b"
    back: str = ""
    name: str = ""


def _wants(draft: Draft, roles: tuple[Role, ...] = ("q", "k", "other"), keys: str = "k") -> list[Want]:
    bias = draft.choices.pick("bias", [False, True])
    return [
        Want("q", "h", "d", "t", roles[0], bias),
        Want("k", keys, "d", "s", roles[1], bias),
        Want("v", keys, "e", "s", roles[2], bias),
    ]


def _heads_of_keys(draft: Draft) -> str:
    """Letter of the key heads: that of the query heads where there are as many."""
    return "k" if draft.sizes["k"] != draft.sizes["h"] else "h"


def _on_the_way(draft: Draft, q: Operand, k: Operand, v: Operand) -> tuple[Operand, Operand, Operand]:
    """Norms, rope and the rest, the same on both sides mostly."""
    chance, pick = draft.choices.chance, draft.choices.pick
    if chance("short convolution", 10):
        q, k = shifted_in_time(draft, q, "t"), shifted_in_time(draft, k, "s")
    norm = pick("norm", NORMS) if chance("qk norm", 3) else None
    one_side = norm is not None and chance("norm on one side", 6)
    after = chance("norm after rope", 4)
    for step in ("rope", "norm") if after else ("norm", "rope"):
        if step == "norm" and norm is not None:
            k = normed(draft, k, "key", norm)
            q = q if one_side else normed(draft, q, "query", norm)
        elif step == "rope" and (chance("rope", 3)):
            q, k = rotated(draft, q, "t"), rotated(draft, k, "s")
    if chance("bias of a head", 10):
        q = with_head_bias(draft, q)
    if chance("bent", 10):
        q, k = clamped(draft, q), clamped(draft, k)
    if chance("scaled early", 8):
        q, k = scaled(draft, q, 0.5), scaled(draft, k, 0.25)
    if chance("fewer keys", 8):
        kept = draft.letter(max(2, draft.sizes["s"] // 2))
        k, v = thinned(draft, k, "s", kept), thinned(draft, v, "s", kept)
        k, v = _renamed(draft, k, kept), _renamed(draft, v, kept)
        draft.sizes["s"] = draft.sizes[kept]
    if chance("null key", 8):
        more = draft.letter(draft.sizes["s"] + pick("null keys", [1, 3]))
        k, v = with_null(draft, k, "s", more), with_null(draft, v, "s", more)
        k, v = _renamed(draft, k, more), _renamed(draft, v, more)
        draft.sizes["s"] = draft.sizes[more]
    return q, k, v


def _renamed(draft: Draft, x: Operand, letter: str) -> Operand:
    return x.at(x.value.renamed(letter, "s"))


# ---- the designs -----------------------------------------------------------------------------------------------------


def self_attention(draft: Draft) -> Sides:
    x, batch, back = _seen_as(draft)
    draft.sizes["s"] = draft.sizes["t"]
    q, k, v = projected(draft, x, _wants(draft, keys=_heads_of_keys(draft)))
    q, k, v = _on_the_way(draft, q, k, v)
    return Sides([(q, k)], v, batch=batch, back=back)


def _seen_as(draft: Draft) -> tuple[Value, str, str]:
    """The input as attention sees it; its batch axes, and what turns the output back."""
    sizes, x = draft.sizes, Value("x", "btc")
    b, t, c = sizes["b"], sizes["t"], sizes["c"]
    way = draft.choices.pick("input", ["as it is"] * 5 + ["tokens first", "no batch", "windows", "shifted windows"])
    if way == "tokens first":
        return draft.let("x", "x.transpose(0, 1)", "tbc"), "b", ""
    if way == "no batch":
        return draft.let("x", "x[0]", "tc"), "", f".expand({b}, {t}, {c})"
    if "windows" not in way or t % 2 or t < 4:
        return x, "b", ""
    moved, back = ("x.roll(1, 1)", ".roll(-1, 1)") if way.startswith("shifted") else ("x", "")
    sizes["b"], sizes["t"] = b * 2, t // 2
    return draft.let("x", f"{moved}.reshape({b * 2}, {t // 2}, {c})", "btc"), "b", f".reshape({b}, {t}, {c}){back}"


def cross_attention(draft: Draft) -> Sides:
    q_want, k_want, v_want = _wants(draft, keys=_heads_of_keys(draft))
    draft.sizes["C"] = draft.sizes["c"] + 2
    q = projected(draft, Value("x", "btc"), [q_want])[0]
    k, v = projected(draft, Value("y", "bsC"), [k_want, v_want])
    q, k, v = _on_the_way(draft, q, k, v)
    return Sides([(q, k)], v, cross=True)


def learned_queries(draft: Draft) -> Sides:
    """Queries projected from a learned latent (Perceiver)."""
    q_want, k_want, v_want = _wants(draft, keys=_heads_of_keys(draft))
    draft.sizes["s"] = draft.sizes["t"]
    count, b, c = draft.choices.pick("latents", [4, 6, 2]), draft.sizes["b"], draft.sizes["c"]
    k, v = projected(draft, Value("x", "btc"), [k_want, v_want])
    p = draft.parameter("latents", 1, count, c)
    draft.sizes["t"] = count
    latents = draft.let("latents", f"self.{p}.expand({b}, -1, -1)", "btc")
    q = single(draft, latents, q_want)
    q, k, v = _on_the_way(draft, q, k, v)
    # Where one sequence of latents meets a weight as `weight @ latents`, nothing tells which of the two is the weight.
    draft.may_refuse |= draft.sizes["b"] == 1
    return Sides([(q, k)], v, cross=True)


def adapters(draft: Draft) -> Sides:
    draft.sizes["s"] = draft.sizes["t"]
    x = Value("x", "btc")
    rank = draft.choices.pick("rank", [2, 1, 3])
    on = draft.choices.pick("adapters", ["both", "queries", "keys"])
    made = draft.choices.pick("adapter", [with_adapter, with_adapter, with_branch])
    made = merged_adapter if draft.choices.chance("merged", 20) else made
    wants = _wants(draft, keys=_heads_of_keys(draft))
    q = made(draft, x, wants[0], rank) if on != "keys" else single(draft, x, wants[0])
    k = made(draft, x, wants[1], rank) if on != "queries" else single(draft, x, wants[1])
    v = single(draft, x, wants[2])
    q, k, v = _on_the_way(draft, q, k, v)
    return Sides([(q, k)], v)


def factored(draft: Draft) -> Sides:
    draft.sizes["s"] = draft.sizes["t"]
    x = Value("x", "btc")
    rank = draft.choices.pick("rank", [2, 3])
    on = draft.choices.pick("low rank", ["both", "queries", "keys"])
    wants = _wants(draft, keys=_heads_of_keys(draft))
    q = (
        single(draft, x, replace(wants[0], role="uq"))
        if on == "keys"
        else low_rank(draft, x, wants[0], rank, ("uq", "dq"))
    )
    k = single(draft, x, wants[1]) if on == "queries" else low_rank(draft, x, wants[1], rank, ("uk", "dkv"))
    v = single(draft, x, wants[2])
    q, k, v = _on_the_way(draft, q, k, v)
    return Sides([(q, k)], v, kind=None if on == "queries" else "mla")


def multi_latent(draft: Draft) -> Sides:
    draft.sizes["s"] = draft.sizes["t"]
    draft.sizes["k"] = draft.sizes["h"]
    pairs, v = latent_attention(draft, Value("x", "btc"), Value("x", "btc"), absorbed=False)
    return Sides(pairs, v, kind="mla")


def absorbed(draft: Draft) -> Sides:
    draft.sizes["s"] = draft.sizes["t"]
    draft.sizes["k"] = 1
    pairs, v = latent_attention(draft, Value("x", "btc"), Value("x", "btc"), absorbed=True)
    if draft.sizes["h"] > 1:
        return Sides(pairs, v, kind="mla")
    # A single head may as well be one of low rank, with a norm of its keys.
    return Sides(pairs, v, unchecked=frozenset({"roles", "kind", "norms", "latent norms"}))


def joint(draft: Draft) -> Sides:
    """Two streams with projections of their own, side by side along the tokens."""
    sizes = draft.sizes
    letter = _heads_of_keys(draft)
    bias = draft.choices.pick("bias", [False, True])
    others, sizes["s"], sizes["C"] = sizes["s"], sizes["t"], sizes["c"] + 2
    sizes["u"] = others
    mine = projected(draft, Value("x", "btc"), _with_tokens(letter, "s", bias))
    yours = projected(draft, Value("y", "buC"), _with_tokens(letter, "u", bias))
    norm = draft.choices.pick("joint norm", ["rms", "l2", "layer bare"]) if draft.choices.chance("qk norm", 3) else None
    if norm is not None:
        mine[:2] = [normed(draft, x, side, norm) for x, side in zip(mine, ("query", "key"), strict=False)]  # type: ignore[arg-type]
        yours[:2] = [normed(draft, x, side, norm) for x, side in zip(yours, ("query", "key"), strict=False)]  # type: ignore[arg-type]
    keep = sizes["t"]
    flip = draft.choices.chance("other stream first", 3)
    joined = []
    for a, b, tokens in zip(mine, yours, "tss", strict=True):
        axes = a.value.axes
        second = draft.arrange(b.value, axes.replace(tokens, "u"))
        pair = (second, a.value) if flip else (a.value, second)
        code = f"torch.cat(({pair[0].name}, {pair[1].name}), {axes.index(tokens)})"
        value = draft.let(a.value.hint, code, axes)
        norms = tuple(dict.fromkeys((*a.norms, *b.norms)))
        joined.append(replace(a, value=value, kinds=(*a.kinds, *b.kinds), norms=norms))
    sizes["t"] = sizes["s"] = keep + others
    q, k, v = joined
    return Sides([(q, k)], v, keep=keep)


def _with_tokens(keys: str, tokens: str, bias: bool) -> list[Want]:
    return [
        Want("q", "h", "d", "t" if tokens == "s" else tokens, "q", bias),
        Want("k", keys, "d", tokens, "k", bias),
        Want("v", keys, "e", tokens, "other", bias),
    ]


def refined(draft: Draft) -> Sides:
    """A second product inside each head, behind the projection: a grouped convolution, or a weight a head."""
    draft.sizes["s"] = draft.sizes["t"]
    q, k, v = projected(draft, Value("x", "btc"), _wants(draft, keys=_heads_of_keys(draft)))
    on = draft.choices.pick("refined", ["queries", "keys", "both"])
    q = q if on == "keys" else refined_heads(draft, q, "q")
    k = k if on == "queries" else refined_heads(draft, k, "k")
    q, k, v = _on_the_way(draft, q, k, v)
    # What parts the two factors play has no name of its own.
    return Sides([(q, k)], v, unchecked=frozenset({"roles", "kind"}))


def fewer_queries(draft: Draft) -> Sides:
    """Queries of some tokens, keys of all (pooling attention)."""
    sizes = draft.sizes
    sizes["s"] = sizes["t"]
    q, k, v = projected(draft, Value("x", "btc"), _wants(draft, keys=_heads_of_keys(draft)))
    kept = draft.letter(max(2, sizes["t"] // 2))
    q = thinned(draft, q, "t", kept)
    q, sizes["t"] = q.at(q.value.renamed(kept, "t")), sizes[kept]
    q, k, v = _on_the_way(draft, q, k, v)
    return Sides([(q, k)], v)


def tied(draft: Draft) -> Sides:
    """Queries and keys are one projection (Reformer)."""
    draft.sizes["s"] = draft.sizes["t"]
    draft.sizes["k"] = draft.sizes["h"]
    wants = _wants(draft, keys="h")
    x = Value("x", "btc")
    q, v = projected(draft, x, [wants[0], wants[2]])

    def as_key(head: tuple[frozenset[Any], ...]) -> tuple[frozenset[Any], ...]:
        return tuple(frozenset((replace(p[0], role="k"), *p[1:]) for p in place) for place in head)

    k = replace(q, value=q.value.renamed("t", "s"), kinds=tuple(tuple(map(as_key, kind)) for kind in q.kinds))
    if draft.choices.chance("rope", 3):
        q, k = rotated(draft, q, "t"), rotated(draft, k, "s")
    if draft.choices.chance("normalised keys", 3):
        k = normed(draft, k, "key", "l2")
    return Sides([(q, k)], v)
