"""Lion, which torch.optim does not have: whoever's class does what the paper says is taken for it.

In: weight, gradient, momentum. Out: the sign of an interpolation plus decay, new momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from quack_fx.step.rules.rule import Flags, Group, State, Tensors, UpdateRule, add_zeros

_OPTIONS = {"lr", "betas", "weight_decay"}


class LionRule(UpdateRule):
    """Lion with decoupled weight decay (Chen et al., 2023, Alg. 2)."""

    name = "Lion"

    def flags(self, group: Group) -> Flags:
        """None."""
        return ()

    def slots(self, flags: Flags) -> tuple[str, ...]:
        """The momentum."""
        return ("exp_avg",)

    def numbers(self, group: Group) -> tuple[float | Tensor, ...]:
        """lr, decay, and what both interpolations take of a gradient."""
        beta1, beta2 = group["betas"]
        return group["lr"], group["weight_decay"], 1 - beta1, 1 - beta2

    def count(self, params: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]) -> Tensor:
        """Of no importance."""
        for param, group, state in zip(params, groups, states, strict=True):
            add_zeros(param, state, self.kept(self.flags(group)))
        return torch.zeros(len(params), dtype=torch.float64)

    def advance(self, states: Sequence[State], finite: Tensor | None) -> None:
        """Nothing is counted."""

    def coefficients(self, count: Tensor, numbers: Tensors) -> Tensors:
        """Rate, decay and both rests."""
        lr, decay, rest1, rest2 = numbers
        return lr, lr * decay, rest1, rest2

    def change(
        self, weight: Tensor, grad: Tensor, slots: Tensors, coefficients: Tensors, flags: Flags
    ) -> tuple[Tensor, Tensors]:
        """Sign plus decay."""
        rate, decay, rest1, rest2 = coefficients
        (mean,) = slots
        return rate * (mean + rest1 * (grad - mean)).sign() + decay * weight, (mean + rest2 * (grad - mean),)


def is_lion(optimizer: Optimizer) -> bool:
    """Whether an optimizer of any class is Lion: it has Lion's options and state, and does what Lion does.

    Three steps of a copy of it on a tiny weight tell, for each of its groups with all its options.
    """
    return all(_steps_as_lion(type(optimizer), group) for group in optimizer.param_groups)


@torch.no_grad()
def _steps_as_lion(kind: Callable[..., Optimizer], group: Group) -> bool:
    options = {name: value for name, value in group.items() if name != "params"}
    if not options.keys() >= _OPTIONS or any(isinstance(options[name], Tensor) for name in _OPTIONS):
        return False
    beta1, beta2 = options["betas"]
    lr, decay = 0.125, 0.25  # numbers that show, whatever a schedule has made of the user's
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64))
    expected, mean = weight.detach().clone(), torch.zeros_like(weight)
    try:
        optimizer = kind([{**options, "params": [weight], "lr": lr, "weight_decay": decay}], lr=lr)
        for step in range(3):
            grad = torch.linspace(0.5, -1.5, 8, dtype=torch.float64).roll(step)
            weight.grad = grad.clone()
            optimizer.step()
            expected = expected * (1 - lr * decay) - lr * (mean + (1 - beta1) * (grad - mean)).sign()
            mean = mean + (1 - beta2) * (grad - mean)
    except Exception:  # an optimizer that cannot be made of groups alone, or has needs of its own
        return False
    state = optimizer.state[weight]
    same = state.keys() == {"exp_avg"} and torch.allclose(state["exp_avg"], mean, rtol=1e-12)
    return same and torch.allclose(weight, expected, rtol=1e-12)
