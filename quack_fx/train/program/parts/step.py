"""The training step of a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_fx.train.program.parts.change import Number, change
from quack_fx.train.program.parts.masters import Masters
from quack_fx.train.program.parts.quack import QuacK
from quack_fx.train.program.parts.sharded import norms_of

STEPS: dict[type[Optimizer], Callable[..., None]] = {}


class TrainStep:
    """Trains on one batch per call. Create it while the model has its initial weights; the optimizers stay yours."""

    def __init__(
        self,
        model: nn.Module,
        *optimizers: Optimizer,  # of the classes in STEPS
        loss_fn: Callable[..., Any] | None = None,  # loss_fn(model, *batch); by default the model returns the loss
        tau: float | Tensor = 1.0,  # learning rate of query and key rows at the start, relative to the others
        clip_grad_norm: float | None = None,  # maximum total norm of the gradients
        skip_nonfinite: bool = False,  # whether to skip a step if its gradients are not finite
        compile: bool = True,  # whether to use torch.compile
    ) -> None:
        self.model, self.optimizers, self.loss_fn = model, optimizers, loss_fn
        self.clip_grad_norm, self.skip_nonfinite = clip_grad_norm, skip_nonfinite
        if unknown := [type(optimizer).__name__ for optimizer in optimizers if type(optimizer) not in STEPS]:
            raise TypeError(f"{unknown[0]} is not among {', '.join(kind.__name__ for kind in STEPS)}")
        self.steps = [STEPS[type(optimizer)] for optimizer in optimizers]
        self.quack, self.seen = QuacK(model, tau, optimizers), list[int]()
        self.masters = [Masters(optimizer) for optimizer in optimizers]  # if masters
        self.loss = torch.compile(self.loss_of) if compile else self.loss_of
        # One pass over memory for each weight, without buffers for intermediate results.
        one_pass: dict[str, Any] = {f"realize_{what}_threshold": 999 for what in ("reads", "acc_reads", "opcount")}
        self.change = torch.compile(change, dynamic=True, options=one_pass) if compile else change

    def __call__(self, *batch: Any, **named: Any) -> Tensor:
        """Train on one batch and return its loss."""
        try:
            loss = self.loss(*batch, **named)
            if loss is None:
                raise ValueError("the model gives no loss, or several; give it targets, or pass loss_fn")
            torch.autograd.backward(loss)
            self.update()
        finally:  # so that gradients left by an exception are not added to the next batch's
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def update(self) -> None:
        """Update the weights with their gradients."""
        weights = [weight for o in self.optimizers for group in o.param_groups for weight in group["params"]]
        if self.seen != (seen := list(map(id, weights))):  # parameters were added or replaced
            self.quack.find(self.model)
            self.seen = seen
        for optimizer in self.optimizers:
            self.quack.take_over(optimizer)
        for masters in self.masters:  # if masters
            masters.refresh()  # if masters
        grads = [g.coalesce().values() if g.is_sparse else g for w in weights if (g := w.grad) is not None]
        clip: Number = 1.0
        finite: Tensor | None = None
        if grads and (self.clip_grad_norm is not None or self.skip_nonfinite):
            exact = reduce(torch.promote_types, {grad.dtype for grad in grads}, torch.float32)
            norms = [norm.to(grads[0].device) for norm in torch._foreach_norm(grads, 2, exact)]  # if not sharded
            norms = norms_of(grads, exact)  # if sharded
            norm = torch.linalg.vector_norm(torch.stack(norms))
            clip = 1.0 if self.clip_grad_norm is None else (self.clip_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            finite = norm.isfinite().float() if self.skip_nonfinite else None
        scales = self.quack.scales()
        for optimizer, step in zip(self.optimizers, self.steps, strict=True):
            step(optimizer, scales, clip, finite, self.change)
            self.quack.keep(optimizer, [weight for weight in self.quack.home if weight in optimizer.state])
            optimizer._opt_called = True  # type: ignore[attr-defined]  # otherwise schedulers warn
        for masters in self.masters:  # if masters
            masters.round()  # if masters

    def loss_of(self, *batch: Any, **named: Any) -> Tensor | None:
        """The loss in the model's output: a scalar, the attribute or entry `loss`, or the only scalar of a tuple."""
        output = self.loss_fn(self.model, *batch, **named) if self.loss_fn else self.model(*batch, **named)
        output = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
        parts = output if isinstance(output, (tuple, list)) else (output,)
        scalars = [part for part in parts if isinstance(part, Tensor) and part.dim() == 0 and part.is_floating_point()]
        return scalars[0] if len(scalars) == 1 else None
