"""What an optimizer does, found out in short trial runs: whether QuacK suits it, and whether it is Lion.

In: an optimizer of any class. Out: a one-line error if QuacK cannot be attached to it, or a warning if it does not suit
the optimizer; whether it is Lion, which torch.optim does not have, but many packages do.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_fx.errors import OptimizerError
from quack_fx.train.held import params_of

_UNSUITED = {
    "lbfgs": "it evaluates the loss at several points in one step and learns curvature from steps that QuacK changes",
    "adafactor": "its steps are relative to the size of the weights, which already changes with their norms",
}
"""Why QuacK does not suit an optimizer, by part of its class name."""

_STEPS = 16
"""Number of steps that a change of the weights must survive: some optimizers restore a copy every five or six steps."""

_LION_OPTIONS = {"lr", "betas", "weight_decay"}


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise if QuacK cannot be attached to an optimizer, and warn if it does not suit the optimizer.

    Raises:
        OptimizerError: The optimizer has no step hooks, wraps other optimizers, or, in a short trial run, overwrites
            the weights from copies of its own.
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
            f"{kind} is around the optimizer in its {inside!r}; attach QuacK to that one, or to each where there are "
            f"several, and step {kind} as before"
        )
    if not all(_lasts(type(optimizer), group) for group in optimizer.param_groups):
        raise OptimizerError(
            f"{kind} makes the weights anew from copies of its own, so that what QuacK scales would not last; use an "
            "optimizer that adds its updates to the weights"
        )
    lineage = " ".join(cls.__name__.lower() for cls in type(optimizer).__mro__)
    for name, reason in _UNSUITED.items():
        if name in lineage and _relative(optimizer, name):
            warnings.warn(f"QuacK does not suit {kind}: {reason}", stacklevel=3)


def _remade(kind: Callable[..., Any], group: Mapping[str, Any], weight: Tensor, **numbers: Any) -> Any:
    """A new optimizer of the given class for one weight, with the options of a group, some of them replaced."""
    options = {name: value for name, value in group.items() if name != "params"}
    return kind(
        [{**options, "params": [weight], **{n: x for n, x in numbers.items() if n in options}}], lr=numbers["lr"]
    )


def _inside(optimizer: Optimizer) -> str | None:
    """The attribute with the optimizers that an optimizer wraps (they hold some of its weights), or None."""
    own = set(params_of(optimizer))
    for name, value in vars(optimizer).items():
        each = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
        others = [one for one in each if isinstance(one, Optimizer) and one is not optimizer]
        if not all(own.isdisjoint(params_of(one)) for one in others):
            return name
    return None


@torch.no_grad()
def _lasts(kind: type[Optimizer], group: Mapping[str, Any]) -> bool:
    """Whether an external change of a tiny weight is still there after some steps of a new optimizer of this class."""
    if kind.__module__.startswith("torch.optim."):
        return True
    start = torch.linspace(-1, 1, 16, device="cpu").view(4, 4).cos()
    change = 0.1 * torch.linspace(-2, 3, 16, device="cpu").view(4, 4).sin()
    try:
        with torch.random.fork_rng([]), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            ends = [_run(kind, group, start, change * n) for n in (0, 1)]
    except Exception:  # it may need arguments that a parameter group does not have
        return True
    left = ((ends[1] - ends[0]) * change).sum() / change.square().sum()
    return bool(left > 0.75)


def _run(kind: type[Optimizer], group: Mapping[str, Any], start: Tensor, change: Tensor) -> Tensor:
    """A weight after some steps, with `change` added after the first."""
    torch.manual_seed(0)
    weight = nn.Parameter(start.clone())
    optimizer = _remade(kind, group, weight, lr=1e-3, weight_decay=0.0)
    if callable(train := getattr(optimizer, "train", None)):
        train()
    for step in range(_STEPS):
        weight.grad = start.roll(step).clone()
        try:
            optimizer.step()
        except TypeError:  # it needs a closure
            optimizer.step(lambda: torch.zeros(()))
        if step == 0:
            weight.add_(change)
    return weight.detach()


def _relative(optimizer: Optimizer, name: str) -> bool:
    """False for Adafactor of transformers with relative steps turned off."""
    switches = [optimizer.defaults[k] for k in ("relative_step", "scale_parameter") if k in optimizer.defaults]
    return name != "adafactor" or not switches or any(switches)


def is_lion(optimizer: Optimizer) -> bool:
    """Whether an optimizer has Lion's options, state and updates.

    For each parameter group, a new optimizer of the same class and options takes three steps on a tiny weight, which
    are compared with Lion's. An exception means that it is not Lion.
    """
    return all(_steps_as_lion(type(optimizer), group) for group in optimizer.param_groups)


@torch.no_grad()
def _steps_as_lion(kind: Callable[..., Optimizer], group: Mapping[str, Any]) -> bool:
    options = {name: value for name, value in group.items() if name != "params"}
    if not options.keys() >= _LION_OPTIONS or any(isinstance(options[name], Tensor) for name in _LION_OPTIONS):
        return False
    lr, decay = 0.125, 0.25  # large enough to compare; the user's schedule may be at zero
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64, device="cpu"))
    expected, mean = weight.detach().clone(), torch.zeros_like(weight)
    try:
        beta1, beta2 = options["betas"]
        optimizer = _remade(kind, group, weight, lr=lr, weight_decay=decay)
        for step in range(3):
            weight.grad = torch.linspace(0.5, -1.5, 8, dtype=torch.float64, device="cpu").roll(step)
            grad = weight.grad.clone()
            optimizer.step()
            expected = expected * (1 - lr * decay) - lr * (mean + (1 - beta1) * (grad - mean)).sign()
            mean = mean + (1 - beta2) * (grad - mean)
        state = optimizer.state[weight]
        same = state.keys() == {"exp_avg"} and torch.allclose(state["exp_avg"], mean, rtol=1e-12)
        return same and torch.allclose(weight, expected, rtol=1e-12)
    except Exception:  # it cannot be constructed from the group's options, or needs other arguments
        return False
