"""USER: a compiled training step with QuacK's scaling inside the update.

In: a model, the user's optimizer, maybe a loss function and a layout. Out: `step(*batch, **batch) -> loss`.

A graph for the loss (with its backward) and a few for the update. The optimizer stays the user's: its groups,
schedulers and `state_dict()` are the ordinary ones, over its own state tensors.

    loss.py       the loss of one batch as one function
    rules/        the arithmetic of each optimizer that is compiled
    compiling.py  how functions are compiled
    gradients.py  what is to be known of all gradients
    pieces.py     weights cut so that a head is one long row
    heads.py      the norms that one step leaves to the next, and the scales that follow
    masters.py    fp32 copies of weights in half precision
    views.py      a parameter and its state as the loops take them
    loops.py      the compiled calls that change weights and state
    update.py     one optimizer's update
    joint.py      a loss and its gradients as two graphs
    whole.py      all of that as one graph
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_fx.errors import OptimizerError, StepError
from quack_fx.factors import NormName
from quack_fx.layout import QKLayout
from quack_fx.optim import QuacK
from quack_fx.step.compiling import Compiler
from quack_fx.step.gradients import all_finite, gradients
from quack_fx.step.heads import Heads
from quack_fx.step.loss import LossFn, make_loss, model_inputs
from quack_fx.step.masters import Masters
from quack_fx.step.rules import Gate, rule_of
from quack_fx.step.update import Update
from quack_fx.step.whole import WholeStep

__all__ = ["TrainStep", "compile_train_step"]


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
    whole_graph: bool = False,
) -> TrainStep:
    """A training step with QuacK inlined: forward, backward and update of one batch.

    Arguments:
        model: The model to train.
        optimizer: The user's optimizer over its parameters, or several (Muon for matrices, AdamW for the rest). AdamW,
            Adam, SGD and Muon of `torch.optim` and any Lion are compiled with the scaling inlined; others take their
            own `step()`, with QuacK attached through its hooks (`repr(step)` tells which).
        loss_fn: Called as `loss_fn(model, *batch, **batch)`. Default: the model's own output holds the loss: a scalar,
            an object or mapping with `loss`, or a tuple with exactly one scalar.
        layout: The model's layout; found on the first batch when not given. A layout without sites gives the plain
            step, for comparison.
        tau: Learning rate of queries and keys at the start of training, relative to that of the other weights.
        norm: "frobenius" or "spectral"; the latter takes the optimizer's own step.
        clip_grad_norm: Largest total norm of the gradients, of all optimizers together.
        skip_nonfinite: Whether a step with a gradient that is infinite or not a number changes nothing: no weight, no
            moment, no counter. A compiled update finds out without waiting for the device; one that is the optimizer's
            own step waits.
        scaler: Scales the loss for half precision; its steps are skipped in the same way, and `scaler.update()` is part
            of the step.
        master_weights: Whether parameters in bfloat16 or float16 are updated as fp32 copies of them, which are kept in
            the optimizer's state as "master_param", the moments in fp32 beside them. Make the step before a checkpoint
            is loaded, so that the optimizer does not round it.
        compile: Whether to use torch.compile; False runs the same code eagerly.
        mode: `mode` of torch.compile.
        whole_graph: Whether loss, backward and update are one compiled graph; otherwise they are a few that follow each
            other, which is as fast on a CPU. Gradients are not left in the parameters then. Batches that find gradients
            there (of `forward_backward`) are added to those, and take the few graphs.

    Returns:
        The step: call it with a batch, get the loss (detached, nothing waits for the device).

    Raises:
        StepError: `clip_grad_norm` is not positive; at the first batch: no loss, or no pairs found.
        StepError: At the first batch, with `whole_graph`: the loss is not one graph.
        OptimizerError: No optimizer holds a query or key weight, or one has options that cannot be compiled, or would
            have to take its own step with `master_weights`.

    Example:
        >>> step = compile_train_step(model, torch.optim.AdamW(model.parameters(), lr=3e-4))
        >>> for tokens, targets in batches:
        ...     loss = step(tokens, targets)
        ...     scheduler.step()
    """
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise StepError(f"clip_grad_norm is {clip_grad_norm!r}; need a positive number, or None for no clipping")

    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
    skip_nonfinite = skip_nonfinite or scaler is not None
    options = StepOptions(tau, norm, clip_grad_norm, skip_nonfinite, scaler, master_weights, whole_graph)
    if whole_graph:
        _check_whole(model, compile, scaler)
    return TrainStep(model, optimizers, loss_fn, layout, options, Compiler(compile, mode))


@dataclass(frozen=True)
class StepOptions:
    """Options of a step, as `compile_train_step` has them."""

    tau: float
    norm: NormName
    clip_grad_norm: float | None
    skip_nonfinite: bool
    scaler: torch.amp.GradScaler | None
    master_weights: bool
    whole_graph: bool


class TrainStep:
    """One training step; see `compile_train_step`.

    Attributes:
        quacks: QuacK as attached to each optimizer that holds queries or keys; none before the first batch where the
            layout is yet to be found, and for a layout without sites.
        layout: The layout in use.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        loss_fn: LossFn | None,
        layout: QKLayout | None,
        options: StepOptions,
        compiler: Compiler,
    ) -> None:
        self.quacks: tuple[QuacK, ...] = ()
        self.layout = layout
        self._model, self._optimizers, self._loss_fn = model, optimizers, loss_fn
        self._options, self._compiler = options, compiler
        self._loss = compiler(make_loss(model, loss_fn), sizes="any")
        self._updates: list[Update | None] = []
        self._whole: WholeStep | None = None
        if layout is not None:
            self._attach(layout)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch; gives its loss."""
        self._know_layout(args, kwargs)
        if self._whole is not None and not self._has_gradients():
            self._compiler.begins()
            loss = _loss_in(self._whole(*args, **kwargs))
            self._took_a_step()
            return loss
        loss = self.forward_backward(*args, **kwargs)
        self.update()
        return loss

    def forward_backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Add the gradients of one batch to those that are there; gives its loss, detached.

        For gradient accumulation: several of these, then one `update()`. Divide the loss by their number in `loss_fn`.
        """
        self._know_layout(args, kwargs)
        if self._compiler.mode and not self._has_gradients():
            self._compiler.begins()
        loss = _loss_in(self._loss(*args, **kwargs))
        if not loss.requires_grad:
            raise StepError("the loss does not depend on any parameter that requires a gradient")
        scaler = self._options.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss.detach()

    def update(self) -> None:
        """Change the weights by the gradients that are there, and drop those."""
        self._step()
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def __repr__(self) -> str:
        kinds = [type(optimizer).__name__ for optimizer in self._optimizers]
        if self.layout is None:
            return f"TrainStep({', '.join(kinds)}; layout to be found on the first batch)"
        how = ["compiled update" if update is not None else "its own step()" for update in self._updates]
        each = ", ".join(f"{kind}: {way}" for kind, way in zip(kinds, how, strict=True))
        units = sum(len(quack.plan.units) for quack in self.quacks[:1])
        heads = f"QuacK on {units} heads, tau={self._options.tau}" if self.quacks else "without QuacK"
        return f"TrainStep({each}, {heads})"

    def _step(self) -> None:
        scaler = self._options.scaler
        if scaler is not None:
            for optimizer in self._optimizers:
                scaler.unscale_(optimizer)
        gate = None if all(self._updates) else self._looked_at()
        for i, (optimizer, update) in enumerate(zip(self._optimizers, self._updates, strict=True)):
            if update is not None:
                gate = update.run(gradients(self._optimizers[i + 1 :]) if gate is None else (), gate)
            elif scaler is not None:
                scaler.step(optimizer)
            elif gate is None or gate.finite is None or bool(gate.finite):
                optimizer.step()
        if scaler is not None:
            scaler.update()
        self._took_a_step()

    def _took_a_step(self) -> None:
        for optimizer in self._optimizers:
            # Schedulers warn of an optimizer that never stepped; its own step() notes that it did.
            optimizer._opt_called = True  # type: ignore[attr-defined]
        for quack in self.quacks:
            quack.publish()

    def _has_gradients(self) -> bool:
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        return any(p.grad is not None for group in groups for p in group["params"])

    def _know_layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the layout on the first batch, where none was given."""
        if self.layout is None:
            self._attach(self._find(args, kwargs))

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> QKLayout:
        from quack_fx.find import find_qk_pairs

        inputs, named = model_inputs(self._model, self._loss_fn, args, kwargs)
        layout = find_qk_pairs(self._model, *inputs, **named)
        if not any(not site.qk_norm for site in layout.sites):
            reasons = "; ".join(dict.fromkeys(s.reason for s in layout.skipped)) or "the model has no attention"
            raise StepError(f"no query/key pairs for QuacK were found: {reasons}; pass layout=QKLayout() to go without")
        return layout

    def _looked_at(self) -> Gate:
        """Clip all gradients, and tell whether they are finite, for optimizers that take their own step."""
        options, optimizers = self._options, self._optimizers
        if options.clip_grad_norm is not None:
            params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(params, options.clip_grad_norm)
        grads = gradients(optimizers) if options.skip_nonfinite else []
        return Gate(finite=all_finite(grads) if grads else None)

    def _attach(self, layout: QKLayout) -> None:
        options = self._options
        rules = [rule_of(o) if options.norm == "frobenius" else None for o in self._optimizers]
        for optimizer, rule in zip(self._optimizers, rules, strict=True):
            for asked, what in ((options.master_weights, "master_weights"), (options.whole_graph, "whole_graph")):
                if rule is None and asked:
                    raise OptimizerError(
                        f"{type(optimizer).__name__} with norm={options.norm!r} takes its own step, which knows no "
                        f"{what}; leave out {what}=True, or use an optimizer whose update is compiled"
                    )
        holding = [o for o in self._optimizers if _holds(o, self._model, layout)] or self._optimizers[:1]
        quacks = {o: QuacK(o, self._model, layout, options.tau, options.norm) for o in holding if layout.sites}
        masters = {o: Masters(o) for o in self._optimizers if options.master_weights}
        heads: Heads | None = None
        for o in (o for o, rule in zip(self._optimizers, rules, strict=True) if rule is not None and o in quacks):
            if heads is None:
                heads = Heads(quacks[o], masters.get(o))
            else:
                heads.join(quacks[o], masters.get(o))
        finding = options.clip_grad_norm, options.skip_nonfinite
        for o, rule in zip(self._optimizers, rules, strict=True):
            shared = quacks.get(o), heads, masters.get(o)
            self._updates.append(None if rule is None else Update(o, rule, *shared, *finding, self._compiler))
        if options.whole_graph:
            updates = [update for update in self._updates if update is not None]
            self._whole = WholeStep(make_loss(self._model, self._loss_fn), updates, *finding, self._compiler)
        self.quacks = tuple(quacks.values())
        self.layout = layout


def _loss_in(result: Tensor | str) -> Tensor:
    """The loss, where the model returned one."""
    if not isinstance(result, Tensor):
        raise StepError(f"there is no loss in what the model returned: {result}; pass loss_fn=, or give it targets")
    return result


def _check_whole(model: nn.Module, compile: bool, scaler: torch.amp.GradScaler | None) -> None:
    """Refuse what one graph would leave out."""
    if not compile:
        raise StepError("whole_graph=True is one compiled graph; leave out compile=False")
    if not torch.__version__ >= "2.13":
        raise StepError(f"whole_graph=True needs torch 2.13 or newer; {torch.__version__} got norms in one graph wrong")
    if scaler is not None:
        raise StepError("whole_graph=True knows no GradScaler; leave out one of them (bfloat16 needs no scaler)")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise StepError("whole_graph=True would not average gradients over processes; leave it out")


def _holds(optimizer: Optimizer, model: nn.Module, layout: QKLayout) -> bool:
    """Whether an optimizer holds a weight or a bias of queries or keys."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    blocks = [block for site in layout.sites for _, block in site.blocks()]
    names = {name for block in blocks for name in (block.param, block.bias) if name is not None}
    return any(id(model.get_parameter(name)) in held for name in names)
