"""Training on several ranks compared with one process: every way to shard, attention, step and optimizer.

    python -m benchmarks.sharded --markdown benchmarks/results/sharded.md

Each cell trains a small model for 50 steps on several ranks (gloo), each with its part of the batch, and the same model
in one process. Out: the largest difference of a parameter at the end, relative to its norm, and that of the factors.

Ranks add numbers up in another order than one process, and Muon, which rounds to bfloat16, amplifies such differences.
Two baselines tell how much of a difference is rounding: one process against itself after the last digits of the initial
weights were changed, and torch's Muon without QuacK on the same ranks. A difference of that size counts as rounding.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Muon, Optimizer

from benchmarks.attentions import EVEN, KINDS, ODD, Model, Sizes, tensor_parallel_plan
from quack_fx import QKLayout, QuacK, compile_train_step, convert, find_qk_pairs
from quack_fx.errors import FactorError, LayoutError, OptimizerError, first_line
from quack_fx.train.program.scaling import execute

STEPS = 50
TAU = 0.5
HANGS = 300
"""Seconds after which a cell counts as hanging."""

LIMIT, FACTOR_LIMIT = 1e-5, 1e-6
"""Maximum relative differences of weights and factors in fp32."""

DOUBLE_LIMIT = 1e-11
"""Maximum relative difference in fp64."""

ROUNDING = 4
"""A difference up to this many times the effect of rounding in one process counts as rounding."""


# ---- ways to shard -------------------------------------------------------------------------------------------------

Sharded = tuple[nn.Module, int, int]
"""A sharded model, the index of this rank's part of the batch, and the number of parts."""


def data_parallel(model: Model) -> Sharded:
    """DistributedDataParallel."""
    return DistributedDataParallel(model), dist.get_rank(), dist.get_world_size()


def fsdp(model: Model, mesh: DeviceMesh | None = None) -> Sharded:
    """FSDP2 over all ranks, or over those of a mesh."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh), dist.get_rank(), dist.get_world_size()


def hybrid(model: Model) -> Sharded:
    """FSDP2 over one dimension of a mesh, replicated over the other."""
    return fsdp(model, init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copies", "shards")))


def tensor_parallel(model: Model, mesh: DeviceMesh | None = None) -> Sharded:
    """Tensor parallel over all ranks, or over those of a mesh."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        parallelize_module(layer, mesh, tensor_parallel_plan(layer))
    return model, 0, 1


def fsdp_over_tensor_parallel(model: Model) -> Sharded:
    """FSDP2 over one dimension of a mesh, tensor parallel over the other."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    tensor_parallel(model, mesh["tensor"])
    return fsdp(model, mesh["data"])[0], mesh["data"].get_local_rank(), mesh["data"].size()


WAYS: dict[str, Callable[[Model], Sharded]] = {
    "DDP": data_parallel,
    "FSDP2 even": fsdp,
    "FSDP2 odd": fsdp,
    "HSDP odd": hybrid,
    "TP": tensor_parallel,
    "FSDP2 x TP": fsdp_over_tensor_parallel,
}
"""Ways to shard, by name; "odd" means sizes that are not divisible by the number of ranks."""

TAKERS = ("hooks", "step", "emitted", "compiled")
"""Implementations of the step: the optimizer with QuacK's hooks, `compile_train_step` run eagerly, the emitted file,
`compile_train_step` compiled."""


COMPILED = {
    (2, "DDP"): ("GQA",),
    (2, "FSDP2 odd"): ("GQA", "MLA"),
    (2, "TP"): ("GQA", "MLA"),
    (4, "FSDP2 x TP"): ("GQA",),
}
"""The attentions to test compiled, by ranks and way; the source is that of "step", and each takes a minute."""


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        world: Number of ranks.
        way: One of `WAYS`.
        attention: One of the kinds of `benchmarks.attentions`.
        taker: One of `TAKERS`.
        optimizer: "AdamW", or "Muon" (for matrices, with AdamW for the rest).
        double: Whether to train in fp64.
    """

    world: int
    way: str
    attention: str
    taker: str
    optimizer: str
    double: bool = False

    def __str__(self) -> str:
        precision = " in fp64" if self.double else ""
        return f"{self.world} ranks, {self.way}, {self.attention}, {self.taker}, {self.optimizer}{precision}"


