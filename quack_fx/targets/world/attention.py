"""Fused attention functions of packages for GPUs, written out in torch: what they compute, not how.

In: the arguments that the packages' own functions take. Out: what those return. They stand in where the package is not
installed, so that a model's attention can be seen on any machine. Each goes through `scaled_dot_product_attention`.

Letters at the end of a tensor's name are its shape: B sequences, T queries, S keys, N tokens of all sequences in a row,
H heads of queries, K heads of keys, D features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quack_fx.targets.world.inert import Inert


def _attend(
    q_BTHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, scale: float | None, causal: bool, mask: Tensor | None = None
) -> Tensor:
    """Softmax attention; the queries are the last ones of the sequence where there are fewer than keys."""
    t, s = q_BTHD.shape[1], k_BSKD.shape[1]
    if causal and t != s:
        mask, causal = torch.ones(t, s, dtype=torch.bool).tril(s - t), False
    out_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BSKD.transpose(1, 2),
        v_BSKD.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q_BTHD.shape[2] != k_BSKD.shape[2],
    )
    return out_BHTD.transpose(1, 2)


# ---- flash_attn ------------------------------------------------------------------------------------------------------


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_func`: q [B, T, H, D], k and v [B, S, K, D] -> [B, T, H, D]."""
    return _returned(_attend(q, k, v, softmax_scale, causal), kwargs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_qkvpacked_func`: [B, T, 3, H, D] -> [B, T, H, D]."""
    q, k, v = qkv.unbind(2)
    return _returned(_attend(q, k, v, softmax_scale, causal), kwargs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_kvpacked_func`: q [B, T, H, D], kv [B, S, 2, K, D] -> [B, T, H, D]."""
    k, v = kv.unbind(2)
    return _returned(_attend(q, k, v, softmax_scale, causal), kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_varlen_func`: sequences joined to one row; q [N, H, D], k and v [N, K, D] -> [N, H, D].

    Tokens attend to those of their own sequence: a mask says which.
    """
    of_query, of_key = _sequence_of(cu_seqlens_q, q.shape[0]), _sequence_of(cu_seqlens_k, k.shape[0])
    mask = of_query[0][:, None] == of_key[0][None]
    if causal:  # the last query of a sequence sees its last key
        mask = mask & (of_key[1][None] <= of_query[1][:, None])
    out = _attend(q[None], k[None], v[None], softmax_scale, False, mask)[0]
    return _returned(out, kwargs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int = 0,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_varlen_qkvpacked_func`: [N, 3, H, D] -> [N, H, D]."""
    q, k, v = qkv.unbind(1)
    starts = cu_seqlens
    return flash_attn_varlen_func(q, k, v, starts, starts, softmax_scale=softmax_scale, causal=causal, **kwargs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_varlen_kvpacked_func`: q [N, H, D], kv [N, 2, K, D] -> [N, H, D]."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=softmax_scale, causal=causal, **kwargs
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *args: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_with_kvcache`: new keys and values are appended to an empty cache."""
    if any(kwargs.get(name) is not None for name in ("rotary_cos", "rotary_sin")):
        raise NotImplementedError("flash_attn_with_kvcache with rotary embeddings inside has no stand-in")
    keys, values = (k_cache, v_cache) if k is None or v is None else (k, v)
    return _returned(_attend(q, keys, values, softmax_scale, causal), kwargs)


class FlashAttention(nn.Module):
    """`flash_attn.flash_attention.FlashAttention` of version 1."""

    def __init__(self, softmax_scale: float | None = None, *args: Any, causal: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.scale, self.causal = softmax_scale, causal

    def forward(
        self,
        qkv: Tensor,
        key_padding_mask: Tensor | None = None,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_s: int | None = None,
        need_weights: bool = False,
        **kwargs: Any,
    ) -> Any:
        """[B, T, 3, H, D] or, with `cu_seqlens`, [N, 3, H, D]."""
        causal = self.causal if causal is None else causal
        if cu_seqlens is None:
            out = flash_attn_qkvpacked_func(qkv, softmax_scale=self.scale, causal=causal)
        else:
            out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, softmax_scale=self.scale, causal=causal)
        return out, None


class FlashSelfAttention(nn.Module):
    """`flash_attn.modules.mha.FlashSelfAttention`."""

    def __init__(self, causal: bool = False, softmax_scale: float | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.inner = FlashAttention(softmax_scale=softmax_scale, causal=causal)

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `FlashAttention`, without weights."""
        return self.inner(qkv, None, causal, cu_seqlens)[0]


class FlashCrossAttention(nn.Module):
    """`flash_attn.modules.mha.FlashCrossAttention`."""

    def __init__(self, causal: bool = False, softmax_scale: float | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.scale, self.causal = softmax_scale, causal

    def forward(self, q: Tensor, kv: Tensor, causal: bool | None = None, **kwargs: Any) -> Any:
        """Queries [B, T, H, D], keys and values [B, S, 2, K, D]."""
        return flash_attn_kvpacked_func(q, kv, 0.0, self.scale, self.causal if causal is None else causal)


def unpad_input(hidden_states: Tensor, attention_mask: Tensor, *args: Any) -> Any:
    """`flash_attn.bert_padding.unpad_input`: [B, T, ...] -> ([N, ...], indices, starts, longest)."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    rows = hidden_states.flatten(0, 1)[indices]
    return rows, indices, starts, int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """`flash_attn.bert_padding.pad_input`: [N, ...] -> [B, T, ...]."""
    full = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    padded: Tensor = full.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
    return padded


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """`flash_attn.bert_padding.index_first_axis`."""
    return x[indices]


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *args: Any, **kwargs: Any) -> Any:
    """`flash_attn.layers.rotary.apply_rotary_emb`: x [B, T, H, D], cos and sin [T, R / 2]; R features are rotated."""
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    cos, sin = cos[: x.shape[1], None], sin[: x.shape[1], None]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((out, rest), -1)


def _returned(out: Tensor, kwargs: dict[str, Any]) -> Any:
    """The output, with the numbers that flash_attn gives back beside it when asked for weights."""
    return (out, None, None) if kwargs.get("return_attn_probs") else out


def _sequence_of(starts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """For each token of a row of sequences the number of its sequence, and its distance from that one's end."""
    at = torch.arange(n)
    sequence = (at[:, None] >= starts[None, 1:]).sum(1)
    ends = starts[1:][sequence.clamp(max=len(starts) - 2)]
    return sequence, at - ends  # numbers below zero that grow along the sequence


# ---- xformers --------------------------------------------------------------------------------------------------------


class LowerTriangularMask:
    """`xformers.ops.LowerTriangularMask`: causal attention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """`xformers.ops.memory_efficient_attention`: [B, T, H, D], [B, T, D] (one head) or [B, T, G, H, D] (groups)."""
    causal = isinstance(attn_bias, LowerTriangularMask)
    mask = attn_bias if isinstance(attn_bias, Tensor) else None
    if not (causal or mask is not None or attn_bias is None or isinstance(attn_bias, Inert)):
        raise NotImplementedError(f"attn_bias={type(attn_bias).__name__} has no stand-in")
    if query.dim() == 3:
        mask = mask[:, None] if mask is not None and mask.dim() == 3 else mask
        return _attend(query[:, :, None], key[:, :, None], value[:, :, None], scale, causal, mask)[:, :, 0]
    if query.dim() == 5:  # groups of query heads, each with a key head that is repeated
        parts = [
            _attend(query[:, :, g], key[:, :, g], value[:, :, g], scale, causal, mask) for g in range(query.shape[2])
        ]
        return torch.stack(parts, 2)
    return _attend(query, key, value, scale, causal, mask)


# ---- others ----------------------------------------------------------------------------------------------------------


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """`sageattention.sageattn`: [B, H, T, D], or [B, T, H, D] with the layout "NHD"."""
    if tensor_layout == "NHD":
        return _attend(q, k, v, sm_scale, is_causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _attend(q, k, v, sm_scale, is_causal).transpose(1, 2)
