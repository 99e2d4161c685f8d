"""Ranks that train one model together: pairs found after wrapping, the same given to all, the same steps taken."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_distributed import (
    LAYOUT,
    Model,
    adamw,
    batch,
    data_parallel,
    fsdp,
    fsdp_over_tensor_parallel,
    loss_of,
    mesh,
    one_layer_sharded,
    run_in_processes,
    tensor_parallel,
    train,
    whole,
)
from test_wrapped import Own, compiled, everything
from torch import nn
from torch.distributed._composable.replicate import replicate as composable_replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, NAdam

from quack_fx import QuacK, RunLog, compile_train_step, find_qk_pairs, strip_qk_norm, verify_qk_pairs
from quack_fx.errors import LayoutError, OptimizerError, RunError, StripError
from quack_fx.layout import QKLayout


def fsdp1(model: Model, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def checkpointed(model: Model) -> Model:
    model.layers = nn.ModuleList(map(checkpoint_wrapper, model.layers))
    return model


def trained(shard: Callable[[Model], nn.Module]) -> Callable[[Model], nn.Module]:
    """Models that have run: FSDP has made what it makes in the first forward."""

    def make(model: Model) -> nn.Module:
        sharded = shard(model)
        loss_of(sharded, batch(0, torch.float32)).backward()
        return sharded

    return make


SHARDED: dict[str, Callable[[Model], nn.Module]] = {
    "DistributedDataParallel": data_parallel,
    "compiled DistributedDataParallel": lambda model: compiled(data_parallel(model)),
    "replicate": composable_replicate,
    "FSDP2": fsdp,
    "FSDP2 that has run": trained(fsdp),
    "FSDP2 on one layer": one_layer_sharded,
    "FSDP2, offloaded, in bfloat16": lambda model: fully_shard(
        model,
        mesh=mesh(2),
        offload_policy=CPUOffloadPolicy(pin_memory=False),
        mp_policy=MixedPrecisionPolicy(torch.bfloat16),
    ),
    "FSDP2 over checkpointed layers": lambda model: fsdp(checkpointed(model)),
    "tensor parallel": tensor_parallel,
    "FSDP1": fsdp1,
    "FSDP1 that has run": trained(fsdp1),
    "FSDP1 with its parameters": lambda model: fsdp1(model, use_orig_params=True),
    "FSDP1 in layers": lambda model: fsdp1(model, auto_wrap_policy=ModuleWrapPolicy({type(model.layers[0])})),
}


def pairs_are_found_on_one_rank() -> None:
    """And proved. The other rank does something else: nobody waits for it. Nothing is changed, and the model trains."""
    x = batch(0, torch.float32)
    expected = find_qk_pairs(Model(), x)
    assert len(expected.sites) == 2
    for name, shard in SHARDED.items():
        model = shard(Model())
        if dist.get_rank() == 0:
            before = everything(model)
            assert find_qk_pairs(model, x) == expected, name
            assert verify_qk_pairs(model, expected, x).complete, name
            with pytest.raises(StripError, match="take QK norms out, or put them in, before the model is wrapped"):
                strip_qk_norm(model, expected)
            assert everything(model) == before, name
        dist.barrier()
        if "offloaded" not in name:  # gloo takes no copies to the host while it reduces
            loss_of(model, x).backward()


def a_sharded_model_is_no_wrapper() -> None:
    model = fully_shard(Own(Model), mesh=mesh(2))
    assert [s.name for s in find_qk_pairs(model, batch(0, torch.float32)).sites] == [
        "module.layers.0",
        "module.layers.1",
    ]


def refused_by_all(attach: Callable[[], Any], error: type[Exception], message: str) -> None:
    """Every rank raises the same line."""
    with pytest.raises(error, match=message) as raised:
        attach()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, str(raised.value))
    assert len(set(everywhere)) == 1 and "\n" not in everywhere[0]


def ranks_that_differ_are_refused() -> None:
    first = dist.get_rank() == 0
    half = QKLayout(LAYOUT.sites[:1])
    other = QKLayout((LAYOUT.sites[0], replace(LAYOUT.sites[1], qk_norm=(), head_map=(0, 0, 2))))
    given: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
        (
            {"layout": LAYOUT},
            {"layout": half},
            LayoutError,
            r"different layouts \(1 sites to 2\); find the pairs on one",
        ),
        ({"layout": LAYOUT}, {"layout": other}, LayoutError, r"different layouts \(2 sites on each\)"),
        ({"layout": QKLayout()}, {"layout": LAYOUT}, LayoutError, r"different layouts \(0 sites to 2\)"),
        ({"tau": 0.25}, {"tau": 0.5}, OptimizerError, "were given tau from 0.25 to 0.5; give all the same"),
        ({"norm": "spectral"}, {}, OptimizerError, "were given different norms or methods; give all the same"),
    ]
    for shard in (data_parallel, fsdp, tensor_parallel):
        model = shard(Model())
        for ours, theirs, error, message in given:
            options = {"layout": LAYOUT, **(ours if first else theirs)}
            optimizer = adamw(model)
            refused_by_all(lambda m=model, o=optimizer, k=options: QuacK(o, m, **k), error, message)
            refused_by_all(
                lambda m=model, o=optimizer, k=options: compile_train_step(m, o, loss_of, **k), error, message
            )
            notes = replace(LAYOUT.sites[0], calls=1 + first, logit_scale=float(first))  # what QuacK does not use
            QuacK(optimizer, model, QKLayout((notes, LAYOUT.sites[1])))


def one_of_four_differs() -> None:
    """It meets one other rank on each axis of the mesh; all four say so."""
    model = fsdp_over_tensor_parallel(Model())
    tau = 0.25 if dist.get_rank() == 3 else 0.5
    refused_by_all(lambda: QuacK(adamw(model), model, LAYOUT, tau=tau), OptimizerError, "tau from 0.25 to 0.5")


def ranks_that_share_no_model_are_left_alone() -> None:
    """Stages of a pipeline: each with a model of its own, with QuacK or without, replicated among others or not."""
    rank = dist.get_rank()
    groups = [dist.new_group([0]), dist.new_group([1])]
    for model in (Model(), DistributedDataParallel(Model(), process_group=groups[rank])):
        QuacK(adamw(model), model, LAYOUT, tau=0.5 + rank)
        if rank == 0:
            QuacK(adamw(model), model, LAYOUT)


def weights_of_another_rank_are_no_mistake() -> None:
    """Optimizers over parts of one replicated model: a rank may hold no query and no key, but not all ranks."""
    model = data_parallel(Model())
    parts = [list(model.module.layers.parameters()), list(model.module.head.parameters())]  # type: ignore[union-attr, operator]
    quack = QuacK(AdamW(parts[dist.get_rank()]), model, LAYOUT)
    train(model, quack.optimizer, steps=range(1))
    with pytest.raises(OptimizerError, match="holds none of the query and key weights"):
        QuacK(AdamW(parts[1]), model, LAYOUT)


def shared_steps_are_resumed() -> None:
    """ZeroRedundancyOptimizer: refused as a whole; inside of it a run goes on as one that was never interrupted."""

    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns, as it imports TorchScript

    def build() -> tuple[nn.Module, ZeroRedundancyOptimizer]:
        model = data_parallel(Model().double())
        return model, ZeroRedundancyOptimizer(model.parameters(), AdamW, lr=1e-2, foreach=False)

    model, optimizer = build()
    with pytest.raises(
        OptimizerError, match=r"ZeroRedundancyOptimizer is around .* in its 'optim'; attach QuacK to that"
    ):
        QuacK(optimizer, model, LAYOUT)
    QuacK(optimizer.optim, model, LAYOUT, tau=0.5)
    plain = Model().double()
    reference = adamw(plain)
    reference.param_groups[0]["weight_decay"] = 1e-2
    QuacK(reference, plain, LAYOUT, tau=0.5)
    train(plain, reference)
    train(model, optimizer, steps=range(4))
    optimizer.consolidate_state_dict(0)
    saved = [copy.deepcopy(optimizer.state_dict()) if dist.get_rank() == 0 else None, copy.deepcopy(model.state_dict())]
    dist.broadcast_object_list(saved, 0)
    model, optimizer = build()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    QuacK(optimizer.optim, model, LAYOUT, tau=0.5)
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    train(model, optimizer, steps=range(4, 8))
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-11)


def steps_are_skipped_by_all() -> None:
    """A gradient that is not a number, in what one rank holds: no rank changes anything, none waits for the others.

    Of an update that is compiled, and of an optimizer's own step; with weights that only one rank has a gradient of.
    """
    for shard in (fsdp, one_layer_sharded):
        for make in (adamw, lambda model: NAdam(model.parameters(), lr=1e-2, foreach=False)):
            model = shard(Model())
            optimizer = make(model)
            step = compile_train_step(
                model, optimizer, loss_of, layout=LAYOUT, skip_nonfinite=True, clip_grad_norm=1.0, compile=False
            )
            step(batch(0, torch.float32))
            for name in ("layers.0.q.weight", "layers.1.k"):
                before = [whole(p).clone() for p in model.parameters()]
                step.forward_backward(batch(1, torch.float32))
                if dist.get_rank() == 1:
                    grad = model.get_parameter(name).grad
                    (grad.to_local() if hasattr(grad, "to_local") else grad)[0, 0] = torch.nan
                step.update()
                assert all(map(torch.equal, before, map(whole, model.parameters())))
            step(batch(2, torch.float32))
            assert all(bool(whole(p).isfinite().all()) for p in model.parameters())


def states_are_loaded_twice() -> None:
    """Through torch.distributed.checkpoint, with no step in between: as once."""
    model = fsdp(Model())
    optimizer = adamw(model)
    QuacK(optimizer, model, LAYOUT, tau=0.5)
    train(model, optimizer, steps=range(3))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = fsdp(Model())
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    theirs = adamw(other)
    quack = QuacK(theirs, other, LAYOUT, tau=0.5)
    for _ in range(2):
        set_optimizer_state_dict(other, theirs, copy.deepcopy(state))
    set_optimizer_state_dict(other, theirs, copy.deepcopy(get_optimizer_state_dict(other, theirs)))
    train(model, optimizer, steps=range(3, 5))
    train(other, theirs, steps=range(3, 5))
    assert all(map(torch.equal, map(whole, model.parameters()), map(whole, other.parameters())))
    assert quack.init_factors.isfinite().all()


def optimizers_are_made_after_sharding() -> None:
    for shard, message in (
        (fsdp, "holds none of the query and key weights, .* made after the model was wrapped, sharded and moved"),
        (one_layer_sharded, "holds weights that are not in the model, and not 'layers.0.q.weight', which is; make the"),
    ):
        model = Model()
        optimizer = adamw(model)
        sharded = shard(model)
        refused_by_all(lambda o=optimizer, m=sharded: QuacK(o, m, LAYOUT), OptimizerError, message)


def models_are_sharded_before_attaching() -> None:
    """Trainers that shard a model, and give its optimizer the new weights."""
    model = Model()
    optimizer = adamw(model)
    QuacK(optimizer, model, LAYOUT)
    sharded = fsdp(model)
    optimizer.param_groups[0]["params"] = list(sharded.parameters())
    loss_of(sharded, batch(0, torch.float32)).backward()
    refused_by_all(
        optimizer.step, OptimizerError, "was sharded after QuacK was attached to AdamW; attach it afterwards"
    )


def a_run_is_recorded_by_one() -> None:
    """Metrics of sharded weights need every rank; the file is written by the first."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    path = Path(folder[0], f"rank_{dist.get_rank()}.jsonl")
    model = fsdp(Model())
    optimizer = adamw(model)
    quack = QuacK(optimizer, model, LAYOUT)
    log = RunLog(path, quack)
    train(model, optimizer, steps=range(1))
    log.log(0, loss=1.0)
    expected = quack.metrics(heads=True)
    assert path.exists() == (dist.get_rank() == 0)
    if path.exists():
        (line,) = path.read_text().splitlines()
        assert json.loads(line)["attention/layers.0/q/norm"][2] == expected["attention/layers.0/q/norm/head_2"]
    refused_by_all(lambda: log.log(1, loss=None), RunError, "loss is None; give a number")  # type: ignore[arg-type]


TOGETHER: dict[str, Callable[[], None]] = {
    "pairs": pairs_are_found_on_one_rank,
    "no wrapper": a_sharded_model_is_no_wrapper,
    "differ": ranks_that_differ_are_refused,
    "pipeline": ranks_that_share_no_model_are_left_alone,
    "parts": weights_of_another_rank_are_no_mistake,
    "ZeRO": shared_steps_are_resumed,
    "skipped": steps_are_skipped_by_all,
    "twice": states_are_loaded_twice,
    "made before": optimizers_are_made_after_sharding,
    "attached before": models_are_sharded_before_attaching,
    "recorded": a_run_is_recorded_by_one,
}


def cases_of(world: int) -> dict[str, Callable[[], None]]:
    return TOGETHER if world == 2 else {"one differs": one_of_four_differs}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_together(world: int, tmp_path: Path) -> None:
    run_in_processes(world, tmp_path, cases_of)