@dataclass(frozen=True)
class Verdict:
    """Result of a cell.

    Attributes:
        off: Relative difference of the weights from those of one process.
        factors_off: Relative difference of the factors.
        rounding: If these are above the limits, the difference of a single-process run when the last digits of its
            initial weights are changed, or the difference of torch's Muon without QuacK if that is larger.
        refused: The error message of a refusal.
        failed: A traceback.
    """

    off: float = 0.0
    factors_off: float = 0.0
    rounding: float = 0.0
    refused: str = ""
    failed: str = ""

    def outcome(self, cell: Cell) -> str:
        """The result in one word: "equal", "rounding" (no larger than the effect of rounding), "refused" or "wrong"."""
        if self.refused:
            return "refused"
        limit, factors = (DOUBLE_LIMIT, DOUBLE_LIMIT) if cell.double else (LIMIT, FACTOR_LIMIT)
        if not self.failed and self.off <= limit and self.factors_off <= factors:
            return "equal"
        far = ROUNDING * self.rounding
        return "rounding" if not self.failed and self.off <= far and self.factors_off <= far else "wrong"


def cells(world: int) -> Iterator[Cell]:
    """All cells for a number of ranks, 2 or 4."""
    ways = [way for way in WAYS if world == 4 or way not in ("HSDP odd", "FSDP2 x TP")]
    for way, attention, taker in itertools.product(ways, KINDS, TAKERS):
        if taker == "compiled" and attention not in COMPILED.get((world, way), ()):
            continue
        yield Cell(world, way, attention, taker, "AdamW")
        # With hooks, torch's Muon takes minutes on four ranks, because it multiplies sharded matrices.
        if (world, taker) != (4, "hooks") or (way, attention) == ("FSDP2 odd", "GQA"):
            yield Cell(world, way, attention, taker, "Muon", double=True)
        if (world, taker) in ((2, "hooks"), (2, "step")):
            yield Cell(world, way, attention, taker, "Muon")


# ---- one cell ------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell) -> Verdict | None:
    """Train a cell on all ranks; rank 0 returns the verdict.

    Raises:
        Exception: Any error of training, raised on every rank; an error on one rank only makes the others hang.
    """
    sizes = ODD if "odd" in cell.way or (cell.way == "DDP" and cell.world == 2) else EVEN
    dtype = torch.float64 if cell.double else torch.float32
    sharded, part, parts = WAYS[cell.way](Model(cell.attention, sizes).to(dtype))
    weights, scales = train(cell, sharded, lambda x: x.chunk(parts)[part])
    everywhere: list[Any] = [None] * cell.world
    dist.all_gather_object(everywhere, scales.tolist())
    if any(other != everywhere[0] for other in everywhere):
        raise AssertionError("ranks have other factors than each other")  # replicas would diverge
    plain = list[Tensor]()
    if (cell.taker, cell.optimizer) == ("hooks", "Muon"):
        sharded, part, parts = WAYS[cell.way](Model(cell.attention, sizes).to(dtype))
        plain, _ = train(replace(cell, taker="nobody"), sharded, lambda x: x.chunk(parts)[part])
    if dist.get_rank() != 0:
        return None
    run = (cell.attention, sizes, cell.taker, cell.optimizer, dtype)
    expected, theirs = alone(*run)
    verdict = Verdict(distance(weights, expected), float(((scales - theirs) / theirs).abs().max()))
    if verdict.outcome(cell) == "equal":
        return verdict
    rounding = [distance(alone(*run, nudged=True)[0], expected)]
    if plain:
        rounding.append(distance(plain, alone(cell.attention, sizes, "nobody", cell.optimizer, dtype)[0]))
    return replace(verdict, rounding=max(rounding))


def train(cell: Cell, model: nn.Module, part_of: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], Tensor]:
    """Train for some steps; returns the full weights and the scale of every head at the end.

    Arguments:
        cell: What is trained; the taker "nobody" has no QuacK.
        model: The model, sharded or not.
        part_of: Returns this rank's part of a batch.
    """
    dtype, width = next(model.parameters()).dtype, getattr(model, "module", model).head.in_features
    layout = layout_of(cell.attention, ODD if width == ODD.width else EVEN)
    optimizers = optimizers_of(cell.optimizer, model)
    step, scaling = taker_of(cell, model, layout, optimizers)
    for i in range(STEPS):
        x = torch.randn(4, 6, width, generator=torch.Generator().manual_seed(i))
        with sdpa_kernel(SDPBackend.MATH):
            step(part_of(x.to(dtype)))
    pairs = zip(scaling.factors(), scaling.first, strict=True) if scaling else ()
    scales = [(now / first).flatten() for kind in pairs for now, first in zip(*kind, strict=True)]
    return [whole(p) for p in model.parameters()], torch.cat(scales) if scales else torch.empty(0)


