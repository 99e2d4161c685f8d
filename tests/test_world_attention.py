"""Stand-ins for fused attention and for layers of timm: what they compute, beside a plain softmax written out here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quack_fx.find import find, find_qk_pairs
from quack_fx.targets import resolve
from quack_fx.targets.world import attention as fused
from quack_fx.targets.world import flash_attn, timm_vit, vision
from quack_fx.targets.world.known import _KNOWN, meaning

EXACT = {"rtol": 0.0, "atol": 1e-12}
HEADS, KEY_HEADS, DIM = 4, 2, 6


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sees: Callable[[int, int], bool] = lambda t, s: True,
    scale: float | None = None,
    bias: Callable[[int, int, int], float] = lambda h, t, s: 0.0,
    bend: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """One sequence, one query at a time: q [T, H, D], k and v [S, K, D]; a query that sees nothing gives zeros."""
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[-1], dtype=torch.float64)
    for h in range(q.shape[1]):
        g = h * k.shape[1] // q.shape[1]
        for t in range(q.shape[0]):
            seen = [s for s in range(k.shape[0]) if sees(t, s)]
            if seen:
                logits = bend(k[seen, g] @ q[t, h] * (DIM**-0.5 if scale is None else scale))
                logits = logits + torch.tensor([bias(h, t, s) for s in seen], dtype=torch.float64)
                weights = logits.exp() / logits.exp().sum()
                out[t, h] = weights @ v[seen, g]
    return out


def batch(of: Callable[..., Tensor], *tensors: Tensor, **more: Any) -> Tensor:
    """The reference for each sequence of a batch."""
    return torch.stack([of(*each, **more) for each in zip(*tensors, strict=True)])


def last_beside_last(t: int, s: int) -> Callable[[int, int], bool]:
    """Causal: the last query of t sees the last key of s."""
    return lambda i, j: j <= i + s - t


SLOPES = torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.float64)
OPTIONS: dict[str, tuple[dict[str, Any], Callable[[int, int], dict[str, Any]]]] = {
    # What is given, and what it means for t queries and s keys.
    "plain": ({}, lambda t, s: {}),
    "causal": ({"causal": True}, lambda t, s: {"sees": last_beside_last(t, s)}),
    "scale": ({"softmax_scale": 0.3}, lambda t, s: {"scale": 0.3}),
    "window": (
        {"window_size": (2, 1)},
        lambda t, s: {"sees": lambda i, j: -1 <= i + s - t - j <= 2},
    ),
    "causal window": (
        {"causal": True, "window_size": (2, 0)},
        lambda t, s: {"sees": lambda i, j: 0 <= i + s - t - j <= 2},
    ),
    "softcap": ({"softcap": 1.5}, lambda t, s: {"bend": lambda x: 1.5 * torch.tanh(x / 1.5)}),
    "causal softcap": (
        {"softcap": 1.5, "causal": True},
        lambda t, s: {"bend": lambda x: 1.5 * torch.tanh(x / 1.5), "sees": last_beside_last(t, s)},
    ),
    "alibi": (
        {"causal": True, "alibi_slopes": SLOPES},
        lambda t, s: {
            "sees": last_beside_last(t, s),
            "bias": lambda h, i, j: -float(SLOPES[h]) * abs(i + s - t - j),
        },
    ),
    "dropout is none": ({"dropout_p": 0.5}, lambda t, s: {}),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(("t", "s", "key_heads"), [(5, 5, HEADS), (5, 5, KEY_HEADS), (3, 7, KEY_HEADS), (7, 3, 1)])
def test_flash_attn_func(option: str, t: int, s: int, key_heads: int) -> None:
    given, meant = OPTIONS[option]
    q, k, v = rows(2, t, HEADS, DIM), rows(2, s, key_heads, DIM), rows(2, s, key_heads, DIM)
    expected = batch(softmax_attention, q, k, v, **meant(t, s))
    torch.testing.assert_close(flash_attn.flash_attn_func(q, k, v, **given), expected, **EXACT)
    kv = torch.stack((k, v), 2)
    torch.testing.assert_close(flash_attn.flash_attn_kvpacked_func(q, kv, **given), expected, **EXACT)
    without = {n: x for n, x in given.items() if n != "dropout_p"}
    torch.testing.assert_close(flash_attn.flash_attn_with_kvcache(q, k, v, **without), expected, **EXACT)
    torch.testing.assert_close(flash_attn.flash_attn_3_func(q, k, v, **without), expected, **EXACT)
    empty = torch.zeros_like(k)
    torch.testing.assert_close(flash_attn.flash_attn_with_kvcache(q, empty, empty, k, v, **without), expected, **EXACT)
    if t == s and key_heads == HEADS:
        packed = torch.stack((q, k, v), 2)
        torch.testing.assert_close(flash_attn.flash_attn_qkvpacked_func(packed, **given), expected, **EXACT)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("of_q", "of_k"), [((3, 1, 4), (3, 1, 4)), ((2, 3), (5, 3)), ((1, 0, 2), (3, 2, 1)), ((4,), (4,))]
)
@pytest.mark.parametrize("key_heads", [HEADS, KEY_HEADS])
def test_joined_sequences(option: str, of_q: tuple[int, ...], of_k: tuple[int, ...], key_heads: int) -> None:
    given, meant = OPTIONS[option]
    q = rows(sum(of_q), HEADS, DIM)
    k, v = rows(sum(of_k), key_heads, DIM), rows(sum(of_k), key_heads, DIM)
    parts = zip(q.split(of_q), k.split(of_k), v.split(of_k), strict=True)
    expected = torch.cat([softmax_attention(*p, **meant(len(p[0]), len(p[1]))) for p in parts])
    starts_q, starts_k = starts(of_q), starts(of_k)
    arguments = starts_q, starts_k, max(of_q), max(of_k)
    torch.testing.assert_close(flash_attn.flash_attn_varlen_func(q, k, v, *arguments, **given), expected, **EXACT)
    kv = torch.stack((k, v), 1)
    torch.testing.assert_close(
        flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *arguments, **given), expected, **EXACT
    )
    without = {n: x for n, x in given.items() if n != "dropout_p"}
    torch.testing.assert_close(flash_attn.flash_attn_3_varlen_func(q, k, v, *arguments, **without), expected, **EXACT)
    if of_q == of_k and key_heads == HEADS:
        packed = torch.stack((q, k, v), 1)
        out = flash_attn.flash_attn_varlen_qkvpacked_func(packed, starts_q, max(of_q), **given)
        torch.testing.assert_close(out, expected, **EXACT)


def starts(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_arguments_by_place_mean_what_they_mean_in_each_package() -> None:
    q, k, v = rows(1, 3, HEADS, DIM), rows(1, 3, HEADS, DIM), rows(1, 3, HEADS, DIM)
    expected = batch(softmax_attention, q, k, v, scale=0.3, sees=last_beside_last(3, 3))
    second, third = meaning("flash_attn.flash_attn_func"), meaning("flash_attn_interface.flash_attn_func")
    torch.testing.assert_close(second(q, k, v, 0.0, 0.3, True), expected, **EXACT)
    torch.testing.assert_close(third(q, k, v, 0.3, True), expected, **EXACT)
    packed, at = torch.stack((q, k, v), 2), starts([3])
    torch.testing.assert_close(flash_attn.flash_attn_qkvpacked_func(packed, 0.0, 0.3, True), expected, **EXACT)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(packed[0], at, 3, 0.0, 0.3, True)
    torch.testing.assert_close(out[None], expected, **EXACT)


def test_weights_that_are_asked_for_stand_beside_the_output() -> None:
    q, at = rows(1, 3, HEADS, DIM), starts([3])
    plain = flash_attn.flash_attn_func(q, q, q)
    out, *more = flash_attn.flash_attn_func(q, q, q, return_attn_probs=True)
    joined, *_ = flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], at, at, 3, 3, return_attn_probs=True)
    torch.testing.assert_close(out, plain, **EXACT)
    torch.testing.assert_close(joined, plain[0], **EXACT)
    assert len(more) == 2


Q = rows(1, 3, HEADS, DIM)
REFUSED: dict[str, Callable[[], Any]] = {
    "rotary embeddings inside": lambda: flash_attn.flash_attn_with_kvcache(Q, Q, Q, Q, Q, Q, Q),
    "a part of the cache": lambda: flash_attn.flash_attn_with_kvcache(Q, Q, Q, cache_seqlens=torch.tensor([2])),
    "pages": lambda: flash_attn.flash_attn_varlen_func(Q[0], Q[0], Q[0], starts([3]), starts([3]), block_table=Q),
    "sinks": lambda: flash_attn.flash_attn_func(Q, Q, Q, s_aux=SLOPES),
    "used parts": lambda: flash_attn.flash_attn_3_varlen_func(Q, Q, Q, Q, Q, 3, 3, SLOPES),
    "weights of version 1": lambda: flash_attn.FlashAttention()(torch.stack((Q, Q, Q), 2), need_weights=True),
    "an unknown bias": lambda: fused.memory_efficient_attention(Q, Q, Q, attn_bias=object()),
    "a bias that is inert": lambda: fused.memory_efficient_attention(Q, Q, Q, meaning_or_inert("SomeOtherMask")),
    "turned on joined sequences": lambda: flash_attn.apply_rotary_emb(Q[0], Q, Q, cu_seqlens=starts([3])),
    "sums of sageattn": lambda: fused.sageattn(Q, Q, Q, return_lse=True),
    "a mask of sageattn": lambda: fused.sageattn(Q, Q, Q, attn_mask=Q),
}


def meaning_or_inert(name: str) -> Any:
    from quack_fx.targets.world.inert import Inert

    return meaning(f"xformers.ops.{name}") or Inert(f"xformers.ops.{name}")


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_written_out_is_refused(case: str) -> None:
    with pytest.raises(NotImplementedError, match="no stand-in"):
        REFUSED[case]()


# ---- modules of flash_attn -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_modules_of_flash_attention(causal: bool, scale: float | None) -> None:
    q, k, v = rows(2, 4, HEADS, DIM), rows(2, 4, HEADS, DIM), rows(2, 4, HEADS, DIM)
    sees = last_beside_last(4, 4) if causal else lambda t, s: True
    expected = batch(softmax_attention, q, k, v, sees=sees, scale=scale)
    qkv, kv, at = torch.stack((q, k, v), 2), torch.stack((k, v), 2), starts([4, 4])
    first, self_, cross = (
        flash_attn.FlashAttention(softmax_scale=scale),
        flash_attn.FlashSelfAttention(causal=causal, softmax_scale=scale),
        flash_attn.FlashCrossAttention(causal=causal, softmax_scale=scale),
    )
    torch.testing.assert_close(first(qkv, causal=causal)[0], expected, **EXACT)
    torch.testing.assert_close(self_(qkv), expected, **EXACT)
    torch.testing.assert_close(cross(q, kv), expected, **EXACT)
    joined = expected.flatten(0, 1)
    torch.testing.assert_close(first(qkv.flatten(0, 1), None, causal, at, 4)[0], joined, **EXACT)
    torch.testing.assert_close(self_(qkv.flatten(0, 1), cu_seqlens=at, max_seqlen=4), joined, **EXACT)
    more = {"cu_seqlens": at, "max_seqlen": 4, "cu_seqlens_k": at, "max_seqlen_k": 4}
    torch.testing.assert_close(cross(q.flatten(0, 1), kv.flatten(0, 1), **more), joined, **EXACT)


def test_padding_is_seen_by_nobody() -> None:
    q, k, v = rows(2, 4, HEADS, DIM), rows(2, 4, HEADS, DIM), rows(2, 4, HEADS, DIM)
    kept = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    out = flash_attn.FlashAttention()(torch.stack((q, k, v), 2), kept)[0]
    for b, n in enumerate((3, 2)):
        expected = softmax_attention(q[b, :n], k[b, :n], v[b, :n])
        torch.testing.assert_close(out[b, :n], expected, **EXACT)
        assert not out[b, n:].any()


def test_padding_and_back() -> None:
    x, kept = rows(3, 5, 2, DIM), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    tokens, indices, at, longest = flash_attn.unpad_input(x, kept)
    assert tokens.shape == (8, 2, DIM) and at.tolist() == [0, 2, 7, 8] and longest == 5
    assert torch.equal(tokens, x[kept.bool()]) and at.dtype == torch.int32
    assert torch.equal(flash_attn.pad_input(tokens, indices, 3, 5), x * kept[..., None, None])
    assert torch.equal(flash_attn.index_first_axis(x.flatten(0, 1), indices), tokens)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "offset"), [(DIM, 0), (4, 0), (4, 2)])
def test_rotary_embedding(interleaved: bool, width: int, offset: int) -> None:
    x, angles = rows(2, 5, HEADS, DIM), rows(9, width // 2)
    turn = torch.polar(torch.ones_like(angles), angles)[offset : offset + 5, None]
    pairs = (
        [(2 * i, 2 * i + 1) for i in range(width // 2)]
        if interleaved
        else [(i, i + width // 2) for i in range(width // 2)]
    )
    expected = x.clone()
    for i, (a, b) in enumerate(pairs):
        turned = torch.complex(x[..., a], x[..., b]) * turn[..., i]
        expected[..., a], expected[..., b] = turned.real, turned.imag
    out = flash_attn.apply_rotary_emb(x, angles.cos(), angles.sin(), interleaved, seqlen_offsets=offset)
    torch.testing.assert_close(out, expected, **EXACT)
    flash_attn.apply_rotary_emb(x, angles.cos(), angles.sin(), interleaved, inplace=True, seqlen_offsets=offset)
    torch.testing.assert_close(x, expected, **EXACT)


# ---- xformers and others ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "causal", "causal from the end", "bias"])
@pytest.mark.parametrize(("t", "s"), [(4, 4), (3, 5), (5, 3)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_memory_efficient_attention(mask: str, t: int, s: int, scale: float | None) -> None:
    q, k, v = rows(2, t, 2, 3, DIM), rows(2, s, 2, 3, DIM), rows(2, s, 2, 3, DIM)  # [B, T, G, H, D]
    bias = rows(2, 2, 3, t, s)
    sees: dict[str, Callable[[int, int], bool]] = {
        "causal": lambda i, j: j <= i,
        "causal from the end": last_beside_last(t, s),
    }
    given: dict[str, Any] = {
        "none": None,
        "causal": fused.LowerTriangularMask(),
        "causal from the end": fused.LowerTriangularFromBottomRightMask(),
        "bias": bias,
    }

    def expected(b: int, g: int, heads: slice) -> Tensor:
        def added(h: int, i: int, j: int) -> float:
            return float(bias[b, g, range(3)[heads][h], i, j]) if mask == "bias" else 0.0

        seen = sees.get(mask, lambda i, j: True)
        return softmax_attention(q[b, :, g, heads], k[b, :, g, heads], v[b, :, g, heads], seen, scale, added)

    attend, what = fused.memory_efficient_attention, given[mask]
    grouped = torch.stack([torch.stack([expected(b, g, slice(None)) for g in range(2)], 1) for b in range(2)])
    torch.testing.assert_close(attend(q, k, v, what, scale=scale), grouped, **EXACT)
    four = [x[:, :, 1] for x in (q, k, v)]
    what = bias[:, 1] if mask == "bias" else what
    torch.testing.assert_close(attend(*four, attn_bias=what, scale=scale), grouped[:, :, 1], **EXACT)
    three = [x[:, :, 1, 2] for x in (q, k, v)]
    what = bias[:, 1, 2] if mask == "bias" else what
    torch.testing.assert_close(attend(*three, what, 0.0, scale), grouped[:, :, 1, 2], **EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_attend_to_themselves_alone(causal: bool) -> None:
    of_q, of_k = [2, 3], [4, 3]
    q, k, v = rows(1, 5, 2, DIM), rows(1, 7, 2, DIM), rows(1, 7, 2, DIM)
    mask = meaning("xformers.ops.fmha.BlockDiagonalMask").from_seqlens(of_q, of_k)
    mask = mask.make_causal() if causal else mask
    out = fused.memory_efficient_attention(q, k, v, mask)
    for qs, ks in ((slice(0, 2), slice(0, 4)), (slice(2, 5), slice(4, 7))):
        alone = softmax_attention(q[0, qs], k[0, ks], v[0, ks], lambda i, j: not causal or j <= i, None)
        torch.testing.assert_close(out[0, qs], alone, **EXACT)


@pytest.mark.parametrize("conj", [False, True])
def test_the_rotary_extension_writes_what_it_rotates(conj: bool) -> None:
    (x1, x2), angles = rows(2, 1, 3, 2, 4), rows(3, 1, 4)
    turned = torch.complex(x1, x2) * torch.polar(torch.ones_like(angles), -angles if conj else angles)
    meaning("rotary_emb.apply_rotary")(x1, x2, angles.cos(), angles.sin(), x1, x2, conj)
    torch.testing.assert_close(torch.complex(x1, x2), turned, **EXACT)


@pytest.mark.parametrize("width", [8, 12])
def test_rotary_embeddings_turn_pairs_of_features(width: int) -> None:
    """Against a product of complex numbers; features beyond the first 8 stay."""
    q = torch.randn(2, 3, 5, width)
    turn = torch.polar(torch.ones(5, 4), torch.outer(torch.arange(5.0) + 2, 1e4 ** (-torch.arange(0, 8, 2) / 8)))
    turned = torch.view_as_real(torch.view_as_complex(q[..., :8].unflatten(-1, (4, 2)).contiguous()) * turn).flatten(-2)
    rotary = meaning("rotary_embedding_torch.RotaryEmbedding")(8)
    expected = torch.cat((turned, q[..., 8:]), -1)
    torch.testing.assert_close(rotary.rotate_queries_or_keys(q, offset=2), expected)
    torch.testing.assert_close(
        rotary.rotate_queries_or_keys(q.transpose(1, 2), seq_dim=1, offset=2), expected.transpose(1, 2)
    )
    torch.testing.assert_close(
        rotary.rotate_queries_with_cached_keys(q[..., 3:, :], q, offset=2)[0], expected[..., 3:, :]
    )
    torch.testing.assert_close(
        meaning("rotary_embedding_torch.apply_rotary_emb")(rotary(torch.arange(5), offset=2), q), expected
    )
    with pytest.raises(NotImplementedError):
        meaning("rotary_embedding_torch.RotaryEmbedding")(8, use_xpos=True)


def test_quaternions_rotate_as_their_matrices_do() -> None:
    a, b, point = rows(5, 4), rows(5, 4), rows(5, 3)
    apply, matrix = (meaning(f"pytorch3d.transforms.quaternion_{n}") for n in ("apply", "to_matrix"))
    unit = torch.nn.functional.normalize(a, dim=-1)
    torch.testing.assert_close(apply(unit, point), (matrix(a) @ point[..., None])[..., 0], **EXACT)
    product = meaning("pytorch3d.transforms.quaternion_multiply")(a, b)
    torch.testing.assert_close(matrix(product), matrix(a) @ matrix(b), **EXACT)
    assert bool((product[..., 0] >= 0).all())


@pytest.mark.parametrize("packed", [False, True])
def test_a_gated_layer(packed: bool) -> None:
    layer = meaning("xformers.ops.SwiGLU")(8, 12, bias=False, _pack_weights=packed).double()
    x = rows(2, 3, 8)
    w1, w2 = layer.w12.weight.chunk(2) if packed else (layer.w1.weight, layer.w2.weight)
    expected = (torch.nn.functional.silu(x @ w1.T) * (x @ w2.T)) @ layer.w3.weight.T
    torch.testing.assert_close(layer(x), expected, **EXACT)


def test_a_registry_makes_what_was_registered() -> None:
    registry = meaning("mmcv.Registry")("models")

    @registry.register_module()
    class One:
        def __init__(self, size: int = 1, other: int = 2) -> None:
            self.size, self.other = size, other

    @registry.register_module(name="second")
    class Two(One):
        pass

    assert registry.get("One") is One and "second" in registry
    made = registry.build({"type": "second", "size": 3}, default_args={"other": 4})
    assert isinstance(made, Two) and (made.size, made.other) == (3, 4)


@pytest.mark.parametrize("causal", [False, True])
def test_sageattn(causal: bool) -> None:
    q, k, v = rows(2, 4, HEADS, DIM), rows(2, 4, KEY_HEADS, DIM), rows(2, 4, KEY_HEADS, DIM)
    expected = batch(softmax_attention, q, k, v, scale=0.3, **({"sees": last_beside_last(4, 4)} if causal else {}))
    more = {"is_causal": causal, "sm_scale": 0.3}
    torch.testing.assert_close(fused.sageattn(q, k, v, tensor_layout="NHD", **more), expected, **EXACT)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(fused.sageattn(*heads_first, **more), expected.transpose(1, 2), **EXACT)


# ---- layers ----------------------------------------------------------------------------------------------------------


def test_layers_of_timm_keep_shapes() -> None:
    image, tokens = torch.randn(2, 3, 32, 48), torch.randn(2, 5, 16)
    patches = vision.PatchEmbed((32, 48), 8, 3, 16)
    assert patches(image).shape == (2, 24, 16) and patches.num_patches == 24 and patches.grid_size == (4, 6)
    for layer in (vision.Attention(16, 4, qkv_bias=True, qk_norm=True), vision.Mlp(16, 32), vision.Block(16, 4)):
        assert layer(tokens).shape == tokens.shape
    assert vision.Mlp(16, 32, 8)(tokens).shape == (2, 5, 8)
    assert torch.equal(vision.DropPath(0.9).train()(tokens), tokens)
    assert vision.to_2tuple(3) == (3, 3) and vision.to_2tuple([3, 4]) == (3, 4)


def test_attention_of_timm_is_attention() -> None:
    model, x = vision.Attention(8, 2).double(), rows(2, 5, 8)
    q, k, v = model.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
    expected = model.proj(batch(softmax_attention, q, k, v, scale=4**-0.5).flatten(2))
    torch.testing.assert_close(model(x), expected, **EXACT)


@pytest.mark.parametrize("name", ["Attention(16, 4)", "Block(16, 4, qkv_bias=True)"])
def test_rows_of_timms_attention(name: str) -> None:
    model = eval(name, vars(vision))
    (site,) = find_qk_pairs(model, torch.randn(2, 5, 16)).sites
    prefix = "attn." if "Block" in name else ""
    assert site.query_heads == 4 and site.head_dim == 4
    for blocks, offset in ((site.query, 0), (site.key, 16)):
        (block,) = blocks
        assert block.param == f"{prefix}qkv.weight"
        assert [h[0] for h in block.heads] == [(offset + 4 * i, offset + 4 * i + 4) for i in range(4)]


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (vision.Block, {"dim": 8, "num_heads": 2, "init_values": 1e-5}),
        (vision.Attention, {"dim": 8, "qk_scale": 2.0}),
        (vision.Mlp, {"in_features": 8, "use_conv": True}),
        (meaning("transformer_engine.pytorch.RMSNorm"), {"normalized_shape": 8, "zero_centered_gamma": True}),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_options_of_layers_that_change_what_they_compute_are_refused(layer: Any, options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="no stand-in"):
        layer(**options)


@pytest.mark.parametrize("name", ["apex.normalization.FusedRMSNorm", "apex.normalization.FusedLayerNorm"])
def test_fused_norms_take_their_options_by_place(name: str) -> None:
    kind, x = meaning(name), rows(2, 8)
    plain = {"FusedRMSNorm": nn.RMSNorm, "FusedLayerNorm": nn.LayerNorm}[name.rsplit(".", 1)[1]]
    torch.testing.assert_close(kind(8, 0.5).double()(x), plain(8, eps=0.5).double()(x), **EXACT)
    assert not list(kind(8, elementwise_affine=False).parameters()) and kind(8).eps == 1e-5


def test_layers_that_ranks_share_are_whole_on_one() -> None:
    x = torch.randn(2, 3, 8)
    for package in ("fairscale.nn.model_parallel.layers", "megatron.core.tensor_parallel"):
        layer = meaning(f"{package}.ColumnParallelLinear")(8, 6, bias=False)
        out = layer(x)
        out = out[0] if "megatron" in package else out  # megatron gives a bias beside
        torch.testing.assert_close(out, x @ layer.weight.T)
    assert meaning("fairscale.nn.model_parallel.initialize.get_model_parallel_world_size")() == 1


def test_every_known_name_is_told_by_its_package_alone() -> None:
    for package, names in _KNOWN.items():
        for name, value in names.items():
            assert meaning(f"{package}.somewhere.else_.{name}") is value
            assert meaning(f"another.{name}") is None


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_rows_through_fused_attention(device: str, own_folder: Path) -> None:
    source = """
