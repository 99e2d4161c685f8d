"""Stops a build that would take too much of the machine's memory.

In: a limit in bytes. Out: a context in which making tensors of more bytes raises `TooLarge`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode  # private, but the documented way to watch ATen ops

from quack_fx.graph.forward.machine import available_memory

UNSEEN_BYTES = 1 << 28
"""Bytes of results after which free memory is checked."""

_FACTORIES = {torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default, torch.ops.aten.ones.default}
_FACTORIES |= {torch.ops.aten.empty_strided.default, torch.ops.aten.randn.default, torch.ops.aten.full.default}


class TooLarge(RuntimeError):
    """A model takes too much of the memory of this machine."""


class AtMost(TorchDispatchMode):
    """Context in which making more than `limit` bytes of tensors raises `TooLarge`, before they are filled.

    Only tensors from factory functions count, since results of other operations may be freed again. For those, the free
    memory of the machine is checked from time to time.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._limit, self._total = limit, 0
        self._least, self._unseen = available_memory() - limit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor) or result.device.type == "meta" or func.is_view:
            return result
        size = result.numel() * result.element_size()
        self._total += size if func in _FACTORIES else 0
        self._unseen += size
        if self._unseen > UNSEEN_BYTES:
            self._unseen = 0
            if available_memory() < self._least:
                raise TooLarge
        if self._total > self._limit:
            raise TooLarge
        return result
