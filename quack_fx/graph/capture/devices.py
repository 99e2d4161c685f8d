"""Make every tensor, fake or real, report the CPU as its device while a forward is recorded.

In: a recorder. Out: a function mode in which the model's code, and PyTorch's own checks, see a single device.

Forwards read devices: they compare those of token ids and buffers, create tables on the device of an activation, ask
where the parameters are. A recording mixes fake (meta) and real tensors, which the model's code must not see; how an op
runs is decided later, in `hybrid.py`, from the actual tensors. Function modes are off inside PyTorch's own Python
functions, so those do see the actual devices; the few that matter are handled here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from quack_fx.graph.capture.isolate import unrecorded
from quack_fx.graph.forward.fused import is_flex

_CPU = torch.device("cpu")


class Twins(Protocol):
    """What this file needs from the recorder."""

    def twin(self, tensor: Tensor) -> Tensor:
        """Return the tensor that ops receive instead of `tensor`."""

    def stand_in(self, tensor: Tensor, fake: bool) -> Tensor:
        """Return a tensor with the same graph node: the twin or, if `fake`, a meta tensor."""

    def note_read(self) -> None:
        """Note that Python reads real values without an op."""

    def made_up(self, tensor: Tensor) -> Any:
        """Return made-up values for a fake tensor."""


def _type(tensor: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:
        with unrecorded():
            return torch.empty(0, dtype=tensor.dtype, device=_CPU).type()
    return Tensor.type(tensor, dtype, *args, **kwargs)


_CLAIMS: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: lambda _: _CPU,
    Tensor.get_device: lambda _: -1,
    torch.get_device: lambda _: -1,
    Tensor.type: _type,
    **{
        getattr(Tensor, f"is_{kind}").__get__: (lambda _, is_cpu=kind == "cpu": is_cpu)
        for kind in ("cpu", "meta", "cuda", "xpu", "mps", "ipu", "maia", "mtia", "vulkan", "xla")
        if hasattr(Tensor, f"is_{kind}")
    },
}
"""Tensor attributes and functions that report the device, and what they report instead."""

_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
"""Methods by which Python reads values without running an op."""


class OneDevice(TorchFunctionMode):
    """Function mode that reports the CPU as the device of every tensor."""

    def __init__(self, twins: Twins) -> None:
        super().__init__()
        self._twins = twins

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        claim = _CLAIMS.get(func)
        if claim is not None:
            return claim(*args, **kwargs)
        if func in _READS:
            args = (self._twin(args[0]), *args[1:])
            if func is Tensor.tolist and args[0].is_meta:
                return self._twins.made_up(args[0])
            self._twins.note_read()
        elif func is Tensor.__format__ and not args[0].dim() and (twin := self._twin(args[0])).is_meta:
            return self._twins.made_up(twin).__format__(*args[1:])
        elif func in (torch.tensor, torch.as_tensor) and isinstance((*args, kwargs.get("data"))[0], list | tuple):
            args, kwargs = tree_map_only(Tensor, self._number, (args, kwargs))  # torch reads them without an op
        elif func in (Tensor.__getitem__, Tensor.__setitem__) and len(args) > 1:
            index = args[1]
            index = tuple(map(_as_index, index)) if isinstance(index, tuple) else _as_index(index)
            args = (args[0], index, *args[2:])
        elif is_flex(func):
            self._score(*args[:4])
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "device" not in str(error) or _writes(func, kwargs) or not _on_two_devices((args, kwargs)):
                raise
        # Some functions (attention, recurrent layers) reject tensors on different devices before any op runs.
        args, kwargs = self._on_one_device((args, kwargs))
        return func(*args, **kwargs)

    def _on_one_device(self, tree: Any) -> Any:
        """Make all tensors in the arguments fake if one of them is, else all real."""

        def plain(of: Callable[[Tensor], Any]) -> Any:
            return tree_map_only(Tensor, lambda t: of(t) if type(t) in (Tensor, nn.Parameter) else t, tree)

        with unrecorded():
            real = plain(lambda t: self._twins.stand_in(t, fake=False))
            if not any(t.is_meta for t in tree_leaves(real) if isinstance(t, Tensor)):
                return real
            return plain(lambda t: self._twins.stand_in(t, fake=True))

    def _score(self, query: Tensor, _key: Tensor, _value: Tensor, modify: Callable[..., Any]) -> None:
        """Call the score_mod of flex attention once, to record the weights that it uses."""
        index = torch.zeros((), dtype=torch.int32)
        with self, suppress(Exception):  # an error will surface in the attention itself
            modify(query.new_zeros(()), index, index, index, index)

    def _twin(self, tensor: Tensor) -> Tensor:
        with unrecorded():
            return self._twins.twin(tensor)

    def _number(self, tensor: Tensor) -> Any:
        twin = self._twin(tensor)
        return self._twins.made_up(twin) if twin.is_meta else tensor


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function may write into its arguments. A write into a stand-in would be lost."""
    name = getattr(func, "__name__", "_")
    return name.endswith("_") or "out" in kwargs or bool(kwargs.get("inplace"))


def _on_two_devices(tree: Any) -> bool:
    return len({t.device.type for t in tree_leaves(tree) if isinstance(t, Tensor)}) > 1


def _as_index(item: Any) -> Any:
    """Turn an index list into a CPU tensor: on the meta device its values would be lost."""
    integers = isinstance(item, list) and bool(item) and all(type(i) is int for i in item)
    return torch.tensor(item, device=_CPU) if integers else item
