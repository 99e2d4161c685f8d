"""The examples: their mathematics against plain fp64 formulas, their habits, the configs at their full sizes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import EXAMPLES, example
from torch import Tensor, nn

import quack_fx

IDS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
MODELS = {"gpt": ("GPT", "GPTConfig"), "mla": ("MLATransformer", "MLAConfig")}


def build(file: str, **config: Any) -> nn.Module:
    module = example(file)
    model, of = (getattr(module, name) for name in MODELS[file])
    torch.manual_seed(0)
    built: nn.Module = model(of(**config))
    return built


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * gain


def reference_mla(p: dict[str, Tensor], x: Tensor, heads: int, nope: int, rope: int, value: int, rank: int) -> Tensor:
    """One attention, head by head and position by position, as the DeepSeek-V2 report writes it (Eq. 37 to 47)."""
    length = x.shape[0]

    def rotated(vector: Tensor, position: int) -> Tensor:
        pairs = torch.complex(vector[: rope // 2], vector[rope // 2 :])
        angles = position * 10_000.0 ** -(torch.arange(rope // 2, dtype=torch.float64) / (rope // 2))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag))

    c_q = rms(x @ p["q_down.weight"].T, p["q_norm.weight"])
    down = x @ p["kv_down.weight"].T
    c_kv = rms(down[:, :rank], p["kv_norm.weight"])
    outputs = []
    for h in range(heads):
        w_q = p["q_up.weight"][h * (nope + rope) : (h + 1) * (nope + rope)]
        w_kv = p["kv_up.weight"][h * (nope + value) : (h + 1) * (nope + value)]
        rows = []
        for i in range(length):
            q = w_q @ c_q[i]
            logits = torch.stack(
                [
                    q[:nope] @ (w_kv[:nope] @ c_kv[j]) + rotated(q[nope:], i) @ rotated(down[j, rank:], j)
                    for j in range(i + 1)
                ]
            ) / math.sqrt(nope + rope)
            values = torch.stack([w_kv[nope:] @ c_kv[j] for j in range(i + 1)])
            rows.append(logits.softmax(0) @ values)
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, -1) @ p["out.weight"].T


def test_mla_is_the_formula() -> None:
    model = build("mla").double()
    attention = model.get_submodule("blocks.0.attn")
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(5, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # As the model does, angles in float32: the only rounding that is left.
    cos, sin = example("mla").rope_angles(5, example("mla").MLAConfig(), torch.device("cpu"))
    want = reference_mla(dict(attention.named_parameters()), x, 6, 32, 16, 32, 64)
    torch.testing.assert_close(attention(x[None], cos, sin)[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("file", MODELS)
def test_no_position_sees_what_comes_after(file: str) -> None:
    model = build(file, layers=2)
    targets = torch.zeros_like(IDS)
    changed = IDS.clone()
    changed[:, 7:] += 1
    before, after = (model(ids % 256, targets)[0] for ids in (IDS, changed))
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("file", MODELS)
def test_forward_has_nanogpt_habits(file: str) -> None:
    model = build(file)
    logits, loss = model(IDS)
    assert loss is None
    assert logits.shape[0::2] == (2, 256)
    targets = (IDS + 77) % 256
    logits, loss = model(IDS, targets)
    assert logits.shape == (2, 12, 256)
    want = -logits.double().log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(loss.double(), want)
    assert abs(loss.item() - math.log(256)) < 0.2, "an untrained model knows nothing"


@pytest.mark.parametrize("file", MODELS)
def test_model_is_small_and_builds_on_meta(file: str) -> None:
    config = getattr(example(file), MODELS[file][1])
    assert all(f.default is not dataclasses.MISSING for f in dataclasses.fields(config))
    with torch.device("meta"):
        model = build(file)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    assert not list(model.buffers())


def test_gpt_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="width 192 does not divide into 5 heads"):
        build("gpt", heads=5)
    with pytest.raises(ValueError, match="sequence of 12 tokens is longer than the context of 8"):
        build("gpt", context=8)(IDS)


@pytest.mark.parametrize(
    ("folder", "billions", "shapes"),
    [
        ("llama-3.1-405b", 405.85, {"q_proj": (16384, 16384), "k_proj": (1024, 16384)}),
        ("qwen3-235b-a22b", 235.09, {"q_proj": (8192, 4096), "k_proj": (512, 4096), "q_norm": (128,)}),
        ("deepseek-v3-671b", 671.03, {"q_b_proj": (24576, 1536), "kv_a_proj_with_mqa": (576, 7168)}),
    ],
)
def test_configs_build_at_their_published_size(folder: str, billions: float, shapes: dict[str, Any]) -> None:
    path = EXAMPLES / "configs" / folder
    raw = json.loads((path / "config.json").read_text())
    assert not {"auto_map", "quantization_config"} & raw.keys()
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == raw["architectures"][0]
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == billions
    attention = model.get_submodule("model.layers.0.self_attn")
    assert {name: tuple(attention.get_submodule(name).weight.shape) for name in shapes} == shapes


# -- the trainer -------------------------------------------------------------------------------------------------------


def test_corpus_is_real_text_in_two_parts() -> None:
    trainer = example("train_text")
    train, check = trainer.corpus(300_000)
    assert (len(train), len(check)) == (300_000, 30_000)
    assert b"def " in bytes(train.tolist()) and b"def " in bytes(check.tolist())
    assert bytes(check[:2000].tolist()) not in bytes(train.tolist())


def test_crops_are_text_and_what_follows() -> None:
    trainer = example("train_text")
    text = torch.arange(200, dtype=torch.uint8)
    idx, targets = next(trainer.crops(text, batch=4, context=16, seed=0))
    assert idx.shape == targets.shape == (4, 16)
    assert torch.equal(targets, idx + 1)
    again = next(trainer.crops(text, batch=4, context=16, seed=0))
    assert torch.equal(again[0], idx)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.py", "--model", "examples/mla.py:MLATransformer"], "no such Python file: missing.py"),
        (["examples/mla.py", "--model", "examples/mla.py"], "write FILE:CLASS"),
        (["examples/mla.py"], "the following arguments are required: --model"),
    ],
)
def test_trainer_tells_what_is_wrong(args: list[str], message: str) -> None:
    command = [sys.executable, "examples/train_text.py", *args]
    done = subprocess.run(command, cwd=EXAMPLES.parent, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_trainer_trains_with_the_file(tmp_path: Path) -> None:
    """As `make demo` does, with fewer steps on shorter texts."""
    root, file = EXAMPLES.parent, tmp_path / "train_mla.py"
    file.write_text(quack_fx.convert(str(EXAMPLES / "mla.py")))
    command = [sys.executable, "examples/train_text.py", str(file), "--model", "examples/mla.py:MLATransformer"]
    command += ["--steps", "20", "--batch", "4", "--context", "32"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, last = map(float, re.findall(r"^loss +([\d.]+) -> ([\d.]+)", done.stdout, re.MULTILINE)[0])
    assert last < first - 0.5
    low, high = map(float, re.findall(r"1\.000 -> ([\d.]+) to ([\d.]+)", done.stdout)[0])
    assert 0 < low < 1 and low < high, "weights grow, so that scales fall"
