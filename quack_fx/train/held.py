"""The query and key weights that an optimizer holds, and what its state says about them.

In: an optimizer, and the scales of a program. Out: the optimizer's parameters; error messages about them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from traceback import walk_stack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from quack_fx.layout import QKLayout
from quack_fx.train.program.scaling import local

if TYPE_CHECKING:
    from quack_fx.train.program.parts.quack import QuacK as Scaling

STATE_KEY = "quack_init"
"""Key of QuacK's entry in each parameter's optimizer state: the initial factors of its attention, as bytes."""


def params_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters that an optimizer holds."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def no_start(name: str) -> str:
    """Error message for a loaded state without initial factors."""
    return (
        f"the optimizer state has no initial factors of QuacK ({STATE_KEY!r}) for {name!r}; to start QuacK from these "
        "weights, detach() it, load the state, and attach it again"
    )


def has_trained(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state shows that it has taken steps; waits for the device."""
    tensors = [local(value) for value in state.values() if isinstance(value, Tensor)]
    return bool(state.get("step", 1)) and any(tensor.dim() > 0 and bool(tensor.any()) for tensor in tensors)


def stale_weight(
    optimizer: Optimizer, own: set[nn.Parameter], names: Mapping[Tensor, str], scaling: Scaling
) -> str | None:
    """A weight that the optimizer lacks but seems to hold an old copy of: as many other tensors have its shape."""
    params = params_of(optimizer)
    held, strange = set(params), Counter(param.shape for param in params if param not in own)
    missing = [param for param in scaling.home if param.requires_grad and param not in held]
    shapes = Counter(param.shape for param in missing)
    return next((names[param] for param in missing if strange[param.shape] >= shapes[param.shape]), None)


def is_stepping(optimizer: Optimizer) -> bool:
    """Whether a step hook runs inside another step of the same optimizer.

    torch runs the hooks twice if a subclass's `step` calls `super().step()`; only the outer call sees the whole update.
    Nested calls are found on the stack, because a step that raises leaves no other trace. (If torch renames its
    wrapper, an inner call is taken for the outer one.)
    """
    frames = (frame for frame, _ in walk_stack(sys._getframe()) if frame.f_code.co_name == "wrapper")
    wrappers = (frame for frame in frames if frame.f_globals.get("__name__") == Optimizer.__module__)
    return sum(frame.f_locals.get("self") is optimizer for frame in wrappers) > 1


def nothing_held(optimizer: Optimizer, layout: QKLayout, scaling: Scaling, own: set[nn.Parameter]) -> str:
    """Error message for an optimizer that holds no rows of a layout."""
    kind = type(optimizer).__name__
    if not scaling.home:
        kept = sum(bool(site.qk_norm) for site in layout.sites)
        left_out = f" ({kept} sites keep a QK norm)" if kept else ""
        return f"the layout has no query or key weights that QuacK scales{left_out}; use {kind} as it is"
    first = next(block.param for site in layout.sites if not site.qk_norm for _, block in site.blocks())
    if all(p.dim() == 1 and p not in own for p in params_of(optimizer)):
        return (
            f"{kind} holds none of the query and key weights, such as {first!r}, but tensors of one axis; in "
            "flat parts of weights, as ZeRO makes them, rows are lost: use FSDP2 (fully_shard), or another sharding "
            "that keeps their shapes"
        )
    return (
        f"{kind} holds none of the query and key weights, such as {first!r}; attach QuacK to the "
        "optimizer that has them, made after the model was wrapped, sharded and moved"
    )
