"""USER: one optimizer's update as tensor arithmetic, a small class for each optimizer that the compiled step knows.

In: a weight, its gradient, the optimizer's own state tensors and a few 0-d coefficients. Out: the change of the weight
before QuacK scales it, and the new state. The rule knows nothing of heads, factors or compilation: the update writes
`weight - scale * change`, whatever the rule is, so that weight decay follows the scaled learning rate.

To teach the compiled step another optimizer: write its `UpdateRule` and add it to `RULES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from quack_fx.errors import OptimizerError


class UpdateRule(ABC):
    """How one class of optimizer changes a weight.

    Everything that a user may change between two steps is a number of `numbers`, which reaches the graph as a tensor:
    a learning-rate schedule never recompiles. What decides which operations there are is in `flags`.
    """

    optimizer: ClassVar[type[torch.optim.Optimizer]]
    """The optimizer class whose arithmetic this is; subclasses may differ and do not match."""

    @abstractmethod
    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse a parameter group that this rule cannot honour.

        Raises:
            OptimizerError: In one line, with the option and what to do.
        """

    @abstractmethod
    def flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        """Options of a parameter group that choose the operations of the update."""

    @abstractmethod
    def slots(self, flags: tuple[bool, ...]) -> tuple[str, ...]:
        """Names of the state tensors, as the optimizer itself calls them; each has the shape of its weight."""

    @abstractmethod
    def numbers(self, group: Mapping[str, Any]) -> tuple[float | Tensor, ...]:
        """Hyperparameters of a group, read anew before each step."""

    @abstractmethod
    def coefficients(self, step: Tensor, numbers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What `change` needs, for all parameters at once.

        Arguments:
            step: Steps taken, this one included, [n].
            numbers: The hyperparameters of each parameter's group, [n] each.

        Returns:
            Coefficients, [n] each.
        """

    @abstractmethod
    def change(
        self,
        weight: Tensor,
        grad: Tensor,
        slots: tuple[Tensor, ...],
        coefficients: tuple[Tensor, ...],
        flags: tuple[bool, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What this step subtracts from a weight, and the new state.

        Arguments:
            weight, grad, slots: Tensors of one shape, in the precision to compute in.
            coefficients: 0-d tensors, the entries of `coefficients` for this parameter.
            flags: Options of its group.

        Returns:
            The change, learning rate and weight decay included, and the new slots.
        """


class AdamWRule(UpdateRule):
    """`torch.optim.AdamW`: decoupled weight decay (Loshchilov & Hutter, 2019, Alg. 2), amsgrad and maximize included.

    `foreach`, `fused` and `capturable` choose how torch's own `step` runs; here they change nothing.
    """

    optimizer = torch.optim.AdamW

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse what cannot be part of a graph."""
        if group["differentiable"]:
            raise OptimizerError("AdamW(differentiable=True) cannot be compiled into a step; set differentiable=False")
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            raise OptimizerError("AdamW with betas given as tensors cannot be compiled into a step; give two floats")

    def flags(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        """(amsgrad, maximize)."""
        return bool(group["amsgrad"]), bool(group["maximize"])

    def slots(self, flags: tuple[bool, ...]) -> tuple[str, ...]:
        """Moments, as AdamW calls them."""
        amsgrad, _ = flags
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")

    def numbers(self, group: Mapping[str, Any]) -> tuple[float | Tensor, ...]:
        """lr, decay, eps and what follows from the betas."""
        beta1, beta2 = group["betas"]
        # The complements and logarithms are taken here, in double: 1 - 0.999 in fp32 is wrong in the fifth digit.
        return (
            group["lr"], group["weight_decay"], group["eps"], 1 - beta1, beta2, 1 - beta2, _log(beta1), _log(beta2),
        )  # fmt: skip

    def coefficients(self, step: Tensor, numbers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Decay and rate of this step, with both bias corrections."""
        lr, decay, eps, rest1, beta2, rest2, log1, log2 = numbers
        bias1, bias2 = -torch.expm1(step * log1), -torch.expm1(step * log2)
        return lr * decay, lr / bias1, bias2.rsqrt(), eps, rest1, beta2, rest2

    def change(
        self,
        weight: Tensor,
        grad: Tensor,
        slots: tuple[Tensor, ...],
        coefficients: tuple[Tensor, ...],
        flags: tuple[bool, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Decoupled decay plus the corrected Adam direction."""
        decay, rate, unbias2, eps, rest1, beta2, rest2 = coefficients
        amsgrad, maximize = flags
        grad = -grad if maximize else grad
        mean = slots[0] + rest1 * (grad - slots[0])
        square = beta2 * slots[1] + rest2 * grad * grad
        largest = torch.maximum(slots[2], square) if amsgrad else square
        change = decay * weight + rate * mean / (largest.sqrt() * unbias2 + eps)
        return change, (mean, square, largest) if amsgrad else (mean, square)


RULES: dict[type[torch.optim.Optimizer], UpdateRule] = {rule.optimizer: rule for rule in (AdamWRule(),)}
"""The optimizers that the compiled update knows, by exact class."""


def _log(x: float) -> float:
    """Natural logarithm, with log(0) = -inf."""
    return math.log(x) if x > 0 else -math.inf
