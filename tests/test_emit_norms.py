"""Emitted files that take QK norms out: the same surgery as the library's, with torch alone."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import gemma3, llama, olmo2, qwen3
from torch import Tensor, nn

import quack_fx
from quack_fx.cli.app import main
from quack_fx.emit import convert, emit
from quack_fx.emit.norms import StandIn
from quack_fx.errors import EmitError
from quack_fx.strip import strip_qk_norm


def loaded(source: str) -> ModuleType:
    module = ModuleType("emitted")
    sys.modules["emitted"] = module  # dataclasses look their module up
    exec(compile(source, "emitted.py", "exec"), module.__dict__)
    return module


class Unit(nn.Module):
    """L2 norm of queries and keys in one call, times a number."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1)


class Attention(nn.Module):
    """Two heads whose norms bound the logits: there is no other scale."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(16, 48, bias=False), norm

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        q, k = self.norm(q, k) if isinstance(self.norm, Unit) else (self.norm(q), self.norm(k))
        return F.softmax(q @ k.mT, -1) @ v


def plain() -> tuple[nn.Module, dict[str, Any]]:
    return Attention(nn.RMSNorm(8)), {"x": torch.randn(2, 5, 16)}


def of(case: Any) -> tuple[nn.Module, dict[str, Any]]:
    return case.model, dict(case.inputs)


MODELS = {
    "qwen3": lambda: of(qwen3()),
    "olmo2": lambda: of(olmo2()),
    "gemma3": lambda: of(gemma3()),
    "scaled": plain,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_file_does_what_the_library_does(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    before = list(model.state_dict())
    source = convert(model, **inputs)
    assert list(model.state_dict()) == before
    emitted = loaded(source)
    with pytest.raises(ValueError, match=r"the model still has the QK norm .*norm: call strip_qk_norm\(model\) first"):
        emitted.QuacKAdamW(model, compile=False)
    twin = copy.deepcopy(model)
    report = strip_qk_norm(twin, quack_fx.find_qk_pairs(model, **inputs))
    assert emitted.strip_qk_norm(model) is model
    assert list(model.state_dict()) == list(twin.state_dict())
    ours, theirs = (torch.utils._pytree.tree_flatten(m(**inputs))[0] for m in (model, twin))
    assert all(map(torch.equal, *([t for t in leaves if isinstance(t, Tensor)] for leaves in (ours, theirs))))
    optimizer = emitted.QuacKAdamW(model, compile=False)
    rows = {block.param for site in report.layout.sites for block in (*site.query, *site.key)}
    assert rows == {weight.name for product in emitted.logit_products() for weight, *_ in product}
    sum(t.float().square().sum() for t in ours if isinstance(t, Tensor) and t.requires_grad).backward()  # type: ignore[union-attr]
    optimizer.step()


def test_norms_that_are_kept_are_left_out() -> None:
    model, inputs = of(qwen3())
    with pytest.raises(EmitError, match="keep their QK norm"):
        convert(model, **inputs, qk_norm="keep")
    with pytest.raises(EmitError, match=r"qk_norm='drop' is not known; use qk_norm='strip' or qk_norm='keep'"):
        convert(model, **inputs, qk_norm="drop")  # type: ignore[arg-type]
    assert "PassThrough" not in convert(of(llama())[0], **of(llama())[1])


def test_form_of_the_file(tmp_path: Path) -> None:
    """Formatted, linted, and one loop for equal layers."""
    model, inputs = of(llama())
    layout = quack_fx.find_qk_pairs(model, **inputs)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    names = {f"model.layers.{i}.self_attn.{side}_norm": StandIn() for i in range(94) for side in "qk"}
    ways = {
        "plain": names,
        "factor": {n: StandIn(factor=0.125 if "q_norm" in n else 1.0) for n in names},
        "tensors": {f"blocks.{i}.norm": StandIn(tensors=2, factor=0.5) for i in (0, 1, 5)} | {"last.norm": StandIn()},
    }
    for way, stand_ins in ways.items():
        source = emit(layout, shapes, title=way, stand_ins=stand_ins)
        (tmp_path / f"{way}.py").write_text(source)
        module = loaded(source)
        made = dict(module.qk_norms())
        assert made.keys() == stand_ins.keys()
        for name, stand_in in stand_ins.items():
            x, y = torch.randn(3), torch.randn(3)
            given = made[name](x) if stand_in.tensors == 1 else made[name](x, k=y)
            expected = x * stand_in.factor if stand_in.tensors == 1 else (x * stand_in.factor, y * stand_in.factor)
            assert all(map(torch.equal, given, expected))  # type: ignore[arg-type]
    assert "for i in range(94):" in (tmp_path / "plain.py").read_text()
    options = ("--isolated", "--line-length", "120", "--target-version", "py311")
    for words in (["check", "--extend-select", "I,UP,B,E501,W,SIM,RUF"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", words[0], *options, *words[1:], str(tmp_path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


TARGET = """
import torch
from torch import nn
import torch.nn.functional as F

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = nn.RMSNorm(16), nn.RMSNorm(16)
    def forward(self, x):
        return F.softmax(self.q_norm(self.q(x)) @ self.k_norm(self.k(x)).mT, -1) @ self.v(x)
"""


def test_command_line(own_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("model.py").write_text(TARGET)
    words = ["convert", "model.py", "--inputs", "torch.randn(2, 5, 16)", "-o"]
    assert main([*words, "strip.py"]) == 0
    told = capfd.readouterr().err
    assert "the file takes the QK norms out of 1 attentions (2 modules); --qk-norm keep leaves them" in told
    assert "logits were scaled by 1, which relied on the norm" in told
    assert 'yield "q_norm", PassThrough(factor=0.25)' in Path("strip.py").read_text()
    assert main([*words, "keep.py", "--qk-norm", "keep"]) == 2
    assert "take it out first (--qk-norm strip" in capfd.readouterr().err
    assert main([*words, "no.py", "--qk-norm", "fold"]) == 2
    assert "'fold' is not one of 'strip', 'keep'" in capfd.readouterr().err
    assert not Path("keep.py").exists() and not Path("no.py").exists()
