"""DeepSpeed on two ranks, where it is installed: without ZeRO as one process, with ZeRO refused on every rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_distributed import LAYOUT, Model, adamw, batch, loss_of, run_in_processes, train
from test_ranks import refused_by_all

from quack_fx import QuacK
from quack_fx.errors import LayoutError, OptimizerError

pytest.importorskip("deepspeed")


def engine_of(stage: int, model: Model, optimizer: Any) -> Any:
    import deepspeed

    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # as its launcher does
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def without_zero_it_is_one_process() -> None:
    plain, model = Model().double(), Model().double()
    reference, optimizer = adamw(plain), adamw(model)
    engine = engine_of(0, model, optimizer)
    QuacK(reference, plain, LAYOUT, tau=0.5)
    QuacK(optimizer, engine.module, LAYOUT, tau=0.5)
    train(plain, reference, range(5))
    for i in range(5):
        engine.backward(loss_of(engine, batch(i, torch.float64).chunk(2)[dist.get_rank()]))
        engine.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-11)


def with_zero_it_is_refused(stage: int) -> None:
    """Attached before or after the engine is made: flat parts of weights, and at stage 3 empty ones."""
    model = Model()
    optimizer = adamw(model)
    QuacK(optimizer, model, LAYOUT)
    engine = engine_of(stage, model, optimizer)
    engine.backward(loss_of(engine, batch(0, torch.float32)))
    known: Any = (LayoutError, "which is empty here, as ZeRO-3") if stage == 3 else (OptimizerError, "no longer holds")
    refused_by_all(engine.step, *known)
    model = Model()
    optimizer = adamw(model)
    engine = engine_of(stage, model, optimizer)
    known = known if stage == 3 else (OptimizerError, "flat parts of weights")
    refused_by_all(lambda: QuacK(optimizer, engine.module, LAYOUT), *known)
    refused_by_all(lambda: QuacK(engine.optimizer, engine.module, LAYOUT), OptimizerError, "no torch.optim.Optimizer")


def cases_of(world: int) -> dict[str, Callable[[], None]]:
    return {"none": without_zero_it_is_one_process} | {
        f"ZeRO-{stage}": partial(with_zero_it_is_refused, stage) for stage in (1, 2, 3)
    }


def test_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run_in_processes(2, tmp_path, cases_of)
