"""Storages and views.

In: a tensor. Out: the identity of its storage, a key for its view of that storage, or the same view of another storage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Window = tuple[Any, ...]
"""Key of a view: storage, offset, shape, strides, dtype."""


def storage_of(tensor: Tensor) -> int:
    """Return an id that a tensor shares with all its views; for a tensor without storage (sparse), its own id."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else -id(tensor)


def window_of(tensor: Tensor) -> Window:
    """Return a key that is equal for two tensors that are the same view of the same storage."""
    if tensor.layout != torch.strided:
        return (id(tensor),)
    return (storage_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def window_on(storage: torch.UntypedStorage, tensor: Tensor) -> Tensor:
    """Return a view of `storage` with the offset, shape and strides of `tensor`."""
    window = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return window.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