def optimizers_of(name: str, model: nn.Module) -> list[Optimizer]:
    """New optimizers for a model."""
    if name == "AdamW":
        return [AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, foreach=False)]  # foreach needs a single mesh
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [Muon(matrices, lr=3e-3, weight_decay=0.1), AdamW(others, lr=3e-3, foreach=False)]


def taker_of(
    cell: Cell, model: nn.Module, layout: QKLayout, optimizers: Sequence[Optimizer]
) -> tuple[Callable[[Tensor], Any], Any]:
    """A function that takes a step on a batch, and the object with its scales."""
    if cell.taker == "emitted":
        shards = any(isinstance(p, DTensor) for p in model.parameters())
        text = convert(model, layout=layout, sharded=shards, optimizer="adamw" if cell.optimizer == "AdamW" else "muon")
        emitted = execute(text).TrainStep(model, *optimizers, loss_fn=loss_of, tau=TAU, compile=False)
        return emitted, emitted.quack
    if cell.taker in ("step", "compiled"):
        compiled = cell.taker == "compiled"
        step = compile_train_step(model, optimizers, loss_of, layout=layout, tau=TAU, compile=compiled)
        return step, step.quacks[0].scaling
    blocks = [block for site in layout.sites for _, block in site.blocks()]
    names = {name for block in blocks for name in (block.param, block.bias)}
    scaled = {p for name, p in model.named_parameters() if name.removeprefix("module.") in names}
    holding = [o for o in optimizers if any(p in scaled for group in o.param_groups for p in group["params"])]
    quacks = [QuacK(o, model, layout, tau=TAU) for o in holding if cell.taker != "nobody"]

    def by_hooks(x: Tensor) -> None:
        loss_of(model, x).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return by_hooks, quacks[0].scaling if quacks else None


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Mean over the batch, so that the loss of the batch is the mean of the losses of its parts."""
    return F.mse_loss(model(x), x.roll(1, -1).sin())


@cache
def layout_of(attention: str, sizes: Sizes) -> QKLayout:
    """The layout of a model."""
    return find_qk_pairs(Model(attention, sizes), torch.zeros(2, 3, sizes.width))


@cache
def alone(
    attention: str, sizes: Sizes, taker: str, optimizer: str, dtype: torch.dtype, nudged: bool = False
) -> tuple[list[Tensor], Tensor]:
    """Weights and scales at the end of a single-process run; `nudged` perturbs the last digits of initial weights."""
    model, draw = Model(attention, sizes).to(dtype), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters() if nudged else ():
            p.mul_(1 + torch.finfo(dtype).eps * torch.randint(-1, 2, p.shape, generator=draw))
    return train(Cell(1, "one process", attention, taker, optimizer), model, lambda x: x)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if this rank holds a shard."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def distance(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest distance between two tensors, relative to the norm of the second."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


# ---- all cells -----------------------------------------------------------------------------------------------------


def run_cells(rank: int, world: int, folder: str, wanted: Sequence[Cell]) -> None:
    """Run all cells on one rank. Rank 0 writes a line for each, including errors that the ranks raise.

    If a cell hangs, its stack is printed and the process ends. Gloo and the interpreter are not torn down, because
    gloo's threads may still hold Work objects that refer to Python objects.
    """
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    with Path(folder, "verdicts").open("a") as lines:
        for cell in wanted:
            faulthandler.dump_traceback_later(HANGS, exit=True)
            torch.compiler.reset()
            verdict, error = None, ""
            try:
                verdict = run_cell(cell)
            except (FactorError, LayoutError, OptimizerError) as refusal:
                verdict = Verdict(refused=str(refusal))
            except Exception as raised:
                verdict, error = Verdict(failed=first_line(raised)), traceback.format_exc()
            everywhere: list[Any] = [None] * world
            dist.all_gather_object(everywhere, (verdict and (verdict.refused or verdict.failed), error))
            if rank == 0:
                if any(said != everywhere[0][0] for said, _ in everywhere if said):
                    verdict = Verdict(failed=" / ".join(str(said) for said, _ in everywhere))
                assert verdict is not None
                lines.write(json.dumps([asdict(cell), asdict(verdict), [error for _, error in everywhere]]) + "\n")
                lines.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def verdicts(
    wanted: Sequence[Cell], tell: Callable[[str], None], known: Mapping[Cell, Verdict] | None = None
) -> dict[Cell, Verdict]:
    """The verdicts of cells, each run on as many processes as it has ranks.

    Arguments:
        wanted: The cells.
        tell: Called with a line of progress for each cell.
        known: Verdicts of cells that need not run again.

    Raises:
        Exception: A rank died or hung.
    """
    found = dict(known or {})
    missing = [cell for cell in wanted if cell not in found]
    for world in sorted({cell.world for cell in missing}):
        own = [cell for cell in missing if cell.world == world]
        with tempfile.TemporaryDirectory(prefix="sharded") as folder:
            processes = mp.spawn(run_cells, args=(world, folder, own), nprocs=world, join=False)
            file, seen, ended = Path(folder, "verdicts"), 0, False
            while not ended:
                ended = processes.join(timeout=0.2)
                lines = file.read_text().splitlines() if file.exists() else []
                for cell, line in zip(own[seen : len(lines)], lines[seen:], strict=True):
                    _, verdict, errors = json.loads(line)
                    found[cell] = Verdict(**verdict)
                    outcome = found[cell].outcome(cell)
                    said = found[cell].refused or "\n".join(dict.fromkeys(filter(None, errors)))
                    tell(f"{cell}: {outcome}, off {found[cell].off:.1e} {said}")
                seen = len(lines)
    return {cell: found[cell] for cell in wanted}


def tell(text: str) -> None:
    """Report progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def page(found: Mapping[Cell, Verdict], command: str) -> Iterator[str]:
    """The page of results, line by line; each field shows the worst of its attentions."""
    yield f"""# Several ranks against one process

`{command}`

torch {torch.__version__}, CPU, gloo. Attentions: {", ".join(KINDS)}; {STEPS} steps, each rank with its part of the
batch, fp32 unless it says fp64. Odd sizes cut heads. Each field has the largest distance of a weight from that of one
process, relative to its norm, of all attentions, and what that is:

- *equal*: weights to {LIMIT:.0e} and factors to {FACTOR_LIMIT:.0e}; in fp64 both to {DOUBLE_LIMIT:.0e};
- *rounding*: no more than {ROUNDING} times as far as one process is from itself when its first weights have other last
  digits, or as torch's Muon is off without QuacK. Muon rounds to bfloat16, and under DTensor adds up such numbers in
  another order; the steps that quack-fx writes gather a weight first, and are equal in fp64;
- *refused*, with the line; *wrong*: anything else.

Factors are the same bits on all ranks, in every cell.
"""
    count = Counter(verdict.outcome(cell) for cell, verdict in found.items())
    yield f"{len(found)} cells: {', '.join(f'{n} {outcome}' for outcome, n in count.most_common())}."
    yield ""
    columns = list(dict.fromkeys((c.optimizer + (" fp64" if c.double else ""), c.taker) for c in found))
    columns.sort(key=lambda column: (column[0], TAKERS.index(column[1])))
    yield f"| ranks | way | {' | '.join(f'{optimizer}, {taker}' for optimizer, taker in columns)} |"
    yield "|" + "---|" * (2 + len(columns))
    for world, way in dict.fromkeys((cell.world, cell.way) for cell in found):
        fields = []
        for column in columns:
            own = {
                cell: verdict
                for cell, verdict in found.items()
                if (cell.world, cell.way) == (world, way)
                and column == (cell.optimizer + (" fp64" if cell.double else ""), cell.taker)
            }
            outcomes = sorted({verdict.outcome(cell) for cell, verdict in own.items()})
            fields.append(f"{max(v.off for v in own.values()):.0e} {', '.join(outcomes)}" if own else "")
        yield f"| {world} | {way} | {' | '.join(fields)} |"
    said = {cell: verdict.refused or verdict.failed for cell, verdict in found.items()}
    yield from (f"\n- {cell}: {line}" for cell, line in said.items() if line)


def main() -> int:
    """Run all cells, or some, and print the page; returns 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words that the name of a cell has to hold, as 'TP, GQA, hooks'")
    parser.add_argument("--markdown", type=Path, help="write the page to this file as well")
    parser.add_argument("--resume", type=Path, help="file that keeps verdicts; cells that it has are not run again")
    options = parser.parse_args()
    wanted = [cell for world in (2, 4) for cell in cells(world) if options.only in str(cell)]
    kept = options.resume.read_text().splitlines() if options.resume and options.resume.exists() else []
    known = {Cell(**cell): Verdict(**verdict) for cell, verdict in map(json.loads, kept)}
    for world in (2, 4):
        known |= verdicts([cell for cell in wanted if cell.world == world], tell, known)
        if options.resume:
            lines = [json.dumps([asdict(cell), asdict(verdict)]) for cell, verdict in known.items()]
            options.resume.write_text("\n".join(lines))
    found = {cell: known[cell] for cell in wanted}
    text = "\n".join(page(found, "python -m benchmarks.sharded")) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    return int(any(verdict.outcome(cell) == "wrong" for cell, verdict in found.items()))


if __name__ == "__main__":
    sys.exit(main())
