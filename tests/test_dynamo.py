"""torch.compile(backend="quack_fx"): what Dynamo hands over, without its QK norms."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import llama, olmo2, qwen3
from torch import Tensor, nn
from torch.fx import GraphModule

from quack_fx.qk_norm.strip import strip_qk_norm

# Dynamo looks at .grad of what flows on behind a graph break.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    result: Callable[..., Any] = torch.compile(
        model, backend="quack_fx", dynamic=False, options={"backend": "aot_eager", **options}
    )
    return result


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", [qwen3, olmo2])
def test_compiled_is_the_stripped_model(build: Any, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    case = build()
    twin = copy.deepcopy(case.model)
    strip_qk_norm(twin, case.layout)
    with caplog.at_level(logging.INFO, "quack_fx"):
        ours = compiled(case.model)(**case.inputs).logits
    assert "took 4 QK norms out of a graph" in caplog.text
    theirs = twin(**case.inputs).logits
    assert torch.allclose(ours, theirs, atol=1e-6)
    mine, expected = gradients(case.model, ours), gradients(twin, theirs)
    assert mine.keys() == expected.keys()  # the gains get none
    assert all(torch.allclose(mine[n], expected[n], atol=1e-5) for n in mine)


class Layer(nn.Module):
    """Attention with an inline norm; Dynamo cannot pass its end."""

    def __init__(self, normed: bool = True) -> None:
        super().__init__()
        self.normed, self.qkv, self.gain = normed, nn.Linear(16, 48, bias=False), nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        if self.normed:
            q, k = (F.normalize(y, dim=-1) * 8**0.5 * self.gain for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        torch._dynamo.graph_break()
        return x + y


def test_inline_norms_on_both_sides_of_graph_breaks() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Layer(), Layer()), torch.randn(2, 5, 16)
    ours = compiled(model)(x)
    for layer in model:
        layer.normed = False
    torch._dynamo.reset()
    theirs = model(x)
    assert torch.allclose(ours, theirs, atol=1e-6)
    mine, expected = gradients(model, ours), gradients(model, theirs)
    assert mine.keys() == expected.keys() and all(torch.allclose(mine[n], expected[n], atol=1e-5) for n in mine)


def test_gain_and_scale_are_options() -> None:
    model, x = Layer(), torch.randn(2, 5, 16)
    kept = compiled(model, gain="keep")(x)
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in model.qkv(x).chunk(3, -1))
    expected = F.scaled_dot_product_attention(q * model.gain, k * model.gain, v).transpose(1, 2).flatten(-2)
    assert torch.allclose(kept, x + expected, atol=1e-6)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"option scale='fix' of the backend quack_fx is not known; use 'restore' or"):
        compiled(model, scale="fix")(x)


def test_graphs_without_qk_norm_are_passed_on_as_they_are() -> None:
    seen: list[tuple[GraphModule, int]] = []

    def passed_on(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append((graph, len(graph.graph.nodes)))
        assert any(n.target is F.scaled_dot_product_attention for n in graph.graph.nodes)  # Dynamo's own, no ATen ops
        return graph

    case = llama()
    result = compiled(case.model, backend=passed_on)(**case.inputs).logits
    assert seen and torch.allclose(result, case.model(**case.inputs).logits, atol=1e-6)


def test_moving_shapes_are_refused() -> None:
    model = torch.compile(Layer(), backend="quack_fx", dynamic=True, options={"backend": "eager"})
    with pytest.raises(Exception, match="the backend quack_fx needs fixed shapes"):
        model(torch.randn(2, 5, 16))


@pytest.mark.slow
def test_inductor_is_the_default() -> None:
    model, x = Layer(), torch.randn(2, 5, 16)
    ours = torch.compile(model, backend="quack_fx", dynamic=False)(x)
    model.normed = False
    torch._dynamo.reset()
    assert torch.allclose(ours, model(x), atol=1e-5)


class InPlace(nn.Module):
    """Queries and keys are cast (to what they are already, or not) and scaled in place before their norm."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.qkv, self.normed = dtype, nn.Linear(16, 48, bias=False), True

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        q, k = (y.to(self.dtype).mul_(2.0) for y in (q, k))
        if self.normed:
            q, k = (F.rms_norm(y, (8,)) for y in (q, k))
        return F.scaled_dot_product_attention(q, k, v.to(self.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_casts_that_may_hand_on_their_argument(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    model, x = InPlace(dtype), torch.randn(2, 5, 16)
    with caplog.at_level(logging.INFO, "quack_fx"), torch.no_grad():
        ours = compiled(model, scale="keep")(x)
        model.normed = False
        torch._dynamo.reset()
        assert torch.allclose(ours, model(x), atol=1e-6)
    assert "took 2 QK norms out of a graph" in caplog.text
