"""The largest logit of every query, as attention computes it.

In: a call of a softmax or of `scaled_dot_product_attention`, as a `TorchFunctionMode` sees it. Out: a `Call`: the
tensor whose gradient tells the heads, and the largest logit of every query. Nothing here is part of the autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CELLS = 1 << 24
"""Logits that are in memory at a time."""

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
_SOFTMAX |= {F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax}
_FUSED = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Call:
    """One call in a forward pass that may be an attention.

    Attributes:
        op: Name of what was called.
        source: The logits of a softmax, or the queries of a fused attention.
        axis: Axis of `source` that is not in the result: that of the keys, or of the features.
        largest: Computes the largest logit of every query, in the shape of `source` without `axis`.
    """

    op: str
    source: Tensor
    axis: int
    largest: Callable[[], Tensor]


def call_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """What a call of some function is for us; None where it is neither a softmax nor a fused attention."""
    if func is _FUSED:
        return _fused(*args, **kwargs)
    return _softmax(*args, **kwargs) if func in _SOFTMAX else None


def opened(func: Any) -> Callable[..., Any] | None:
    """A function of torch whose calls a `TorchFunctionMode` sees as well; None where it has no need to be opened.

    `multi_head_attention_forward` is handed to the mode as a whole. This is its own code, without the question that
    does so. (Should torch write that question in another way, its attention is not seen, and the reader says so.)
    """
    if func is not F.multi_head_attention_forward or not isinstance(func, FunctionType):
        return None
    own = {**func.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(func.__code__, own, func.__name__, func.__defaults__, func.__closure__)


def _softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Call | None:
    """A softmax over keys, or over something else: whose gradients tell."""
    if dim is None or input.dim() < 2:
        return None
    axis = dim % input.dim()
    return Call("softmax", input, axis, lambda: input.amax(axis))


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Call:
    """`scaled_dot_product_attention`, by its parameters."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def largest() -> Tensor:
        device = query.device.type
        q, k = query, key
        if torch.is_autocast_enabled(device) and query.dtype != torch.float64:  # the kernel is given that dtype
            q, k = (x.to(torch.get_autocast_dtype(device)) for x in (query, key))
        with torch.autocast(device, enabled=False):
            return largest_logits(q, k, attn_mask, is_causal, scale, enable_gqa)

    return Call("scaled_dot_product_attention", query, query.dim() - 1, largest)


def largest_logits(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float, enable_gqa: bool
) -> Tensor:
    """The largest logit of every query, in float32 at least and a piece at a time.

    Arguments:
        query: Queries, [..., heads, queries, features].
        key: Keys, [..., key heads, keys, features].
        mask: What stands at an entry is added to the logit; of booleans, False takes it out. None for no mask.
        is_causal: Whether key j is taken out for query i where j > i.
        scale: Factor on the products.
        enable_gqa: Whether each key head serves as many query heads, one after the other.

    Returns:
        The largest logits, [..., heads, queries]; -inf for a query without keys.

    Example:
        >>> largest_logits(torch.ones(1, 4, 2), torch.ones(1, 5, 2), None, False, 0.5, False)
        tensor([[1., 1., 1., 1.]])
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    queries, keys = query.shape[-2], key.shape[-2]
    exact = torch.promote_types(query.dtype, torch.float32)
    lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    size = max(1, _CELLS // max(1, lead.numel() * keys))
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], queries, keys) if mask.dim() > 1 else mask.expand(queries, keys)
    found, positions = [], torch.arange(max(queries, keys), device=query.device)
    turned = key.to(exact).mT
    for start in range(0, queries, size):
        piece = slice(start, start + size)
        logits = (query[..., piece, :].to(exact) * scale) @ turned
        if mask is not None and mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask[..., piece, :], -torch.inf)
        elif mask is not None:
            logits = logits + mask[..., piece, :]
        if is_causal:
            later = positions[:keys] > positions[:queries][piece].unsqueeze(-1)
            logits = logits.masked_fill(later, -torch.inf)
        found.append(logits.amax(-1))
    return torch.cat(found, -1)
