"""USER: a compiled training step with QuacK's scaling inside the update.

In: a model, the user's optimizer, maybe a loss function and a layout. Out: `step(*batch, **batch) -> loss`.

Two graphs: the loss (with its backward) and the update. The optimizer stays the user's: its groups, schedulers and
`state_dict()` are the ordinary ones, over its own state tensors.

    loss.py     the loss of one batch as one function
    rules.py    the arithmetic of each optimizer that is compiled
    pieces.py   weights cut so that a head is one long row
    update.py   all weights, their state and the norms that one step leaves to the next
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_fx.errors import StepError
from quack_fx.factors import NormName
from quack_fx.layout import QKLayout
from quack_fx.optim import QuacK
from quack_fx.step.loss import LossFn, make_loss, model_inputs
from quack_fx.step.update import Update

__all__ = ["TrainStep", "compile_train_step"]


def compile_train_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn | None = None,
    *,
    layout: QKLayout | None = None,
    tau: float = 1.0,
    norm: NormName = "frobenius",
    clip_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    scaler: torch.amp.GradScaler | None = None,
    compile: bool = True,
    mode: str | None = None,
) -> TrainStep:
    """A training step with QuacK inlined: forward, backward and update of one batch.

    Arguments:
        model: The model to train.
        optimizer: The user's optimizer over its parameters. AdamW, Adam and SGD of `torch.optim` are compiled with the
            scaling inlined; any other takes its own `step()`, with QuacK attached through its hooks (`repr(step)` tells
            which).
        loss_fn: Called as `loss_fn(model, *batch, **batch)`. Default: the model's own output holds the loss: a scalar,
            an object or mapping with `loss`, or a tuple with exactly one scalar.
        layout: The model's layout; found on the first batch when not given. A layout without sites gives the plain
            step, for comparison.
        tau: Learning rate of queries and keys at the start of training, relative to that of the other weights.
        norm: "frobenius" or "spectral"; the latter takes the optimizer's own step.
        clip_grad_norm: Largest total norm of the gradients.
        skip_nonfinite: Whether a step with a gradient that is infinite or not a number changes nothing: no weight, no
            moment, no counter. A compiled update finds out without waiting for the device; one that is the optimizer's
            own step waits.
        scaler: Scales the loss for half precision; its steps are skipped in the same way, and `scaler.update()` is part
            of the step.
        compile: Whether to use torch.compile; False runs the same code eagerly.
        mode: `mode` of torch.compile.

    Returns:
        The step: call it with a batch, get the loss (detached, nothing waits for the device).

    Raises:
        StepError: `clip_grad_norm` is not positive; at the first batch: no loss, or no pairs found.
        OptimizerError: The optimizer holds no query or key weight, or has options that cannot be compiled.

    Example:
        >>> step = compile_train_step(model, torch.optim.AdamW(model.parameters(), lr=3e-4))
        >>> for tokens, targets in batches:
        ...     loss = step(tokens, targets)
        ...     scheduler.step()
    """
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise StepError(f"clip_grad_norm is {clip_grad_norm!r}; need a positive number, or None for no clipping")

    def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return torch.compile(function, mode=mode, **options) if compile else function

    options = StepOptions(tau, norm, clip_grad_norm, skip_nonfinite or scaler is not None, scaler)
    return TrainStep(model, optimizer, loss_fn, layout, options, compiled)


@dataclass(frozen=True)
class StepOptions:
    """Options of a step, as `compile_train_step` has them."""

    tau: float
    norm: NormName
    clip_grad_norm: float | None
    skip_nonfinite: bool
    scaler: torch.amp.GradScaler | None


class TrainStep:
    """One training step; see `compile_train_step`.

    Attributes:
        quack: QuacK as attached to the optimizer; None before the first batch where the layout is yet to be found, and
            for a layout without sites.
        layout: The layout in use.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn | None,
        layout: QKLayout | None,
        options: StepOptions,
        compiled: Callable[..., Callable[..., Any]],
    ) -> None:
        self.quack: QuacK | None = None
        self.layout = layout
        self._model, self._optimizer, self._loss_fn = model, optimizer, loss_fn
        self._options, self._compiled = options, compiled
        self._loss = compiled(make_loss(model, loss_fn))
        self._update: Update | None = None
        if layout is not None:
            self._attach(layout)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch; gives its loss."""
        loss = self.forward_backward(*args, **kwargs)
        self.update()
        return loss

    def forward_backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Add the gradients of one batch to those that are there; gives its loss, detached.

        For gradient accumulation: several of these, then one `update()`. Divide the loss by their number in `loss_fn`.
        """
        if self.layout is None:
            self._attach(self._find(args, kwargs))
        loss = self._loss(*args, **kwargs)
        if not isinstance(loss, Tensor):
            raise StepError(f"there is no loss in what the model returned: {loss}; pass loss_fn=, or give it targets")
        if not loss.requires_grad:
            raise StepError("the loss does not depend on any parameter that requires a gradient")
        scaler = self._options.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss.detach()

    def update(self) -> None:
        """Change the weights by the gradients that are there, and drop those."""
        self._step()
        self._optimizer.zero_grad(set_to_none=True)

    def __repr__(self) -> str:
        kind = type(self._optimizer).__name__
        if self.layout is None:
            return f"TrainStep({kind}; layout to be found on the first batch)"
        how = "compiled update" if self._update is not None else "its own step()"
        heads = (
            f"QuacK on {len(self.quack.plan.units)} heads, tau={self._options.tau}" if self.quack else "without QuacK"
        )
        return f"TrainStep({kind}: {how}, {heads})"

    def _step(self) -> None:
        scaler, clip = self._options.scaler, self._options.clip_grad_norm
        if scaler is not None:
            scaler.unscale_(self._optimizer)
        if self._update is not None:
            self._update.run()
            # Schedulers warn when they find that the optimizer never stepped; the wrapped step() would have noted it.
            self._optimizer._opt_called = True  # type: ignore[attr-defined]
        else:
            params = [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(params, clip)
            if scaler is not None:
                scaler.step(self._optimizer)
            elif not self._options.skip_nonfinite or all(bool(p.grad.isfinite().all()) for p in params):
                self._optimizer.step()
        if scaler is not None:
            scaler.update()

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> QKLayout:
        from quack_fx.find import find_qk_pairs

        inputs, named = model_inputs(self._model, self._loss_fn, args, kwargs)
        layout = find_qk_pairs(self._model, *inputs, **named)
        if not any(not site.qk_norm for site in layout.sites):
            reasons = "; ".join(dict.fromkeys(s.reason for s in layout.skipped)) or "the model has no attention"
            raise StepError(f"no query/key pairs for QuacK were found: {reasons}; pass layout=QKLayout() to go without")
        return layout

    def _attach(self, layout: QKLayout) -> None:
        options = self._options
        if layout.sites:
            self.quack = QuacK(self._optimizer, self._model, layout, options.tau, options.norm)
        if Update.knows(self._optimizer) and options.norm == "frobenius":
            # Not fullgraph: where other weights have gradients each time, the compiler may give up and run it eagerly.
            static = functools.partial(self._compiled, dynamic=False)
            self._update = Update(self._optimizer, self.quack, options.clip_grad_norm, options.skip_nonfinite, static)
        self.layout = layout
