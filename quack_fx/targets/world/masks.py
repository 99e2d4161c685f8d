"""Masks as transformers 4 made them (its `modeling_attn_mask_utils`): additive, [batch, 1, queries, keys].

In: a mask of keys, [batch, keys], 1 for a token and 0 for padding, or None; and the number of queries. Out: what is
added to the logits: 0, or the least number of the dtype. A mask that hides nothing is made too, never left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class AttentionMaskConverter:
    """Makes masks of one kind: causal or not, and perhaps with a window."""

    def __init__(self, is_causal: bool, sliding_window: int | None = None) -> None:
        self.is_causal = is_causal
        self.sliding_window = sliding_window

    def to_causal_4d(
        self, batch_size: int, query_length: int, key_value_length: int, dtype: torch.dtype, device: Any = "cpu"
    ) -> Tensor:
        """A causal mask, the last query at the last key."""
        past = key_value_length - query_length
        return self._make_causal_mask((batch_size, query_length), dtype, device, past, self.sliding_window)

    def to_4d(
        self, attention_mask_2d: Tensor, query_length: int, dtype: torch.dtype, key_value_length: int | None = None
    ) -> Tensor:
        """A mask of keys, and causal where this converter is."""
        hidden = self._expand_mask(attention_mask_2d, dtype, query_length)
        if not self.is_causal:
            return hidden
        keys = attention_mask_2d.shape[-1] if key_value_length is None else key_value_length
        causal = self.to_causal_4d(attention_mask_2d.shape[0], query_length, keys, dtype, attention_mask_2d.device)
        return torch.minimum(causal, hidden)

    @staticmethod
    def _make_causal_mask(
        input_ids_shape: Sequence[int],
        dtype: torch.dtype,
        device: Any = "cpu",
        past_key_values_length: int = 0,
        sliding_window: int | None = None,
    ) -> Tensor:
        batch, queries = int(input_ids_shape[0]), int(input_ids_shape[-1])
        at = torch.arange(queries, device=device)[:, None] + past_key_values_length
        to = torch.arange(queries + past_key_values_length, device=device)
        hidden = to > at
        if sliding_window is not None:
            hidden = hidden | (to <= at - sliding_window)
        return _additive(hidden, dtype).expand(batch, 1, *hidden.shape)

    @staticmethod
    def _expand_mask(mask: Tensor, dtype: torch.dtype, tgt_len: int | None = None) -> Tensor:
        queries = mask.shape[-1] if tgt_len is None else tgt_len
        return _additive(mask == 0, dtype)[:, None, None, :].expand(len(mask), 1, queries, mask.shape[-1])

    @staticmethod
    def _unmask_unattended(expanded_mask: Tensor, min_dtype: float | None = None, **kwargs: Any) -> Tensor:
        return expanded_mask

    @staticmethod
    def _ignore_causal_mask_sdpa(*args: Any, **kwargs: Any) -> bool:
        return False


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


def causal_mask(
    attention_mask: Tensor | None,
    input_shape: Sequence[int],
    inputs_embeds: Tensor,
    past_key_values_length: int,
    sliding_window: int | None = None,
) -> Tensor:
    """`_prepare_4d_causal_attention_mask`, also its form for sdpa."""
    converter = AttentionMaskConverter(is_causal=True, sliding_window=sliding_window)
    batch, queries, dtype = int(input_shape[0]), int(input_shape[-1]), inputs_embeds.dtype
    if attention_mask is None:
        keys = queries + past_key_values_length
        return converter.to_causal_4d(batch, queries, keys, dtype, inputs_embeds.device)
    if attention_mask.dim() == 4:
        return _additive(attention_mask == 0, dtype)
    return converter.to_4d(attention_mask, queries, dtype, queries + past_key_values_length)


def causal_mask_alone(
    input_shape: Sequence[int],
    dtype: torch.dtype,
    device: Any,
    past_key_values_length: int = 0,
    sliding_window: int | None = None,
) -> Tensor:
    """`_create_4d_causal_attention_mask`."""
    return AttentionMaskConverter._make_causal_mask(input_shape, dtype, device, past_key_values_length, sliding_window)


def mask_of_keys(mask: Tensor, dtype: torch.dtype, tgt_len: int | None = None) -> Tensor:
    """`_prepare_4d_attention_mask`, also its form for sdpa."""
    return AttentionMaskConverter._expand_mask(mask, dtype, tgt_len)


FUNCTIONS: dict[str, Any] = {
    "AttentionMaskConverter": AttentionMaskConverter,
    "_prepare_4d_causal_attention_mask": causal_mask,
    "_prepare_4d_causal_attention_mask_for_sdpa": causal_mask,
    "_create_4d_causal_attention_mask": causal_mask_alone,
    "_prepare_4d_attention_mask": mask_of_keys,
    "_prepare_4d_attention_mask_for_sdpa": mask_of_keys,
}
"""Stand-ins by the names of transformers 4."""
