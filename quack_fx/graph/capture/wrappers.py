"""Remove wrappers and sharding from a model while a forward is recorded.

In: a model that may be wrapped or sharded, as a whole or in some layers. Out: a context with the module inside, whose
forward runs in a single process. Its tree has no wrappers (DistributedDataParallel, torch.compile, activation
checkpointing and offload, AveragedModel, FSDP1), and no hooks or classes of torch.distributed. Weights of which a rank
holds only a part (DTensors of FSDP2 and tensor parallelism, flat weights of FSDP1) have their full shape, on meta. So
the module has its own names, it can be copied, and no rank waits for another. On exit everything is restored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.errors import CaptureError
from quack_fx.graph.capture.isolate import Snapshot

_INSIDE = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Attributes in which torch wrappers hold the wrapped module."""

_PARALLEL = ("torch.distributed.", "torch.nn.parallel.")
"""Packages whose hooks shard, gather and synchronize."""

_STATE = "__composable_api_state_key"
"""Prefix of the attributes in which FSDP2 and `replicate` keep their process groups; private to torch."""


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """Remove a model's wrappers and sharding within this context.

    Arguments:
        model: Any module.

    Yields:
        The module inside; the model itself if nothing is wrapped or sharded.

    Raises:
        CaptureError: The full shape of a weight is unknown.

    Example:
        >>> with unwrapped(torch.compile(layer)) as inner:
        ...     assert inner is layer
    """
    modules = list(model.modules())
    if not any(map(_is_touched, modules)):
        yield model
        return
    before = [(module, Snapshot(module), type(module)) for module in modules]
    try:
        _take_off(modules)
        yield _inside(model)
    finally:
        for module, snapshot, kind in before:
            module.__class__ = kind
            snapshot.restore(module)


def first_wrapped(model: nn.Module) -> str | None:
    """Describe the first wrapped or sharded module of a model; None if there is none.

    Example:
        >>> first_wrapped(torch.compile(torch.nn.Linear(2, 2)))
        'the model is in OptimizedModule'
    """
    for name, module in model.named_modules():
        if _is_touched(module):
            return f"{repr(name) if name else 'the model'} is in {type(module).__name__}"
    return None


def _is_touched(module: nn.Module) -> bool:
    """Whether a module is a wrapper, holds a DTensor, or has hooks of torch.distributed."""
    tensors = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return _inside(module) is not module or any(map(is_part, tensors)) or any(map(_is_parallel, hooks))


def _inside(module: nn.Module) -> nn.Module:
    """Return the module inside any number of nested torch wrappers."""
    while len(module._modules) == 1 and _is_of_torch(type(module)):
        ((name, inner),) = module._modules.items()
        if name not in _INSIDE or inner is None:
            break
        module = inner
    return module


def _is_of_torch(kind: type) -> bool:
    """Whether the forward of this class is that of a torch wrapper rather than of a layer."""
    running = next(cls for cls in kind.__mro__ if not vars(cls).keys().isdisjoint({"forward", "__call__"}))
    return running.__module__.startswith("torch.") and not running.__module__.startswith("torch.nn.modules.")


def _take_off(modules: list[nn.Module]) -> None:
    """Undo wrapping and sharding of modules in place."""
    whole: dict[int, Tensor] = {}  # tied weights stay tied
    for module in modules:
        module.__class__ = _own_class(type(module))
        for name in [name for name in vars(module) if name.startswith(_STATE)]:
            del vars(module)[name]
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if _is_parallel(hook)]:
                del hooks[key]
        tensors: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for held in tensors:
            for name in [name for name, value in held.items() if is_part(value)]:
                held[name] = whole.setdefault(id(held[name]), _whole(held[name]))
        if "_fsdp_wrapped_module" in module._modules:
            _unflatten(module)
    for module in modules:
        for name, child in [*module._modules.items()]:
            module._modules[name] = None if child is None else _inside(child)


def _own_class(kind: type) -> type:
    """Return the class that a module had before FSDP2 or `replicate` mixed in its own."""
    mixed = len(kind.__bases__) == 2 and kind.__module__.startswith(_PARALLEL)
    return kind.__bases__[1] if mixed and kind.__bases__[0].__module__.startswith(_PARALLEL) else kind


def is_part(value: Any) -> bool:
    """Whether a value is a DTensor, without importing its module: if that is not yet imported, there are none."""
    home = sys.modules.get("torch.distributed.tensor")
    return home is not None and isinstance(value, home.DTensor)


def _whole(tensor: Any) -> Tensor:
    """Return a DTensor's full-shape counterpart: a replicated buffer with its values, anything else on meta."""
    if isinstance(tensor, nn.Parameter):
        return _on_meta(tensor.shape, tensor.dtype, tensor.requires_grad)
    if all(placement.is_replicate() for placement in tensor.placements):
        own: Tensor = tensor.detach().to_local()
        return own
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _on_meta(shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad)


def _unflatten(wrapper: nn.Module) -> None:
    """Restore the weights of the modules in an FSDP1 wrapper from the metadata of its flat weight.

    Raises:
        CaptureError: The metadata (private attributes of torch) is missing, or the weights are also tensor-parallel.
    """
    try:
        handle = vars(wrapper)["_handle"]
        if handle is None:  # all weights belong to inner wrappers
            return
        flat = handle.flat_param
        infos, shapes, shared = flat._param_infos, flat._shapes, flat._shared_param_infos
        own = flat._params or [flat] * len(infos)
        cut = any(extension is not None for extension in flat._param_extensions)
    except (AttributeError, KeyError):
        cut = True
    if cut:
        raise CaptureError(
            "the shapes of weights that FSDP1 flattened cannot be told; find the pairs before the model is wrapped in "
            "FullyShardedDataParallel"
        )
    for (name, module, _), shape, parameter in zip(infos, shapes, own, strict=False):
        _give(module, name, _on_meta(shape, parameter.dtype, parameter.requires_grad))
    for name, module, _, first_name, first, _ in shared:
        _give(module, name, first._parameters[first_name])
    for module in wrapper.modules():
        module._parameters.pop("_flat_param", None)


def _give(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    vars(module).pop(name, None)  # FSDP1 leaves a view of its flat weight there
    module._parameters[name] = parameter


def _is_parallel(hook: Callable[..., Any]) -> bool:
    """Whether a hook belongs to torch.distributed or torch.nn.parallel: these shard, gather and synchronize."""
    while isinstance(hook, partial):
        hook = hook.func
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return f"{home}.".startswith(_PARALLEL)
