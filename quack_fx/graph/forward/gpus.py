"""Code that asks for a GPU, on a machine without one.

In: nothing. Out: a function mode in which tensors requested on a GPU are made on `Device.now`: the CPU, or the meta
device while a model is built there. On a machine with a GPU it changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_HAS_GPU = torch.cuda.is_available()
_GPUS = ("cuda", "hip", "npu", "xpu", "mps")


class Device:
    """Device of tensors that are requested on a GPU: "cpu", or "meta" while a model is built there."""

    now = "cpu"


class OnThisMachine(TorchFunctionMode):
    """Makes tensors that are requested on a GPU on `Device.now`."""

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
    """A tensor on a device; a meta tensor stays as it is."""
    return tensor if tensor.is_meta or tensor.device.type == device else tensor.to(device)


def here(device: Any) -> Any:
    """A device that this machine has."""
    if isinstance(device, int) and not isinstance(device, bool):
        return Device.now
    if isinstance(device, str):
        kind = device.split(":")[0]
        if device.startswith("torch.cuda."):
            return device.replace("torch.cuda.", "torch.")
    else:
        kind = device.type if isinstance(device, torch.device) else ""
    return Device.now if kind in _GPUS else device
