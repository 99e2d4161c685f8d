"""Attentions written by hand, each with the site that it is by construction.

In: a name of `CASES`. Out: `Made`: a model, its inputs (ones; whole numbers where they are indices) and its only site.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import heads, site
from torch import Tensor, nn
from toy import Toy

from quack_fx.layout import AttentionSite, LogitTerm, Norm, Role, WeightBlock

BATCH, TOKENS, OTHERS, WIDTH, HEADS, DIM = 2, 5, 7, 24, 3, 4
INNER = HEADS * DIM
X, Y = torch.ones(BATCH, TOKENS, WIDTH), torch.ones(BATCH, OTHERS, WIDTH)
SCALE = DIM**-0.5


Made = tuple[nn.Module, tuple[Tensor, ...], AttentionSite]


def linear(width: int, bias: bool = False, of: int = WIDTH) -> nn.Linear:
    return nn.Linear(of, width, bias=bias)


def split(x: Tensor, dim: int = DIM) -> Tensor:
    """[..., tokens, heads * dim] to [..., heads, tokens, dim]."""
    return x.unflatten(-1, (-1, dim)).transpose(-2, -3)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention written out."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


def q_block(param: str = "q.weight", n: int = HEADS, bias: str | None = None, axis: int = 0) -> WeightBlock:
    return WeightBlock(param, "q", axis, heads(n, DIM), bias)


def k_block(param: str = "k.weight", n: int = HEADS, bias: str | None = None, axis: int = 0) -> WeightBlock:
    return WeightBlock(param, "k", axis, heads(n, DIM), bias)


def plain(**more: Any) -> AttentionSite:
    """The site of q, k, v in matrices of their own."""
    return replace(site("", q_block(), k_block(), DIM, logit_scale=SCALE), **more)


def qkv() -> dict[str, nn.Module]:
    return {name: linear(INNER) for name in "qkv"}


def made(run: Callable[..., Tensor], expected: AttentionSite, *inputs: Tensor, **parts: nn.Module | Tensor) -> Made:
    return Toy(run, **(parts or qkv())), inputs or (X,), expected


# ---- where the rows lie ----------------------------------------------------------------------------------------------


def separate() -> Made:
    return made(lambda m, x: attend(split(m.q(x)), split(m.k(x)), split(m.v(x))), plain())


def separate_with_bias() -> Made:
    expected = site("", q_block(bias="q.bias"), k_block(bias="k.bias"), DIM, logit_scale=SCALE)
    parts = {name: linear(INNER, bias=True) for name in "qkv"}
    return made(lambda m, x: attend(split(m.q(x)), split(m.k(x)), split(m.v(x))), expected, **parts)


def fused() -> Made:
    key = WeightBlock("qkv.weight", "k", 0, heads(HEADS, DIM, INNER), "qkv.bias")
    expected = site("", q_block("qkv.weight", bias="qkv.bias"), key, DIM, logit_scale=SCALE)
    run = lambda m, x: attend(*map(split, m.qkv(x).chunk(3, -1)))  # noqa: E731
    return made(run, expected, qkv=linear(3 * INNER, bias=True))


def interleaved() -> Made:
    """Each head's queries, keys and values lie side by side."""
    query = WeightBlock("qkv.weight", "q", 0, heads(HEADS, DIM, 0, 3 * DIM))
    key = WeightBlock("qkv.weight", "k", 0, heads(HEADS, DIM, DIM, 3 * DIM))

    def run(m: Any, x: Tensor) -> Tensor:
        return attend(*m.qkv(x).unflatten(-1, (HEADS, 3 * DIM)).transpose(1, 2).split(DIM, -1))

    return made(run, site("", query, key, DIM, logit_scale=SCALE), qkv=linear(3 * INNER))


def strided() -> Made:
    """The features of a head lie HEADS apart."""
    rows = tuple(tuple((h + d * HEADS, h + d * HEADS + 1) for d in range(DIM)) for h in range(HEADS))
    expected = site(
        "", WeightBlock("q.weight", "q", 0, rows), WeightBlock("k.weight", "k", 0, rows), DIM, logit_scale=SCALE
    )

    def run(m: Any, x: Tensor) -> Tensor:
        return attend(*(p(x).unflatten(-1, (DIM, HEADS)).permute(0, 3, 1, 2) for p in (m.q, m.k, m.v)))

    return made(run, expected)


def conv1d() -> Made:
    """GPT-2's transposed weight."""
    query = q_block("w", bias="b", axis=1)
    key = WeightBlock("w", "k", 1, heads(HEADS, DIM, INNER), "b")

    def run(m: Any, x: Tensor) -> Tensor:
        y = torch.addmm(m.b, x.view(-1, WIDTH), m.w).view(*x.shape[:2], -1)
        return attend(*map(split, y.split(INNER, -1)))

    expected = site("", query, key, DIM, logit_scale=SCALE)
    return made(run, expected, w=torch.ones(WIDTH, 3 * INNER), b=torch.ones(3 * INNER))


