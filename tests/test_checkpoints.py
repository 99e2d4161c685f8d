"""Checkpoints of a run with QuacK: its initial factors survive bit for bit, or loading is refused with the way out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_distributed import LAYOUT, Model, adamw, fsdp, run_in_processes, train, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from quack_fx import QuacK
from quack_fx.errors import OptimizerError

STEPS = 4


class Run:
    """A model, its optimizer and QuacK; on all ranks or whole on this one."""

    def __init__(self, sharded: bool, shift: float = 0.0) -> None:
        model = Model()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(shift)
        self.model: nn.Module = fsdp(model) if sharded else model
        self.optimizer: Optimizer = adamw(self.model)
        self.quack = QuacK(self.optimizer, self.model, LAYOUT, tau=0.5)

    def state(self, flat: bool) -> dict[str, Any]:
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        return {"model": get_model_state_dict(self.model), "optimizer": optimizer}

    def load(self, state: dict[str, Any], flat: bool) -> None:
        set_model_state_dict(self.model, state["model"])
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)

    def weights(self) -> list[Tensor]:
        return [whole(p).clone() for p in self.model.parameters()]


def through_a_checkpoint(folder: Path, before: bool, after: bool, flat: bool) -> None:
    """A run on two ranks (True) or one goes on on as many or others; the loaded weights were others, and trained."""
    here = dist.get_rank() == 0
    first, weights = torch.empty(0), list[Tensor]()
    if before or here:
        run = Run(before)
        first = run.quack.init_factors.clone()
        train(run.model, run.optimizer, range(STEPS))
        weights = run.weights()
        dcp.save(run.state(flat), checkpoint_id=folder, no_dist=not before)
    dist.barrier()
    shared: list[Any] = [first, weights]
    dist.broadcast_object_list(shared)
    if after or here:
        run = Run(after, shift=0.1)
        train(run.model, run.optimizer, range(20, 22))
        assert not torch.equal(run.quack.init_factors, shared[0])
        state = run.state(flat)
        dcp.load(state, checkpoint_id=folder, no_dist=not after)
        run.load(state, flat)
        assert all(map(torch.equal, run.weights(), shared[1]))
        assert torch.equal(run.quack.init_factors, shared[0])  # bit for bit
        fresh = Run(
            after, shift=0.2
        )  # before its first step: torch makes its state by one with a learning rate of zero
        state = fresh.state(flat)
        dcp.load(state, checkpoint_id=folder, no_dist=not after)
        fresh.load(state, flat)
        assert torch.equal(fresh.quack.init_factors, shared[0])
        for one in (run, fresh):
            train(one.model, one.optimizer, range(STEPS, STEPS + 2))
        assert all(map(torch.equal, run.weights(), fresh.weights()))


def without_quack_is_refused(folder: Path, flat: bool) -> None:
    """A checkpoint of a run that had no QuacK: by DCP the entry is missing, by hand QuacK says what to do."""
    model = fsdp(Model())
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    plain = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save(plain, checkpoint_id=folder)
    run = Run(True)
    before = run.quack.init_factors.clone()
    with pytest.raises(dcp.CheckpointException, match=r"Missing key .*quack_init"):
        dcp.load(run.state(flat)["optimizer"], checkpoint_id=folder)
    said = "quack_init.*attach it again" if flat else "quack_init"  # nested, torch misses the entry before QuacK does
    with pytest.raises(OptimizerError if flat else (OptimizerError, KeyError, RuntimeError), match=said):
        set_optimizer_state_dict(run.model, run.optimizer, plain, options=options)
    assert torch.equal(run.quack.init_factors, before)


class Cases:
    """The cases, their checkpoints in a folder; it is pickled for the processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, world: int) -> dict[str, Callable[[], None]]:
        found: dict[str, Callable[[], None]] = {}
        for flat in (False, True):
            form = "flat" if flat else "nested"
            for before, after in ((True, True), (True, False), (False, True)):
                name = f"{1 + before} to {1 + after} ranks, {form}"
                found[name] = partial(through_a_checkpoint, self.folder / name, before, after, flat)
            found[f"without QuacK, {form}"] = partial(without_quack_is_refused, self.folder / form, flat)
        return found


def test_factors_survive_dcp_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    run_in_processes(2, tmp_path, Cases(tmp_path / "checkpoints"))


@pytest.mark.parametrize("attach_first", [True, False])
def test_factors_survive_torch_save(tmp_path: Path, attach_first: bool) -> None:
    run = Run(False)
    first = run.quack.init_factors.clone()
    train(run.model, run.optimizer, range(STEPS))
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other = Model()
    optimizer = adamw(other)
    quack = QuacK(optimizer, other, LAYOUT, tau=0.5) if attach_first else None
    other.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    quack = quack or QuacK(optimizer, other, LAYOUT, tau=0.5)
    assert torch.equal(quack.init_factors, first)
    for model, its in ((run.model, run.optimizer), (other, optimizer)):
        train(model, its, range(STEPS, STEPS + 3))
    assert all(map(torch.equal, run.weights(), (p.detach() for p in other.parameters())))


def test_a_saved_state_without_factors_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = Model()
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "plain.pt")
    run = Run(False)
    with pytest.raises(OptimizerError, match=r"quack_init.*detach\(\) it, load the state, and attach it again"):
        run.optimizer.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True))
