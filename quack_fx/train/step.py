"""A compiled training step with QuacK's scaling inside the update.

In: a model, the user's optimizer, optionally a loss function and a layout. Out: `step(*batch, **batch) -> loss`.

The step runs the program that `quack_fx.convert` writes for the model (`program/`). This module adds what does not
depend on the model: finding the layout on the first batch, gradient accumulation, GradScaler, and optimizers that the
program does not know, which take their own step with QuacK attached through hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from quack_fx.errors import OptimizerError, StepError
from quack_fx.layout import QKLayout
from quack_fx.train.held import params_of
from quack_fx.train.hooks import QuacK, check_tau
from quack_fx.train.loss import LossFn, model_inputs
from quack_fx.train.program.scaling import NormName, check_norm, program_text, run_program, with_factor_error
from quack_fx.train.program.source import PARTS_OF
from quack_fx.train.ranks import Groups, check_ranks, everywhere, groups_that_differ
from quack_fx.train.suited import is_lion

if TYPE_CHECKING:
    from quack_fx.train.program.parts.step import TrainStep as ProgramStep


def compile_train_step(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    loss_fn: LossFn | None = None,
    *,
    layout: QKLayout | None = None,
    tau: float = 1.0,
    norm: NormName = "frobenius",
    clip_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    scaler: torch.amp.GradScaler | None = None,
    master_weights: bool = False,
    compile: bool = True,
    mode: str | None = None,
) -> TrainStep:
    """Create a compiled training step with QuacK: forward, backward and update for one batch.

    Arguments:
        model: The model to train, plain or wrapped (torch.compile, DistributedDataParallel, activation checkpointing);
            its weights may be sharded (FSDP2, tensor parallel). Ranks that train one model create the step together.
        optimizer: An optimizer over the model's parameters, or several (Muon for matrices, AdamW for the rest). For
            AdamW, Adam, SGD and Muon of `torch.optim` and any Lion, the update is compiled with the scaling inlined;
            others take their own `step()`, with QuacK attached through hooks (`repr(step)` shows which).
        loss_fn: Called as `loss_fn(model, *batch, **batch)`. Default: the loss is taken from the model's output: a
            scalar, an object or mapping with `loss`, or a tuple with exactly one scalar.
        layout: The model's layout; found on the first batch if not given. A layout without sites gives a plain
            training step, for comparison.
        tau: Learning rate of queries and keys at the start of training, relative to that of the other weights.
        norm: "frobenius" or "spectral" (slower; waits for the device).
        clip_grad_norm: Maximum total norm of the gradients, over all optimizers.
        skip_nonfinite: Whether a step with inf or NaN gradients changes nothing: no weight, no moment, no step count. A
            compiled update checks this without waiting for the device; an optimizer's own step waits.
        scaler: A GradScaler for half precision. Steps with inf or NaN gradients are skipped in the same way, and
            `scaler.update()` is part of the step. A disabled scaler is ignored.
        master_weights: Whether bfloat16 and float16 parameters are updated through fp32 copies. The optimizer's state
            has these as "master_param", and the moments in fp32. Create the step before loading a checkpoint, or the
            optimizer rounds the loaded state.
        compile: Whether to use torch.compile; False runs the same code eagerly.
        mode: `mode` of torch.compile, for the loss.

    Returns:
        The step. Call it with a batch; it returns the loss, detached, without waiting for the device.

    Raises:
        StepError: `clip_grad_norm` is not positive; at the first batch: no loss, or no pairs found.
        OptimizerError: No optimizer holds a query or key weight; an optimizer has options that cannot be compiled, or
            takes its own step although `master_weights` is set.

    Example:
        >>> step = compile_train_step(model, torch.optim.AdamW(model.parameters(), lr=3e-4))
        >>> for tokens, targets in batches:
        ...     loss = step(tokens, targets)
        ...     scheduler.step()
    """
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise StepError(f"clip_grad_norm is {clip_grad_norm!r}; need a positive number, or None for no clipping")
    check_tau(tau)
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
    scaler = scaler if scaler is not None and scaler.is_enabled() else None
    skip_nonfinite = skip_nonfinite or scaler is not None
    options = _Options(tau, check_norm(norm), clip_grad_norm, skip_nonfinite, scaler, master_weights, compile, mode)
    return TrainStep(model, optimizers, loss_fn, layout, options)


@dataclass(frozen=True)
class _Options:
    """The options of `compile_train_step`."""

    tau: float
    norm: NormName
    clip_grad_norm: float | None
    skip_nonfinite: bool
    scaler: torch.amp.GradScaler | None
    master_weights: bool
    compile: bool
    mode: str | None


class TrainStep:
    """One training step; see `compile_train_step`.

    Attributes:
        quacks: The `QuacK` of each optimizer that holds queries or keys; it also scales calls of `optimizer.step()`
            from elsewhere. Empty for a layout without sites, and until the layout is found on the first batch.
        layout: The layout in use.
        source: The source of the program that runs, as written by `quack_fx.convert`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        loss_fn: LossFn | None,
        layout: QKLayout | None,
        options: _Options,
    ) -> None:
        self.quacks: tuple[QuacK, ...] = ()
        self.layout = layout
        self.source = ""
        self._model, self._optimizers, self._loss_fn, self._options = model, optimizers, loss_fn, options
        self._names = [_known(optimizer) for optimizer in optimizers]
        for optimizer, name in zip(optimizers, self._names, strict=True):
            _check_options(optimizer, name, options)
        self._program: ProgramStep | None = None
        if layout is not None:
            self._attach(layout)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch and return its loss."""
        loss = self.forward_backward(*args, **kwargs)
        self.update()
        return loss

    def forward_backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Accumulate the gradients of one batch and return its loss, detached.

        For gradient accumulation, call this several times, then `update()`; in `loss_fn`, divide the loss by the number
        of batches. An exception discards all gradients, those of previous batches included.
        """
        program = self._program or self._attach(self._find(args, kwargs))
        if self._options.mode:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            loss = program.loss(*args, **kwargs)
            if loss is None:
                raise StepError(
                    "the model's output holds no loss, or several scalars; pass loss_fn=, or give it targets"
                )
            if not loss.requires_grad:
                raise StepError("the loss does not depend on any parameter that requires a gradient")
            scaler = self._options.scaler
            torch.autograd.backward(loss if scaler is None else scaler.scale(loss))
        except BaseException:
            self._drop_gradients()
            raise
        return loss.detach()

    def update(self) -> None:
        """Update the weights with the accumulated gradients, then clear the gradients."""
        if self._program is None:
            raise StepError("there is no gradient yet; call forward_backward first, or pass layout=")
        try:
            for quack in self.quacks:
                quack.check()
            scaler = self._options.scaler
            if scaler is not None:
                for optimizer in self._optimizers:
                    _unscale(scaler, optimizer)
            self._program.update()
            if scaler is not None:
                scaler.update()
        finally:
            self._drop_gradients()

    def metrics(self, heads: bool = False) -> dict[str, float]:
        """The result of `QuacK.metrics`; empty if no attention is scaled."""
        return self.quacks[0].metrics(heads) if self.quacks else {}

    def __repr__(self) -> str:
        kinds = [type(optimizer).__name__ for optimizer in self._optimizers]
        if self._program is None:
            return f"TrainStep({', '.join(kinds)}; layout to be found on the first batch)"
        how = ["compiled update" if name is not None else "its own step()" for name in self._names]
        each = ", ".join(f"{kind}: {way}" for kind, way in zip(kinds, how, strict=True))
        heads = sum(factor.numel() for first in self._program.quack.first for factor in first)
        about = f"QuacK on {heads} heads, tau={self._program.quack.tau}" if self.quacks else "without QuacK"
        return f"TrainStep({each}, {about})"

    def __reduce__(self) -> NoReturn:  # copy.copy and copy.deepcopy call it, too
        raise StepError(
            "a training step holds a model, its optimizers and compiled code, and cannot be copied or pickled; save "
            "model.state_dict() and optimizer.state_dict(), which has QuacK's factors, or make a step of the copies"
        )

    def _drop_gradients(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> QKLayout:
        """The layout, if none was given: found on the first batch."""
        from quack_fx.find import find_qk_pairs

        inputs, named = model_inputs(self._model, self._loss_fn, args, kwargs)
        layout = find_qk_pairs(self._model, *inputs, **named)
        if not any(not site.qk_norm for site in layout.sites):
            reasons = "; ".join(dict.fromkeys(s.reason for s in layout.skipped)) or "the model has no attention"
            raise StepError(f"no query/key pairs for QuacK were found: {reasons}; pass layout=QKLayout() to go without")
        return layout

    def _attach(self, layout: QKLayout) -> ProgramStep:
        """Write the program for the layout, run it, and attach QuacK to the optimizers."""
        options = self._options
        check_ranks(self._model, layout, options.tau, options.norm, self._optimizers)
        names = list(dict.fromkeys(name for name in self._names if name is not None))
        features = {"masters"} if options.master_weights else set[str]()
        self.source = program_text(self._model, layout, names, features)
        program = run_program(self.source, options.norm)
        known = {kind.__name__: step for kind, step in program.STEPS.items()}
        steps = [_own_step if name is None else known[name] for name in self._names]
        program.STEPS.update(zip(map(type, self._optimizers), steps, strict=True))  # it refuses other classes
        step_: ProgramStep = with_factor_error(
            program.TrainStep,
            self._model,
            *self._optimizers,
            loss_fn=self._loss_fn,
            tau=options.tau,
            clip_grad_norm=options.clip_grad_norm,
            skip_nonfinite=options.skip_nonfinite,
            compile=options.compile,
        )
        self._program = step_
        if options.compile and options.mode:
            step_.loss = torch.compile(step_.loss_of, mode=options.mode)
        if layout.sites:
            home = step_.quack.home
            holding = [o for o in self._optimizers if not home.keys().isdisjoint(params_of(o))]
            holding = holding or list(self._optimizers[:1])
            self.quacks = tuple(QuacK.around(o, self._model, layout, step_.quack) for o in holding)
        paused = {quack.optimizer: quack for quack in self.quacks}
        groups = groups_that_differ(self._model) if options.skip_nonfinite else Groups()
        step_.steps = [
            partial(_step_with_hooks, step, paused.get(optimizer), groups)
            for step, optimizer in zip(steps, self._optimizers, strict=True)
        ]
        self.layout = layout
        return step_


def _known(optimizer: Optimizer) -> str | None:
    """The program's name for an optimizer; None if the optimizer takes its own step."""
    if any(param.is_complex() for param in params_of(optimizer)):
        return None
    name = type(optimizer).__name__
    # The very class of torch.optim, because a subclass may behave differently.
    if name in PARTS_OF and getattr(torch.optim, name, None) is type(optimizer):
        return name
    return "Lion" if is_lion(optimizer) else None


def _check_options(optimizer: Optimizer, name: str | None, options: _Options) -> None:
    """Raise for options that a program does not support."""
    kind = type(optimizer).__name__
    if name is None and options.master_weights:
        raise OptimizerError(
            f"{kind} takes its own step, which knows no master_weights; leave out master_weights=True, or use an "
            "optimizer whose update is compiled"
        )
    for group in optimizer.param_groups if name is not None else ():
        if group.get("differentiable"):
            raise OptimizerError(f"{kind}(differentiable=True) cannot be part of a step; set differentiable=False")
        if any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
            raise OptimizerError(f"{kind} with betas given as tensors cannot be part of a step; give two floats")
        if name == "SGD" and options.skip_nonfinite and group["momentum"] and group["dampening"]:
            raise OptimizerError("SGD with dampening treats its first step unlike the others, so none may be skipped")


def _step_with_hooks(
    step: Callable[..., None],
    quack: QuacK | None,
    groups: Groups,
    optimizer: Optimizer,
    scales: Any,
    clip: float | Tensor,
    finite: Tensor | None,
    compiled: Callable[..., None],
) -> None:
    """Run the program's step for one optimizer and that optimizer's step hooks; all ranks skip it, or none does."""
    finite = everywhere(finite, groups)
    if step is _own_step or any(grad.is_sparse for grad in _gradients(optimizer)):
        _own_step(optimizer, scales, clip, finite, compiled)
        return
    with nullcontext() if quack is None else quack.paused():
        for hook in chain(_global_optimizer_pre_hooks.values(), optimizer._optimizer_step_pre_hooks.values()):
            hook(optimizer, (), {})
        step(optimizer, scales, clip, finite, compiled)
        for hook in chain(optimizer._optimizer_step_post_hooks.values(), _global_optimizer_post_hooks.values()):
            hook(optimizer, (), {})


def _own_step(
    optimizer: Optimizer, scales: Any, clip: float | Tensor, finite: Tensor | None, compiled: Callable[..., None]
) -> None:
    """Run the optimizer's own step, which QuacK scales through hooks."""
    if finite is not None and not bool(finite):
        return
    if isinstance(clip, Tensor):
        for grad in _gradients(optimizer):
            grad.mul_(clip.to(grad.dtype))
    optimizer.step()


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """The gradients of an optimizer's parameters."""
    return [param.grad for param in params_of(optimizer) if param.grad is not None]


def _unscale(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
    """Unscale the gradients of an optimizer, unless the user already did."""
    try:
        scaler.unscale_(optimizer)
    except RuntimeError as error:
        if "has already been called" not in str(error):
            raise
