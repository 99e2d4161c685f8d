"""The functions and modules of flash_attn, written out in torch: what they compute, not how.

In and out as in `attention.py`, whose letters at the end of a tensor's name are meant here, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quack_fx.targets.world.attention import attend, both_masks, distance_between

Window = tuple[int, int] | None


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window: Window,
    softcap: float,
    slopes: Tensor | None,
    given: dict[str, Any],
    mask: Tensor | None = None,
    distance: Tensor | None = None,
) -> Any:
    """Attention with what flash_attn's functions share.

    Arguments:
        q, k, v: [B, T, H, D], [B, S, K, D] twice.
        scale: Of the logits.
        causal: Whether queries see no later keys.
        window: How many keys before and after each query are seen; below zero, all.
        softcap: Bound of the logits, if not zero.
        slopes: ALiBi slope of each head, [H] or [B, H].
        given: Other arguments by name.
        mask: Where else attention is.
        distance: How far each key lies before each query, if not by their places.
    """
    for name in _UNKNOWN & given.keys():
        if given[name] is not None:
            raise NotImplementedError(f"flash attention with {name} has no stand-in")
    left, right = window if window is not None else (-1, -1)
    if distance is None and (slopes is not None or left >= 0 or right >= 0):
        distance = distance_between(q.shape[1], k.shape[1])
    if distance is not None and left >= 0:
        mask = both_masks(mask, distance <= left)
    if distance is not None and (right >= 0 or (causal and mask is not None)):
        mask, causal = both_masks(mask, distance >= (0 if causal else -right)), False
    if slopes is not None and distance is not None:
        bias = -slopes[..., None, None] * distance.abs()
        seen = mask if mask is not None else torch.ones_like(distance, dtype=torch.bool)
        mask = bias.to(q.dtype).masked_fill(~seen, float("-inf"))
    out = attend(q, k, v, scale, causal, mask, softcap)
    return (out, None, None) if given.get("return_attn_probs") else out


_UNKNOWN = frozenset(
    {"block_table", "page_table", "qv", "rotary_cos", "rotary_sin", "attention_chunk", "sinks", "s_aux"}
)
"""Arguments that change what is computed, in ways that are not written out here."""


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_func`: q [B, T, H, D], k and v [B, S, K, D] -> [B, T, H, D]."""
    return _flash(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes, kwargs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_qkvpacked_func`: [B, T, 3, H, D] -> [B, T, H, D]."""
    q, k, v = qkv.unbind(2)
    return _flash(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes, kwargs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_kvpacked_func`: q [B, T, H, D], kv [B, S, 2, K, D] -> [B, T, H, D]."""
    k, v = kv.unbind(2)
    return _flash(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes, kwargs)


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
    window_size: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_varlen_func`: sequences joined to one row; q [N, H, D], k and v [N, K, D] -> [N, H, D].

    Tokens attend to those of their own sequence: a mask says which.
    """
    of_query, of_key = _sequence_of(cu_seqlens_q, q.shape[0]), _sequence_of(cu_seqlens_k, k.shape[0])
    mask = of_query[0][:, None] == of_key[0][None]
    distance = of_query[1][:, None] - of_key[1][None]  # the last query of a sequence is beside its last key
    if alibi_slopes is not None and alibi_slopes.dim() == 2:
        raise NotImplementedError("ALiBi slopes of each sequence have no stand-in for joined sequences")
    out = _flash(
        *(q[None], k[None], v[None]),
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        kwargs,
        mask,
        distance,
    )
    return (out[0][0], *out[1:]) if isinstance(out, tuple) else out[0]


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int = 0,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_varlen_qkvpacked_func`: [N, 3, H, D] -> [N, H, D]."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_varlen_kvpacked_func`: q [N, H, D], kv [N, 2, K, D] -> [N, H, D]."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *args, **kwargs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = None,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`flash_attn.flash_attn_with_kvcache`: new keys and values are appended to an empty cache; without new ones the
    whole cache is attended to."""
    beside = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "block_table": block_table}
    beside |= {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    for name, value in beside.items():
        if value is not None:
            raise NotImplementedError(f"flash_attn_with_kvcache with {name} has no stand-in")
    if k is None and cache_seqlens is not None:
        raise NotImplementedError("flash_attn_with_kvcache on a part of its cache has no stand-in")
    keys, values = (k_cache, v_cache) if k is None or v is None else (k, v)
    return _flash(q, keys, values, softmax_scale, causal, window_size, softcap, alibi_slopes, kwargs)


def flash_attn_3_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, **kwargs: Any
) -> Any:
    """`flash_attn_interface.flash_attn_func` of version 3: no dropout among its arguments."""
    return flash_attn_func(q, k, v, 0.0, softmax_scale, causal, **kwargs)


def flash_attn_3_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    **kwargs: Any,
) -> Any:
    """`flash_attn_interface.flash_attn_varlen_func` of version 3."""
    if seqused_q is not None or seqused_k is not None:
        raise NotImplementedError("flash attention with seqused_q or seqused_k has no stand-in")
    starts = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return flash_attn_varlen_func(q, k, v, *starts, 0.0, softmax_scale, causal, **kwargs)


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
        if need_weights:
            raise NotImplementedError("weights of fused attention have no stand-in")
        if cu_seqlens is None:
            q, k, v = qkv.unbind(2)
            kept = None if key_padding_mask is None else key_padding_mask.bool()
            out = attend(q, k, v, self.scale, causal, None if kept is None else kept[:, None, None])
            out = out if kept is None else out * kept[..., None, None]
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

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Any:
        """Queries [B, T, H, D], keys and values [B, S, 2, K, D]; with `cu_seqlens` sequences joined to one row."""
        causal = self.causal if causal is None else causal
        if cu_seqlens is None or cu_seqlens_k is None:
            return flash_attn_kvpacked_func(q, kv, 0.0, self.scale, causal)
        starts = cu_seqlens, cu_seqlens_k
        return flash_attn_varlen_kvpacked_func(q, kv, *starts, softmax_scale=self.scale, causal=causal)


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


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Any = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Any:
    """`flash_attn.layers.rotary.apply_rotary_emb`: x [B, T, H, D], cos and sin [T, R / 2]; R features are rotated."""
    if cu_seqlens is not None or not isinstance(seqlen_offsets, int):
        raise NotImplementedError("apply_rotary_emb on joined sequences or from several places on has no stand-in")
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    at = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
    cos, sin = cos[at, None], sin[at, None]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    out = torch.cat((out, rest), -1)
    return x.copy_(out) if inplace else out


def _sequence_of(starts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """For each token of a row of sequences the number of its sequence, and its distance from that one's end."""
    at = torch.arange(n)
    sequence = (at[:, None] >= starts[None, 1:]).sum(1)
    ends = starts[1:][sequence.clamp(max=len(starts) - 2)]
    return sequence, at - ends  # numbers below zero that grow along the sequence