import torch
from torch import nn
from flash_attn import {name}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
    def forward(self, x):
        q, k, v = self.q(x).unflatten(-1, (4, 4)), self.k(x).unflatten(-1, (2, 4)), self.v(x).unflatten(-1, (2, 4))
        return {call}
"""
    calls = {
        "flash_attn_func": "flash_attn_func(q, k, v, causal=True, window_size=(2, 0))",
        "flash_attn_kvpacked_func": "flash_attn_kvpacked_func(q, torch.stack((k, v), 2))",
        "flash_attn_with_kvcache": "flash_attn_with_kvcache(q, torch.zeros_like(k), torch.zeros_like(v), k, v)",
        "flash_attn_varlen_func": "flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), "
        "*[torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1])] * 2, 4, 4, causal=True)",
    }
    for name, call in calls.items():
        file = own_folder / f"{name}_model.py"
        file.write_text(source.format(name=name, call=call))
        target = resolve(str(file), real=device == "cpu")
        (site,) = find(target.model, target.args, target.kwargs, recording=target.recording).layout.sites
        assert (site.query_heads, site.key_heads, site.head_dim) == (4, 2, 4), name
        assert [b.param for b in (*site.query, *site.key)] == ["q.weight", "k.weight"]
        assert [h[0] for h in site.query[0].heads] == [(4 * i, 4 * i + 4) for i in range(4)]
        assert ("missing", "flash_attn cannot be imported here and had stand-ins") in target.notes


@pytest.mark.parametrize("more", [{}, {"distilled": True}, {"global_pool": "avg", "qk_norm": True}, {"num_classes": 0}])
def test_the_transformer_of_timm(more: dict[str, Any]) -> None:
    model = timm_vit.VisionTransformer(32, 8, embed_dim=16, depth=2, num_heads=4, **{"num_classes": 7, **more})
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, more.get("num_classes", 7) or 16)
    front = 2 if "distilled" in more else 1
    assert model.forward_features(x).shape == (2, 16 + front, 16) == model.pos_embed.expand(2, -1, -1).shape
    assert [(s.name, s.query_heads) for s in find_qk_pairs(model, x).sites] == [(f"blocks.{i}.attn", 4) for i in (0, 1)]


def test_models_of_timm_by_name() -> None:
    with torch.device("meta"):
        model = timm_vit.create_model("vit_deit_tiny_distilled_patch16_384", pretrained=True, num_classes=None)
    assert isinstance(model, timm_vit.VisionTransformer) and model.pos_embed.shape == (1, 578, 192)
    for name in ("resnet50", "vit_small_patch16_224"):
        with pytest.raises(NotImplementedError, match="install timm"):
            timm_vit.create_model(name)
    with pytest.raises(NotImplementedError, match="reg_tokens"):
        timm_vit.VisionTransformer(reg_tokens=4)
