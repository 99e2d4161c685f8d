"""What goes wrong on one of several ranks, or in a checkpoint: all ranks say so in one line, or go on rightly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from test_checkpoints import Run
from test_distributed import (
    LAYOUT,
    Messages,
    Model,
    adamw,
    batch,
    data_parallel,
    fsdp,
    hybrid,
    loss_of,
    one_layer_sharded,
    run_in_processes,
    tensor_parallel,
    train,
    whole,
)
from test_metrics import Waits
from test_ranks import refused_by_all
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.kills import kills
from quack_fx import QuacK, compile_train_step
from quack_fx.errors import FactorError, LayoutError
from quack_fx.layout import QKLayout

SHARDED: dict[str, Callable[[Model], nn.Module]] = {
    "DistributedDataParallel": data_parallel,
    "FSDP2": fsdp,
    "FSDP2 on one layer": one_layer_sharded,
    "FSDP2 with replicas": hybrid,
    "tensor parallel": tensor_parallel,
}


def here(tensor: Tensor) -> Tensor:
    """What this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def heads_that_are_wrong_on_one_rank_are_refused() -> None:
    """One rank holds a number that is none, at the start: every rank refuses, and names the weight."""
    for shard in (fsdp, tensor_parallel):
        model = shard(Model())
        with torch.no_grad():
            if dist.get_rank() == 1:
                here(model.layers[0].q.weight)[-1, 0] = torch.nan
        optimizer = adamw(model)
        said = r"a head in layers\.0\.q\.weight, .* has norm zero, or one that is not finite; initialise it"
        refused_by_all(lambda m=model, o=optimizer: QuacK(o, m, LAYOUT), FactorError, said)
        refused_by_all(lambda m=model, o=optimizer: compile_train_step(m, o, loss_of, layout=LAYOUT), FactorError, said)


def a_gradient_of_one_rank_that_is_not_a_number() -> None:
    """By hooks nothing is skipped, as by the optimizer alone; what was hit is the same on all ranks."""
    for name, shard in SHARDED.items():
        model = shard(Model())
        optimizer = adamw(model)
        quack = QuacK(optimizer, model, LAYOUT)
        train(model, optimizer, range(1))
        loss_of(model, batch(1, torch.float32)).backward()
        grad = here(next(p for n, p in model.named_parameters() if n.endswith("layers.0.q.weight")).grad)
        if dist.get_rank() == 1 or name in ("DistributedDataParallel", "FSDP2 with replicas"):  # those add them up
            grad[0, 0] = torch.nan
        optimizer.step()
        scales = [s for own in quack.factors().values() for s in own.values()]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, [s == s for s in scales])
        assert everywhere[0] == everywhere[1], name
        assert 0 < sum(everywhere[0]) < len(scales), name  # of the heads that it is multiplied with, not of all


def a_layout_that_fits_one_rank_alone() -> None:
    """A weight that is called otherwise in the model of one rank: no rank waits for the one that refuses."""
    for shard in (data_parallel, fsdp):
        model = shard(Model())
        inside = getattr(model, "module", model)
        if dist.get_rank() == 1:
            inside.layers[1].key = inside.layers[1].k
            del inside.layers[1].k
        said = "does not fit the model of another rank" if dist.get_rank() == 0 else r"layers\.1\.k"
        with pytest.raises(LayoutError, match=said) as raised:
            QuacK(adamw(model), model, LAYOUT)
        assert "\n" not in str(raised.value)
        dist.barrier()


def a_renamed_weight_is_refused_by_all() -> None:
    block = replace(LAYOUT.sites[0].query[0], param="layers.0.query.weight")
    renamed = QKLayout((replace(LAYOUT.sites[0], query=(block,)), LAYOUT.sites[1]))
    model = fsdp(Model())
    refused_by_all(lambda: QuacK(adamw(model), model, renamed), LayoutError, r"layers\.0\.query\.weight")


def frozen_weights_stay_and_the_others_train() -> None:
    """As in one process, by hooks and by a step."""
    for shard in (data_parallel, fsdp, tensor_parallel):
        for by_step in (False, True):
            ends = []
            for wrap in (lambda model: model, shard):
                plain = Model().double()
                plain.layers[0].q.weight.requires_grad_(False)
                model = wrap(plain)
                optimizer = adamw(model)
                if by_step:
                    step = compile_train_step(model, optimizer, loss_of, layout=LAYOUT, tau=0.5, compile=False)
                    for i in range(4):
                        step(batch(i, torch.float64))
                else:
                    QuacK(optimizer, model, LAYOUT, tau=0.5)
                    train(model, optimizer, range(4))
                ends.append([whole(p) for p in model.parameters()])
                frozen = next(whole(p) for n, p in model.named_parameters() if n.endswith("layers.0.q.weight"))
                assert torch.equal(frozen, Model().double().layers[0].q.weight)
            for ours, theirs in zip(*ends, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-11)


