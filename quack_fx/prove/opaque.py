"""Fused attention as plain ops, so that its logits are on the tape.

In: an op that is about to run. Out: an equivalent function of plain ATen ops, or None. PyTorch itself runs
`F.scaled_dot_product_attention` as plain ops; its flash kernel is here because models may call it directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_OWN_NAMESPACES = frozenset({"aten", "prims", "prim", "_c10d_functional", "torchvision", "inductor", "higher_order"})


def written_out(func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The function to run instead of an op; None to run the op itself."""
    if isinstance(func, torch._ops.HigherOrderOperator):
        return _flex_attention if func.name() == "flex_attention" else None
    if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
        return _flash_attention
    if str(func) == "torch_attn._varlen_attn.default":  # registered when `varlen_attn` is first imported
        return _packed_attention
    if func.namespace in _OWN_NAMESPACES:
        # PyTorch does not decompose composite ops below autograd, where these functions run.
        composite = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
        return func.decompose if composite else None
    return _python_of_custom_op(f"{func.namespace}::{func.overloadpacket.__name__}", args)


def is_opaque(func: Any) -> bool:
    """Whether it is unknown what an op computes."""
    namespace = getattr(func, "namespace", "higher_order")
    return namespace not in _OWN_NAMESPACES or "attention" in str(func)


def _flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor],
    block_mask: tuple[Any, ...],
    scale: float,
    kernel_options: dict[str, Any],
    score_mod_buffers: tuple[Any, ...] = (),
    mask_mod_buffers: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """flex_attention as its documentation defines it: softmax(mask(score_mod(q k^T * scale))) v."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1).expand(query.shape[0], -1, -1, -1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    index = [torch.arange(n, device=query.device) for n in scores.shape]
    allowed = _over_all(block_mask[-1], (), len(mask_mod_buffers))(*index, *mask_mod_buffers)
    scores = _over_all(score_mod, (0,), len(score_mod_buffers))(scores, *index, *score_mod_buffers)
    scores = scores.masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1).nan_to_num()
    return weights @ value, scores.logsumexp(-1), scores.amax(-1)


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The CPU flash kernel in plain ops, without dropout."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`varlen_attn` as its documentation defines it, on concatenated sequences [tokens, heads, features]."""
    if seqused_k is not None or block_table is not None:
        raise NotImplementedError("varlen_attn with a cache of pages is not written out here")
    groups = query.shape[1] // key.shape[1]
    q, k, v = query.transpose(0, 1), *(t.repeat_interleave(groups, 1).transpose(0, 1) for t in (key, value))
    scores = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    ends = cu_seq_q[1:], (cu_seq_q if cu_seq_k is None else cu_seq_k)[1:]
    of_q, of_k = (
        torch.searchsorted(e, torch.arange(len(t)), right=True) for e, t in zip(ends, (q[0], k[0]), strict=True)
    )
    # Positions count from a sequence's end: its last query and last key have the same position.
    from_end_q, from_end_k = (e[of] - torch.arange(len(of)) for e, of in zip(ends, (of_q, of_k), strict=True))
    later = from_end_q[:, None] - from_end_k
    left, right = window_size or (-1, -1)
    right = 0 if is_causal else right
    allowed = of_q[:, None] == of_k
    allowed &= (later <= right) | torch.tensor(right < 0)
    allowed &= (-later <= left) | torch.tensor(left < 0)
    scores = scores.masked_fill(~allowed, float("-inf"))
    out = scores.softmax(-1).nan_to_num() @ v
    return out.transpose(0, 1), scores.logsumexp(-1), torch.empty(0)


def _over_all(function: Callable[..., Tensor], first: tuple[int, ...], buffers: int) -> Callable[..., Tensor]:
    """Vectorise a function of one (batch, head, query, key); `first` is (0,) if it takes the score first, else ()."""
    for axis in reversed(range(4)):
        dims = tuple(0 if axis == i else None for i in range(4))
        function = torch.vmap(function, in_dims=(*first, *dims, *(None,) * buffers), out_dims=0)
    return function


def _python_of_custom_op(name: str, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The Python implementation of an op made by `torch.library.custom_op`."""
    try:  # private; without it, the op stays opaque
        from torch._library.custom_ops import OPDEFS
    except ImportError:
        return None
    definition = OPDEFS.get(name)
    if definition is None:
        return None
    device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
    backends = getattr(definition, "_backend_fns", {})
    function: Callable[..., Any] | None = backends.get(device) or getattr(definition, "_init_fn", None)
    return function
