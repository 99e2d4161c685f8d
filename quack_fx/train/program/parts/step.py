"""The training step of a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_fx.train.program.parts.change import change, look_at
from quack_fx.train.program.parts.loss import pick_loss
from quack_fx.train.program.parts.masters import Masters
from quack_fx.train.program.parts.quack import QuacK

STEPS: dict[type[Optimizer], Callable[..., None]] = {}


class TrainStep:
    """Trains on one batch: compiled loss, backward, compiled update; gives the loss, detached.

    Arguments:
        model: The model, with its initial weights.
        optimizers: Those of `STEPS` over its parameters; groups, schedulers and state_dict stay their own.
        loss_fn: Called as loss_fn(model, *batch). Default: the loss is in what the model returns, see `pick_loss`.
        tau: Learning rate of query and key rows at the start, relative to that of the other weights.
        clip_grad_norm: Largest total norm of the gradients.
        skip_nonfinite: Whether a step whose gradients are not finite changes nothing.
        compile: Whether to use torch.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        *optimizers: Optimizer,
        loss_fn: Callable[..., Any] | None = None,
        tau: float | Tensor = 1.0,
        clip_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        compile: bool = True,
    ) -> None:
        self.model, self.optimizers, self.loss_fn = model, optimizers, loss_fn
        self.clip_grad_norm, self.skip_nonfinite = clip_grad_norm, skip_nonfinite
        if unknown := [type(optimizer) for optimizer in optimizers if type(optimizer) not in STEPS]:
            raise TypeError(f"{unknown[0].__name__} is not among {', '.join(kind.__name__ for kind in STEPS)}")
        self.steps = [STEPS[type(optimizer)] for optimizer in optimizers]
        self.quack = QuacK(model, tau, optimizers)
        self.masters = [Masters(optimizer) for optimizer in optimizers]  # if masters
        self.loss = torch.compile(self.loss_of) if compile else self.loss_of
        self.change = torch.compile(change, fullgraph=True, dynamic=True) if compile else change
        self.seen = list(map(id, self.weights()))

    def __call__(self, *batch: Any, **named: Any) -> Tensor:
        """Train on one batch; gives its loss."""
        try:
            loss = self.loss(*batch, **named)
            if loss is None:
                raise ValueError("the model returns no loss, or several; give it targets, or pass loss_fn")
            torch.autograd.backward(loss)
            self.update()
        finally:  # what an exception leaves behind is not added to the next batch
            self.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def update(self) -> None:
        """Change the weights by the gradients that are there."""
        weights = self.weights()
        if self.seen != (seen := list(map(id, weights))):  # some were added, or replaced
            self.quack.find(self.model)
            self.seen = seen
        for optimizer in self.optimizers:
            self.quack.take_over(optimizer)
        for masters in self.masters:  # if masters
            masters.refresh()  # if masters
        grads = [weight.grad for weight in weights if weight.grad is not None]
        look = look_at(grads, weights[0].device, self.clip_grad_norm, self.skip_nonfinite)
        scales = self.quack.scales()
        for optimizer, step in zip(self.optimizers, self.steps, strict=True):
            step(optimizer, scales, look, self.change)
            self.quack.keep(optimizer, [weight for weight in self.quack.home if weight in optimizer.state])
            optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers warn of one that never stepped
        for masters in self.masters:  # if masters
            masters.round()  # if masters

    def loss_of(self, *batch: Any, **named: Any) -> Tensor | None:
        """The loss of a batch."""
        return pick_loss(self.loss_fn(self.model, *batch, **named) if self.loss_fn else self.model(*batch, **named))

    def weights(self) -> list[Tensor]:
        """All parameters of the optimizers."""
        return [weight for o in self.optimizers for group in o.param_groups for weight in group["params"]]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
