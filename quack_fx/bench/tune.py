"""Short training runs of the user's model: plain, with QuacK and with QK norm, over learning rates and seeds.

In: a `Task`. Out: one `Outcome` per run, as soon as it ends. All points are run with one seed before the next seed
starts; tune_advice.py draws conclusions from the outcomes.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, product
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from quack_fx.bench.normed import with_qk_norm
from quack_fx.errors import OptimizerError, StepError
from quack_fx.layout import QKLayout
from quack_fx.qk_norm.strip import strip_qk_norm
from quack_fx.train.loss import LossFn, model_inputs
from quack_fx.train.step import TrainStep, compile_train_step

Batch = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""

HELD_OUT = 8
"""Number of batches for measuring the loss; they are not trained on."""

_WARMUP = 10
"""The learning rate grows over the first `1 / _WARMUP` of the steps, then stays constant."""

_CLIP = 1.0
"""Maximum total norm of the gradients."""

_LOOK = 10
"""Number of steps between checks that the loss is finite."""

OTHER_LR = 3e-3
"""Learning rate of AdamW used with Muon, for embeddings, output heads, gains and biases."""


@dataclass(frozen=True)
class Task:
    """A model and data to train on.

    Attributes:
        model: Builds the model for a seed.
        layout: Its layout.
        loss: `loss(model, *args, **kwargs)`, with a result like a model's output; None to use the model's output.
        batches: Returns the batches for a seed, always the same ones.
        held_out: Batches for measuring the loss.
    """

    model: Callable[[int], nn.Module]
    layout: QKLayout
    loss: LossFn | None
    batches: Callable[[int], Iterator[Batch]]
    held_out: Sequence[Batch]


@dataclass(frozen=True)
class Arm:
    """One way to train: plain, QuacK or QK norm.

    Attributes:
        kind: "none", "quack" or "qk-norm".
        tau: QuacK's `tau`.
    """

    kind: str
    tau: float = 1.0

    @property
    def name(self) -> str:
        """Its name in tables."""
        return {"none": "none", "qk-norm": "QK norm"}.get(self.kind, f"QuacK, tau {self.tau:g}")


@dataclass(frozen=True)
class Outcome:
    """Outcome of one run.

    Attributes:
        arm: The way to train.
        lr: Learning rate.
        seed: Seed of the weights and the batches.
        loss: Mean loss of the held-out batches at the end; not finite if the run diverged.
        seconds: Duration of the run.
    """

    arm: Arm
    lr: float
    seed: int
    loss: float
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the loss is inf or NaN."""
        return not math.isfinite(self.loss)


@dataclass(frozen=True)
class Plan:
    """The runs to do.

    Attributes:
        arms: The ways to train.
        lrs: Learning rates.
        seeds: Number of seeds.
        steps: Steps per run.
        optimizer: "adamw", or "muon" together with AdamW.
        seconds: Time limit for all runs; a run that has not finished by then does not count.
    """

    arms: Sequence[Arm]
    lrs: Sequence[float]
    seeds: int
    steps: int
    optimizer: str
    seconds: float

    def points(self) -> Iterator[tuple[int, float, Arm]]:
        """Seed, learning rate and arm of all runs, in order; learning rates go from the middle outwards."""
        middle = (len(self.lrs) - 1) / 2
        lrs = sorted(self.lrs, key=lambda lr: abs(sorted(self.lrs).index(lr) - middle))
        yield from product(range(self.seeds), lrs, self.arms)


def arms_of(taus: Sequence[float]) -> list[Arm]:
    """The ways to train a model: plain, with QK norm, and with QuacK at each `tau`."""
    return [Arm("none"), Arm("qk-norm"), *(Arm("quack", tau) for tau in taus)]


@dataclass(frozen=True)
class Models:
    """The model for a seed, without and with QK norm.

    Attributes:
        bare: The model without QK norm, or the reason why it cannot be built.
        normed: The model with QK norm, or the reason why it cannot be built.
        layout: Layout of the model without QK norm.
    """

    bare: nn.Module | str
    normed: nn.Module | str
    layout: QKLayout

    def of(self, arm: Arm) -> nn.Module | str:
        """The model that an arm trains a copy of."""
        return self.normed if arm.kind == "qk-norm" else self.bare