def einsum_heads_first() -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hdk->bhtk", x, w) for w in (m.q, m.k, m.v))
        return attend(q, k, v)

    rows = heads(HEADS, 1)
    expected = site("", WeightBlock("q", "q", 0, rows), WeightBlock("k", "k", 0, rows), DIM, logit_scale=SCALE)
    return made(run, expected, **{name: torch.ones(HEADS, WIDTH, DIM) for name in "qkv"})


def einsum_heads_middle() -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dhk->bthk", x, w) for w in (m.q, m.k, m.v))
        weights = torch.einsum("bqhk,bshk->bhqs", q, k).mul(SCALE).softmax(-1)
        return torch.einsum("bhqs,bshk->bqhk", weights, v)

    rows = heads(HEADS, 1)
    expected = site("", WeightBlock("q", "q", 1, rows), WeightBlock("k", "k", 1, rows), DIM, logit_scale=SCALE)
    return made(run, expected, **{name: torch.ones(WIDTH, HEADS, DIM) for name in "qkv"})


# ---- who reads whom --------------------------------------------------------------------------------------------------


def grouped(tiled: bool, native: bool = False) -> Made:
    """Six query heads on three key heads: in blocks of two, or in turn."""
    head_map = tuple(h % 3 if tiled else h // 2 for h in range(6))

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
        if native:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        k, v = (t.repeat(1, 2, 1, 1) if tiled else t.repeat_interleave(2, dim=1) for t in (k, v))
        return attend(q, k, v)

    expected = site("", q_block(n=6), k_block(), DIM, head_map=head_map, logit_scale=SCALE)
    return made(run, expected, q=linear(2 * INNER), k=linear(INNER), v=linear(INNER))


def multi_query() -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        return attend(split(m.q(x)), m.k(x).unsqueeze(1), m.v(x).unsqueeze(1))

    expected = site("", q_block(), k_block(n=1), DIM, logit_scale=SCALE)
    return made(run, expected, q=linear(INNER), k=linear(DIM), v=linear(DIM))


def multi_latent(query_latent: bool) -> Made:
    """DeepSeek's arrangement; the rope part is last, its key is shared by all heads."""
    nope, rope, rank = 4, 2, 6
    up = nope + rope

    def run(m: Any, x: Tensor) -> Tensor:
        q = split(m.uq(m.dq(x)) if query_latent else m.uq(x), up)
        latent, k_rope = m.dkv(x).split((rank, rope), -1)
        k, v = split(m.ukv(latent), 2 * nope).split(nope, -1)
        k = torch.cat((k, rotated_in_pairs(k_rope).unsqueeze(1).expand(-1, HEADS, -1, -1)), -1)
        q = torch.cat((q[..., :nope], rotated_in_pairs(q[..., nope:])), -1)
        return attend(q, k, v)

    query = (
        WeightBlock("uq.weight", "uq" if query_latent else "q", 0, heads(HEADS, nope, 0, up)),
        WeightBlock("uq.weight", "qr", 0, heads(HEADS, rope, nope, up)),
    )
    if query_latent:
        query = (WeightBlock("dq.weight", "dq", 0, (((0, rank),),) * HEADS), *query)
    else:
        query = (replace(query[0], role="uq"), query[1])
    key = (
        WeightBlock("dkv.weight", "dkv", 0, (((0, rank),),) * HEADS),
        WeightBlock("ukv.weight", "uk", 0, heads(HEADS, nope, 0, 2 * nope)),
        WeightBlock("dkv.weight", "kr", 0, (((rank, rank + rope),),) * HEADS),
    )
    terms = (LogitTerm((1, 0), (1, 0)), LogitTerm((2, 0), (2,)))
    if not query_latent:
        terms = (LogitTerm((0,), (1, 0)), LogitTerm((1,), (2,)))
    expected = plain(kind="mla", head_dim=up, query=query, key=key, terms=terms, logit_scale=up**-0.5)
    parts = {"uq": linear(HEADS * up), "dkv": linear(rank + rope), "ukv": linear(HEADS * 2 * nope, of=rank)}
    if query_latent:
        parts |= {"dq": linear(rank), "uq": linear(HEADS * up, of=rank)}
    return made(run, expected, **parts)


def forgetting() -> Made:
    """Data-dependent ALiBi: how much is forgotten between two tokens is summed up from gates of their own."""

    def run(m: Any, x: Tensor) -> Tensor:
        kept = F.logsigmoid(m.gate(x)).cumsum(1).mT
        logits = split(m.q(x)) @ split(m.k(x)).mT * SCALE + kept.unsqueeze(-1) - kept.unsqueeze(-2)
        return logits.softmax(-1) @ split(m.v(x))

    return made(run, plain(), gate=linear(HEADS), **qkv())


def talking_heads() -> Made:
    """Logits of all heads are mixed before the softmax and its weights behind it."""

    def run(m: Any, x: Tensor) -> Tensor:
        logits = split(m.q(x)) @ split(m.k(x)).mT * SCALE
        weights = torch.einsum("bhqs,hg->bgqs", logits, m.before).softmax(-1)
        return torch.einsum("bhqs,hg->bgqs", weights, m.after) @ split(m.v(x))

    mix = {name: torch.ones(HEADS, HEADS) for name in ("before", "after")}
    return made(run, plain(), **qkv(), **mix)


def joint() -> Made:
    """Two streams, each with projections of its own, attend to both together."""

    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (torch.cat((split(one(x)), split(two(y))), 2) for one, two in ((m.q, m.q2), (m.k, m.k2), (m.v, m.v2)))
        return attend(q, k, v)

    expected = plain(
        query=(q_block(), q_block("q2.weight")),
        key=(k_block(), k_block("k2.weight")),
        terms=tuple(LogitTerm((i,), (j,)) for i in (0, 1) for j in (0, 1)),
    )
    return made(run, expected, X, Y, **{name + n: linear(INNER) for n in ("", "2") for name in "qkv"})


def cross() -> Made:
    return made(lambda m, x, y: attend(split(m.q(x)), split(m.k(y)), split(m.v(y))), plain(cross=True), X, Y)


def shared_twice() -> Made:
    parts = qkv()
    layer = Toy(lambda m, x: attend(split(m.q(x)), split(m.k(x)), split(m.v(x))).transpose(1, 2).flatten(2), **parts)

    def run(m: Any, x: Tensor) -> Tensor:
        x = x + m.out(m.layer(x))
        return x + m.out(m.layer(x))

    expected = plain(name="layer", calls=2, query=(q_block("layer.q.weight"),), key=(k_block("layer.k.weight"),))
    return made(run, expected, layer=layer, out=linear(WIDTH, of=INNER))


def low_rank_branches() -> Made:
    """LoRA: each of q and k is W x + B A x."""
    rank = 2

    def run(m: Any, x: Tensor) -> Tensor:
        q = m.q(x) + 2.0 * m.qb(m.qa(x))
        k = m.k(x) + 2.0 * m.kb(m.ka(x))
        return attend(split(q), split(k), split(m.v(x)))

    whole = (((0, rank),),) * HEADS
    query, key = (
        (
            WeightBlock(f"{s}.weight", s, 0, heads(HEADS, DIM)),
            WeightBlock(f"{s}a.weight", "other", 0, whole),
            WeightBlock(f"{s}b.weight", "other", 0, heads(HEADS, DIM)),
        )
        for s in "qk"
    )
    chains = ((0,), (2, 1))
    terms = tuple(LogitTerm(q, k) for q in chains for k in chains)
    parts = {f"{s}a": linear(rank) for s in "qk"} | {f"{s}b": linear(INNER, of=rank) for s in "qk"}
    return made(run, plain(query=query, key=key, terms=terms, logit_scale=None), **qkv(), **parts)


# ---- what happens to q and k on the way ------------------------------------------------------------------------------


def rotated_in_pairs(x: Tensor) -> Tensor:
    """Interleaved RoPE: features 2i and 2i + 1 are rotated together."""
    angle = torch.arange(x.shape[-2]).unsqueeze(-1) / 10 ** torch.arange(x.shape[-1] // 2)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)


def rotated_in_halves(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[-2]).unsqueeze(-1) / 10 ** torch.arange(x.shape[-1] // 2)
    angle = torch.cat((angle, angle), -1)
    a, b = x.chunk(2, -1)
    return x * angle.cos() + torch.cat((-b, a), -1) * angle.sin()


def scaled_by_angles(x: Tensor) -> Tensor:
    """Half of a rotation: features times cosines and sines of their place, which at place 0 are 1 and 0."""
    angles = torch.arange(float(x.shape[-2])).unsqueeze(-1) / torch.arange(1.0, 1 + x.shape[-1] // 2)
    return torch.stack((x[..., ::2] * angles.cos(), x[..., 1::2] * angles.sin()), -1).flatten(-2)


def rotated_as_complex(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[-2]).unsqueeze(-1) / 10 ** torch.arange(x.shape[-1] // 2)
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.view_as_real(turned).flatten(-2)


def rotated_by_matrices(x: Tensor) -> Tensor:
    """A matrix of 2 x 2 for each pair of features, multiplied and summed by hand."""
    angle = torch.arange(x.shape[-2]).unsqueeze(-1) / 10 ** torch.arange(x.shape[-1] // 2)
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).unflatten(-1, (2, 2))
    return (turn * x.unflatten(-1, (-1, 1, 2))).sum(-1).flatten(-2)


def rotary(rotate: Callable[[Tensor], Tensor]) -> Made:
    return made(lambda m, x: attend(rotate(split(m.q(x))), rotate(split(m.k(x))), split(m.v(x))), plain())


def rotated_by_a_table() -> Made:
    """RoFormer: the angles' sines and cosines are looked up by position in a parameter."""

    def run(m: Any, x: Tensor) -> Tensor:
        cos, sin = m.angles(torch.arange(x.shape[1])).chunk(2, -1)

        def rotate(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)

        return attend(rotate(split(m.q(x))), rotate(split(m.k(x))), split(m.v(x)))

    return made(run, plain(), angles=nn.Embedding(16, DIM), **qkv())


def rotated_in_place() -> Made:
    """CogView 4: the tokens of the picture are rotated where they stand, in what a norm gave back."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k = (F.layer_norm(split(part(x)), (DIM,)) for part in (m.q, m.k))
        for part in (q, k):
            part[:, :, 2:] = rotated_in_halves(part[:, :, 2:])
        return attend(q, k, split(m.v(x)))

    return made(run, plain(qk_norm=(Norm("query", "layer", DIM), Norm("key", "layer", DIM))), **qkv())


def chosen_queries() -> Made:
    """Informer: each head's queries are those of the tokens that its data choose; heads and samples are one axis."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (split(part(x)).flatten(0, 1) for part in (m.q, m.k, m.v))
        best = (q @ k.mT).amax(-1).topk(3, dim=-1).indices
        return attend(q[torch.arange(BATCH * HEADS)[:, None], best], k, v)

    return made(run, plain(), **qkv())


def pooled_queries(pool: Callable[[Tensor], Tensor]) -> Made:
    """Fewer or more queries than keys, each made of several tokens'."""
    return made(lambda m, x: attend(pool(split(m.q(x))), split(m.k(x)), split(m.v(x))), plain())


def as_signals(pool: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """[batch, heads, tokens, dim] through a pool of signals, the features as channels."""
    return lambda x: pool(x.flatten(0, 1).mT).mT.unflatten(0, (-1, HEADS))


def normed(kind: Any, norm: Callable[[], nn.Module], full: bool = False) -> Made:
    """A norm module on queries and keys, per head or over all heads together."""
    width = INNER if full else DIM

    def run(m: Any, x: Tensor) -> Tensor:
        q, k = m.q(x), m.k(x)
        q, k = (split(m.qn(q)), split(m.kn(k))) if full else (m.qn(split(q)), m.kn(split(k)))
        return attend(q, k, split(m.v(x)))

    norms = tuple(Norm(side, kind, width, n, f"{n}.weight") for side, n in (("query", "qn"), ("key", "kn")))
    return made(run, plain(qk_norm=norms), **qkv(), qn=norm(), kn=norm())


class WrittenRMSNorm(nn.Module):
    """RMSNorm as model files write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def unit_length() -> Made:
    """L2 norm, then a learned temperature per head (Swin 2, ViT-22B's cousins)."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k = F.normalize(split(m.q(x)), dim=-1), F.normalize(split(m.k(x)), dim=-1)
        return (q @ k.mT * m.temperature).softmax(-1) @ split(m.v(x))

    norms = (Norm("query", "l2", DIM), Norm("key", "l2", DIM))
    expected = plain(qk_norm=norms, logit_scale=None)
    return made(run, expected, **qkv(), temperature=torch.ones(HEADS, 1, 1))


def over_channels() -> Made:
    """Cross-covariance attention (XCiT): normed over tokens, a head is the channels that a softmax compares."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k = (F.normalize(split(part(x)).mT, dim=-1) for part in (m.q, m.k))
        return (q @ k.mT * m.temperature).softmax(-1) @ split(m.v(x)).mT

    norms = (Norm("query", "l2", TOKENS), Norm("key", "l2", TOKENS))
    expected = plain(kind="other", qk_norm=norms, logit_scale=None)
    return made(run, expected, **qkv(), temperature=torch.ones(HEADS, 1, 1))


def clipped() -> Made:
    """Vectors longer than one are cut down to one; shorter ones stay, so this is no norm."""

    def run(m: Any, x: Tensor) -> Tensor:
        q = split(m.q(x))
        q = q * (1.0 / (q.norm(dim=-1, keepdim=True) + 1e-6)).clamp(max=1.0)
        return attend(q, split(m.k(x)), split(m.v(x)))

    return made(run, plain(logit_scale=None))


# ---- how the product and the softmax are written ---------------------------------------------------------------------


def softmax_by_hand() -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        logits = split(m.q(x)) @ split(m.k(x)).mT / 2.0
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        return weights / weights.sum(-1, keepdim=True) @ split(m.v(x))

    return made(run, plain(logit_scale=0.5))


def masked() -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        logits = split(m.q(x)) @ split(m.k(x)).mT * SCALE
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return logits.masked_fill(~mask, -math.inf).softmax(-1) @ split(m.v(x))

    return made(run, plain())


def product_then_sum() -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k = split(m.q(x)), split(m.k(x))
        logits = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * SCALE
        return logits.softmax(-1) @ split(m.v(x))

    return made(run, plain())


def keys_on_the_left() -> Made:
    """K Q^T with a softmax over its rows."""

    def run(m: Any, x: Tensor) -> Tensor:
        logits = split(m.k(x)) @ split(m.q(x)).mT * SCALE
        return logits.softmax(-2).mT @ split(m.v(x))

    return made(run, plain())


def sdpa(scale: float | None) -> Made:
    def run(m: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(split(m.q(x)), split(m.k(x)), split(m.v(x)), is_causal=True, scale=scale)

    return made(run, plain(logit_scale=scale or SCALE))


def torch_layer() -> Made:
    """nn.MultiheadAttention, given one tensor three times."""
    model = nn.MultiheadAttention(INNER, HEADS, batch_first=True)
    query = WeightBlock("in_proj_weight", "q", 0, heads(HEADS, DIM), "in_proj_bias")
    key = WeightBlock("in_proj_weight", "k", 0, heads(HEADS, DIM, INNER), "in_proj_bias")
    x = torch.ones(BATCH, TOKENS, INNER)
    return model, (x, x, x), site("", query, key, DIM, logit_scale=SCALE)


# ---- factors, groups and memories ------------------------------------------------------------------------------------


class Memory(nn.Module):
    """Numbers that no parameter made: a mask, a cache."""

    numbers: Tensor

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.register_buffer("numbers", numbers)


def factor(param: str, role: Role, rows: int) -> WeightBlock:
    """A factor that every head reads whole."""
    return WeightBlock(param, role, 0, (((0, rows),),) * HEADS)


def shared_factor() -> Made:
    """One down projection for queries and keys."""
    rank = 5

    def run(m: Any, x: Tensor) -> Tensor:
        return attend(*map(split, m.up(m.down(x)).chunk(3, -1)))

    query = (factor("down.weight", "dq", rank), WeightBlock("up.weight", "uq", 0, heads(HEADS, DIM)))
    key = (factor("down.weight", "dkv", rank), WeightBlock("up.weight", "uk", 0, heads(HEADS, DIM, INNER)))
    expected = plain(kind="mla", query=query, key=key, terms=(LogitTerm((1, 0), (1, 0)),))
    return made(run, expected, down=linear(rank), up=linear(3 * INNER, of=rank))


def layer_before() -> Made:
    """Queries, keys and values of one layer's output, as wide as they are: an embedding is no factor of theirs."""

    def run(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        return attend(split(m.q(x)), split(m.k(x)), split(m.v(x)))

    query = (WeightBlock("q.weight", "q", 0, heads(HEADS, DIM)),)
    key = (WeightBlock("k.weight", "k", 0, heads(HEADS, DIM)),)
    own = {name: linear(INNER, of=INNER) for name in "qkv"}
    return made(run, plain(query=query, key=key), embed=linear(INNER), **own)


def low_rank_branch_of_a_fused_weight() -> Made:
    """LoRA on a fused weight: its first factor serves both sides."""
    rank = 2

    def run(m: Any, x: Tensor) -> Tensor:
        return attend(*map(split, (m.qkv(x) + m.b(m.a(x))).chunk(3, -1)))

    def side(role: Role, start: int) -> tuple[WeightBlock, ...]:
        own = heads(HEADS, DIM, start)
        return (
            WeightBlock("qkv.weight", role, 0, own),
            factor("a.weight", "other", rank),
            WeightBlock("b.weight", "other", 0, own),
        )

    chains = ((0,), (2, 1))
    terms = tuple(LogitTerm(q, k) for q in chains for k in chains)
    expected = plain(query=side("q", 0), key=side("k", INNER), terms=terms)
    return made(run, expected, qkv=linear(3 * INNER), a=linear(rank), b=linear(3 * INNER, of=rank))


def factors_of_each_head() -> Made:
    """Keys of each head pass a matrix of its own, in a loop over heads (absorbed without a latent)."""

    def run(m: Any, x: Tensor) -> Tensor:
        k = torch.stack([one @ w for one, w in zip(split(m.k(x)).unbind(1), m.w, strict=True)], 1)
        return attend(split(m.q(x)), k, split(m.v(x)))

    each = tuple(((h, h + 1),) for h in range(HEADS))
    query = WeightBlock("q.weight", "uq", 0, heads(HEADS, DIM))
    key = (WeightBlock("k.weight", "dkv", 0, heads(HEADS, DIM)), WeightBlock("w", "uk", 0, each))
    expected = plain(kind="mla", query=(query,), key=key, terms=(LogitTerm((0,), (1, 0)),))
    return made(run, expected, **qkv(), w=torch.ones(HEADS, DIM, DIM))


def absorbed() -> Made:
    """Absorbed MLA: queries pass the keys' up projection and meet the latent, of which the values are made."""
    rank = 5

    def run(m: Any, x: Tensor) -> Tensor:
        latent = m.norm(m.down(x))
        q = torch.einsum("bthd,hdr->bhtr", m.q(x).unflatten(-1, (HEADS, DIM)), m.up)
        weights = (q @ latent.mT.unsqueeze(1) * SCALE).softmax(-1)
        return torch.einsum("bhtr,hrd->bthd", weights @ latent.unsqueeze(1), m.out).flatten(2)

    each = tuple(((h, h + 1),) for h in range(HEADS))
    query = (WeightBlock("q.weight", "uq", 0, heads(HEADS, DIM)), WeightBlock("up", "uk", 0, each))
    key = (WeightBlock("down.weight", "dkv", 0, (((0, rank),),)),)
    expected = plain(
        kind="mla",
        key_heads=1,
        head_dim=rank,
        head_map=(0,) * HEADS,
        query=query,
        key=key,
        terms=(LogitTerm((1, 0), (0,)),),
        latent_norm=(Norm("key", "rms", rank, "norm", "norm.weight"),),
    )
    parts = {"q": linear(INNER), "down": linear(rank), "norm": nn.RMSNorm(rank)}
    return made(run, expected, **parts, up=torch.ones(HEADS, DIM, rank), out=torch.ones(HEADS, rank, DIM))


def absorbed_together() -> Made:
    """Absorbed MLA whose up projection is one 2-D weight for the keys and values of all heads, cut inside each head."""
    rank, rope, value = 5, 2, 3

    def run(m: Any, x: Tensor) -> Tensor:
        q, q_rope = m.q(x).unflatten(-1, (HEADS, DIM + rope)).split((DIM, rope), -1)
        latent, k_rope = m.down(x).split((rank, rope), -1)
        latent = m.norm(latent)
        up = m.up.weight.view(HEADS, -1, rank)
        q = torch.einsum("bshd,hdc->bshc", q, up[:, :DIM])
        logits = torch.einsum("bshc,btc->bsht", q, latent) + torch.einsum("bshr,btr->bsht", q_rope, k_rope)
        out = torch.einsum("bsht,btc->bshc", (logits * SCALE).softmax(-1), latent)
        return torch.einsum("bshc,hdc->bshd", out, up[:, -value:]).flatten(2)

    query = (
        WeightBlock("q.weight", "uq", 0, heads(HEADS, DIM, 0, DIM + rope)),
        WeightBlock("up.weight", "uk", 0, heads(HEADS, DIM, 0, DIM + value)),
        WeightBlock("q.weight", "qr", 0, heads(HEADS, rope, DIM, DIM + rope)),
    )
    key = (
        WeightBlock("down.weight", "dkv", 0, (((0, rank),),)),
        WeightBlock("down.weight", "kr", 0, (((rank, rank + rope),),)),
    )
    expected = plain(
        kind="mla",
        key_heads=1,
        head_dim=rank + rope,
        head_map=(0,) * HEADS,
        query=query,
        key=key,
        terms=(LogitTerm((1, 0), (0,)), LogitTerm((2,), (1,))),
        latent_norm=(Norm("key", "rms", rank, "norm", "norm.weight"),),
    )
    parts = {"q": linear(HEADS * (DIM + rope)), "down": linear(rank + rope), "norm": nn.RMSNorm(rank)}
    return made(run, expected, **parts, up=linear(HEADS * (DIM + value), of=rank))


def pruned() -> Made:
    """A weight under a mask keeps its rows."""

    def run(m: Any, x: Tensor) -> Tensor:
        return attend(split(F.linear(x, m.q.weight * m.mask.numbers)), split(m.k(x)), split(m.v(x)))

    return made(run, plain(), **qkv(), mask=Memory((torch.arange(INNER * WIDTH) % 3 > 0).float().view(INNER, WIDTH)))


def behind_a_computed_rotation() -> Made:
    """OFT: tokens are rotated by a matrix that is computed from parameters; no row of those makes a feature."""

    def run(m: Any, x: Tensor) -> Tensor:
        rotation = torch.linalg.matrix_exp(m.r - m.r.mT)
        return attend(split(m.q(x @ rotation)), split(m.k(x)), split(m.v(x)))

    return made(run, plain(), **qkv(), r=torch.ones(WIDTH, WIDTH))


def scaled_by_its_size() -> Made:
    """DeLoRA: the branch is divided by the size of its factors, which is made of all their rows."""
    rank = 2

    def run(m: Any, x: Tensor) -> Tensor:
        size = m.a.weight.norm(dim=1) * m.b.weight.norm(dim=0)
        return attend(split(m.q(x) + m.b(m.a(x) / size)), split(m.k(x)), split(m.v(x)))

    query = (
        WeightBlock("q.weight", "q", 0, heads(HEADS, DIM)),
        factor("a.weight", "other", rank),
        WeightBlock("b.weight", "other", 0, heads(HEADS, DIM)),
    )
    expected = plain(query=query, terms=(LogitTerm((0,), (0,)), LogitTerm((2, 1), (0,))))
    return made(run, expected, **qkv(), a=linear(rank), b=linear(INNER, of=rank))


def cached() -> Made:
    """Keys and values are written into a cache, and the whole of it is read."""
    room = 2 * TOKENS

    def run(m: Any, x: Tensor) -> Tensor:
        places = torch.arange(TOKENS)
        k = m.keys.numbers.index_copy_(2, places, split(m.k(x)))
        v = m.values.numbers.index_copy_(2, places, split(m.v(x)))
        mask = torch.arange(room) <= places.unsqueeze(-1)
        return F.scaled_dot_product_attention(split(m.q(x)), k, v, attn_mask=mask)

    caches = {name: Memory(torch.zeros(BATCH, HEADS, room, DIM)) for name in ("keys", "values")}
    return made(run, plain(), **qkv(), **caches)


def fewer_keys(over_tokens: Callable[[Any, Tensor], Tensor], bias: bool = False, **parts: nn.Module | Tensor) -> Made:
    """Linformer: keys and values are summed over tokens with weights that make no features."""

    def run(m: Any, x: Tensor) -> Tensor:
        return attend(split(m.q(x)), split(over_tokens(m, m.k(x))), split(over_tokens(m, m.v(x))))

    expected = plain(query=(q_block(bias="q.bias"),), key=(k_block(bias="k.bias"),)) if bias else plain()
    return made(run, expected, **{name: linear(INNER, bias=bias) for name in "qkv"}, **parts)


def learned_angles() -> Made:
    """Rotary embedding whose frequencies are parameters."""

    def run(m: Any, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1]).unsqueeze(-1) * m.frequencies

        def rotated(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)

        return attend(rotated(split(m.q(x))), rotated(split(m.k(x))), split(m.v(x)))

    return made(run, plain(), **qkv(), frequencies=torch.ones(DIM // 2))


def partly_normed() -> Made:
    """All features of a head but the last are normed."""

    def run(m: Any, x: Tensor) -> Tensor:
        def normed(norm: nn.Module, y: Tensor) -> Tensor:
            return torch.cat((norm(y[..., :-1]), y[..., -1:]), -1)

        return attend(normed(m.qn, split(m.q(x))), normed(m.kn, split(m.k(x))), split(m.v(x)))

    norms = tuple(Norm(side, "rms", DIM - 1, n, f"{n}.weight") for side, n in (("query", "qn"), ("key", "kn")))
    return made(run, plain(qk_norm=norms), **qkv(), qn=nn.RMSNorm(DIM - 1), kn=nn.RMSNorm(DIM - 1))


def normed_like_values(*, keys_are_values: bool = False) -> Made:
    """A module norms queries, keys and values: without it, the values would change, too."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k = m.n(split(m.q(x))), m.n(split(m.k(x)))
        return attend(q, k, k if keys_are_values else m.n(split(m.v(x))))

    norms = (Norm("query", "rms", DIM, None, "n.weight"), Norm("key", "rms", DIM, None, "n.weight"))
    return made(run, plain(qk_norm=norms), **qkv(), n=nn.RMSNorm(DIM))


def normed_in_one_tensor() -> Made:
    """Queries and keys are normed each by its own norm, and then lie in one tensor with the values."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, DIM)) for p in (m.q, m.k, m.v))
        q, k, v = torch.stack((m.qn(q), m.kn(k), v)).transpose(-2, -3)
        return attend(q, k, v)

    norms = tuple(Norm(side, "rms", DIM, n, f"{n}.weight") for side, n in (("query", "qn"), ("key", "kn")))
    return made(run, plain(qk_norm=norms), **qkv(), qn=nn.RMSNorm(DIM), kn=nn.RMSNorm(DIM))


def loop_over_heads() -> Made:
    """A module for each head, each with a softmax of its own: one attention all the same."""

    def run(m: Any, x: Tensor) -> Tensor:
        turns = [attend(q(x), k(x), v(x)) for q, k, v in zip(m.q, m.k, m.v, strict=True)]
        return m.out(torch.cat(turns, -1))

    def side(role: Role) -> tuple[WeightBlock, ...]:
        own = [tuple(((0, DIM),) if h == i else () for h in range(HEADS)) for i in range(HEADS)]
        return tuple(WeightBlock(f"{role}.{i}.weight", role, 0, rows) for i, rows in enumerate(own))

    expected = plain(query=side("q"), key=side("k"), terms=tuple(LogitTerm((i,), (i,)) for i in range(HEADS)))
    parts = {name: nn.ModuleList(linear(DIM) for _ in range(HEADS)) for name in "qkv"}
    return made(run, expected, **parts, out=linear(WIDTH, of=INNER))


def on_edges(*, edges_have_features: bool = False, by_index: bool = False) -> Made:
    """Attention over the edges of a graph: a softmax over the edges that end in one node (graph transformers)."""
    nodes = 6
    ends = torch.tensor([(i, j) for i in range(nodes) for j in range(nodes) if (i + 2 * j) % 3]).mT.contiguous()

    def run(m: Any, x: Tensor, ends: Tensor, *edges: Tensor) -> Tensor:
        source, target = ends
        q, k, v = (part(x).unflatten(-1, (HEADS, DIM)) for part in (m.q, m.k, m.v))
        k = k[source]
        for features in edges:
            k = k + m.e(features).unflatten(-1, (HEADS, DIM))
        logits = (q[target] * k).sum(-1) * SCALE
        to = target.unsqueeze(-1).expand_as(logits)
        if by_index:
            weights = logits.exp()
            total = weights.new_zeros(nodes, HEADS).index_add(0, target, weights)
        else:
            most = torch.full((nodes, HEADS), -1e9).scatter_reduce(0, to, logits.detach(), "amax")
            weights = (logits - most[target]).exp()
            total = weights.new_zeros(nodes, HEADS).scatter_add_(0, to, weights)
        messages = v[source] * (weights / total[target]).unsqueeze(-1)
        return torch.zeros(nodes, HEADS, DIM).index_add(0, target, messages).flatten(1)

    inputs = [torch.ones(nodes, WIDTH), ends]
    if not edges_have_features:
        return made(run, plain(), *inputs)
    key = (WeightBlock("e.weight", "k", 0, heads(HEADS, DIM)), k_block())
    expected = plain(key=key, terms=(LogitTerm((0,), (0,)), LogitTerm((0,), (1,))))
    return made(run, expected, *inputs, torch.ones(ends.shape[1], 5), **qkv(), e=linear(INNER, of=5))


def in_tiles(*, causal: bool) -> Made:
    """Keys come in tiles, each with its largest logit so far (flash attention in Python)."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m.q(x)), split(m.k(x)), split(m.v(x))
        out, total = torch.zeros_like(q), torch.zeros(*q.shape[:-1], 1)
        most = torch.full_like(total, -1e9)
        for start in range(0, x.shape[1], 4):
            logits = q @ k[:, :, start : start + 4].mT * SCALE
            if causal:
                later = torch.arange(start, start + logits.shape[-1]) > torch.arange(x.shape[1]).unsqueeze(-1)
                logits = logits.masked_fill(later, -1e9)
            now = torch.maximum(most, logits.amax(-1, keepdim=True))
            weights = (logits - now).exp()
            decay = (most - now).exp()
            out, total = (
                out * decay + weights @ v[:, :, start : start + 4],
                total * decay + weights.sum(-1, keepdim=True),
            )
            most = now
        return out / total

    return made(run, plain(calls=2), torch.ones(BATCH, 8, WIDTH))


CASES: dict[str, Callable[[], Made]] = {
    "separate": separate,
    "separate_with_bias": separate_with_bias,
    "fused": fused,
    "interleaved": interleaved,
    "strided": strided,
    "conv1d": conv1d,
    "einsum_heads_first": einsum_heads_first,
    "einsum_heads_middle": einsum_heads_middle,
    "gqa_blocked": lambda: grouped(tiled=False),
    "gqa_tiled": lambda: grouped(tiled=True),
    "gqa_native": lambda: grouped(tiled=False, native=True),
    "mqa": multi_query,
    "mla": lambda: multi_latent(query_latent=True),
    "mla_plain_query": lambda: multi_latent(query_latent=False),
    "forgetting": forgetting,
    "talking_heads": talking_heads,
    "joint": joint,
    "cross": cross,
    "shared_twice": shared_twice,
    "lora": low_rank_branches,
    "rope_pairs": lambda: rotary(rotated_in_pairs),
    "rope_halves": lambda: rotary(rotated_in_halves),
    "scaled_by_angles": lambda: rotary(scaled_by_angles),
    "rope_complex": lambda: rotary(rotated_as_complex),
    "rope_matrices": lambda: rotary(rotated_by_matrices),
    "rope_table": rotated_by_a_table,
    "rope_in_place": rotated_in_place,
    "queries_chosen": chosen_queries,
    "queries_max": lambda: pooled_queries(lambda x: x[..., :4, :].unflatten(-2, (2, 2)).max(-2).values),
    "queries_mean": lambda: pooled_queries(lambda x: x[..., :4, :].unflatten(-2, (2, 2)).mean(-2)),
    "queries_max_pool": lambda: pooled_queries(as_signals(lambda x: F.max_pool1d(x, 2))),
    "queries_interpolated": lambda: pooled_queries(as_signals(lambda x: F.interpolate(x, 8, mode="linear"))),
    "rms_norm": lambda: normed("rms", lambda: nn.RMSNorm(DIM)),
    "rms_norm_written": lambda: normed("rms", lambda: WrittenRMSNorm(DIM)),
    "rms_norm_full": lambda: normed("rms", lambda: nn.RMSNorm(INNER), full=True),
    "layer_norm": lambda: normed("layer", lambda: nn.LayerNorm(DIM)),
    "l2_norm": unit_length,
    "clipped": clipped,
    "channels": over_channels,
    "softmax_by_hand": softmax_by_hand,
    "masked": masked,
    "product_then_sum": product_then_sum,
    "keys_on_the_left": keys_on_the_left,
    "sdpa": lambda: sdpa(None),
    "sdpa_scale": lambda: sdpa(0.3),
    "torch_layer": torch_layer,
    "shared_factor": shared_factor,
    "layer_before": layer_before,
    "lora_fused": low_rank_branch_of_a_fused_weight,
    "factors_of_each_head": factors_of_each_head,
    "absorbed": absorbed,
    "absorbed_together": absorbed_together,
    "pruned": pruned,
    "behind_a_rotation": behind_a_computed_rotation,
    "scaled_by_its_size": scaled_by_its_size,
    "cached": cached,
    "fewer_keys": lambda: fewer_keys(lambda m, y: m.over(y.mT).mT, bias=True, over=nn.Linear(TOKENS, 3)),
    "fewer_keys_left": lambda: fewer_keys(lambda m, y: m.over @ y, over=torch.ones(3, TOKENS)),
    "learned_angles": learned_angles,
    "partly_normed": partly_normed,
    "normed_in_one_tensor": normed_in_one_tensor,
    "normed_like_values": normed_like_values,
    "normed_keys_are_values": lambda: normed_like_values(keys_are_values=True),
    "loop_over_heads": loop_over_heads,
    "edges": on_edges,
    "edges_with_features": lambda: on_edges(edges_have_features=True),
    "edges_by_index_add": lambda: on_edges(by_index=True),
    "tiles": lambda: in_tiles(causal=False),
    "tiles_causal": lambda: in_tiles(causal=True),
}
