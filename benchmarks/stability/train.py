"""One training run: the model, its optimizer, the method, and the recorded curves.

In: a `Run`, its `Setup` and the text. Out: a `Result`, or None if the run was stopped. A stopped run has written a
checkpoint, from which it continues next time, bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.overrides import TorchFunctionMode

from benchmarks.stability.grid import Run, Setup
from benchmarks.stability.models import build
from benchmarks.stability.probe import attention_logits, largest, mean_change
from benchmarks.stability.text import Text
from quack_fx.bench.normed import with_qk_norm
from quack_fx.find import find_qk_pairs
from quack_fx.train.hooks import QuacK

_WARMUP = 10
"""The learning rate grows over the first `1 / _WARMUP` of the steps, then stays constant, as in the paper."""


@dataclass
class Curves:
    """Values recorded at some steps.

    Attributes:
        step: Step numbers, from 1.
        loss: Mean training loss since the previous point.
        logit: Largest absolute logit of the probe batch, before the step.
        change: Mean absolute change of the probe batch's logits by the step.
    """

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    logit: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """Result of a run.

    Attributes:
        loss: Validation loss at the end; not finite if the run diverged.
        diverged: Step after which a loss or logit was not finite; None if all were finite.
        largest: Largest absolute logit of the probe batch over all points.
        curves: Values recorded at some steps.
        seconds: Duration of the run.
    """

    loss: float
    diverged: int | None
    largest: float
    curves: Curves
    seconds: float


def train(
    run: Run, setup: Setup, text: Text, checkpoint: Path, stop: Callable[[], bool] = lambda: False
) -> Result | None:
    """Do one training run.

    Arguments:
        run: The run.
        setup: Settings that all runs share.
        text: The training text.
        checkpoint: File to resume from, and to write if the run is stopped.
        stop: Called before every step; returns whether to stop.

    Returns:
        The result; None if the run was stopped.
    """
    training = _Training(run, setup, text)
    if checkpoint.exists():
        training.load(checkpoint)
    while training.done < run.steps and training.diverged is None:
        if stop():
            training.save(checkpoint)
            return None
        training.step()
    result = training.result()
    checkpoint.unlink(missing_ok=True)
    return result


class _Training:
    """The state of an active run."""

    def __init__(self, run: Run, setup: Setup, text: Text) -> None:
        self._run, self._setup, self._text = run, setup, text
        self._started = time.perf_counter()
        self._seconds = 0.0  # of earlier sessions
        self.done = 0
        self.diverged: int | None = None
        self._curves, self._losses = Curves(), list[Tensor]()
        model: nn.Module = build(run.attention, setup.shape, run.seed).to(setup.device)
        self._probe = self._check(0)
        layout = find_qk_pairs(model, *self._probe)
        if run.method.kind == "qk-norm":
            with self._precision():
                normed = with_qk_norm(model, layout, (self._probe, {}))
            if isinstance(normed, str):
                raise RuntimeError(f"no QK norm in {run.attention}: {normed}")
            model = normed
        self._model = model
        # QK-Clip can read logits only if the model runs in Python.
        compiles = setup.compile and run.method.kind != "qk-clip"
        self._forward: Callable[..., Any] = torch.compile(model) if compiles else model
        self._optimizers = _optimizers(run, setup, model)
        self._base = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]
        method = run.method
        if method.kind != "none" and method.kind != "qk-norm":
            # The first optimizer has the matrices.
            QuacK(self._optimizers[0], model, layout, method.tau, method=method.kind, threshold=method.threshold)

    def step(self) -> None:
        """Take one training step, and record a point on the curves if one is due."""
        run, setup = self._run, self._setup
        first = self.done % max(1, run.steps // setup.points) == 0
        before = self._logits() if first else None
        factor = min(1.0, _WARMUP * (self.done + 1) / run.steps)
        for optimizer, base in zip(self._optimizers, self._base, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = factor * lr
        loss = torch.zeros((), device=setup.device)
        for part in range(setup.accumulate):
            batch = self._text.batch(run.seed, self.done * setup.accumulate + part, setup.sequences, setup.positions)
            with self._precision():
                own = self._forward(*(ids.to(setup.device) for ids in batch))[1] / setup.accumulate
            own.backward()
            loss += own.detach()
        with _InFloat32() if setup.device == "cpu" else contextlib.nullcontext():
            for optimizer in self._optimizers:
                optimizer.step()
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        self.done += 1
        self._losses.append(loss)
        if before is not None:
            self._note(before, self._logits())

    def _note(self, before: list[Tensor], after: list[Tensor]) -> None:
        """Record a point on the curves; nothing else in a step waits for the device."""
        loss = float(torch.stack(self._losses).mean())
        logit, change = largest(before), mean_change(before, after)
        self._losses.clear()
        if not all(map(math.isfinite, (loss, logit, change))):
            self.diverged = self.done
            return
        self._curves.step.append(self.done)
        for curve, value in ((self._curves.loss, loss), (self._curves.logit, logit), (self._curves.change, change)):
            curve.append(float(f"{value:.4g}"))

    @torch.no_grad()
    def result(self) -> Result:
        """The result of the finished run."""
        loss = math.nan
        if self.diverged is None:
            losses = []
            for number in range(self._setup.check_batches):
                with self._precision():
                    losses.append(float(self._model(*self._check(number))[1]))
            loss = sum(losses) / len(losses)
            if not math.isfinite(loss):
                self.diverged = self.done
        seconds = self._seconds + time.perf_counter() - self._started
        return Result(loss, self.diverged, max(self._curves.logit, default=math.nan), self._curves, seconds)

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        torch.save(
            {
                "done": self.done,
                "seconds": self._seconds + time.perf_counter() - self._started,
                "curves": vars(self._curves),
                "losses": self._losses,
                "model": self._model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            },
            temporary,
        )
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Resume from a checkpoint."""
        state = torch.load(path, map_location=self._setup.device)
        self.done, self._seconds = state["done"], state["seconds"]
        self._curves, self._losses = Curves(**state["curves"]), state["losses"]
        self._model.load_state_dict(state["model"])
        for optimizer, own in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)

    def _check(self, number: int) -> tuple[Tensor, Tensor]:
        s = self._setup
        ids, targets = self._text.check_batch(number, s.check_batches, s.sequences, s.positions)
        return ids.to(s.device), targets.to(s.device)

    def _logits(self) -> list[Tensor]:
        with self._precision():
            return attention_logits(self._model, self._probe, self._setup.probed, self._setup.shape.layers)

    def _precision(self) -> AbstractContextManager[Any]:
        if not self._setup.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self._setup.device, dtype=torch.bfloat16)


class _InFloat32(TorchFunctionMode):
    """Makes torch's Muon orthogonalise in float32, because bfloat16 products are 30 times slower on CPUs without
    bfloat16 units."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.bfloat16:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


def _optimizers(run: Run, setup: Setup, model: nn.Module) -> list[Optimizer]:
    """The optimizer of the blocks' matrices; with Muon, also AdamW for embeddings and gains."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks.")]
    held = set(matrices)
    others = [p for p in model.parameters() if p not in held]
    if run.optimizer == "muon":
        muon = Muon(matrices, lr=run.lr, weight_decay=setup.weight_decay)
        return [muon, AdamW(others, lr=setup.other_lr, betas=(0.9, 0.95), weight_decay=0.0)]
    groups = [{"params": matrices, "weight_decay": setup.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [AdamW(groups, lr=run.lr, betas=(0.9, 0.95))]
