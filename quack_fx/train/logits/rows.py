"""The largest logit of every query in an attention call.

In: a call of a softmax or of `scaled_dot_product_attention`, as a `TorchFunctionMode` sees it. Out: a `Call`, with the
tensor whose gradient identifies the heads and the largest logit of every query. Nothing is recorded by autograd.
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
"""Maximum number of logits in memory at a time."""

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
_SOFTMAX |= {F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax}
_FUSED = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Call:
    """One call in a forward pass that may be an attention.

    Attributes:
        op: Name of the function that was called.
        source: The logits of a softmax, or the queries of a fused attention.
        axis: Axis of `source` that the result lacks: keys for a softmax, features for a fused attention.
        largest: Computes the largest logit of every query, in the shape of `source` without `axis`.
    """

    op: str
    source: Tensor
    axis: int
    largest: Callable[[], Tensor]


def call_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """The `Call` for a function call; None if it is neither a softmax nor a fused attention."""
    if func is _FUSED:
        return _fused(*args, **kwargs)
    return _softmax(*args, **kwargs) if func in _SOFTMAX else None


def opened(func: Any) -> Callable[..., Any] | None:
    """A copy of a torch function that lets a `TorchFunctionMode` see the calls inside; None if it needs no copy.

    `multi_head_attention_forward` passes itself to the mode as a whole if `has_torch_function` is true; in the copy, it
    is always false. (If torch changes this check, the attention is not seen and `MaxLogits` raises.)
    """
    if func is not F.multi_head_attention_forward or not isinstance(func, FunctionType):
        return None
    own = {**func.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(func.__code__, own, func.__name__, func.__defaults__, func.__closure__)


def _softmax(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> Call | None:
    """A softmax, maybe over keys; gradients decide later."""
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
    """A call of `scaled_dot_product_attention`; the parameters are the same."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def largest() -> Tensor:
        device = query.device.type
        q, k = query, key
        if torch.is_autocast_enabled(device) and query.dtype != torch.float64:  # as autocast does
            q, k = (x.to(torch.get_autocast_dtype(device)) for x in (query, key))
        with torch.autocast(device, enabled=False):
            return largest_logits(q, k, attn_mask, is_causal, scale, enable_gqa)

    return Call("scaled_dot_product_attention", query, query.dim() - 1, largest)


def largest_logits(
    query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float, enable_gqa: bool
) -> Tensor:
    """The largest logit of every query, computed in chunks, at least in float32.

    Arguments:
        query: Queries, [..., heads, queries, features].
        key: Keys, [..., key heads, keys, features].
        mask: Float mask that is added to the logits, or boolean mask in which False masks a key out; None for no mask.
        is_causal: Whether keys j > i are masked out for query i.
        scale: Factor on the products.
        enable_gqa: Whether each key head serves the same number of consecutive query heads.

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
