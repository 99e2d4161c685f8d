"""Correctness first, then what a training step costs with and without QuacK, on the GPU of this machine.

    python -m benchmarks.gpu --markdown benchmarks/results/step_gpu.md
    python -m benchmarks.gpu --small        all of it on tiny models, on a CPU too: does it run?

Checks: fifty compiled steps against the eager optimizer under QuacK; no number of a tensor waited for in an update
(`torch.cuda.set_sync_debug_mode("error")`); a gradient that is not finite changes nothing; a hundred learning rates
compile nothing anew. Then the ways of `quack_fx.bench` on a GPT of 124M weights under autocast, on a model of the shape
of Qwen3 with 1B weights in bfloat16, and on one of about that size with MLA, all with 2,048 tokens of context.

Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from quack_fx.bench import Case, compare, markdown
from quack_fx.bench.measure import machine, synchronize
from quack_fx.find import find_qk_pairs
from quack_fx.optim import QuacK
from quack_fx.step import compile_train_step
from quack_fx.strip import strip_qk_norm

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from gpt import GPT, GPTConfig
from mla import MLAConfig, MLATransformer


def main() -> int:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of whole steps; updates get three times as many")
    parser.add_argument("--seconds", type=float, default=500, help="begin no further model after these (default: 500)")
    parser.add_argument("--small", action="store_true", help="tiny models, few rounds")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file as well")
    options = parser.parse_args()
    start = time.perf_counter()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    command = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
    parts = [f"# A training step on {machine()}\n\n`{command}`\n"]
    wrong = [name for name, right in checks(device) if not _told(name, right)]
    parts.append(f"Checks: {'all right' if not wrong else 'WRONG: ' + ', '.join(wrong)}.\n")
    for title, case, ways in () if wrong else cases(device, options.small):
        if time.perf_counter() - start > options.seconds:
            parts.append(f"## {title}\n\nNot measured: no time was left.\n")
            continue
        rounds = 2 if options.small else options.rounds
        title = f"{title} (tiny)" if options.small else title
        parts.append(f"## {title}\n\n{markdown(compare(case, ways, rounds, _tell))}")
    text = "\n".join(parts)
    print(text)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(text)
    return 1 if wrong else 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _told(name: str, right: bool) -> bool:
    _tell(f"{'ok   ' if right else 'WRONG'} {name}")
    return right


# ---- checks ----------------------------------------------------------------------------------------------------------


def checks(device: torch.device) -> Iterator[tuple[str, bool]]:
    """Names of what is checked, and whether it is so."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=64, context=32, layers=3, heads=4, width=64, bias=False)).to(device)
    batches = [tuple(torch.randint(0, 64, (2, 4, 32), device=device)) for _ in range(50)]
    layout = find_qk_pairs(model, *batches[0])
    eager, compiled = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.AdamW(eager.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    quack = QuacK(optimizer, eager, layout)
    own = torch.optim.AdamW(compiled.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    step = compile_train_step(compiled, own, loss_of, layout=layout, clip_grad_norm=1.0, skip_nonfinite=True)
    for batch in batches:
        loss_of(eager, *batch).backward()
        nn.utils.clip_grad_norm_(eager.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step(*batch)
    pairs = zip(eager.parameters(), compiled.parameters(), strict=True)
    error = max(float((a - b).detach().norm() / a.detach().norm()) for a, b in pairs)
    yield f"compiled steps equal eager ones: {error:.1e} after {len(batches)} steps", error < 1e-4 and bool(quack.plan)

    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    right = True
    for i, batch in enumerate(batches * 2):
        own.param_groups[0]["lr"] = 1e-3 / (1 + i)
        step.forward_backward(*batch)
        if device.type == "cuda":
            synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            step.update()
        except RuntimeError as error:
            _tell(str(error))
            right = False
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        if not right:
            break
    yield "no update waits for the device" + ("" if device.type == "cuda" else " (not checked here)"), right
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    yield f"a hundred learning rates: {again} graphs compiled anew", again == 0

    before = copy.deepcopy((list(compiled.parameters()), own.state_dict()["state"]))
    step.forward_backward(*batches[0])
    next(compiled.parameters()).grad[0] = torch.inf  # type: ignore[index]
    step.update()
    after = (list(compiled.parameters()), own.state_dict()["state"])
    leaves = zip(*(torch.utils._pytree.tree_leaves(side) for side in (before, after)), strict=True)
    yield "an infinite gradient changes nothing", all(torch.equal(a, b) for a, b in leaves if isinstance(a, Tensor))

    if not torch.__version__ >= "2.13":
        return  # whole_graph=True is refused
    one, few = copy.deepcopy(compiled), copy.deepcopy(compiled)
    options = {"layout": layout, "clip_grad_norm": 1.0, "skip_nonfinite": True}
    steps = [
        compile_train_step(
            m, torch.optim.AdamW(m.parameters(), lr=1e-3, fused=True), loss_of, whole_graph=whole, **options
        )
        for m, whole in ((one, True), (few, False))
    ]
    for batch in batches[:10]:
        for step in steps:
            step(*batch)
    pairs = zip(one.parameters(), few.parameters(), strict=True)
    error = max(float((a - b).detach().norm() / a.detach().norm()) for a, b in pairs)
    yield f"one graph does what a few do: {error:.1e} after 10 steps", error < 1e-4


# ---- what is timed ---------------------------------------------------------------------------------------------------


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss that one of our examples gives."""
    loss: Tensor = model(tokens, targets)[1]
    return loss


def loss_in_half(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """The same under autocast to bfloat16."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        return loss_of(model, tokens, targets)


def loss_of_labels(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss that a model of transformers gives."""
    loss: Tensor = model(input_ids=tokens, labels=targets, use_cache=False).loss
    return loss


def cases(device: torch.device, small: bool) -> Iterator[tuple[str, Case, list[str]]]:
    """Title, model and ways of each table, one after the other."""
    torch.manual_seed(0)
    context = 32 if small else 2048
    sizes = {"layers": 2, "heads": 2, "width": 64} if small else {"layers": 12, "heads": 12, "width": 768}
    vocabulary = 512 if small else 50304
    gpt = GPT(GPTConfig(vocab_size=vocabulary, context=context, bias=False, **sizes)).to(device)
    batch = _batch(vocabulary, 2 if small else 8, context, device)
    yield (
        "GPT, 124M, fp32 under autocast to bfloat16",
        Case(gpt, find_qk_pairs(gpt, *batch), loss_in_half, batch),
        ["a", "b", "c", "d", "e", "plain", "quack", "whole"],
    )
    del gpt
    import transformers  # an extra: the two above need none

    config = transformers.Qwen3Config(
        vocab_size=512 if small else 32768,
        hidden_size=64 if small else 2048,
        intermediate_size=128 if small else 5632,
        num_hidden_layers=2 if small else 18,
        num_attention_heads=2 if small else 16,
        num_key_value_heads=2 if small else 16,
        head_dim=32 if small else 128,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    qwen = transformers.AutoModelForCausalLM.from_config(config).to(device)
    quiet = {"input_ids": _batch(16, 1, 8, device)[0], "use_cache": False}
    strip_qk_norm(qwen, find_qk_pairs(qwen, **quiet))
    qwen = qwen.bfloat16()
    batch = _batch(config.vocab_size, 2, context, device)
    yield (
        "The shape of Qwen3, 1B, MHA without its QK norm, bfloat16",
        Case(qwen, find_qk_pairs(qwen, **quiet), loss_of_labels, batch),
        ["b", "c", "e", "plain", "quack"],
    )
    del qwen
    mla_sizes = {} if small else {
        "layers": 18, "width": 2048, "ffn_width": 5632, "heads": 16, "q_latent": 768, "kv_latent": 512,
        "nope_width": 128, "rope_width": 64, "value_width": 128,
    }  # fmt: skip
    mla = MLATransformer(MLAConfig(vocab_size=config.vocab_size, context=context, **mla_sizes)).to(device).bfloat16()
    yield (
        "MLA of DeepSeek-V3's form, 1B, bfloat16",
        Case(mla, find_qk_pairs(mla, *batch), loss_of, batch),
        ["b", "c", "plain", "quack"],
    )


def _batch(vocabulary: int, sequences: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(0, vocabulary, (2, sequences, context), device=device)
    return tokens, targets


if __name__ == "__main__":
    sys.exit(main())
