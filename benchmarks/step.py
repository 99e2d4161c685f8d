"""What a training step costs with and without QuacK, on the CPU of this machine.

    python -m benchmarks.step --markdown benchmarks/results/step_cpu.md
    python -m benchmarks.step --ways c plain quack --layers 24 --width 1024    a larger model, fewer ways

All ways to take the step (`quack_fx.bench`) run in one process and take turns. Update: the optimizer alone, clipping
included. Peak memory is what tensors take during a step beyond weights and optimizer state.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from quack_fx.bench import MEANING, Case, compare, markdown
from quack_fx.find import find_qk_pairs

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from gpt import GPT, GPTConfig


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="rounds of whole steps")
    parser.add_argument("--update-rounds", type=int, default=480, help="rounds of updates")
    parser.add_argument("--ways", nargs="*", choices=MEANING, default=[*MEANING], help="which; all if left out")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--markdown", type=Path, help="write the table to this file as well")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=1024, context=128, layers=options.layers, heads=options.width // 64, width=options.width, bias=False
    )
    model = GPT(config)
    batch = tuple(torch.randint(0, 1024, (2, 4, 128)))
    case = Case(model, find_qk_pairs(model, *batch), loss_of, batch)
    comparison = compare(case, options.ways, options.rounds, tell, options.update_rounds)
    command = " ".join(["python -m benchmarks.step", *sys.argv[1:]])
    text = f"# A training step of a GPT on the CPU, fp32\n\n`{command}`\n\n{markdown(comparison)}"
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text)


def tell(text: str) -> None:
    """Report progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss that the model returns."""
    loss: Tensor = model(tokens, targets)[1]
    return loss


if __name__ == "__main__":
    main()
