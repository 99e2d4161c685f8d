"""`torch.cuda` on a machine without a GPU; with one, nothing is changed.

Out: a context in which functions of `torch.cuda` answer as if there were one small GPU, although `is_available()` stays
false, so that code with a branch for CPUs takes it. `quack_fx.graph.forward.gpus` decides on which device tensors are
made that the code wants on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from quack_fx.graph.forward.gpus import here


@contextmanager
def no_gpu() -> Iterator[None]:
    """Context in which code for GPUs runs here."""
    if torch.cuda.is_available():
        yield
        return
    default = torch.set_default_device
    answers = {name: answer for name, answer in _ANSWERS.items() if hasattr(torch.cuda, name)}
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(torch.cuda, **answers))
        stack.callback(default, torch.get_default_device() if torch.get_default_device().type != "cpu" else None)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.enter_context(patch.object(torch, "set_default_device", lambda device: default(here(device))))
        stack.enter_context(patch.object(torch, "set_default_tensor_type", _set_default_tensor_type))
        to, to_empty = _to(nn.Module.to, only_numbers=True), _to(nn.Module.to_empty, only_numbers=False)
        stack.enter_context(patch.multiple(nn.Module, to=to, to_empty=to_empty))
        yield


def _set_default_tensor_type(kind: Any) -> None:
    """Sets the dtype only; the device stays the CPU."""
    name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}"
    types = {"Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64}
    torch.set_default_dtype(next((t for n, t in types.items() if n in name), torch.float32))


def _to(original: Any, only_numbers: bool) -> Any:
    """`nn.Module.to` or `to_empty` on a device that this machine has; with `only_numbers`, of numbers only."""

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        args = tuple(here(a) if isinstance(a, int) else a for a in args)
        if "device" in kwargs and (isinstance(kwargs["device"], int) or not only_numbers):
            kwargs = {**kwargs, "device": here(kwargs["device"])}
        result: nn.Module = original(self, *args, **kwargs)
        return result

    return to


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


class _Done:
    """A stream, an event or a device on which nothing is waiting: its methods return None at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Done:
        return self

    def __exit__(self, *exc: Any) -> None:
        return None

    record = synchronize = wait_stream = wait_event = _nothing

    def elapsed_time(self, other: Any) -> float:
        """Zero."""
        return 0.0


_PROPERTIES = SimpleNamespace(
    name="none", major=8, minor=0, total_memory=16 << 30, multi_processor_count=1, warp_size=32, gcnArchName=""
)
_ANSWERS: dict[str, Any] = {
    "set_device": _nothing,
    "synchronize": _nothing,
    "empty_cache": _nothing,
    "current_device": lambda: 0,
    "get_device_name": lambda *args: "none",
    "get_device_capability": lambda *args: (8, 0),
    "get_device_properties": lambda *args: _PROPERTIES,
    "mem_get_info": lambda *args: (16 << 30, 16 << 30),
    "get_rng_state": lambda *args: torch.zeros(16, dtype=torch.uint8),
    "set_rng_state": _nothing,
    "stream": lambda *args: nullcontext(),
    "current_stream": lambda *args: _Done(),
    "device": _Done,
    "Stream": _Done,
    "Event": _Done,
}