def metrics_are_those_of_one_process() -> None:
    """The same bits on every rank, by one copy to the host."""
    model = Model()
    optimizer = adamw(model)
    quack = QuacK(optimizer, model, LAYOUT, tau=0.5)
    train(model, optimizer, range(3))
    expected = quack.metrics(heads=True)
    for name, shard in SHARDED.items():
        model = shard(Model())
        optimizer = adamw(model)
        quack = QuacK(optimizer, model, LAYOUT, tau=0.5)
        train(model, optimizer, range(3))
        with Waits() as waits, Messages() as messages:
            found = quack.metrics(heads=True)
        assert waits.calls == ["tolist"], name
        kinds = {kind for kind, _ in messages.sent}
        assert kinds == ({"c10d::allreduce_"} if any(isinstance(p, DTensor) for p in model.parameters()) else set())
        assert found == pytest.approx(expected, rel=1e-5), name
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, found)
        assert everywhere[0] == everywhere[1], name


def checkpoints_that_are_cut_short(folder: Path) -> None:
    """Every rank is told: of a file that ends early, one that is missing, and of a save that was interrupted."""
    run = Run(True)
    train(run.model, run.optimizer, range(2))
    first = run.quack.init_factors.clone()
    for fault in ("short", "missing", "interrupted"):
        at = folder / fault
        dcp.save(run.state(False), checkpoint_id=at)
        if dist.get_rank() == 0:
            file = at / "__1_0.distcp"
            if fault == "short":
                file.write_bytes(file.read_bytes()[:1000])
            else:
                (file if fault == "missing" else at / ".metadata").unlink()
        dist.barrier()
        fresh = Run(True, shift=0.1)
        with pytest.raises(dcp.CheckpointException, match=r"CheckpointException ranks"):
            dcp.load(fresh.state(False), checkpoint_id=at)
        dcp.save(run.state(False), checkpoint_id=at)  # over what was left of it
        state = fresh.state(False)
        dcp.load(state, checkpoint_id=at)
        fresh.load(state, False)
        assert torch.equal(fresh.quack.init_factors, first)
        assert all(map(torch.equal, fresh.weights(), run.weights()))


def a_checkpoint_of_renamed_weights(folder: Path) -> None:
    """It lacks what the model asks for: every rank says so, and nothing has changed."""
    run = Run(True)
    train(run.model, run.optimizer, range(2))
    saved = run.state(True)
    for part in saved.values():
        for name in [name for name in part if "layers.1.k" in name]:
            part[name.replace("layers.1.k", "layers.1.key")] = part.pop(name)
    dcp.save(saved, checkpoint_id=folder)
    fresh = Run(True)
    before = copy.deepcopy(fresh.weights()), fresh.quack.init_factors.clone()
    with pytest.raises(dcp.CheckpointException, match=r"Missing key in checkpoint state_dict: .*layers\.1\.k"):
        dcp.load(fresh.state(True), checkpoint_id=folder)
    assert all(map(torch.equal, before[0], fresh.weights())) and torch.equal(before[1], fresh.quack.init_factors)


class Cases:
    """The cases, their checkpoints in a folder; it is pickled for the processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, world: int) -> dict[str, Callable[[], None]]:
        return {
            "wrong heads": heads_that_are_wrong_on_one_rank_are_refused,
            "gradient": a_gradient_of_one_rank_that_is_not_a_number,
            "fits one rank": a_layout_that_fits_one_rank_alone,
            "renamed": a_renamed_weight_is_refused_by_all,
            "frozen": frozen_weights_stay_and_the_others_train,
            "metrics": metrics_are_those_of_one_process,
            "cut short": partial(checkpoints_that_are_cut_short, self.folder / "cut"),
            "renamed checkpoint": partial(a_checkpoint_of_renamed_weights, self.folder / "renamed"),
        }


def test_faults_on_ranks(tmp_path: Path) -> None:
    run_in_processes(2, tmp_path, Cases(tmp_path / "checkpoints"))


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path: Path) -> None:
    """The round of benchmarks.kills, three times."""
    found = kills(3, tmp_path)
    assert (found.other_steps, found.other_tensors) == (0, 0)
    assert found.taken >= 2 * found.steps and found.tensors > 200
