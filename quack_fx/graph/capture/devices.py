"""One device: while a forward is recorded every tensor says that it is on the CPU, fake ones as well.

In: a recorder. Out: a context in which Python code sees one device, and PyTorch's own checks do too.

Forwards look at devices: they compare those of token ids and buffers, make tables on the device of an activation, ask
where the parameters are. Half of the tensors are fake (on meta) here and half are real, which is nobody's business but
the recorder's: what an op does with a tensor is decided below, in `hybrid.py`, by what the tensor really is. (Modes of
this kind are off while PyTorch's own functions run, so those see what is there; this is why some are helped here.)
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
    """What this file asks of the recorder."""

    def twin(self, tensor: Tensor) -> Tensor:
        """What ops get in place of a tensor."""

    def stand_in(self, tensor: Tensor, fake: bool) -> Tensor:
        """A tensor that is the given one in the graph: its twin, or, where `fake`, a tensor on meta in any case."""

    def made_up(self, tensor: Tensor) -> Any:
        """A made-up number in place of each of a fake tensor's."""


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
"""What a tensor says when it is asked where it is."""

_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
"""How Python gets at numbers without an op that could be seen."""


class OneDevice(TorchFunctionMode):
    """The context; a mode of torch."""

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
        elif func is Tensor.__format__ and not args[0].dim() and (twin := self._twin(args[0])).is_meta:
            return self._twins.made_up(twin).__format__(*args[1:])
        elif func in (torch.tensor, torch.as_tensor) and isinstance((*args, kwargs.get("data"))[0], list | tuple):
            args, kwargs = tree_map_only(Tensor, self._number, (args, kwargs))  # they would be read unseen
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
        # It refuses tensors of different devices before any op runs, as attention and the recurrent layers do.
        args, kwargs = self._on_one_device((args, kwargs))
        return func(*args, **kwargs)

    def _on_one_device(self, tree: Any) -> Any:
        """Arguments with tensors that are all fake where one is, and all real otherwise."""

        def plain(of: Callable[[Tensor], Any]) -> Any:
            return tree_map_only(Tensor, lambda t: of(t) if type(t) in (Tensor, nn.Parameter) else t, tree)

        with unrecorded():
            real = plain(lambda t: self._twins.stand_in(t, fake=False))
            if not any(t.is_meta for t in tree_leaves(real) if isinstance(t, Tensor)):
                return real
            return plain(lambda t: self._twins.stand_in(t, fake=True))

    def _score(self, query: Tensor, _key: Tensor, _value: Tensor, modify: Callable[..., Any]) -> None:
        """Call the function that flex attention modifies scores by once, so that the weights in it are seen."""
        place = torch.zeros((), dtype=torch.int32)
        with self, suppress(Exception):  # what is wrong with it the attention itself will say
            modify(query.new_zeros(()), place, place, place, place)

    def _twin(self, tensor: Tensor) -> Tensor:
        with unrecorded():
            return self._twins.twin(tensor)

    def _number(self, tensor: Tensor) -> Any:
        twin = self._twin(tensor)
        return self._twins.made_up(twin) if twin.is_meta else tensor


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function may write into what it is given; what it wrote into a stand-in would be lost."""
    name = getattr(func, "__name__", "_")
    return name.endswith("_") or "out" in kwargs or bool(kwargs.get("inplace"))


def _on_two_devices(tree: Any) -> bool:
    return len({t.device.type for t in tree_leaves(tree) if isinstance(t, Tensor)}) > 1


def _as_index(item: Any) -> Any:
    """Places that Python hands over, as a tensor on the CPU: on the device of a fake tensor they would be lost."""
    integers = isinstance(item, list) and bool(item) and all(type(i) is int for i in item)
    return torch.tensor(item, device=_CPU) if integers else item
