"""USER: one optimizer's update as tensor arithmetic, a small class for each optimizer that the compiled step knows.

In: a weight, its gradient, the optimizer's own state tensors and a few 0-d coefficients. Out: the change of the weight
before QuacK scales it, and the new state. The rule knows nothing of heads, factors or compilation: the update writes
`weight - scale * change`, whatever the rule is, so that weight decay follows the scaled learning rate. Every rule works
element by element, so that it may be given a weight in pieces.

To teach the compiled step another optimizer: write its `UpdateRule` and add it to `RULES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from quack_fx.errors import OptimizerError

Group = Mapping[str, Any]
State = dict[str, Tensor]


class UpdateRule(ABC):
    """How one class of optimizer changes a weight.

    Everything that a user may change between two steps is a number of `numbers`, which reaches the graph as a tensor:
    a learning-rate schedule never recompiles. What decides which operations there are is in `flags`.
    """

    optimizer: ClassVar[type[torch.optim.Optimizer]]
    """The optimizer class whose arithmetic this is; subclasses may differ and do not match."""

    def check(self, group: Group, skipping: bool) -> None:
        """Refuse a parameter group that this rule cannot honour.

        Arguments:
            group: The group.
            skipping: Whether steps may turn out, on the device, to be none.

        Raises:
            OptimizerError: In one line, with the option and what to do.
        """
        kind = self.optimizer.__name__
        if group["differentiable"]:
            raise OptimizerError(
                f"{kind}(differentiable=True) cannot be compiled into a step; set differentiable=False"
            )

    @abstractmethod
    def flags(self, group: Group) -> tuple[bool, ...]:
        """Options of a parameter group that choose the operations of the update."""

    @abstractmethod
    def slots(self, flags: tuple[bool, ...]) -> tuple[str, ...]:
        """Names of the state tensors, as the optimizer itself calls them; each has the shape of its weight."""

    @abstractmethod
    def numbers(self, group: Group) -> tuple[float | Tensor, ...]:
        """Hyperparameters of a group, read anew before each step."""

    @abstractmethod
    def count(
        self, params: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State], finite: Tensor | None
    ) -> Tensor:
        """Advance the step counters, if there are any, and make what state is missing.

        Arguments:
            params: The parameters.
            groups: The group of each.
            states: The optimizer's state of each.
            finite: 0-d; where it is false, no counter advances. None for always.

        Returns:
            What `coefficients` needs to know of how often each parameter was updated, float64 [n].
        """

    @abstractmethod
    def coefficients(self, count: Tensor, numbers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What `change` needs, for all parameters at once.

        Arguments:
            count: What `count` returned, [n].
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

    def add_slots(self, param: Tensor, group: Group, state: State) -> None:
        """Make the state tensors that a parameter lacks, all zero."""
        for name in self.slots(self.flags(group)):
            if state.get(name) is None:
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)


class AdamRule(UpdateRule):
    """`torch.optim.Adam` (Kingma & Ba, 2015, Alg. 1), weight decay coupled or not, amsgrad and maximize included.

    `foreach`, `fused` and `capturable` choose how torch's own `step` runs; here they change nothing.
    """

    optimizer: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam

    def check(self, group: Group, skipping: bool) -> None:
        """Refuse what cannot be part of a graph."""
        super().check(group, skipping)
        kind, on_device = self.optimizer.__name__, group["capturable"] or group["fused"]
        if skipping and not on_device and any(p.device.type != "cpu" for p in group["params"]):
            raise OptimizerError(
                f"to skip steps without waiting for the device, {kind} must count its steps there: {kind}(fused=True)"
            )
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            raise OptimizerError(f"{kind} with betas given as tensors cannot be compiled into a step; give two floats")

    def flags(self, group: Group) -> tuple[bool, ...]:
        """(amsgrad, maximize, decoupled)."""
        return bool(group["amsgrad"]), bool(group["maximize"]), bool(group["decoupled_weight_decay"])

    def slots(self, flags: tuple[bool, ...]) -> tuple[str, ...]:
        """Moments, as Adam calls them."""
        amsgrad, *_ = flags
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")

    def numbers(self, group: Group) -> tuple[float | Tensor, ...]:
        """lr, decay, whether it is decoupled, eps and what follows from the betas."""
        beta1, beta2 = group["betas"]
        # The complements and logarithms are taken here, in double: 1 - 0.999 in fp32 is wrong in the fifth digit.
        return (
            group["lr"], group["weight_decay"], float(group["decoupled_weight_decay"]), group["eps"],
            1 - beta1, beta2, 1 - beta2, _log(beta1), _log(beta2),
        )  # fmt: skip

    def count(
        self, params: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State], finite: Tensor | None
    ) -> Tensor:
        """Steps taken, this one included."""
        for param, group, state in zip(params, groups, states, strict=True):
            if "step" not in state:
                on_device = bool(group["capturable"] or group["fused"])
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
                self.add_slots(param, group, state)
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1.0 if finite is None else finite.to(steps[0].dtype))
        return torch.stack(steps).double()

    def coefficients(self, count: Tensor, numbers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Decay and rate of this step, with both bias corrections."""
        lr, decay, decoupled, eps, rest1, beta2, rest2, log1, log2 = numbers
        bias1, bias2 = -torch.expm1(count * log1), -torch.expm1(count * log2)
        return torch.where(decoupled > 0, lr * decay, decay), lr / bias1, bias2.rsqrt(), eps, rest1, beta2, rest2

    def change(
        self,
        weight: Tensor,
        grad: Tensor,
        slots: tuple[Tensor, ...],
        coefficients: tuple[Tensor, ...],
        flags: tuple[bool, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Decay plus the corrected direction."""
        decay, rate, unbias2, eps, rest1, beta2, rest2 = coefficients
        amsgrad, maximize, decoupled = flags
        grad = -grad if maximize else grad
        grad = grad if decoupled else grad + decay * weight
        mean = slots[0] + rest1 * (grad - slots[0])
        square = beta2 * slots[1] + rest2 * grad * grad
        largest = torch.maximum(slots[2], square) if amsgrad else square
        change = rate * mean / (largest.sqrt() * unbias2 + eps)
        change = change + decay * weight if decoupled else change
        return change, (mean, square, largest) if amsgrad else (mean, square)


class AdamWRule(AdamRule):
    """`torch.optim.AdamW`: Adam whose weight decay is decoupled (Loshchilov & Hutter, 2019, Alg. 2)."""

    optimizer = torch.optim.AdamW


class SGDRule(UpdateRule):
    """`torch.optim.SGD` with momentum, dampening, Nesterov's form, weight decay and maximize."""

    optimizer = torch.optim.SGD

    def check(self, group: Group, skipping: bool) -> None:
        """Refuse what cannot be part of a graph."""
        super().check(group, skipping)
        if skipping and group["momentum"] and group["dampening"]:
            raise OptimizerError("SGD with dampening treats its first step unlike the others, so none may be skipped")

    def flags(self, group: Group) -> tuple[bool, ...]:
        """(momentum, nesterov, maximize)."""
        return group["momentum"] != 0, bool(group["nesterov"]), bool(group["maximize"])

    def slots(self, flags: tuple[bool, ...]) -> tuple[str, ...]:
        """The momentum, where there is any."""
        momentum, *_ = flags
        return ("momentum_buffer",) if momentum else ()

    def numbers(self, group: Group) -> tuple[float | Tensor, ...]:
        """lr, decay, momentum and what dampening leaves of a gradient."""
        return group["lr"], group["weight_decay"], group["momentum"], 1 - group["dampening"]

    def count(
        self, params: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State], finite: Tensor | None
    ) -> Tensor:
        """0 for a parameter whose momentum begins with this step, 1 for all others."""
        begun = torch.tensor([float(state.get("momentum_buffer") is not None) for state in states], dtype=torch.float64)
        for param, group, state in zip(params, groups, states, strict=True):
            self.add_slots(param, group, state)
        return begun

    def coefficients(self, count: Tensor, numbers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The first gradient is not dampened."""
        lr, decay, momentum, rest = numbers
        return lr, decay, momentum, torch.where(count > 0, rest, 1.0)

    def change(
        self,
        weight: Tensor,
        grad: Tensor,
        slots: tuple[Tensor, ...],
        coefficients: tuple[Tensor, ...],
        flags: tuple[bool, ...],
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The momentum, or the gradient ahead of it, with the decay inside."""
        lr, decay, momentum, rest = coefficients
        has_momentum, nesterov, maximize = flags
        grad = (-grad if maximize else grad) + decay * weight
        if not has_momentum:
            return lr * grad, ()
        moving = momentum * slots[0] + rest * grad
        return lr * (grad + momentum * moving if nesterov else moving), (moving,)


RULES: dict[type[torch.optim.Optimizer], UpdateRule] = {
    rule.optimizer: rule for rule in (AdamRule(), AdamWRule(), SGDRule())
}
"""The optimizers that the compiled update knows, by exact class."""


def _log(x: float) -> float:
    """Natural logarithm, with log(0) = -inf."""
    return math.log(x) if x > 0 else -math.inf
