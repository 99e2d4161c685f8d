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
from test_distributed import run_in_processes
from test_ranks import refused_by_all
from torch import Tensor, nn

from benchmarks.attentions import ODD, Model
from benchmarks.sharded import LIMIT, distance, layout_of, loss_of, optimizers_of
from quack_fx import QuacK
from quack_fx.errors import LayoutError, OptimizerError

pytest.importorskip("deepspeed")


def engine_of(stage: int, model: nn.Module, optimizer: Any) -> Any:
    import deepspeed

    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # as its launcher does
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def made() -> tuple[nn.Module, Any]:
    model = Model("GQA", ODD)
    return model, optimizers_of("AdamW", model)[0]


def batch(step: int) -> Tensor:
    return torch.randn(4, 6, ODD.width, generator=torch.Generator().manual_seed(step))


def without_zero_it_is_one_process() -> None:
    (plain, reference), (model, optimizer) = made(), made()
    engine, layout = engine_of(0, model, optimizer), layout_of("GQA", ODD)
    QuacK(reference, plain, layout, tau=0.5)
    QuacK(optimizer, engine.module, layout, tau=0.5)
    for i in range(10):
        loss_of(plain, batch(i)).backward()
        reference.step()
        reference.zero_grad()
        engine.backward(loss_of(engine, batch(i).chunk(2)[dist.get_rank()]))
        engine.step()
    assert distance(model.parameters(), plain.parameters()) < LIMIT


def with_zero_it_is_refused(stage: int) -> None:
    """Attached before or after the engine is made: flat parts of weights, and at stage 3 empty ones."""
    (model, optimizer), layout = made(), layout_of("GQA", ODD)
    QuacK(optimizer, model, layout)
    engine = engine_of(stage, model, optimizer)
    engine.backward(loss_of(engine, batch(0)))
    known: Any = (LayoutError, "which is empty here, as ZeRO-3") if stage == 3 else (OptimizerError, "no longer holds")
    refused_by_all(engine.step, *known)
    model, optimizer = made()
    engine = engine_of(stage, model, optimizer)
    known = known if stage == 3 else (OptimizerError, "flat parts of weights")
    refused_by_all(lambda: QuacK(optimizer, engine.module, layout), *known)
    refused_by_all(lambda: QuacK(engine.optimizer, engine.module, layout), OptimizerError, "no torch.optim.Optimizer")


def cases_of(world: int) -> dict[str, Callable[[], None]]:
    return {"none": without_zero_it_is_one_process} | {
        f"ZeRO-{stage}": partial(with_zero_it_is_refused, stage) for stage in (1, 2, 3)
    }


def test_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run_in_processes(2, tmp_path, cases_of)
