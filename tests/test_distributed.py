"""Sharded weights: several processes take the steps that one takes, however rows and heads are cut."""

from __future__ import annotations

import copy
import faulthandler
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from per_head import Layers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Muon, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quack_fx import QuacK, compile_train_step, convert
from quack_fx.errors import FactorError, LayoutError
from quack_fx.layout import AttentionSite, LogitTerm, QKLayout, WeightBlock
from quack_fx.layout.fit import check_layout
from quack_fx.train.program.parts.sharded import held
from quack_fx.train.program.scaling import execute, local, scaling_of

HEADS, DIM, WIDTH, STEPS = 3, 5, 8, 8  # 15 rows: two ranks hold 8 and 7, and the second head is cut


class Attention(nn.Module):
    """Attention with a plain query projection and a transposed key weight, features along axis 1 (as Conv1D)."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k = nn.Parameter(torch.randn(WIDTH, HEADS * DIM) / WIDTH**0.5)
        self.v = nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(-2, -3) for t in (self.q(x), x @ self.k, self.v(x)))
        with sdpa_kernel(SDPBackend.MATH):  # torch 2.11's own kernel for CPUs fails on float64
            out = F.scaled_dot_product_attention(q, k, v)
        return self.out(out.transpose(-2, -3).flatten(-2))


class Model(Layers):
    def __init__(self) -> None:
        super().__init__(Attention, WIDTH)


def site(layer: str) -> AttentionSite:
    heads = tuple(((h * DIM, (h + 1) * DIM),) for h in range(HEADS))
    return AttentionSite(
        name=layer,
        kind="mha",
        cross=False,
        calls=1,
        query_heads=HEADS,
        key_heads=HEADS,
        head_dim=DIM,
        head_map=tuple(range(HEADS)),
        query=(WeightBlock(f"{layer}.q.weight", "q", 0, heads, f"{layer}.q.bias"),),
        key=(WeightBlock(f"{layer}.k", "k", 1, heads),),
        terms=(LogitTerm((0,), (0,)),),
    )


LAYOUT = QKLayout((site("layers.0"), site("layers.1")))


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)  # foreach fails on mixed DTensors


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [Muon(matrices, lr=1e-2, weight_decay=0.1), AdamW(others, lr=1e-2, foreach=False)]


def batch(step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(step)).to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return F.mse_loss(model(x), x.roll(1, -1).sin())


def train(model: nn.Module, optimizer: Optimizer, steps: range = range(STEPS)) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, batch(step, next(model.parameters()).dtype))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def equal_to_one_process(shard: Callable[[Model], nn.Module], norm: Any = "frobenius") -> None:
    """The sharded run against the plain one: losses, weights and factors.

    In fp64: what is cut is summed up in another order, and Adam makes much of a rounding where a gradient is little.
    """
    plain, model = Model().double(), shard(Model().double())
    optimizer, sharded = adamw(plain), adamw(model)
    expected = QuacK(optimizer, plain, LAYOUT, tau=0.5, norm=norm)
    quack = QuacK(sharded, model, LAYOUT, tau=0.5, norm=norm)
    torch.testing.assert_close(train(model, sharded), train(plain, optimizer), rtol=1e-12, atol=0.0)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), theirs.detach(), rtol=0.0, atol=1e-11)
    report, wanted = quack.factors(), expected.factors()
    for name, scales in report.items():
        assert scales == pytest.approx(wanted[name], rel=1e-6)
        assert max(abs(s - 0.5) for s in scales.values()) > 1e-4
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, report)
    assert all(other == report for other in everywhere)  # bit for bit the same on every rank, or replicas would drift


def steps_equal_one_process(
    shard: Callable[[Model], nn.Module], make: Callable[[nn.Module], Any] = adamw, compile: bool = False
) -> None:
    """The same of compiled steps, and of the file that is written for sharded weights: with clipping, in fp64."""
    optimizer = "muon" if make is muon_and_adamw else "adamw"
    program = execute(convert(Model(), layout=LAYOUT, sharded=True, optimizer=optimizer))
    options: Any = {"loss_fn": loss_of, "tau": 0.5, "clip_grad_norm": 0.05, "compile": compile}

    def trained(model: nn.Module, emitted: bool) -> tuple[list[Tensor], list[float]]:
        optimizers = make(model)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        step: Callable[..., Tensor]
        if emitted:
            step = program.TrainStep(model, *optimizers, **options)
        else:
            step = compile_train_step(model, optimizers, layout=LAYOUT, **options)
        losses = [float(step(batch(i, torch.float64))) for i in range(STEPS)]
        return [whole(p) for p in model.parameters()], losses

    expected, losses = trained(Model().double(), False)
    for emitted in (False, True):
        found, ours = trained(shard(Model().double()), emitted)
        assert ours == pytest.approx(losses, rel=1e-12)
        for weight, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(weight, theirs, rtol=0.0, atol=1e-11)


class Messages(TorchDispatchMode):
    """Counts what is sent to other ranks: each collective op and the bytes of its tensors here."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it sends messages by ops on what is here
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.name():
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.sent[func.name(), sum(t.numel() * t.element_size() for t in tensors)] += 1
        return func(*args, **(kwargs or {}))


