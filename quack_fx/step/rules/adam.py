"""Adam and AdamW of torch.optim, as tensor arithmetic.

In: weight, gradient, moments. Out: decay plus corrected direction, new moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quack_fx.step.rules.rule import Flags, Group, State, Tensors, UpdateRule, add_zeros


class AdamRule(UpdateRule):
    """`torch.optim.Adam` (Kingma & Ba, 2015, Alg. 1), weight decay coupled or not, amsgrad and maximize included.

    `foreach`, `fused` and `capturable` choose how torch's own `step` runs; here they change nothing.
    """

    name = "Adam"

    def refusal(self, group: Group, skipping: bool) -> str | None:
        """What cannot be part of a graph."""
        kind, on_device = self.name, group["capturable"] or group["fused"]
        if skipping and not on_device and any(p.device.type != "cpu" for p in group["params"]):
            return f"to skip steps without waiting for the device, {kind} must count them there: {kind}(fused=True)"
        if any(isinstance(beta, Tensor) for beta in group["betas"]):
            return f"{kind} with betas given as tensors cannot be compiled into a step; give two floats"
        return None

    def flags(self, group: Group) -> Flags:
        """(amsgrad, maximize, decoupled)."""
        return bool(group["amsgrad"]), bool(group["maximize"]), bool(group["decoupled_weight_decay"])

    def slots(self, flags: Flags) -> tuple[str, ...]:
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

    def count(self, params: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]) -> Tensor:
        """Steps taken, this one included."""
        for param, group, state in zip(params, groups, states, strict=True):
            if "step" not in state:
                on_device = bool(group["capturable"] or group["fused"])
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
                add_zeros(param, state, self.kept(self.flags(group)))
        return torch.stack([state["step"] for state in states]).double() + 1

    def advance(self, states: Sequence[State], finite: Tensor | None) -> None:
        """One step more."""
        steps = [state["step"] for state in states]
        # A list: to add one tensor to all, foreach may read its number.
        torch._foreach_add_(steps, 1.0 if finite is None else [finite.to(steps[0].dtype)] * len(steps))

    def coefficients(self, count: Tensor, numbers: Tensors) -> Tensors:
        """Decay and rate of this step, with both bias corrections."""
        lr, decay, decoupled, eps, rest1, beta2, rest2, log1, log2 = numbers
        bias1, bias2 = -torch.expm1(count * log1), -torch.expm1(count * log2)
        return torch.where(decoupled > 0, lr * decay, decay), lr / bias1, bias2.rsqrt(), eps, rest1, beta2, rest2

    def change(
        self, weight: Tensor, grad: Tensor, slots: Tensors, coefficients: Tensors, flags: Flags
    ) -> tuple[Tensor, Tensors]:
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

    name = "AdamW"


def _log(x: float) -> float:
    """Natural logarithm, with log(0) = -inf."""
    return math.log(x) if x > 0 else -math.inf
