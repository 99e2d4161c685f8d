"""Let `view` copy where the strides of an attention's result forbid a view.

The fused kernels return [batch, heads, positions, width] with the strides of [batch, positions, heads, width], or with
those of the queries, and forwards rely on it: `y.transpose(1, 2).view(b, s, d)`. Plain ops, as used here, return a
contiguous result, for which this view is an error. Other forwards rely on a contiguous result, so no single layout
works for all. A copy has the same elements in the same order in any layout.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_REFUSED = "view size is not compatible"
"""Text of PyTorch's error if the strides, rather than the number of elements, forbid a view."""


def is_flex(func: Any) -> bool:
    """Whether a function is the higher-order op inside `flex_attention`, which has no public name."""
    return getattr(func, "__name__", "") == "flex_attention"


class AnyLayout(TorchFunctionMode):
    """Function mode that replaces a failing view by a copy after the first attention; before it, the model is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self._attended = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._attended |= func is F.scaled_dot_product_attention or is_flex(func)
        if not self._attended or func not in (Tensor.view, Tensor.view_as):
            return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if _REFUSED not in str(error):
                raise
        return (Tensor.reshape if func is Tensor.view else Tensor.reshape_as)(*args, **kwargs)
