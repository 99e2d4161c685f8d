"""The training step of a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.train.program.parts.adamw import adamw, start_adamw, step_adamw
from quack_fx.train.program.parts.look import look_at
from quack_fx.train.program.parts.quack import QuacK


class TrainStep:
    """Trains on one batch: compiled loss, backward, compiled update; gives the loss, detached.

    Arguments:
        model: The model, with its initial weights.
        optimizer: A torch.optim.AdamW over its parameters; groups, schedulers and state_dict stay its own.
        loss_fn: Called as loss_fn(model, *batch). Default: the model's output holds the loss: a scalar, or the first
            one of a tuple, or the attribute or entry `loss`.
        tau: Learning rate of query and key rows at the start, relative to that of the other weights.
        clip_grad_norm: Largest total norm of the gradients.
        skip_nonfinite: Whether a step whose gradients are not finite changes nothing.
        compile: Whether to use torch.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        loss_fn: Callable[..., Any] | None = None,
        *,
        tau: float = 1.0,
        clip_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        compile: bool = True,
    ) -> None:
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.clip_grad_norm, self.skip_nonfinite = clip_grad_norm, skip_nonfinite
        self.quack = QuacK(model, tau)
        self.loss = torch.compile(self.loss_of) if compile else self.loss_of
        self.adamw = torch.compile(adamw, fullgraph=True, dynamic=True) if compile else adamw

    def __call__(self, *batch: Any, **named: Any) -> Tensor:
        """Train on one batch; gives its loss."""
        loss: Tensor = self.loss(*batch, **named)
        loss.backward()
        self.update()
        return loss.detach()

    @torch.no_grad()
    def update(self) -> None:
        """Change the weights by the gradients that are there, and drop those."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        weights = [weight for group in groups for weight in group["params"] if weight.grad is not None]
        for weight in weights:
            if not state[weight]:
                state[weight] = start_adamw(weight)
        look = look_at([weight.grad for weight in weights], self.clip_grad_norm, self.skip_nonfinite)
        self.quack.keep(state)
        scales = self.quack.scales()
        for group in groups:
            step_adamw(group, state, scales, look, self.adamw)
        self.optimizer.zero_grad()

    def loss_of(self, *batch: Any, **named: Any) -> Tensor:
        """The loss of a batch."""
        output = self.model(*batch, **named) if self.loss_fn is None else self.loss_fn(self.model, *batch, **named)
        output = output["loss"] if isinstance(output, dict) else getattr(output, "loss", output)
        parts = output if isinstance(output, tuple) else (output,)
        (loss,) = (part for part in parts if isinstance(part, Tensor) and part.dim() == 0)
        return loss
