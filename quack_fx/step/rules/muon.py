"""Muon of torch.optim: momentum, then the nearest orthogonal matrix in place of a gradient.

In: weight, gradient, momentum. Out: decay plus orthogonalised direction, new momentum. The direction depends on the
whole matrix, so it is made before the weight is cut into heads, by torch's own Newton-Schulz: bit for bit that of
`torch.optim.Muon`, whose products are nearly all that it costs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz  # a copy of ours would drift from torch's

from quack_fx.step.rules.rule import Flags, Gate, Group, State, Tensors, UpdateRule, add_zeros


class MuonRule(UpdateRule):
    """`torch.optim.Muon` (Jordan et al., 2024), with both adjustments of the learning rate to the shape."""

    name = "Muon"

    def flags(self, group: Group) -> Flags:
        """None: what there is to choose is chosen in `directions`."""
        return ()

    def slots(self, flags: Flags) -> tuple[str, ...]:
        """None for `change`: the momentum is that of `directions`."""
        return ()

    def kept(self, flags: Flags) -> tuple[str, ...]:
        """The momentum."""
        return ("momentum_buffer",)

    def numbers(self, group: Group) -> tuple[float | Tensor, ...]:
        """lr and decay."""
        return group["lr"], group["weight_decay"]

    def count(self, params: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]) -> Tensor:
        """By how much the learning rate is adjusted to the shape of each."""
        for param, group, state in zip(params, groups, states, strict=True):
            add_zeros(param, state, self.kept(self.flags(group)))
        ratios = [_adjust_lr(1.0, group["adjust_lr_fn"], p.shape) for p, group in zip(params, groups, strict=True)]
        return torch.tensor(ratios, dtype=torch.float64)

    def advance(self, states: Sequence[State], finite: Tensor | None) -> None:
        """Nothing is counted."""

    def coefficients(self, count: Tensor, numbers: Tensors) -> Tensors:
        """Rate for the direction, and decay."""
        lr, decay = numbers
        return lr * count, lr * decay

    def directions(self, grads: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State], gate: Gate) -> Gate:
        """Momentum, and its orthogonalisation in place of the gradient, which is clipped by then."""
        for given, group, state in zip(grads, groups, states, strict=True):
            momentum = state["momentum_buffer"]
            grad = given.to(momentum.dtype)
            grad = grad if gate.clip is None else grad * gate.clip.to(grad.dtype)
            new = momentum.lerp(grad, 1 - group["momentum"])
            momentum.copy_(new if gate.finite is None else torch.where(gate.finite, new, momentum))
            ahead = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            given.copy_(_zeropower_via_newtonschulz(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"]))
        return Gate(finite=gate.finite)

    def change(
        self, weight: Tensor, grad: Tensor, slots: Tensors, coefficients: Tensors, flags: Flags
    ) -> tuple[Tensor, Tensors]:
        """Direction plus decay."""
        rate, decay = coefficients
        return rate * grad + decay * weight, ()
