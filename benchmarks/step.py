"""What a training step costs with and without QuacK, on the CPU of this machine.

    python -m benchmarks.step --markdown benchmarks/results/step_cpu.md

All ways to take the step (`arms.py`) run in one process and take turns. Update: the optimizer alone, clipping included.
Ratios are those within a round, as median (lower to upper quartile). Peak memory is what tensors take during a step
beyond weights and optimizer state.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.arms import MEANING, Arm, arms
from benchmarks.measure import Times, bandwidth, machine, matmul_rate, peak_bytes, take_turns, time_of
from quack_fx.find import find_qk_pairs

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from gpt import GPT, GPTConfig

BYTES_PER_WEIGHT = 4 * (1 + 4 + 3)
"""Of the update: the gradient once for clipping; weight, gradient and moments read; weight and moments written."""


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="rounds of whole steps; updates get three times as many")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--markdown", type=Path, help="write the table to this file as well")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=1024, context=128, layers=options.layers, heads=options.width // 64, width=options.width, bias=False
    )
    model = GPT(config)
    batch = tuple(torch.randint(0, 1024, (2, 4, 128)))
    layout = find_qk_pairs(model, *batch)
    table = measured(arms([*MEANING], model, layout, loss_of, lr=1e-4, clip=1.0), batch, options.rounds, config)
    text = f"# A training step on the CPU\n\n`{' '.join(['python -m benchmarks.step', *sys.argv[1:]])}`\n\n{table}"
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text)


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss that the model gives."""
    loss: Tensor = model(tokens, targets)[1]
    return loss


def measured(ways: dict[str, Arm], batch: tuple[Tensor, ...], rounds: int, config: GPTConfig) -> str:
    """All numbers, as a table."""
    first = {name: time_of(lambda arm=arm: arm.step(batch)) for name, arm in ways.items()}
    for arm in ways.values():
        arm.step(batch)
        arm.step(batch)
    peaks = {name: peak_bytes(lambda arm=arm: arm.step(batch)) for name, arm in ways.items()}
    steps = take_turns({name: lambda arm=arm: arm.step(batch) for name, arm in ways.items()}, rounds)
    updates = updates_alone(ways, batch, 3 * rounds)
    weights = sum(p.numel() for p in ways["c"].model.parameters())
    own = sum(p.numel() for n, p in ways["c"].model.named_parameters() if "qkv" in n) * 2 // 3
    tokens = batch[0].numel()
    flops = 6 * weights * tokens + 12 * config.layers * config.width * config.context * tokens
    moved, rate = bandwidth(torch.device("cpu")), matmul_rate(torch.device("cpu"), torch.float32, 1024)
    lines = [
        f"{machine()}. GPT of {weights / 1e6:.1f}M weights, {own / weights:.0%} of them queries and keys, "
        f"{tokens} tokens a step, fp32, AdamW, gradients clipped. {rounds} rounds of steps, {3 * rounds} of updates.",
        "",
        "| way | what | step, ms | step / c | update, ms | update / plain | peak, MB | first call, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in ways:
        lines.append(
            f"| {name} | {MEANING[name]} | {1e3 * steps[name].median:.1f} | {ratio(steps[name], steps['c'])} | "
            f"{1e3 * updates[name].median:.2f} | {ratio(updates[name], updates['plain'])} | {peaks[name] / 1e6:.1f} | "
            f"{first[name]:.1f} |"
        )
    best = weights * BYTES_PER_WEIGHT / moved
    lines += [
        "",
        f"- QuacK over the same step without it: update {ratio(updates['quack'], updates['plain'])}, "
        f"step {ratio(steps['quack'], steps['plain'])}, peak memory {peaks['quack'] / peaks['plain']:.3f}.",
        f"- QuacK over QK norm: step {ratio(steps['quack'], steps['e'])}.",
        f"- Limits: {BYTES_PER_WEIGHT} bytes a weight at {moved / 1e9:.1f} GB/s (a copy of 256 MiB) make an update of "
        f"{1e3 * best:.2f} ms; {flops / 1e9:.1f} Gflop at {rate / 1e9:.0f} Gflop/s (a product of 1024 x 1024 "
        f"matrices) make a forward and backward of {1e3 * flops / rate:.0f} ms. Our step with QuacK reaches "
        f"{flops / steps['quack'].median / rate:.0%} of that rate, {tokens / steps['quack'].median:.0f} tokens/s.",
        "- Nothing here was measured on a GPU.",
        "",
    ]
    return "\n".join(lines)


def updates_alone(ways: dict[str, Arm], batch: tuple[Tensor, ...], rounds: int) -> dict[str, Times]:
    """The optimizer by itself; each timed update follows one of its own kind, and finds what that left behind."""
    kept: dict[str, list[Tensor]] = {}
    for name, arm in ways.items():
        arm.forward(batch)
        kept[name] = [p.grad.clone() for p in arm.model.parameters()]

    def update(name: str) -> None:
        for parameter, gradient in zip(ways[name].model.parameters(), kept[name], strict=True):
            parameter.grad = gradient
        ways[name].update()

    return take_turns({name: partial(update, name) for name in ways}, rounds, warm=True)


def ratio(one: Times, other: Times) -> str:
    """Median and quartiles."""
    low, middle, high = one.over(other)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
