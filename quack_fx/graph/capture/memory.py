"""Storages and the views of them.

In: a tensor. Out: the identity of its storage, a key of the view that it is, or the same view of another storage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Window = tuple[Any, ...]
"""Key of a view: storage, offset, shape, strides, dtype."""


def storage_of(tensor: Tensor) -> int:
    """Identity of the storage of a tensor and all its views; of the tensor itself if it has none (sparse)."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else -id(tensor)


def window_of(tensor: Tensor) -> Window:
    """Equal for two tensors that are the same view of the same storage."""
    if tensor.layout != torch.strided:
        return (id(tensor),)
    return (storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def window_on(storage: torch.UntypedStorage, tensor: Tensor) -> Tensor:
    """A view of a storage, with the offset, shape and strides that `tensor` has in its own."""
    window = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return window.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
