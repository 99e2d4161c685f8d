"""Where a tensor's numbers lie.

In: a tensor. Out: its storage's identity, its place in it, or the same window on another storage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Window = tuple[Any, ...]
"""A view's place: storage, offset, shape, strides, dtype."""


def storage_of(tensor: Tensor) -> int:
    """Identity of the memory that a tensor and all its views share; its own where it has no such memory (sparse)."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else -id(tensor)


def window_of(tensor: Tensor) -> Window:
    """Equal for two handles of the same window on the same memory."""
    if tensor.layout != torch.strided:
        return (id(tensor),)
    return (storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def window_on(storage: torch.UntypedStorage, tensor: Tensor) -> Tensor:
    """The window that `tensor` has on its storage, on another one."""
    window = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return window.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
