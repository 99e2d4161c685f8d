"""Run attention over nested tensors in plain ops.

Provides a function mode in which `scaled_dot_product_attention` of jagged nested tensors (concatenated sequences of
different lengths) runs as dense attention over all tokens, with a mask that keeps sequences apart. Torch's own kernels
for it hide the logits from a dispatch mode and do not support the meta device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor  # private, and named nowhere else
from torch.overrides import TorchFunctionMode


def takes_itself_apart(types: Any) -> bool:
    """Whether an op must be dispatched to a nested tensor first, which then runs ops on its components.

    Arguments:
        types: Classes of the op's tensors, as passed to a dispatch mode.
    """
    return any(issubclass(t, NestedTensor) for t in types)


class JaggedWrittenOut(TorchFunctionMode):
    """Function mode that runs attention over jagged nested tensors as masked dense attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and all(_is_jagged(x) for x in args[:3]) and len(args) >= 3:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _is_jagged(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_nested and x.layout == torch.jagged


Jagged = Any
"""A nested tensor, whose methods (`values`, `offsets`) type checkers do not know."""


def _attention(
    query: Jagged,
    key: Jagged,
    value: Jagged,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Jagged:
    """Masked dense attention of operands [sequences, heads, tokens, dim], whose ragged axis is tokens."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = _sequences(q)[:, None] == _sequences(k)
    if is_causal:
        mask = mask & (_positions(q)[:, None] >= _positions(k))
    q_1HND, k_1HND, v_1HND = (x.values().transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # N: tokens of all sequences
    out = F.scaled_dot_product_attention(q_1HND, k_1HND, v_1HND, mask, scale=scale, enable_gqa=enable_gqa)
    rows = out.squeeze(0).transpose(0, 1)
    return torch.nested.nested_tensor_from_jagged(rows, q.offsets()).transpose(1, 2)


def _sequences(x: Jagged) -> Tensor:
    """Index of each token's sequence."""
    lengths = x.offsets().cpu().diff()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def _positions(x: Jagged) -> Tensor:
    """Position of each token in its sequence."""
    offsets: Tensor = x.offsets().cpu()
    return torch.arange(int(offsets[-1])) - offsets[:-1][_sequences(x)]
