"""Short training runs of one's own model: with nothing, with QuacK and with QK norm, over learning rates and seeds.

In: a `Task`. Out: one `Outcome` a run, as soon as it is over. Seed by seed, so that all points have been tried when
the first is tried again; tune_advice.py says what follows from them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from quack_fx.bench.normed import with_qk_norm
from quack_fx.errors import StepError
from quack_fx.layout import QKLayout
from quack_fx.qk_norm.strip import strip_qk_norm
from quack_fx.train.loss import LossFn, model_inputs
from quack_fx.train.step import TrainStep, compile_train_step

Batch = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments."""

HELD_OUT = 8
"""Batches that the loss is measured on; they are not trained on."""

_WARMUP = 10
"""One in so many steps, at the start, has a learning rate that grows; then it is constant."""

_CLIP = 1.0
"""Largest total norm of the gradients."""

OTHER_LR = 3e-3
"""Learning rate of AdamW beside Muon: embeddings, heads, gains and biases."""


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        model: Makes the model of a seed.
        layout: Its layout.
        loss: `loss(model, *args, **kwargs)`, read as the model's own output; None for that output.
        batches: Makes the batches of a seed, the same whenever it is asked.
        held_out: Batches that the loss is measured on.
    """

    model: Callable[[int], nn.Module]
    layout: QKLayout
    loss: LossFn | None
    batches: Callable[[int], Iterator[Batch]]
    held_out: Sequence[Batch]


@dataclass(frozen=True)
class Arm:
    """One way to train.

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
    """What came of one run.

    Attributes:
        arm: The way to train.
        lr: Learning rate.
        seed: Of the weights and of the batches.
        loss: Mean loss of the held-out batches at the end; not a number where the run diverged.
        seconds: What the run took.
    """

    arm: Arm
    lr: float
    seed: int
    loss: float
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the loss was infinite or no number."""
        return not math.isfinite(self.loss)


@dataclass(frozen=True)
class Plan:
    """Which runs.

    Attributes:
        arms: The ways to train.
        lrs: Learning rates.
        seeds: Number of seeds.
        steps: Steps of a run.
        optimizer: "adamw", or "muon" with AdamW beside it.
        seconds: Time in which to be done; a run that is not over by then does not count.
    """

    arms: Sequence[Arm]
    lrs: Sequence[float]
    seeds: int
    steps: int
    optimizer: str
    seconds: float

    def points(self) -> Iterator[tuple[int, float, Arm]]:
        """Seed, learning rate and arm of all runs, in their order: learning rates from the middle outwards."""
        middle = (len(self.lrs) - 1) / 2
        lrs = sorted(self.lrs, key=lambda lr: abs(sorted(self.lrs).index(lr) - middle))
        yield from product(range(self.seeds), lrs, self.arms)


def arms_of(layout: QKLayout, taus: Sequence[float]) -> list[Arm]:
    """The ways to train a model: nothing, QK norm, and QuacK with each `tau`."""
    return [Arm("none"), Arm("qk-norm"), *(Arm("quack", tau) for tau in taus)]


def models_of(task: Task, seed: int) -> Mapping[str, nn.Module | str]:
    """The model of a seed without and with QK norm, by "bare" and "normed"; or why one cannot be had.

    A model that has QK norms loses them for "bare".
    """
    model = task.model(seed)
    if any(site.qk_norm for site in task.layout.sites):
        bare = copy.deepcopy(model)
        report = strip_qk_norm(bare, task.layout)
        reason = next((f"the QK norm of {left.site!r} stays: {left.reason}" for left in report.left), None)
        return {"bare": bare if reason is None else reason, "normed": model}
    args, kwargs = task.held_out[0]
    inputs = model_inputs(model, task.loss, args, kwargs)
    return {"bare": model, "normed": with_qk_norm(model, task.layout, inputs)}


def bare_layout(task: Task, model: nn.Module) -> QKLayout:
    """The layout of a model without QK norms."""
    if not any(site.qk_norm for site in task.layout.sites):
        return task.layout
    return strip_qk_norm(copy.deepcopy(model), task.layout).layout


def tune(task: Task, plan: Plan) -> Iterator[Outcome]:
    """Train, run after run.

    Arguments:
        task: What is trained.
        plan: Which runs.

    Returns:
        What came of them, one by one; fewer than planned where the time is over, or QK norm cannot be had.

    Raises:
        StepError: The batches hold no loss, or end too early.
    """
    deadline = time.monotonic() + plan.seconds
    layout = QKLayout()
    models: Mapping[str, nn.Module | str] = {}
    of = None
    for seed, lr, arm in plan.points():
        if of != seed:
            models, of = models_of(task, seed), seed
            layout = bare_layout(task, task.model(seed))
        model = models["normed" if arm.kind == "qk-norm" else "bare"]
        if isinstance(model, str):
            continue
        outcome = _run(task, plan, copy.deepcopy(model), layout if arm.kind == "quack" else QKLayout(), arm, lr, seed, deadline)
        if outcome is None:
            return
        yield outcome
