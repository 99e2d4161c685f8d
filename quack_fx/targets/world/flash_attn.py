"""The functions and modules of flash_attn, written out in torch. `attention.py` explains the letters of shapes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quack_fx.targets.world.attention import attend, both_masks, distance_between

Options = Mapping[str, Any]
"""The options of one call, by name."""

_DEFAULTS: dict[str, Any] = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": None,
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
"""Options that flash_attn's functions share, in the order in which they may be given by position."""

_REFUSED = "block_table page_table qv rotary_cos rotary_sin attention_chunk sinks s_aux cache_batch_idx cache_leftpad"
"""Options that change the result and have no stand-in."""


def _with_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function takes these options after its tensors, by position or name, and reads them from one dict.

    Its signature lists them, since model files look there for what the installed version can do.
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    options = [inspect.Parameter(name, kind, default=_DEFAULTS.get(name)) for name in names]
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        tensors = [p for p in inspect.signature(function).parameters.values() if p.name != "options"]
        signature = inspect.Signature([*tensors, *options, rest])

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            given |= given.pop("kwargs")
            return function(*(given.pop(p.name) for p in tensors), given)

        called.__signature__ = signature  # type: ignore[attr-defined]
        return called

    return decorator


def _flash(
    q: Tensor, k: Tensor, v: Tensor, options: Options, mask: Tensor | None = None, distance: Tensor | None = None
) -> Any:
    """Attention with the options of flash_attn.

    Arguments:
        q, k, v: [B, T, H, D], [B, S, K, D] twice.
        options: softmax_scale; causal; window_size, how many keys before and after each query are seen (below zero:
            all); softcap, a bound on the logits (zero: none); alibi_slopes, [H] or [B, H].
        mask: Further limits on which keys a query sees, [T, S].
        distance: How far each key is before each query, [T, S]; by default as their indices say.
    """
    for name in _REFUSED.split():
        if options.get(name) is not None:
            raise NotImplementedError(f"flash attention with {name} has no stand-in")
    options = _DEFAULTS | dict(options)
    causal, slopes = options["causal"], options["alibi_slopes"]
    left, right = options["window_size"] or (-1, -1)
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
    out = attend(q, k, v, options["softmax_scale"], causal, mask, options["softcap"])
    return (out, None, None) if options["return_attn_probs"] else out


@_with_options(*_DEFAULTS)
def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Any:
    """`flash_attn.flash_attn_func`: q [B, T, H, D], k and v [B, S, K, D] -> [B, T, H, D]."""
    return _flash(q, k, v, options)


@_with_options(*_DEFAULTS)
def flash_attn_qkvpacked_func(qkv: Tensor, options: Options) -> Any:
    """`flash_attn.flash_attn_qkvpacked_func`: [B, T, 3, H, D] -> [B, T, H, D]."""
    q, k, v = qkv.unbind(2)
    return _flash(q, k, v, options)


@_with_options(*_DEFAULTS)
def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, options: Options) -> Any:
    """`flash_attn.flash_attn_kvpacked_func`: q [B, T, H, D], kv [B, S, 2, K, D] -> [B, T, H, D]."""
    k, v = kv.unbind(2)
    return _flash(q, k, v, options)


def _joined(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, options: Options) -> Any:
    """Attention over sequences joined to one row, [N, H, D]: a mask keeps each token to its own sequence."""
    if (slopes := options.get("alibi_slopes")) is not None and slopes.dim() == 2:
        raise NotImplementedError("ALiBi slopes of each sequence have no stand-in for joined sequences")
    of_query, of_key = _sequence_of(starts_q, q.shape[0]), _sequence_of(starts_k, k.shape[0])
    mask = of_query[0][:, None] == of_key[0][None]
    distance = of_query[1][:, None] - of_key[1][None]  # the last query of a sequence is at its last key
    out = _flash(q[None], k[None], v[None], options, mask, distance)
    return (out[0][0], *out[1:]) if isinstance(out, tuple) else out[0]


