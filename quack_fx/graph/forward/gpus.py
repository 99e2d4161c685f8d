"""Run code that requests a GPU on a machine without one.

Provides a function mode in which tensors requested on a GPU are made on `Device.now` instead: the CPU, or the meta
device while a model is built there. On a machine with a CUDA GPU it changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_HAS_GPU = torch.cuda.is_available()
_GPUS = ("cuda", "hip", "npu", "xpu", "mps")


class Device:
    """Device that replaces a requested GPU: "cpu", or "meta" while a model is built there."""

    now = "cpu"


class OnThisMachine(TorchFunctionMode):
    """Function mode that makes tensors requested on a GPU on `Device.now`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _HAS_GPU:
            return func(*args, **kwargs)
        if func in _TO_GPU:
            return _moved(args[0], Device.now)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": here(kwargs["device"])}
        if func in _TO and len(args) > 1:
            args = (args[0], *(here(a) for a in args[1:]))
        return func(*args, **kwargs)


_TO_GPU = {torch.Tensor.cuda, torch.Tensor.pin_memory}
_TO = {torch.Tensor.to, torch.Tensor.type}


def _moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """Move a tensor to a device; a meta tensor stays as it is."""
    return tensor if tensor.is_meta or tensor.device.type == device else tensor.to(device)


def here(device: Any) -> Any:
    """Replace a GPU by `Device.now` and a CUDA tensor type by its CPU type; anything else is returned as it is."""
    if isinstance(device, int) and not isinstance(device, bool):
        return Device.now
    if isinstance(device, str):
        kind = device.split(":")[0]
        if device.startswith("torch.cuda."):
            return device.replace("torch.cuda.", "torch.")
    else:
        kind = device.type if isinstance(device, torch.device) else ""
    return Device.now if kind in _GPUS else device
