"""Fused attention of xformers and SageAttention, written out in torch; that of flash_attn has a file of its own.

The functions take the arguments of the original ones. Options without an implementation here raise.

Letters at the end of a tensor's name are its shape: B sequences, T queries, S keys, N tokens of all sequences joined to
one row, H query heads, K key heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quack_fx.targets.world.inert import Inert


def attend(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    scale: float | None,
    causal: bool,
    mask: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Softmax attention. Where there are fewer queries than keys, they belong to the last tokens of the sequence.

    `mask` is true where a query sees a key, or it is added to the logits. A query that sees no key gives zeros.
    """
    t, s = q_BTHD.shape[1], k_BSKD.shape[1]
    if causal and t != s:
        below = distance_between(t, s) >= 0
        mask, causal = below if mask is None else both_masks(mask, below), False
    elif causal and (mask is not None or softcap):
        mask, causal = both_masks(mask, distance_between(t, s) >= 0), False
    q_BHTD, k_BKSD, v_BKSD = (x.transpose(1, 2) for x in (q_BTHD, k_BSKD, v_BSKD))
    grouped = q_BTHD.shape[2] != k_BSKD.shape[2]
    if softcap:
        out_BHTD = _capped(q_BHTD, k_BKSD, v_BKSD, scale, mask, softcap)
    else:
        out_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BKSD, v_BKSD, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return out_BHTD.transpose(1, 2)


def _capped(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, softcap: float) -> Tensor:
    """Attention with a soft cap on its logits; tensors have heads before tokens."""
    each = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
    logits = softcap * torch.tanh(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1).nan_to_num() @ v


def distance_between(t: int, s: int) -> Tensor:
    """Distance from each of s keys to each of t queries, [T, S]; the last key is at the last query."""
    return torch.arange(t)[:, None] + (s - t) - torch.arange(s)


def both_masks(mask: Tensor | None, seen: Tensor) -> Tensor:
    """A mask that excludes what either mask excludes."""
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


class LowerTriangularMask:
    """`xformers.ops.LowerTriangularMask`: causal attention."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class LowerTriangularFromBottomRightMask:
    """`xformers.ops.fmha.attn_bias.LowerTriangularFromBottomRightMask`: causal; the last query is at the last key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class BlockDiagonalMask:
    """xformers' mask for sequences that are joined to one row: each query sees all keys of its sequence."""

    causal = False

    def __init__(self, queries: Sequence[int], keys: Sequence[int]) -> None:
        self._queries, self._keys = list(map(int, queries)), list(map(int, keys))

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, **kwargs: object
    ) -> BlockDiagonalMask:
        """The mask for sequences of these lengths."""
        return cls(q_seqlen, q_seqlen if kv_seqlen is None else kv_seqlen)

    def make_causal(self) -> BlockDiagonalCausalMask:
        """The mask without later keys; the first query of a sequence is at its first key."""
        return BlockDiagonalCausalMask(self._queries, self._keys)

    def mask(self) -> Tensor:
        """True where a query sees a key."""
        blocks = [torch.ones(q, k, dtype=torch.bool) for q, k in zip(self._queries, self._keys, strict=True)]
        seen: Tensor = torch.block_diag(*(block.tril() if self.causal else block for block in blocks))
        return seen.bool()


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each query sees the keys of its sequence up to its own index."""

    causal = True


def _of_group(mask: Tensor | None, group: int) -> Tensor | None:
    return mask[:, group] if mask is not None and mask.dim() == 5 else mask


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
    causal = isinstance(attn_bias, LowerTriangularFromBottomRightMask)
    mask = attn_bias if isinstance(attn_bias, Tensor) else None
    if isinstance(attn_bias, LowerTriangularMask):  # the first query is at the first key
        mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril()
        causal, mask = (True, None) if query.shape[1] == key.shape[1] else (False, mask)
    elif isinstance(attn_bias, BlockDiagonalMask):
        mask = attn_bias.mask()
    elif not (causal or mask is not None or attn_bias is None):
        what = attn_bias if isinstance(attn_bias, Inert) else type(attn_bias).__name__
        raise NotImplementedError(f"attn_bias={what} has no stand-in")
    if query.dim() == 3:
        mask = mask[:, None] if mask is not None and mask.dim() == 3 else mask
        return attend(query[:, :, None], key[:, :, None], value[:, :, None], scale, causal, mask)[:, :, 0]
    if query.dim() == 5:  # groups of query heads that share a key head, which is repeated
        parts = [
            attend(query[:, :, g], key[:, :, g], value[:, :, g], scale, causal, _of_group(mask, g))
            for g in range(query.shape[2])
        ]
        return torch.stack(parts, 2)
    return attend(query, key, value, scale, causal, mask)


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    **kwargs: Any,
) -> Tensor:
    """`sageattention.sageattn`: [B, H, T, D], or [B, T, H, D] with the layout "NHD"."""
    if return_lse or kwargs.get("attn_mask") is not None:
        raise NotImplementedError("sageattn with a mask or with sums has no stand-in")
    if tensor_layout != "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = attend(q, k, v, sm_scale, is_causal)
    return out if tensor_layout == "NHD" else out.transpose(1, 2)
