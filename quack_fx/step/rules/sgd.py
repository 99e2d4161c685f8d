"""SGD of torch.optim, as tensor arithmetic.

In: weight, gradient, momentum. Out: the momentum or the gradient ahead of it, new momentum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quack_fx.step.rules.rule import Flags, Group, State, Tensors, UpdateRule, add_zeros


class SGDRule(UpdateRule):
    """`torch.optim.SGD` with momentum, dampening, Nesterov's form, weight decay and maximize."""

    name = "SGD"

    def refusal(self, group: Group, skipping: bool) -> str | None:
        """What cannot be part of a graph."""
        if skipping and group["momentum"] and group["dampening"]:
            return "SGD with dampening treats its first step unlike the others, so none may be skipped"
        return None

    def flags(self, group: Group) -> Flags:
        """(momentum, nesterov, maximize)."""
        return group["momentum"] != 0, bool(group["nesterov"]), bool(group["maximize"])

    def slots(self, flags: Flags) -> tuple[str, ...]:
        """The momentum, where there is any."""
        momentum, *_ = flags
        return ("momentum_buffer",) if momentum else ()

    def numbers(self, group: Group) -> tuple[float | Tensor, ...]:
        """lr, decay, momentum and what dampening leaves of a gradient."""
        return group["lr"], group["weight_decay"], group["momentum"], 1 - group["dampening"]

    def count(self, params: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]) -> Tensor:
        """0 for a parameter whose momentum begins with this step, 1 for all others."""
        begun = torch.tensor([float(state.get("momentum_buffer") is not None) for state in states], dtype=torch.float64)
        for param, group, state in zip(params, groups, states, strict=True):
            add_zeros(param, state, self.kept(self.flags(group)))
        return begun

    def advance(self, states: Sequence[State], finite: Tensor | None) -> None:
        """Nothing is counted."""

    def coefficients(self, count: Tensor, numbers: Tensors) -> Tensors:
        """The first gradient is not dampened."""
        lr, decay, momentum, rest = numbers
        return lr, decay, momentum, torch.where(count > 0, rest, 1.0)

    def change(
        self, weight: Tensor, grad: Tensor, slots: Tensors, coefficients: Tensors, flags: Flags
    ) -> tuple[Tensor, Tensors]:
        """The momentum, or the gradient ahead of it, with the decay inside."""
        lr, decay, momentum, rest = coefficients
        has_momentum, nesterov, maximize = flags
        grad = (-grad if maximize else grad) + decay * weight
        if not has_momentum:
            return lr * grad, ()
        moving = momentum * slots[0] + rest * grad
        return lr * (grad + momentum * moving if nesterov else moving), (moving,)
