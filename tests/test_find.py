"""The finder against attentions whose rows are known because the test lays them out itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import example, heads, site
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from toy import Toy

from quack_fx.find import find, find_in_graph, find_qk_pairs
from quack_fx.layout import AttentionSite, LogitTerm, Norm, QKLayout, WeightBlock
from quack_fx.verify import verify_qk_pairs

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
}


def canonical(one: AttentionSite) -> AttentionSite:
    """The same site with its blocks and terms in an order that does not depend on who wrote them down."""

    def order(blocks: tuple[WeightBlock, ...]) -> list[int]:
        return sorted(range(len(blocks)), key=lambda i: (blocks[i].param, blocks[i].role, blocks[i].heads))

    q, k = order(one.query), order(one.key)
    terms = {LogitTerm(tuple(q.index(i) for i in t.query), tuple(k.index(i) for i in t.key)) for t in one.terms}
    return replace(
        one,
        query=tuple(one.query[i] for i in q),
        key=tuple(one.key[i] for i in k),
        terms=tuple(sorted(terms, key=lambda t: (t.query, t.key))),
        logit_scale=None if one.logit_scale is None else round(one.logit_scale, 9),
    )


def assert_same(found: AttentionSite, expected: AttentionSite) -> None:
    """Field by field, so that a failure names the field."""
    found, expected = canonical(found), canonical(expected)
    for name in AttentionSite.__dataclass_fields__:
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_construction(name: str, device: str) -> None:
    model, inputs, expected = CASES[name]()
    layout = find_qk_pairs(model.to(device), *inputs)
    assert len(layout.sites) == 1 and not layout.skipped
    assert_same(layout.sites[0], expected)


# ---- what is no site -------------------------------------------------------------------------------------------------


def linear_attention() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = F.elu(split(m.q(x))) + 1, F.elu(split(m.k(x))) + 1, split(m.v(x))
        return q @ (k.mT @ v)

    return Toy(run, **qkv()), (X,)


def learned_queries() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def run(m: Any, x: Tensor) -> Tensor:
        return attend(m.queries.expand(BATCH, -1, -1, -1), split(m.k(x)), split(m.v(x)))

    return Toy(run, queries=torch.ones(HEADS, 6, DIM), k=linear(INNER), v=linear(INNER)), (X,)


def additive() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Bahdanau's score: v . tanh(q + k)."""

    def run(m: Any, x: Tensor) -> Tensor:
        score = m.score(torch.tanh(m.q(x).unsqueeze(2) + m.k(x).unsqueeze(1))).squeeze(-1)
        return score.softmax(-1) @ m.v(x)

    return Toy(run, **qkv(), score=linear(1, of=INNER)), (X,)


def computed_weight() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An adapter that is merged in every forward."""

    def run(m: Any, x: Tensor) -> Tensor:
        q = F.linear(x, m.q.weight + m.b @ m.a)
        return attend(split(q), split(m.k(x)), split(m.v(x)))

    return Toy(run, **qkv(), a=torch.ones(2, WIDTH), b=torch.ones(INNER, 2)), (X,)


def gated() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def run(m: Any, x: Tensor) -> Tensor:
        return attend(split(m.q(x)), split(m.k(x) * m.gate(x).sigmoid()), split(m.v(x)))

    return Toy(run, **qkv(), gate=linear(INNER)), (X,)


def single_key() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def run(m: Any, x: Tensor) -> Tensor:
        logits = split(m.q(x)) @ split(m.k(x)).mT
        return logits.softmax(-1) * split(m.v(x))

    return Toy(run, **qkv()), (torch.ones(BATCH, 1, WIDTH),)


def added_heads() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def run(m: Any, x: Tensor) -> Tensor:
        logits = split(m.q(x)) @ split(m.k(x)).mT
        return (logits + logits.flip(1)).softmax(-1) @ split(m.v(x))

    return Toy(run, **qkv()), (X,)


def selective() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """What the first head has chosen before is masked for all of them."""

    def run(m: Any, x: Tensor) -> Tensor:
        logits = split(m.q(x)) @ split(m.k(x)).mT
        return (logits - logits[:, :1].relu().cumsum(-2)).softmax(-1) @ split(m.v(x))

    return Toy(run, **qkv()), (X,)


def channels_of_one_side() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Each channel over tokens meets weights over tokens that are computed for it."""

    def run(m: Any, x: Tensor) -> Tensor:
        return (m.q(x).mT @ m.over(x).mT).softmax(-1) @ m.v(x)

    return Toy(run, over=linear(TOKENS), **qkv()), (X,)


