"""Correctness first, then what a training step costs with and without QuacK, on the GPU of this machine.

    python -m benchmarks.gpu --markdown benchmarks/results/step_gpu.md
    python -m benchmarks.gpu --small        all of it on tiny models, on a CPU too: does it run?

Checks: those of gpu_checks.py. Then the ways of `quack_fx.bench` on a GPT of 124M weights under autocast, on a model
of the shape of Qwen3 with 1B weights in bfloat16, and on one of about that size with MLA, all with 2,048 tokens of
context.

What fails is said on top of the tables, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu_checks import checks
from benchmarks.step import loss_of, tell
from quack_fx.bench import Case, compare, markdown
from quack_fx.bench.measure import machine
from quack_fx.errors import first_line
from quack_fx.find import find_qk_pairs
from quack_fx.qk_norm.strip import strip_qk_norm

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from gpt import GPT, GPTConfig
from mla import MLAConfig, MLATransformer


def main() -> int:
    """Run the checks and timings, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of whole steps; updates get three times as many")
    parser.add_argument(
        "--seconds", type=float, default=530, help="leave out models that would take longer than this (default: 530)"
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=[*MODELS], help="which are timed")
    parser.add_argument("--small", action="store_true", help="tiny models, few rounds")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file as well")
    options = parser.parse_args()
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    command = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
    parts = [f"# A training step on {machine()}\n\n`{command}`\n"]

    def put(text: str) -> None:
        parts.append(text)
        print(text, flush=True)
        if options.markdown:  # after each part, so that a later failure loses nothing
            options.markdown.parent.mkdir(parents=True, exist_ok=True)
            options.markdown.write_text("\n".join(parts))

    put("## Checks\n")
    right = True
    for told, holds in checks(device):
        right &= holds
        put(f"- {'' if holds else 'WRONG: '}{told}")
    torch.set_float32_matmul_precision("high")
    longest = 0.0
    for name in options.models:
        title, make, ways = MODELS[name]
        title = f"\n## {title}{' (tiny)' if options.small else ''}\n"
        begun = time.perf_counter()
        if begun - start + longest > options.seconds:  # assume that it takes as long as the longest so far
            put(f"{title}\nNot measured: it would have taken longer than {options.seconds:.0f} seconds.")
            continue
        torch._dynamo.reset()
        gc.collect()  # free the last model
        torch.manual_seed(0)
        try:
            comparison = compare(make(device, options.small), ways, 2 if options.small else options.rounds, tell)
        except torch.OutOfMemoryError as error:
            put(f"{title}\nNot measured: {first_line(error)}.")
        else:
            put(f"{title}\n{markdown(comparison)}")
        longest = max(longest, time.perf_counter() - begun)
    return 0 if right else 1


# ---- what is timed ---------------------------------------------------------------------------------------------------


def loss_in_half(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss of a model from examples/, under autocast to bfloat16."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        return loss_of(model, tokens, targets)


def loss_of_labels(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss that a transformers model returns."""
    loss: Tensor = model(input_ids=tokens, labels=targets, use_cache=False).loss
    return loss


def gpt(device: torch.device, small: bool) -> Case:
    """Multi-head attention with a fused projection, fp32."""
    context, vocabulary = (32, 512) if small else (2048, 50304)
    sizes = {"layers": 2, "heads": 2, "width": 64} if small else {"layers": 12, "heads": 12, "width": 768}
    model = GPT(GPTConfig(vocab_size=vocabulary, context=context, bias=False, **sizes)).to(device)
    batch = _batch(vocabulary, 2 if small else 8, context, device)
    return Case(model, find_qk_pairs(model, *batch), loss_in_half, batch)


def qwen3(device: torch.device, small: bool) -> Case:
    """Attention of Qwen3 from transformers, without its QK norms."""
    import transformers  # optional: only this case needs it

    config = transformers.Qwen3Config(
        vocab_size=512 if small else 32768,
        hidden_size=64 if small else 2048,
        intermediate_size=128 if small else 5632,
        num_hidden_layers=2 if small else 18,
        num_attention_heads=2 if small else 16,
        num_key_value_heads=2 if small else 16,
        head_dim=32 if small else 128,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    normed = transformers.AutoModelForCausalLM.from_config(config).to(device).bfloat16()
    model = copy.deepcopy(normed)
    quiet = {"input_ids": _batch(16, 1, 8, device)[0], "use_cache": False}
    strip_qk_norm(model, find_qk_pairs(model, **quiet))
    batch = _batch(config.vocab_size, 2, 32 if small else 2048, device)
    return Case(model, find_qk_pairs(model, **quiet), loss_of_labels, batch, normed=normed)


def mla(device: torch.device, small: bool) -> Case:
    """Multi-head latent attention."""
    sizes = {} if small else {
        "layers": 18, "width": 2048, "ffn_width": 5632, "heads": 16, "q_latent": 768, "kv_latent": 512,
        "nope_width": 128, "rope_width": 64, "value_width": 128,
    }  # fmt: skip
    vocabulary, context = (512, 32) if small else (32768, 2048)
    model = MLATransformer(MLAConfig(vocab_size=vocabulary, context=context, **sizes)).to(device).bfloat16()
    batch = _batch(vocabulary, 2, context, device)
    return Case(model, find_qk_pairs(model, *batch), loss_of, batch)


MODELS: dict[str, tuple[str, Callable[[torch.device, bool], Case], list[str]]] = {
    "gpt": (
        "GPT, 124M, fp32 under autocast to bfloat16",
        gpt,
        ["a", "b", "c", "d", "e", "f", "plain", "quack"],
    ),
    "qwen3": (
        "The shape of Qwen3, 1B, MHA without its QK norm, bfloat16",
        qwen3,
        ["a", "b", "c", "e", "f", "plain", "quack"],
    ),
    "mla": ("MLA of DeepSeek-V3's form, 1B, bfloat16", mla, ["b", "c", "plain", "quack"]),
}
"""For each model: a title, a function that builds the case, and the ways to compare."""


def _batch(vocabulary: int, sequences: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(0, vocabulary, (2, sequences, context), device=device)
    return tokens, targets


if __name__ == "__main__":
    sys.exit(main())
