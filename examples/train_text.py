"""Train a byte-level model with the file that `quack-fx convert` wrote for it, on text that is on every machine.

In: the emitted file, and the model that it was made from. Out: a falling loss, and the changing learning-rate scales of
the heads. The text is Python's own standard library, read as bytes.

    quack-fx convert examples/mla.py -o train_mla.py
    python examples/train_text.py train_mla.py --model examples/mla.py:MLATransformer

This script and the emitted file need only torch and the standard library.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
import sysconfig
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

CORPUS_BYTES = 4_000_000


def main() -> None:
    """Read the command line, train, and print a summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("emitted", type=Path, help="file that `quack-fx convert` wrote")
    parser.add_argument("--model", required=True, metavar="FILE:CLASS", help="model that it was written for")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args.model).to(device)
    emitted = load(args.emitted)
    train_text, held_text = corpus(CORPUS_BYTES)
    batches = crops(train_text, args.batch, args.context, args.seed)
    check = list(islice(crops(held_text, args.batch, args.context, args.seed), 8))

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    train_step = emitted.TrainStep(model, optimizer)

    def held_out() -> float:
        with torch.no_grad():
            return sum(float(model(idx.to(device), targets.to(device))[1]) for idx, targets in check) / len(check)

    count = sum(p.numel() for p in model.parameters())
    print(f"{args.model}: {count / 1e6:.2f}M parameters, {len(train_text) / 1e6:.1f} MB of Python source, {device}")
    before = held_out()
    losses, started = [], time.perf_counter()
    for step in range(1, args.steps + 1):
        idx, targets = next(batches)
        loss = float(train_step(idx.to(device), targets.to(device)))
        schedule.step()
        if step == 1:
            compiled, started = time.perf_counter() - started, time.perf_counter()
        losses.append(loss)
        low, high = scale_range(train_step.quack)
        line = f"step {step:>4}/{args.steps}   loss {loss:6.3f}   head scales {low:.3f} to {high:.3f}"
        progress(line, last=step == args.steps, keep=step == 1 or step % 10 == 0)
    low, high = scale_range(train_step.quack)
    print(f"loss          {losses[0]:.3f} -> {losses[-1]:.3f}   (held out: {before:.3f} -> {held_out():.3f})")
    print(f"head scales   1.000 -> {low:.3f} to {high:.3f}   (learning rate of a head's rows, relative to its start)")
    rate = (args.steps - 1) * args.batch * args.context / (time.perf_counter() - started) if args.steps > 1 else 0.0
    print(f"speed         {rate:,.0f} bytes/s after {compiled:.0f} s of compiling")


def scale_range(quack: Any) -> tuple[float, float]:
    """Smallest and largest scale over all query and key heads; `tau` is 1 here."""
    pairs = zip(quack.factors(), quack.first, strict=True)
    scales = torch.cat([(now / first).flatten() for pair in pairs for now, first in zip(*pair, strict=True)])
    return float(scales.min()), float(scales.max())


def corpus(size: int) -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's sources: about `size` for training, and a tenth of that from held-out files."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not files:
        raise SystemExit("this Python comes without the sources of its standard library")
    # Every tenth file is held out, so that both parts are similar.
    parts = [[f for n, f in enumerate(files) if (n % 10 == 0) == held_out] for held_out in (False, True)]
    train, check = (b"\n".join(f.read_bytes() for f in part) for part in parts)
    return as_tensor(train[:size]), as_tensor(check[: size // 10])


def as_tensor(text: bytes) -> Tensor:
    """Text as a tensor of bytes."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def crops(text: Tensor, batch: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random crops: bytes and next bytes, both [batch, context]."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
        window = text[starts + torch.arange(context + 1)].long()
        yield window[:, :-1], window[:, 1:]


def build(target: str) -> nn.Module:
    """Model from FILE:CLASS, built with the defaults of its config class, if it takes one."""
    path, _, name = target.rpartition(":")
    if not path:
        raise SystemExit(f"--model {target}: write FILE:CLASS, for example examples/mla.py:MLATransformer")
    cls = getattr(load(Path(path)), name)
    hints = get_type_hints(cls.__init__)
    needed = [p for p in list(inspect.signature(cls.__init__).parameters.values())[1:] if p.default is p.empty]
    model: nn.Module = cls(*(hints[p.name]() for p in needed))
    return model


def load(path: Path) -> ModuleType:
    """Module from a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"no such Python file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def progress(line: str, *, last: bool, keep: bool) -> None:
    """Write progress to stderr: one line that is updated in a terminal; elsewhere, only the lines to keep."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if last else ""))
    elif keep or last:
        sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