def a_step_sends_one_message(shard: Callable[[Model], nn.Module], make: Callable[[nn.Module], Any] = adamw) -> None:
    """All ranks add up the norms of all heads at once: one all_reduce, of four bytes a norm, however weights are cut.

    Nothing else is sent that steps without QuacK do not send: by hooks, by compiled steps, by the emitted file.
    """
    norms = 4 * 2 * 2 * HEADS  # bytes; of queries and keys, in two layers

    def messages(layout: QKLayout, taker: str) -> Counter[tuple[str, int]]:
        model = shard(Model())
        optimizers = make(model)
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        options: Any = {"loss_fn": loss_of, "clip_grad_norm": 1.0, "compile": False}
        step: Callable[..., Any]
        if taker == "hooks":
            step = lambda x: train(model, optimizers[0], range(1))  # noqa: E731
            if layout.sites:
                QuacK(optimizers[0], model, layout)
        elif taker == "emitted" and layout.sites:
            text = convert(model, layout=layout, sharded=True, optimizer="adamw" if make is adamw else "muon")
            step = execute(text).TrainStep(model, *optimizers, **options)
        else:
            step = compile_train_step(model, optimizers, layout=layout, **options)
        with Messages() as messages:
            for i in range(2):
                step(batch(i, torch.float32))
        return messages.sent

    for taker in ("hooks", "step", "emitted") if make is adamw else ("step", "emitted"):
        plain, ours = messages(QKLayout(), taker), messages(LAYOUT, taker)
        assert ours - plain == {("c10d::allreduce_", norms): 2} and plain <= ours, (taker, plain, ours)


