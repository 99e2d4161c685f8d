"""Which optimizers QuacK can be attached to.

In: an optimizer. Out: one line on why it has to be another, or a warning where QuacK does not suit what it does.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch.optim import Optimizer

from quack_fx.errors import OptimizerError

_UNSUITED = {
    "lbfgs": "it evaluates the loss at several points in one step and learns curvature from steps that QuacK changes",
    "schedulefree": "it rebuilds the weights from sequences of its own, so that a scaled update does not last",
    "adafactor": "its steps are relative to the size of the weights, which already changes with their norms",
}
"""Why QuacK does not suit an optimizer, by part of its class name."""


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer that QuacK cannot be attached to, and warn of one that it does not suit.

    Raises:
        OptimizerError: It has no step hooks, or its state is that of optimizers inside it.
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(f"optimizer is {kind}, which is no torch.optim.Optimizer; QuacK attaches to those only")
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except AttributeError:
        raise OptimizerError(
            f"{kind} has no hooks, as wrappers of optimizers do; attach QuacK to the one inside"
        ) from None
    if inside := _inside(optimizer):
        raise OptimizerError(
            f"{kind} saves the state of the optimizer in its {inside!r}, and not QuacK's first factors with its own; "
            f"attach QuacK to that one, or to each where there are several, and step {kind} as before"
        )
    lineage = " ".join(cls.__name__.lower() for cls in type(optimizer).__mro__)
    for name, reason in _UNSUITED.items():
        if name in lineage and _relative(optimizer, name):
            warnings.warn(f"QuacK does not suit {kind}: {reason}", stacklevel=3)


def _inside(optimizer: Optimizer) -> str | None:
    """The attribute with the optimizers that an optimizer with a `state_dict` of its own is around."""
    if type(optimizer).state_dict is Optimizer.state_dict:
        return None
    for name, value in vars(optimizer).items():
        each = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, Optimizer) and one is not optimizer for one in each):
            return name
    return None


def _relative(optimizer: Optimizer, name: str) -> bool:
    """False for the Adafactor of transformers when its relative steps are switched off."""
    switches = [optimizer.defaults[k] for k in ("relative_step", "scale_parameter") if k in optimizer.defaults]
    return name != "adafactor" or not switches or any(switches)
