"""Gains folded into weights: what was learned is kept, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import gemma3, olmo2, qwen3
from torch import Tensor, nn

import quack_fx
from quack_fx.errors import StripError
from quack_fx.find import find_qk_pairs
from quack_fx.qk_norm.strip import strip_qk_norm
from quack_fx.qk_norm.strip.gains import RowGain


class Attention(nn.Module):
    """Two heads; norms, and what follows them, as asked for."""

    def __init__(self, norm: Any, bias: bool = True, rotate: bool = False, values: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=bias) for _ in "qkv")
        self.q_norm, self.k_norm, self.rotate, self.values = norm(), norm(), rotate, values
        for parameter in (*self.q_norm.parameters(), *self.k_norm.parameters()):
            nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        raw = [m(x).unflatten(-1, (2, 8)).transpose(1, 2) for m in (self.q, self.k, self.v)]
        q, k, v = raw
        if self.rotate:
            angle = torch.arange(5.0).view(5, 1) * torch.ones(4)
            q, k = (self._rotated(y, angle) for y in (q, k))
        q, k = self.q_norm(q), self.k_norm(k)
        v = raw[1] if self.values else v
        return F.softmax(q @ k.mT * 8**-0.5, -1) @ v

    @staticmethod
    def _rotated(y: Tensor, angle: Tensor) -> Tensor:
        a, b = y.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)


def rms() -> nn.Module:
    return nn.RMSNorm(8)


def layer() -> nn.Module:
    return nn.LayerNorm(8)


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return next(t for t in torch.utils._pytree.tree_flatten(model(**inputs))[0] if isinstance(t, Tensor))


def with_gains(case: Any) -> tuple[nn.Module, dict[str, Any]]:
    for name, parameter in case.model.named_parameters():
        if "_norm" in name and "layernorm" not in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        if "q_proj" in name or "k_proj" in name:
            nn.init.normal_(parameter, std=0.5)  # logits that are not all alike
    return case.model.eval(), dict(case.inputs)


MODELS = {
    "qwen3": lambda: with_gains(qwen3()),
    "olmo2, full width": lambda: with_gains(olmo2()),
    "gemma3, one plus gain": lambda: with_gains(gemma3()),
    "layer norm with bias": lambda: (Attention(layer), {"x": torch.randn(2, 5, 16)}),
    "no projection bias": lambda: (Attention(rms, bias=False), {"x": torch.randn(2, 5, 16)}),
}


@pytest.mark.parametrize("name", MODELS)
def test_folded_is_the_statistic_alone_gone(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    layout = find_qk_pairs(model, **inputs)
    kept, dropped = copy.deepcopy(model), copy.deepcopy(model)
    strip_qk_norm(kept, layout, gain="keep")
    strip_qk_norm(dropped, layout)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    before = outputs(model, inputs)
    report = strip_qk_norm(model, layout, gain="fold", inputs=inputs)
    assert report.vanished and not report.left
    expected = outputs(kept, inputs)
    assert torch.allclose(outputs(model, inputs), expected, atol=1e-5)
    assert not torch.allclose(outputs(dropped, inputs), expected, atol=1e-3)
    assert list(model.state_dict()) == list(dropped.state_dict())
    rows = {block.param for site in layout.sites for block in (*site.query, *site.key)}
    biases = {block.bias for site in layout.sites for block in (*site.query, *site.key)}
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, state[n])}
    assert rows <= changed <= rows | biases
    report.restore()
    assert {n: torch.equal(t, state[n]) for n, t in model.state_dict().items()} == dict.fromkeys(state, True)
    assert torch.equal(outputs(model, inputs), before)


class Unit(nn.Module):
    """L2 norm of the features of a head."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)


IDENTITIES: dict[str, tuple[Any, float]] = {
    "rms": (lambda: nn.RMSNorm(8, eps=0.0), 1.0),
    "layer": (lambda: nn.LayerNorm(8, eps=0.0), 1.0),
    "l2": (Unit, 8**-0.5),
}
"""A norm, and by what plus and minus ones have to be multiplied for it to leave them alone."""


@pytest.mark.parametrize("name", IDENTITIES)
def test_exact_identities_change_nothing(name: str) -> None:
    """Where features have mean 0 and RMS 1 (or length 1) already, the norm's removal is no change at all."""
    torch.manual_seed(0)
    norm, size = IDENTITIES[name]
    model, x = Attention(norm, bias=False), torch.eye(16).view(1, 16, 16)[:, :5]
    signs = torch.tensor([1.0, -1.0]).repeat(4)
    with torch.no_grad():
        for part in (model.q, model.k):  # a token's features are a column; each head has as many plus as minus ones
            heads = [torch.stack([signs[torch.randperm(8)] for _ in range(16)], 1) for _ in range(2)]
            part.weight.copy_(torch.cat(heads) * size)
        for one in (model.q_norm, model.k_norm):
            one.load_state_dict({n: torch.full_like(t, float(n == "weight")) for n, t in one.state_dict().items()})
    before = model(x)
    graph = quack_fx.capture(model, (x,), executable=True).graph_module
    report = strip_qk_norm(model, find_qk_pairs(model, x), scale="keep")
    assert len(report.removed) == 2
    assert torch.allclose(model(x), before, atol=1e-6)
    stripped = strip_qk_norm(graph, scale="keep")
    assert stripped.removed and torch.allclose(stripped.model(x), before, atol=1e-6)


def test_what_cannot_be_folded_stays_and_says_why() -> None:
    cases = {
        "its features are mixed before its gain": Attention(rms, rotate=True),
        "has none to fold it into": Attention(layer, bias=False),
    }
    for reason, model in cases.items():
        x = torch.randn(2, 5, 16)
        before = model(x)
        report = strip_qk_norm(model, find_qk_pairs(model, x), gain="fold", inputs=(x,))
        assert len(report.left) == 1 and reason in report.left[0].reason, report.left
        assert torch.equal(model(x), before)


def test_rows_that_serve_something_else_are_not_changed() -> None:
    """The keys are values, too, before their norm: with other rows the values would be others."""
    model, x = Attention(rms, values=True), torch.randn(2, 5, 16)
    before, state = model(x), list(model.state_dict())
    report = strip_qk_norm(model, find_qk_pairs(model, x), gain="fold", inputs=(x,))
    assert "rows of 'k.weight' serve something else, too" in report.left[0].reason
    assert torch.equal(model(x), before) and list(model.state_dict()) == state


def test_a_folding_that_changes_the_model_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check after the folding stands alone: it catches wrong rows."""
    model, x = Attention(rms), torch.randn(2, 5, 16)
    before, state = model(x), list(model.state_dict())
    wrong = {"q_norm": {("q.weight", (0,), (i,)): RowGain(2.0, 0.0, "q.bias") for i in range(16)}, "k_norm": {}}
    monkeypatch.setattr("quack_fx.qk_norm.strip.modules.gain_rows", lambda *_: wrong)
    with pytest.raises(StripError, match="folding the gains changes what the model computes"):
        strip_qk_norm(model, find_qk_pairs(model, x), gain="fold", inputs=(x,))
    assert torch.equal(model(x), before) and list(model.state_dict()) == state


def test_it_needs_inputs_and_modules() -> None:
    model, x = Attention(rms), torch.randn(2, 5, 16)
    with pytest.raises(StripError, match="give example inputs"):
        strip_qk_norm(model, find_qk_pairs(model, x), gain="fold")
    graph = torch.export.export(model, (x,), strict=False).module()
    with pytest.raises(StripError, match="a graph shares its weights with the original"):
        strip_qk_norm(graph, gain="fold")