@_with_options("max_seqlen_q", "max_seqlen_k", *_DEFAULTS)
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, options: Options
) -> Any:
    """`flash_attn.flash_attn_varlen_func`: q [N, H, D], k and v [N, K, D] -> [N, H, D]."""
    return _joined(q, k, v, cu_seqlens_q, cu_seqlens_k, options)


@_with_options("max_seqlen", *_DEFAULTS)
def flash_attn_varlen_qkvpacked_func(qkv: Tensor, cu_seqlens: Tensor, options: Options) -> Any:
    """`flash_attn.flash_attn_varlen_qkvpacked_func`: [N, 3, H, D] -> [N, H, D]."""
    q, k, v = qkv.unbind(1)
    return _joined(q, k, v, cu_seqlens, cu_seqlens, options)


@_with_options("max_seqlen_q", "max_seqlen_k", *_DEFAULTS)
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, options: Options
) -> Any:
    """`flash_attn.flash_attn_varlen_kvpacked_func`: q [N, H, D], kv [N, 2, K, D] -> [N, H, D]."""
    k, v = kv.unbind(1)
    return _joined(q, k, v, cu_seqlens_q, cu_seqlens_k, options)


@_with_options(
    *("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table"),
    *("softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved", "alibi_slopes"),
)
def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, options: Options) -> Any:
    """`flash_attn.flash_attn_with_kvcache`: new keys and values are appended to an empty cache; without new ones the
    whole cache is attended to."""
    k, v = options["k"], options["v"]
    if k is None and options["cache_seqlens"] is not None:
        raise NotImplementedError("flash_attn_with_kvcache on a part of its cache has no stand-in")
    keys, values = (k_cache, v_cache) if k is None or v is None else (k, v)
    return _flash(q, keys, values, options)


@_with_options("softmax_scale", "causal")
def flash_attn_3_func(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Any:
    """`flash_attn_interface.flash_attn_func` of version 3: no dropout among its arguments."""
    return _flash(q, k, v, options)


@_with_options("max_seqlen_q", "max_seqlen_k", "seqused_q", "seqused_k", "softmax_scale", "causal")
def flash_attn_3_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, options: Options
) -> Any:
    """`flash_attn_interface.flash_attn_varlen_func` of version 3."""
    if options["seqused_q"] is not None or options["seqused_k"] is not None:
        raise NotImplementedError("flash attention with seqused_q or seqused_k has no stand-in")
    return _joined(q, k, v, cu_seqlens_q, cu_seqlens_k, options)


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
        if cu_seqlens is not None:
            return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, softmax_scale=self.scale, causal=causal), None
        if key_padding_mask is None:
            return flash_attn_qkvpacked_func(qkv, softmax_scale=self.scale, causal=causal), None
        kept = key_padding_mask.bool()
        q, k, v = qkv.unbind(2)
        out = attend(q, k, v, self.scale, causal, kept[:, None, None])
        return out * kept[..., None, None], None


class FlashSelfAttention(nn.Module):
    """`flash_attn.modules.mha.FlashSelfAttention`."""

    def __init__(self, causal: bool = False, softmax_scale: float | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.inner = FlashAttention(softmax_scale=softmax_scale, causal=causal)

    def forward(
        self, qkv: Tensor, causal: bool | None = None, cu_seqlens: Tensor | None = None, *args: Any, **kwargs: Any
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
    rotated, rest = x[..., :width], x[..., width:]
    at = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
    cos, sin = cos[at, None], sin[at, None]
    if interleaved:
        a, b = rotated[..., ::2], rotated[..., 1::2]
        out = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    out = torch.cat((out, rest), -1)
    return x.copy_(out) if inplace else out


def _sequence_of(starts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """For each token of joined sequences the index of its sequence, and its distance from the end of it."""
    at = torch.arange(n)
    sequence = (at[:, None] >= starts[None, 1:]).sum(1)
    ends = starts[1:][sequence.clamp(max=len(starts) - 2)]
    return sequence, at - ends  # negative, growing along the sequence
