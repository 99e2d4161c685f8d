"""The ways to take one and the same training step that are compared with each other.

In: a model, its layout and a loss. Out: `Arm`s: `forward(batch)` leaves gradients, `update()` uses them up.

    a  eager model, fused optimizer
    b  torch.compile(model), fused optimizer
    c  torch.compile(model), torch.compile(optimizer.step)
    d  c, with QuacK as one would write it by hand from the paper: a loop over heads around the step
    e  the model with QK norm (RMS with a gain), the compiled step of this package, no QuacK
    plain, quack   the compiled step of this package without and with QuacK
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.factors import FactorPlan
from quack_fx.insert import insert_qk_norm
from quack_fx.layout import QKLayout
from quack_fx.step import compile_train_step

Batch = tuple[Tensor, ...]
Loss = Callable[..., Tensor]
"""`loss(model, *batch)`: a scalar."""

MEANING = {
    "a": "eager model, fused AdamW",
    "b": "torch.compile(model), fused AdamW",
    "c": "torch.compile(model), torch.compile(optimizer.step)",
    "d": "c with QuacK as a loop over heads",
    "e": "QK norm in the model, our step, no QuacK",
    "plain": "our step, no QuacK",
    "quack": "our step with QuacK",
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        model: Its own copy of the model.
        forward: Leaves a loss and the gradients.
        update: Uses the gradients up.
    """

    model: nn.Module
    forward: Callable[[Batch], Tensor]
    update: Callable[[], None]

    def step(self, batch: Batch) -> Tensor:
        """A whole training step."""
        loss = self.forward(batch)
        self.update()
        return loss


def arms(
    names: Sequence[str], model: nn.Module, layout: QKLayout, loss: Loss, lr: float, clip: float
) -> dict[str, Arm]:
    """Arms by name, each on a copy of the model, with AdamW and the same clipping of gradients.

    "plain" and "quack" share a model and an optimizer: where tensors lie in memory makes a difference of some percent.
    """
    own, pair = (n for n in names if n not in PAIR), [n for n in names if n in PAIR]
    made = {name: _arm(name, copy.deepcopy(model), layout, loss, lr, clip) for name in own}
    shared = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(shared.parameters(), lr=lr)
    for name in pair:
        made[name] = _ours(shared, optimizer, loss, layout if name == "quack" else QKLayout(), clip)
    return made


PAIR = ("plain", "quack")


def _ours(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, layout: QKLayout, clip: float) -> Arm:
    step = compile_train_step(model, optimizer, loss, layout=layout, clip_grad_norm=clip)
    return Arm(model, lambda batch: step.forward_backward(*batch), step.update)


def _arm(name: str, model: nn.Module, layout: QKLayout, loss: Loss, lr: float, clip: float) -> Arm:
    if name == "e":
        insert_qk_norm(model, layout)
        return _ours(model, torch.optim.AdamW(model.parameters(), lr=lr), loss, QKLayout(), clip)
    compiled = loss if name == "a" else torch.compile(loss)
    parameters = list(model.parameters())
    if name in ("a", "b"):
        optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
        step_of: Callable[[], Any] = optimizer.step
    else:
        # A learning rate in a tensor: a number would be compiled in, and a schedule would recompile every step.
        rate = torch.tensor(lr, device=parameters[0].device)
        optimizer = torch.optim.AdamW(parameters, lr=rate, capturable=parameters[0].is_cuda)
        step_of = torch.compile(optimizer.step)

    def forward(batch: Batch) -> Tensor:
        value = compiled(model, *batch)
        value.backward()
        return value.detach()

    by_hand = _ByHand(model, layout) if name == "d" else None

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, clip)
        if by_hand is None:
            step_of()
        else:
            by_hand.before()
            step_of()
            by_hand.after()
        optimizer.zero_grad(set_to_none=True)

    return Arm(model, forward, update)


class _ByHand:
    """Alg. 1 and 2 head by head: norms before the step, rows scaled after it."""

    def __init__(self, model: nn.Module, layout: QKLayout) -> None:
        plan = FactorPlan.from_layout(layout)
        params = dict(model.named_parameters())
        self._terms = plan.terms
        self._rows = [[params[u.param].detach().narrow(u.axis, a, b - a) for a, b in u.ranges] for u in plan.units]
        self._first = self._factors()

    def _factors(self) -> list[Tensor]:
        norms = [torch.stack([part.float().square().sum() for part in rows]).sum().sqrt() for rows in self._rows]
        found: list[list[Tensor]] = [[] for _ in norms]
        for term in self._terms:
            for i, unit in enumerate(term):
                others = [norms[other] for j, other in enumerate(term) if j != i]
                found[unit].append(1 / torch.stack(others).prod())
        return [torch.stack(factors).amin() for factors in found]

    @torch.no_grad()
    def before(self) -> None:
        self._scales = [now / first for now, first in zip(self._factors(), self._first, strict=True)]
        self._old = [[part.clone() for part in rows] for rows in self._rows]

    @torch.no_grad()
    def after(self) -> None:
        for rows, old, scale in zip(self._rows, self._old, self._scales, strict=True):
            for part, was in zip(rows, old, strict=True):
                part.copy_(was + scale * (part - was))