def models_of(task: Task, seed: int) -> Models:
    """The model for a seed, without and with QK norm: inserted if the model has none, removed if it has one."""
    model = task.model(seed)
    if not any(site.qk_norm for site in task.layout.sites):
        inputs = model_inputs(model, task.loss, *task.held_out[0])
        return Models(model, with_qk_norm(model, task.layout, inputs), task.layout)
    bare = copy.deepcopy(model)
    report = strip_qk_norm(bare, task.layout)
    reason = next((f"the QK norm of {left.site!r} stays: {left.reason}" for left in report.left), None)
    return Models(bare if reason is None else reason, model, report.layout)


def tune(task: Task, plan: Plan, first: Models | None = None) -> Iterator[Outcome]:
    """Train all runs of a plan, one after the other.

    Arguments:
        task: What is trained.
        plan: The runs to do.
        first: The models for seed 0, if they were already built.

    Returns:
        An iterator over the outcomes. There are fewer than planned if the time runs out, or if a model without or with
        QK norm cannot be built (`models_of` gives the reason).

    Raises:
        StepError: A batch gives no loss, or there are too few batches.
        OptimizerError: Muon has nothing to train.

    Example:
        >>> plan = Plan(arms_of([0.1, 1.0]), lrs=[3e-4, 3e-3], seeds=2, steps=100, optimizer="adamw", seconds=300)
        >>> outcomes = list(tune(task, plan))
    """
    deadline = time.monotonic() + plan.seconds
    for seed, points in groupby(plan.points(), key=itemgetter(0)):
        models = first if seed == 0 and first is not None else models_of(task, seed)
        for _, lr, arm in points:
            model = models.of(arm)
            if isinstance(model, str):
                continue
            layout = models.layout if arm.kind == "quack" else QKLayout()
            started = time.monotonic()
            loss = _train(task, plan, _copy(model), layout, arm.tau, lr, seed, deadline)
            if loss is None:
                return
            yield Outcome(arm, lr, seed, loss, time.monotonic() - started)


def _copy(model: nn.Module) -> nn.Module:
    """A copy of a model, for one run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a warning of torch about copying its own graphs
        return copy.deepcopy(model)


def _train(
    task: Task, plan: Plan, model: nn.Module, layout: QKLayout, tau: float, lr: float, seed: int, deadline: float
) -> float | None:
    """The loss of the held-out batches after training; None if the time ran out first."""
    optimizers = _optimizers(model, plan.optimizer, lr)
    step = compile_train_step(model, optimizers, task.loss, layout=layout, tau=tau, clip_grad_norm=_CLIP, compile=False)
    warmups = [LambdaLR(own, lambda done: min(1.0, _WARMUP * (done + 1) / plan.steps)) for own in optimizers]
    batches = islice(task.batches(seed), plan.steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same dropout masks for every arm
        for done in range(plan.steps):
            if time.monotonic() > deadline:
                return None
            args, kwargs = next(batches, ((), None))
            if kwargs is None:
                raise StepError(f"the batches end after {done}; {plan.steps} steps need as many")
            loss = step(*args, **kwargs)
            for warmup in warmups:
                warmup.step()
            if done % _LOOK == 0 and not torch.isfinite(loss):
                return math.nan
        return _held_out(task, model, step)


def _held_out(task: Task, model: nn.Module, step: TrainStep) -> float:
    """Mean loss of the held-out batches; the gradients that this computes are not used."""
    model.eval()
    losses = [float(step.forward_backward(*args, **kwargs)) for args, kwargs in task.held_out]
    return sum(losses) / len(losses)


def _optimizers(model: nn.Module, name: str, lr: float) -> list[Optimizer]:
    """AdamW over all parameters; or Muon over the matrices between embeddings and head, and AdamW over the rest."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if name == "adamw":
        return [AdamW(trained.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]
    ends = _ends(model)
    matrices = [p for p in trained.values() if p.dim() == 2 and p not in ends]
    if not matrices:
        raise OptimizerError("the model has no matrix for Muon to train; take AdamW")
    others = [p for p in trained.values() if p.dim() != 2 or p in ends]
    muon: list[Optimizer] = [Muon(matrices, lr=lr, weight_decay=0.0)]
    return muon + ([AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0)] if others else [])


def _ends(model: nn.Module) -> set[Tensor]:
    """Embedding weights, and linear weights with as many rows as an embedding: output heads."""
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    rows = {weight.shape[0] for weight in embeddings}
    heads = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in rows]
    return {*embeddings, *heads}