REFUSALS = {
    "channels of one side": (channels_of_one_side, {"channel-attention"}),
    "linear attention": (linear_attention, {"no-softmax"}),
    "learned queries": (learned_queries, {"learned-query"}),
    "additive attention": (additive, {"additive-attention"}),
    "a weight computed from several": (computed_weight, {"unknown-query"}),
    "gated keys": (gated, {"unknown-key"}),
    "a single key": (single_key, {"one-key"}),
    "heads added up": (added_heads, {"mixed-heads"}),
    "selective attention": (selective, {"mixed-heads"}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_code_and_a_sentence(name: str) -> None:
    make, codes = REFUSALS[name]
    layout = find_qk_pairs(*_flat(make()))
    assert not layout.sites
    assert {s.code for s in layout.skipped} == codes
    assert all(s.reason and "\n" not in s.reason for s in layout.skipped)


def test_a_reason_says_where_understanding_ended() -> None:
    (entry,) = find_qk_pairs(*_flat(gated())).skipped
    assert entry.reason.endswith(f"they are lost at mul [{BATCH}, {TOKENS}, {INNER}] in the model itself")


def test_tokens_of_one_head_may_be_treated_in_different_ways() -> None:
    """A class token that is not rotated has the same rows as the others."""

    def rotated(x: Tensor) -> Tensor:
        token, rest = x[:, :, :1], x[:, :, 1:]
        a, b = rest.chunk(2, -1)
        return torch.cat((token, torch.cat((a - b, a + b), -1)), 2)

    model, inputs, expected = made(
        lambda m, x: attend(rotated(split(m.q(x))), rotated(split(m.k(x))), split(m.v(x))), plain()
    )
    (found,) = find_qk_pairs(model, *inputs).sites
    assert (found.query, found.key, found.head_map) == (expected.query, expected.key, expected.head_map)


def test_projected_positions_are_a_projection() -> None:
    """Conditional DETR: half of each head compares positions; content that is zero throughout makes nothing."""

    def run(m: Any, x: Tensor) -> Tensor:
        places = torch.linspace(0, 1, TOKENS * WIDTH).view(TOKENS, WIDTH).expand_as(x)
        q = torch.cat((split(m.q(x)), split(m.q_place(m.places.expand_as(x)))), -1)
        k = torch.cat((split(m.k(x)), split(m.k_place(places)) + split(m.k_empty(torch.zeros_like(x)))), -1)
        return attend(q, k, split(m.v(x)))

    parts = {name: linear(INNER) for name in ("q", "k", "v", "q_place", "k_place", "k_empty")}
    model = Toy(run, places=torch.ones(TOKENS, WIDTH), **parts)
    (found,) = find_qk_pairs(model, X).sites
    assert [b.param for b in found.query] == ["q.weight", "q_place.weight"]
    assert [b.param for b in found.key] == ["k.weight", "k_place.weight"]
    assert found.terms == (LogitTerm((0,), (0,)), LogitTerm((1,), (1,)))
    assert verify_qk_pairs(model, QKLayout((found,)), torch.randn_like(X)).complete


def test_a_bias_without_the_keys_part() -> None:
    """Swin v2: the keys' part of a fused bias is set to zero in every forward."""

    def run(m: Any, x: Tensor) -> Tensor:
        bias = m.qkv.bias.clone()
        bias[INNER : 2 * INNER].zero_()
        return attend(*map(split, F.linear(x, m.qkv.weight, bias).chunk(3, -1)))

    (found,) = find_qk_pairs(Toy(run, qkv=linear(3 * INNER, bias=True)), X).sites
    assert found.query == (q_block("qkv.weight", bias="qkv.bias"),)
    assert found.key == (WeightBlock("qkv.weight", "k", 0, heads(HEADS, DIM, INNER)),)


def _flat(pair: tuple[nn.Module, tuple[Tensor, ...]]) -> tuple[Any, ...]:
    return (pair[0], *pair[1])


def test_a_router_is_no_attention() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        weights, picked = m.router(x).softmax(-1).topk(2)
        experts = torch.stack((m.up(x), m.down(x)), -2)
        return (experts * weights.unsqueeze(-1)).sum(-2) + picked.sum()

    layout = find_qk_pairs(Toy(run, router=linear(4), up=linear(WIDTH), down=linear(WIDTH)), X)
    assert not layout.sites


def test_what_no_op_reads_is_untouched() -> None:
    model, inputs, _ = separate()
    model.idle = nn.Linear(2, 3)
    assert set(find_qk_pairs(model, *inputs).untouched) == {"idle.weight", "idle.bias"}


# ---- graphs that others made -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt() -> nn.Module:
    module = example("gpt")
    return module.GPT(module.GPTConfig(vocab_size=16, context=8, layers=2, heads=HEADS, width=INNER)).eval()


IDS = torch.arange(10).view(2, 5)


def rows_of(layout: QKLayout, rename: Callable[[str], str] = str) -> list[AttentionSite]:
    """Sites without what only a module tree tells, their parameters renamed."""

    def renamed(blocks: tuple[WeightBlock, ...]) -> tuple[WeightBlock, ...]:
        return tuple(replace(b, param=rename(b.param), bias=b.bias and rename(b.bias)) for b in blocks)

    return [
        replace(canonical(s), name="", query=renamed(canonical(s).query), key=renamed(canonical(s).key))
        for s in layout.sites
    ]


def test_exported_graph_gives_the_same_rows(gpt: nn.Module) -> None:
    exported = torch.export.export(gpt, (IDS,)).module()
    assert rows_of(find_in_graph(exported)) == rows_of(find_qk_pairs(gpt, IDS))


def test_make_fx_graph_gives_the_same_rows(gpt: nn.Module) -> None:
    names = [n for n, _ in gpt.named_parameters()]

    def forward(values: dict[str, Tensor], ids: Tensor) -> Any:
        return torch.func.functional_call(gpt, values, (ids,))[0]

    values = dict(gpt.named_parameters())
    graph = make_fx(forward)(values, IDS)
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    layout = find_in_graph(graph, dict(zip(inputs, names, strict=False)), all_names=names)
    assert rows_of(layout) == rows_of(find_qk_pairs(gpt, IDS))


# ---- any arrangement of a fused weight -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    key_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    dim=st.integers(2, 6),
    order=st.permutations("qkv"),
    tiled=st.booleans(),
    bias=st.booleans(),
)
def test_rows_of_any_fused_weight(
    key_heads: int, group: int, dim: int, order: list[str], tiled: bool, bias: bool
) -> None:
    count = {"q": key_heads * group, "k": key_heads, "v": key_heads}
    widths = [count[s] * dim for s in order]
    start = {s: sum(widths[:i]) for i, s in enumerate(order)}

    def run(m: Any, x: Tensor) -> Tensor:
        part = {s: split(y, dim) for s, y in zip(order, m.w(x).split(widths, -1), strict=True)}
        k, v = (part[s].repeat(1, group, 1, 1) if tiled else part[s].repeat_interleave(group, 1) for s in "kv")
        return attend(part["q"], k, v)

    query, key = (
        WeightBlock("w.weight", s, 0, heads(count[s], dim, start[s]), "w.bias" if bias else None)  # type: ignore[arg-type]
        for s in "qk"
    )
    head_map = tuple(h % key_heads if tiled else h // group for h in range(count["q"]))
    expected = site("", query, key, dim, head_map=head_map, logit_scale=dim**-0.5)
    layout = find_qk_pairs(Toy(run, w=linear(sum(widths), bias)), X)
    assert len(layout.sites) == 1 and not layout.skipped
    assert_same(layout.sites[0], expected)


# ---- equal layers ----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Fused attention whose queries, keys and values stand in a given order, with grouped heads."""

    def __init__(self, order: str = "qkv", tiled: bool = False) -> None:
        super().__init__()
        self.order, self.tiled = order, tiled
        self.w, self.out = linear(3 * INNER + INNER, bias=True), linear(WIDTH, of=2 * INNER)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        widths = [2 * INNER if s == "q" else INNER for s in self.order]
        part = {s: split(y) for s, y in zip(self.order, self.w(self.norm(x)).split(widths, -1), strict=True)}
        k, v = (part[s].repeat(1, 2, 1, 1) if self.tiled else part[s].repeat_interleave(2, 1) for s in "kv")
        return x + self.out(attend(part["q"], k, v).transpose(1, 2).flatten(2))


def renamed(one: AttentionSite, to: str) -> AttentionSite:
    """A site of layer "0" as that of another layer."""

    def block(b: WeightBlock) -> WeightBlock:
        return replace(b, param=to + b.param[1:], bias=None if b.bias is None else to + b.bias[1:])

    return replace(one, name=to, query=tuple(map(block, one.query)), key=tuple(map(block, one.key)))


def test_each_of_equal_layers_is_as_if_alone() -> None:
    (alone,) = find_qk_pairs(nn.Sequential(Layer()), X).sites
    sites = find_qk_pairs(nn.Sequential(*(Layer() for _ in range(5))), X).sites
    assert list(sites) == [renamed(alone, str(i)) for i in range(5)]


@pytest.mark.parametrize("odd", [{"order": "kqv"}, {"order": "vkq"}, {"tiled": True}], ids=str)
def test_a_layer_that_differs_is_not_taken_for_the_others(odd: dict[str, Any]) -> None:
    (usual,) = find_qk_pairs(nn.Sequential(Layer()), X).sites
    (other,) = find_qk_pairs(nn.Sequential(Layer(**odd)), X).sites
    assert usual != other
    sites = find_qk_pairs(nn.Sequential(*(Layer(**(odd if i == 3 else {})) for i in range(5))), X).sites
    assert list(sites) == [renamed(other if i == 3 else usual, str(i)) for i in range(5)]


class Flipped(nn.Module):
    """Attention whose heads are taken in an order that only an index tensor tells."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.q, self.k, self.v = (linear(INNER) for _ in range(3))
        self.out = linear(WIDTH, of=INNER)
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x: Tensor) -> Tensor:
        k = split(self.k(x)).index_select(1, self.order)
        return x + self.out(attend(split(self.q(x)), k, split(self.v(x))).transpose(1, 2).flatten(2))


def test_layers_that_differ_in_an_index_alone_are_told_apart() -> None:
    orders = [[0, 1, 2], [0, 1, 2], [0, 1, 2], [2, 0, 1], [0, 1, 2]]
    sites = find_qk_pairs(nn.Sequential(*map(Flipped, orders)), X).sites
    for i, (one, order) in enumerate(zip(sites, orders, strict=True)):
        reads = [one.key[0].heads[k] for k in one.head_map]
        assert reads == [heads(HEADS, DIM)[h] for h in order], i
        assert one.query[0].heads == heads(HEADS, DIM)


def test_find_tells_how_it_was_done() -> None:
    model, inputs, _ = separate()
    steps: list[str] = []
    found = find(model, inputs, progress=steps.append)
    assert found.way == "hybrid" and found.fallback_reason is None
    assert found.nodes > 0 and set(found.seconds) == {"capture", "find"} and steps


def test_a_residual_stream_is_no_projection() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.second(x.relu())
        return attend(split(x), split(self.k(x)), split(x))

    layout = find_qk_pairs(Toy(run, first=linear(INNER), second=linear(INNER, of=INNER), k=linear(INNER, of=INNER)), X)
    assert not layout.sites
    assert [entry.code for entry in layout.skipped] == ["residual-query"]


def test_a_mask_made_of_products_is_no_part_of_the_logits() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        mask = self.mask(x) @ self.mask(x).transpose(-1, -2) < 0
        logits = (split(self.q(x)) @ split(self.k(x)).mT).masked_fill(mask[:, None], -1e9)
        return logits.softmax(-1) @ split(self.v(x))

    parts = {name: linear(INNER) for name in ("q", "k", "v", "mask")}
    (found,) = find_qk_pairs(Toy(run, **parts), X).sites
    assert [block.param for block in (*found.query, *found.key)] == ["q.weight", "k.weight"]


@pytest.mark.parametrize(
    ("bend", "params"), [(nn.GELU(), ["k.weight"]), (nn.RMSNorm(INNER), ["down.weight", "k.weight"])]
)
def test_a_chain_ends_where_a_nonlinear_function_stands(bend: nn.Module, params: list[str]) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        return attend(split(self.q(x)), split(self.k(self.bend(self.down(x)))), split(self.v(x)))

    parts = {"q": linear(INNER), "v": linear(INNER), "down": linear(INNER), "k": linear(INNER, of=INNER)}
    (found,) = find_qk_pairs(Toy(run, bend=bend, **parts), X).sites
    assert [block.param for block in found.key] == params
