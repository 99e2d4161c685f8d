"""A sharded run that is killed many times ends bitwise identical to an uninterrupted one.

    python -m benchmarks.kills --rounds 100 --markdown benchmarks/results/kills.md

In: the number of kills. Two ranks train a small MLA model with FSDP2, AdamW and QuacK's hooks, and save a checkpoint
with torch.distributed.checkpoint every few steps. In each round, SIGKILL ends one of them at a random moment or while
it saves; the other is killed as launchers do, and both resume from the last complete checkpoint. Out: a page that
shows in which phases the kills fell and how many numbers differ from a run without kills or checkpoints. A digest of
all tensors is compared for every step of every rank; at the end the tensors themselves are compared, bit for bit.

A checkpoint is complete once it has its `.metadata`, which torch.distributed.checkpoint writes last and renames.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, MutableSequence
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from quack_fx import QKLayout, QuacK, find_qk_pairs

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from mla import MLAConfig, MLATransformer

WORLD = 2
EVERY = 10
"""Steps between checkpoints."""

PHASES = ("starting", "loading a checkpoint", "training", "saving a checkpoint")
"""Phases of a rank. Shared memory holds the phase index of every rank, then the number of steps of every rank."""

PATIENCE = 600.0
"""Seconds to wait for the end of a run or a moment to kill; after that, an error is raised."""


def small() -> MLATransformer:
    """The model; with 5 heads and odd widths, shards are unequal and heads are split between ranks."""
    torch.manual_seed(0)
    sizes = MLAConfig(32, 16, 2, 20, 24, heads=5, q_latent=14, kv_latent=10, nope_width=6, rope_width=4, value_width=4)
    return MLATransformer(sizes)


class Run:
    """The training state of one rank."""

    def __init__(self, layout: QKLayout) -> None:
        self.model = small()
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.quack = QuacK(self.optimizer, self.model, layout, tau=0.5)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: (1 + step) ** -0.25)
        self.step = 0

    def train(self) -> None:
        """Take one step, on a batch that depends only on the step and the rank."""
        seed = torch.Generator().manual_seed(self.step * dist.get_world_size() + dist.get_rank())
        start, stride = torch.randint(32, (2, 4, 1), generator=seed)
        tokens = (start + stride * torch.arange(13)) % 32
        loss = self.model(tokens[:, :-1], tokens[:, 1:])[1]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """The contents of a checkpoint."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the contents of a checkpoint."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step = state["step"]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of this rank: its shards of weights and optimizer state, initial factors included."""
        found = {}
        for name, param in self.model.named_parameters():
            found[name] = param.detach()
            found |= {f"{name} {key}": value for key, value in self.optimizer.state[param].items()}
        return {
            name: value.to_local() if isinstance(value, DTensor) else torch.as_tensor(value)
            for name, value in found.items()
        } | {"lr": torch.tensor(self.optimizer.param_groups[0]["lr"], dtype=torch.float64)}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of all bits of some tensors."""
    found = blake2b(digest_size=16)
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def last_whole(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    whole = [file.parent for file in folder.glob("step-*/.metadata")]
    return max(whole, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def rank_main(
    rank: int, store: str, folder: Path, layout: QKLayout, until: int | None, phases: MutableSequence[int]
) -> None:
    """One life of one rank: from the last complete checkpoint to step `until`, or until it is killed.

    Writes a line for each step, and the tensors at the end; writes checkpoints only if `until` is None.
    """
    said = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, sys.stderr.fileno())  # the surviving rank reports here that the other is gone
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    run = Run(layout)
    if checkpoint := last_whole(folder):
        phases[rank] = PHASES.index("loading a checkpoint")
        dcp.load({"run": run}, checkpoint_id=checkpoint)
    phases[rank] = PHASES.index("training")
    with (folder / f"steps-{rank}").open("a") as lines:
        while until is None or run.step < until:
            run.train()
            phases[WORLD + rank] += 1
            lines.write(f"\n{run.step} {digest(run.tensors())} .")  # a line cut off by a kill lacks the period
            lines.flush()
            if until is None and run.step % EVERY == 0:
                phases[rank] = PHASES.index("saving a checkpoint")
                dcp.save({"run": run}, checkpoint_id=folder / f"step-{run.step}")
                phases[rank] = PHASES.index("training")
    torch.save({name: tensor.clone() for name, tensor in run.tensors().items()}, folder / f"end-{rank}.pt")
    sys.stdout.flush()
    os._exit(0)  # skip the teardown of gloo: its threads may still hold Work objects with Python references


@dataclass
class Life:
    """One life of the run: two ranks, from their start to their end."""

    folder: Path
    ranks: list[BaseProcess]
    phases: MutableSequence[int]

    @classmethod
    def begin(cls, context: Any, folder: Path, layout: QKLayout, until: int | None = None) -> Life:
        """Start both ranks."""
        phases = context.Array("i", 2 * WORLD, lock=False)
        store = str(folder / f"store-{len([*folder.glob('store-*')])}")
        ranks = [
            context.Process(target=rank_main, args=(rank, store, folder, layout, until, phases), daemon=True)
            for rank in range(WORLD)
        ]
        for rank in ranks:
            rank.start()
        return cls(folder, ranks, phases)

    def finish(self) -> None:
        """Wait for both ranks.

        Raises:
            RuntimeError: A rank failed or takes too long.
        """
        end = time.monotonic() + PATIENCE
        while any(rank.exitcode is None for rank in self.ranks):
            self._check(end, ended=(None, 0))
            time.sleep(0.01)
        self._check(end, ended=(0,))

    def end(self) -> None:
        """Kill all ranks that still run."""
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def kill(self, dice: random.Random, while_saving: bool) -> str:
        """Kill one rank, then the other; returns the phase of the first.

        Raises:
            RuntimeError: A rank ended by itself, or does not reach the phase in which it should be killed.
        """
        victim = dice.randrange(WORLD)
        saving, end = PHASES.index("saving a checkpoint"), time.monotonic() + PATIENCE
        if while_saving:
            for _ in range(dice.randint(1, 2)):  # the first checkpoint of this life, or the second
                for inside in (True, False, True):
                    while (self.phases[victim] == saving) != inside:
                        self._check(end)
                        time.sleep(0.0005)
            time.sleep(dice.uniform(0, 0.03))
        elif dice.random() < 0.2:
            time.sleep(dice.uniform(0, 2))
        else:
            steps = dice.randrange(3 * EVERY)
            while self.phases[WORLD + victim] < steps:
                self._check(end)
                time.sleep(0.0005)
            time.sleep(dice.uniform(0, 0.03))
        self._check(end)
        phase = PHASES[self.phases[victim]]
        os.kill(self.ranks[victim].pid or 0, signal.SIGKILL)
        time.sleep(dice.uniform(0, 0.1))  # the other rank continues for this long
        self.end()
        return phase

    def _check(self, end: float, ended: tuple[int | None, ...] = (None,)) -> None:
        """Raise with the output of the ranks if one ended unexpectedly or the time is over."""
        codes = [rank.exitcode for rank in self.ranks]
        if time.monotonic() > end or any(code not in ended for code in codes):
            self.end()
            said = "\n".join((self.folder / f"said-{rank}").read_text() for rank in range(WORLD))
            raise RuntimeError(
                f"{[PHASES[p] for p in self.phases[:WORLD]]}, exit codes {codes}, and nobody killed:\n{said}"
            )


def steps_of(folder: Path, rank: int) -> Iterator[tuple[int, str]]:
    """The steps of a rank in all its lives, each with the digest of its tensors."""
    for line in (folder / f"steps-{rank}").read_text().splitlines():
        words = line.split()
        if len(words) == 3:
            yield int(words[0]), words[1]


@dataclass
class Outcome:
    """Result of a run with kills.

    Attributes:
        phases: Number of kills in each phase.
        cut: Number of rounds that left an incomplete checkpoint.
        resumed: Number of rounds after which the run resumed from a checkpoint.
        steps: Steps of the run.
        taken: Number of digests compared: steps of all ranks in all lives.
        other_steps: How many of those differ from the run without kills.
        tensors: Number of tensors compared at the end, on all ranks.
        other_tensors: How many of those differ.
        seconds: Duration of the experiment.
    """

    phases: Counter[str]
    cut: int
    resumed: int
    steps: int
    taken: int
    other_steps: int
    tensors: int
    other_tensors: int
    seconds: float


def kills(rounds: int, folder: Path, seed: int = 0) -> Outcome:
    """Kill a run repeatedly, let it finish, and compare it with an undisturbed run.

    Arguments:
        rounds: Number of kills; every second one while a checkpoint is written.
        folder: Empty folder for the checkpoints.
        seed: Seed of the moments of the kills.
    """
    begun = time.monotonic()
    context: Any = mp.get_context("forkserver")  # forks of a process with these imports start quickly
    context.set_forkserver_preload(["torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "quack_fx"])
    layout, dice = find_qk_pairs(small(), torch.zeros(1, 12, dtype=torch.int64)), random.Random(seed)
    killed, whole = folder / "killed", folder / "whole"
    killed.mkdir()
    whole.mkdir()
    phases, cut, resumed = Counter[str](), 0, 0
    for i in range(rounds):
        before = last_whole(killed)
        phase = Life.begin(context, killed, layout).kill(dice, while_saving=i % 2 == 1)
        phases[phase] += 1
        resumed += before is not None
        halves = [path.name for path in killed.glob("step-*") if not (path / ".metadata").exists()]
        cut += bool(halves)
        at = last_whole(killed)
        tell(f"round {i + 1} of {rounds}: killed {phase}; last whole: {at and at.name}; cut: {', '.join(halves)}")
    last = last_whole(killed)
    steps = EVERY + int(last.name.removeprefix("step-") if last else 0)
    for run in (killed, whole):
        Life.begin(context, run, layout, until=steps).finish()
    taken = other_steps = tensors = other_tensors = 0
    for rank in range(WORLD):
        expected = dict(steps_of(whole, rank))
        for step, found in steps_of(killed, rank):
            taken += 1
            other_steps += found != expected.get(step)
        ours, theirs = (torch.load(run / f"end-{rank}.pt", weights_only=True) for run in (killed, whole))
        tensors += len(theirs)
        other_tensors += sum(not same_bits(ours[name], theirs[name]) for name in theirs)
        other_tensors += len(ours.keys() ^ theirs.keys())
    seconds = time.monotonic() - begun
    return Outcome(phases, cut, resumed, steps, taken, other_steps, tensors, other_tensors, seconds)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are bitwise identical."""
    return digest({"": one}) == digest({"": other})


def tell(text: str) -> None:
    """Report progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def page(found: Outcome, command: str) -> str:
    """The page of results."""
    rounds = sum(found.phases.values())
    fell = "\n".join(f"| {phase} | {found.phases[phase]} |" for phase in PHASES)
    return f"""# {rounds} kills of a sharded run

`{command}`

torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, CPU, gloo; {found.seconds:.0f} s.
Two ranks train a small MLA model with FSDP2 (5 heads, odd widths), AdamW, a schedule and QuacK by hooks; every {EVERY}
steps they save a checkpoint of torch.distributed.checkpoint. Each round SIGKILL hits one of them and then the other,
and both start again from the last whole checkpoint.

| the killed rank was | rounds |
|---|---|
{fell}

- A checkpoint that was not whole lay there after {found.cut} rounds; a life began at a checkpoint in {found.resumed}.
- Steps of the run: {found.steps}. Taken by both ranks in all lives: {found.taken}; after each a digest of all tensors
  of the rank (weights, moments, counters, initial factors, learning rate) is compared with the run without kills and
  without checkpoints: {found.other_steps} differ.
- Tensors compared at the end, bit for bit, on both ranks: {found.tensors}; {found.other_tensors} differ.
"""


def main() -> int:
    """Kill, compare, and print the page; returns 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="how many kills")
    parser.add_argument("--seed", type=int, default=0, help="of their moments")
    parser.add_argument("--markdown", type=Path, help="write the page to this file as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills") as folder:
        found = kills(options.rounds, Path(folder), options.seed)
    text = page(found, " ".join(["python -m benchmarks.kills", *sys.argv[1:]]))
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    return int(found.other_steps + found.other_tensors > 0)


if __name__ == "__main__":
    sys.exit(main())
