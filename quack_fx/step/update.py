"""USER: the compiled update: every weight, its state and QuacK's factors in one graph.

In: an optimizer whose arithmetic is in `RULES`, and the QuacK that keeps its initial factors. Out: `Update.run()`,
which does what `optimizer.step()` under QuacK would do, over the optimizer's own state tensors, in one compiled graph.

What changes between steps (learning rates, step counts) enters as a tensor, so that nothing is ever recompiled for it,
and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from quack_fx.factors import FactorPlan, factors, unit_norms
from quack_fx.optim import QuacK
from quack_fx.step.loss import own_code
from quack_fx.step.rules import RULES, UpdateRule


class Update:
    """One optimizer's compiled update.

    Arguments:
        optimizer: An optimizer that `knows` accepts.
        quack: QuacK attached to it, or None for the plain update.
        clip_grad_norm: Largest total norm of the gradients, as in `torch.nn.utils.clip_grad_norm_`; None for no limit.
        compile: Wraps the update function, `torch.compile` with the user's options or nothing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        quack: QuacK | None,
        clip_grad_norm: float | None,
        compile: Callable[[Callable[..., None]], Callable[..., None]],
    ) -> None:
        self._optimizer = optimizer
        self._rule: UpdateRule = RULES[type(optimizer)]
        self._quack = quack
        for group in optimizer.param_groups:
            self._rule.check(group)
        plan = quack.plan if quack is not None else FactorPlan((), (), ())
        self._names = {id(p): name for name, p in quack.params.items()} if quack is not None else {}
        tau = quack.tau if quack is not None else 1.0
        self._apply = compile(_make_apply(self._rule, plan, tau, clip_grad_norm))

    @staticmethod
    def knows(optimizer: Optimizer) -> bool:
        """Whether the update of an optimizer can be compiled here: its exact class is known, nothing is sharded."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return type(optimizer) in RULES and not any(isinstance(p, DTensor) or p.is_complex() for p in params)

    @torch.no_grad()
    def run(self) -> None:
        """Update every parameter that has a gradient."""
        held = [(p, group) for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not held:
            return
        flags = tuple(self._rule.flags(group) for _, group in held)
        slots = [self._rule.slots(flag) for flag in flags]
        states = [self._state(p, group, names) for (p, group), names in zip(held, slots, strict=True)]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1.0)
        device = held[0][0].device
        counts = torch.stack(steps).double()
        coefficients = self._rule.coefficients(counts, self._numbers(held, counts.device))
        self._apply(
            [p for p, _ in held],
            [p.grad for p, _ in held],
            [[state[name] for name in names] for state, names in zip(states, slots, strict=True)],
            torch.stack(coefficients).to(device, non_blocking=True),
            self._quack.params if self._quack is not None else {},
            self._quack.init_factors if self._quack is not None else None,
            [self._names.get(id(p)) for p, _ in held],
            flags,
        )
        if self._quack is not None:
            self._quack.publish()

    def _numbers(
        self, held: Sequence[tuple[nn.Parameter, Mapping[str, Any]]], device: torch.device
    ) -> tuple[Tensor, ...]:
        """Hyperparameters of each parameter's group, float64 [n] each."""
        by_group = {id(group): self._rule.numbers(group) for _, group in held}
        rows = zip(*(by_group[id(group)] for _, group in held), strict=True)
        return tuple(torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in row]) for row in rows)

    def _state(self, param: nn.Parameter, group: Mapping[str, Any], slots: tuple[str, ...]) -> dict[str, Tensor]:
        """The optimizer's state of a parameter, made as the optimizer itself makes it."""
        state: dict[str, Tensor] = self._optimizer.state[param]
        if "step" not in state:
            on_device = bool(group.get("capturable") or group.get("fused"))
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
            for name in slots:
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


def _make_apply(rule: UpdateRule, plan: FactorPlan, tau: float, clip_grad_norm: float | None) -> Callable[..., None]:
    """The function that is compiled."""

    def apply(
        weights: list[Tensor],
        grads: list[Tensor],
        slots: list[list[Tensor]],
        coefficients: Tensor,
        quack_params: dict[str, Tensor],
        init: Tensor | None,
        places: list[str | None],
        flags: tuple[tuple[bool, ...], ...],
    ) -> None:
        clip = _clip(grads, clip_grad_norm)
        by_row = _row_scales(plan, quack_params, init, tau)
        for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            scalars = tuple(c.to(wide) for c in coefficients[:, i].unbind())
            w, g = weight.to(wide), grad.to(wide)
            g = g if clip is None else g * clip.to(wide)
            change, new = rule.change(w, g, tuple(s.to(wide) for s in slots[i]), scalars, flags[i])
            name = places[i]
            if name is not None and by_row is not None:
                change = change * _along_rows(plan, name, by_row, weight).to(wide)
            weight.copy_(w - change)
            for slot, value in zip(slots[i], new, strict=True):
                slot.copy_(value)

    return own_code(apply)


def _clip(grads: list[Tensor], limit: float | None) -> Tensor | None:
    """Factor on all gradients, as `torch.nn.utils.clip_grad_norm_` has it."""
    if limit is None:
        return None
    total = torch.stack([g.float().square().sum() for g in grads]).sum().sqrt()
    return (limit / (total + 1e-6)).clamp(max=1.0)


def _row_scales(plan: FactorPlan, params: dict[str, Tensor], init: Tensor | None, tau: float) -> Tensor | None:
    """tau * factor / initial factor of each flat row of the plan, by the weights before the update."""
    if init is None or not plan.units:
        return None
    scales = tau * (factors(plan, unit_norms(plan, params)) / init)
    return plan.tables(scales.device).spread(scales)


def _along_rows(plan: FactorPlan, name: str, by_row: Tensor, weight: Tensor) -> Tensor:
    """Scales of one parameter, shaped to broadcast over it; 1 on rows that belong to no head."""
    result = by_row.new_ones(())
    for strip in plan.tables(by_row.device).strips:
        if strip.name == name:
            inside = by_row[strip.offset : strip.offset + strip.stop - strip.start]
            rows = torch.cat([
                by_row.new_ones(strip.start), inside, by_row.new_ones(weight.shape[strip.axis] - strip.stop)
            ])  # fmt: skip
            result = result * rows.view([-1 if d == strip.axis else 1 for d in range(weight.dim())])
    return result