def mesh(*shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def fsdp(model: Model, device_mesh: DeviceMesh | None = None) -> nn.Module:
    device_mesh = device_mesh or mesh(dist.get_world_size())
    for layer in model.layers:
        fully_shard(layer, mesh=device_mesh)
    return fully_shard(model, mesh=device_mesh)


def hybrid(model: Model) -> nn.Module:
    """Replicated over one dimension of the mesh and sharded over the other."""
    return fsdp(model, mesh(2, dist.get_world_size() // 2, names=("replicate", "shard")))


def one_layer_sharded(model: Model) -> nn.Module:
    """The other layer's parameters stay plain tensors."""
    fully_shard(model.layers[0], mesh=mesh(2))
    return model


def tensor_parallel(model: Model, device_mesh: DeviceMesh | None = None) -> nn.Module:
    """Queries cut by rows in the first layer, and in the second by input features: pieces of rows."""
    device_mesh = device_mesh or mesh(2)
    parallelize_module(model.layers[0], device_mesh, {"q": ColwiseParallel(output_layouts=Replicate())})
    parallelize_module(model.layers[1], device_mesh, {"q": RowwiseParallel(input_layouts=Replicate())})
    return model


def fsdp_over_tensor_parallel(model: Model) -> nn.Module:
    both = mesh(2, 2, names=("dp", "tp"))
    tensor_parallel(model, both["tp"])
    return fsdp(model, both["dp"])


def data_parallel(model: Model) -> nn.Module:
    return DistributedDataParallel(model)


def rows_are_where_the_tensors_say() -> None:
    """`held` against tensors whose rows hold their own numbers, for every way of cutting."""
    line, square = mesh(dist.get_world_size()), mesh(2, dist.get_world_size() // 2)
    ways: list[tuple[DeviceMesh, Sequence[Any]]] = [(line, [p]) for p in (Shard(0), Shard(1), Replicate())]
    ways += [(square, [p, q]) for p in (Shard(0), Shard(1), Replicate()) for q in (Shard(0), Shard(1), Replicate())]
    for n in (1, 2, 3, 7, 15, 16):
        for axis in (0, 1):
            numbers = torch.arange(n).view(-1, 1).expand(n, 4)
            for device_mesh, placements in ways:
                check_rows(distribute_tensor(numbers.movedim(0, axis).contiguous(), device_mesh, placements), axis)


def check_rows(tensor: Tensor, axis: int) -> None:
    """The numbers of the rows that are here, by the tensor itself and by `held`."""
    rows = local(tensor.detach()).movedim(axis, 0)
    assert len(rows) == len(held(tensor, axis))
    if rows.numel():
        assert rows[:, 0].tolist() == held(tensor, axis).tolist()


def strided_rows_are_where_the_tensors_say() -> None:
    """Rows that FSDP2 cuts over tensor parallelism are not split from left to right."""
    for n in (7, 8, 15):
        model = nn.Sequential(nn.Linear(4, n, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.arange(n).view(-1, 1).expand(n, 4))
        both = mesh(2, 2, names=("dp", "tp"))
        parallelize_module(model, both["tp"], {"0": ColwiseParallel()})
        fully_shard(model, mesh=both["dp"])
        check_rows(model[0].weight, 0)


def norms_are_those_of_the_whole() -> None:
    """And bit for bit the same on every rank."""

    def norms(model: nn.Module) -> list[Tensor]:
        scaling = scaling_of(model, LAYOUT, 1.0, "frobenius", [adamw(model)])
        return [factor for kind in scaling.factors() for factor in kind]

    expected = norms(Model())
    for shard in (fsdp, hybrid, one_layer_sharded, tensor_parallel, data_parallel):
        found = norms(shard(Model()))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, [norm.tolist() for norm in found])
        assert all(other == everywhere[0] for other in everywhere)


def a_resumed_run_is_the_uninterrupted_one() -> None:
    """Through torch.distributed.checkpoint, sharded or gathered whole; bit for bit."""
    for full, flat in ((False, False), (False, True), (True, False)):  # torch itself cannot load both
        options = StateDictOptions(full_state_dict=full, flatten_optimizer_state_dict=flat)
        model = fsdp(Model())
        optimizer = adamw(model)
        QuacK(optimizer, model, LAYOUT, tau=0.5)
        train(model, optimizer, steps=range(3))
        weights = {name: whole(p).clone() for name, p in model.named_parameters()}
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        train(model, optimizer, steps=range(3, 6))

        other = fsdp(Model())
        theirs = adamw(other)
        QuacK(theirs, other, LAYOUT, tau=0.5)
        train(other, theirs, steps=range(20, 21))
        with torch.no_grad():
            for name, p in other.named_parameters():
                p.copy_(distribute_tensor(weights[name], p.device_mesh, p.placements))
        set_optimizer_state_dict(other, theirs, state, options=options)
        train(other, theirs, steps=range(3, 6))
        for ours, again in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(whole(ours), whole(again))


def what_has_no_rows_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"FSDP1.*fully_shard"):
        check_layout(LAYOUT, FullyShardedDataParallel(Model(), device_id=torch.device("cpu")))
    model = Model()
    model.layers[0].k = nn.Parameter(DTensor.from_local(model.layers[0].k.detach(), mesh(2), [Partial()]))
    with pytest.raises(FactorError, match=r"placed as .*; it can be sharded or replicated"):
        QuacK(adamw(model), model, LAYOUT)


CASES: dict[int, dict[str, Callable[[], None]]] = {
    2: {
        "FSDP2, heads cut": lambda: equal_to_one_process(fsdp),
        "FSDP2 with replicas": lambda: equal_to_one_process(hybrid),
        "FSDP2 on one layer": lambda: equal_to_one_process(one_layer_sharded),
        "FSDP2, spectral norm": lambda: equal_to_one_process(fsdp, norm="spectral"),
        "tensor parallel": lambda: equal_to_one_process(tensor_parallel),
        "steps, FSDP2": lambda: steps_equal_one_process(fsdp),
        "steps, FSDP2 with replicas": lambda: steps_equal_one_process(hybrid),
        "steps, FSDP2 on one layer": lambda: steps_equal_one_process(one_layer_sharded),
        "steps, tensor parallel": lambda: steps_equal_one_process(tensor_parallel),
        "steps, DistributedDataParallel": lambda: steps_equal_one_process(data_parallel),
        "DistributedDataParallel": lambda: equal_to_one_process(data_parallel),
        "steps, compiled, FSDP2": lambda: steps_equal_one_process(fsdp, compile=True),
        "steps, Muon and AdamW, FSDP2": lambda: steps_equal_one_process(fsdp, muon_and_adamw),
        "messages, FSDP2": lambda: a_step_sends_one_message(fsdp),
        "messages, FSDP2 with replicas": lambda: a_step_sends_one_message(hybrid),
        "messages, tensor parallel": lambda: a_step_sends_one_message(tensor_parallel),
        "messages, Muon and AdamW": lambda: a_step_sends_one_message(fsdp, muon_and_adamw),
        "rows": rows_are_where_the_tensors_say,
        "norms": norms_are_those_of_the_whole,
        "resume": a_resumed_run_is_the_uninterrupted_one,
        "refused": what_has_no_rows_is_refused,
    },
    4: {
        "steps, FSDP2 over tensor parallel": lambda: steps_equal_one_process(fsdp_over_tensor_parallel),
        "FSDP2 over tensor parallel": lambda: equal_to_one_process(fsdp_over_tensor_parallel),
        "FSDP2 with replicas": lambda: equal_to_one_process(hybrid),
        "steps, Muon and AdamW": lambda: steps_equal_one_process(fsdp_over_tensor_parallel, muon_and_adamw),
        # Two meshes: of the weights that are cut once, and of those that are cut twice.
        "messages": lambda: a_step_sends_one_message(fsdp_over_tensor_parallel),
        "strided rows": strided_rows_are_where_the_tensors_say,
        "rows": rows_are_where_the_tensors_say,
    },
}


def run_cases(rank: int, world: int, folder: str, cases: Callable[[int], dict[str, Callable[[], None]]]) -> None:
    """One process: all cases in turn, the traceback of each that fails in a file; a crash, or a hang, prints its stack.

    The process ends without the teardown of gloo and of the interpreter: gloo's threads may still hold works with
    Python objects in them then, and letting go of those in a dying interpreter crashes once in a great while.
    """
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for name, case in cases(world).items():
        faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            case()
        except Exception:
            Path(folder, f"{name} on rank {rank}").write_text(traceback.format_exc())
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


HANGS = 180
"""Seconds after which a case hangs."""


def run_in_processes(world: int, folder: Path, cases: Callable[[int], dict[str, Callable[[], None]]]) -> None:
    """Run cases in several processes, each case in all of them at once."""
    mp.spawn(run_cases, args=(world, str(folder), cases), nprocs=world)
    failures = {file.name: file.read_text() for file in folder.glob("* on rank *")}
    assert not failures, "\n\n".join(f"{name}:\n{text}" for name, text in failures.items())


def cases_of(world: int) -> dict[str, Callable[[], None]]:
    return CASES[world]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_are_one(world: int, tmp_path: Path) -> None:
    run_in_processes(world, tmp_path, cases_of)
