"""QK norms out of graphs, inline ones too: bitwise what the same attention written without them computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import olmo2, qwen3
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from quack_fx.find import find_in_graph
from quack_fx.layout import QKLayout
from quack_fx.strip import strip_qk_norm

HEADS, DIM = 2, 8
Way = Callable[["Attention", Tensor], Tensor]


class Attention(nn.Module):
    """Two heads, whose queries and keys pass `norm`; `bare` leaves out its statistic, `gone` all of it."""

    def __init__(self, norm: Way, v: bool = False) -> None:
        super().__init__()
        self.way, self.v_too, self.bare, self.gone = norm, v, False, False
        self.q, self.k, self.v = (nn.Linear(HEADS * DIM, HEADS * DIM) for _ in "qkv")
        self.gain, self.bias = nn.Parameter(torch.rand(DIM) + 0.5), nn.Parameter(torch.rand(DIM))
        self.batch = nn.BatchNorm2d(DIM, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for m in (self.q, self.k, self.v))
        if not self.gone:
            q, k = self.way(self, q), self.way(self, k)
        return F.softmax(q @ k.mT * DIM**-0.5, -1) @ v


def rms_by_hand(m: Attention, x: Tensor) -> Tensor:
    y = x if m.bare else x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return m.gain * y


def rms_in_double(m: Attention, x: Tensor) -> Tensor:
    y = x.double()
    y = y if m.bare else y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return y.to(x.dtype) * (1 + m.gain)


def rms_op(m: Attention, x: Tensor) -> Tensor:
    return x * m.gain if m.bare else F.rms_norm(x, (DIM,), m.gain)


def layer_by_hand(m: Attention, x: Tensor) -> Tensor:
    y = x if m.bare else (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return y * m.gain + m.bias


def layer_then_gain(m: Attention, x: Tensor) -> Tensor:
    y = x if m.bare else torch.native_layer_norm(x, (DIM,), None, None, 1e-5)[0]
    return y * m.gain + m.bias


def layer_op(m: Attention, x: Tensor) -> Tensor:
    return x * m.gain + m.bias if m.bare else F.layer_norm(x, (DIM,), m.gain, m.bias)


def unit_length(m: Attention, x: Tensor) -> Tensor:
    return x if m.bare else F.normalize(x, dim=-1)


def in_place(m: Attention, x: Tensor) -> Tensor:
    if m.bare:
        return x * m.gain
    y = x.clone()
    y /= y.norm(dim=-1, keepdim=True) + 1e-6
    return y * m.gain


def batch(m: Attention, x: Tensor) -> Tensor:
    return x if m.bare else m.batch(x.transpose(1, -1)).transpose(1, -1)


WAYS = [rms_by_hand, rms_in_double, rms_op, layer_by_hand, layer_then_gain, layer_op, unit_length, in_place, batch]


def exported(model: nn.Module, x: Tensor) -> GraphModule:
    graph = torch.export.export(model, (x,), strict=False).module()
    assert isinstance(graph, GraphModule)
    return graph


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gain", ["drop", "keep"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_stripped_graph_is_bitwise_the_model_written_without(way: Way, gain: Any) -> None:
    torch.manual_seed(0)
    model, x = Attention(way), torch.randn(3, 5, HEADS * DIM)
    graph = exported(model, x)
    report = strip_qk_norm(graph, gain=gain, scale="keep")
    before = graph(x)
    model.bare, model.gone = gain == "keep", gain == "drop"
    assert len(report.removed) in (1, 2) and not report.left
    assert torch.equal(report.model(x), model(x))
    assert not torch.equal(before, model(x))
    theirs = gradients(model, x)
    ours = gradients(report.model, x)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_parameters_are_those_of_the_original_and_find_sees_no_norm() -> None:
    model, x = Attention(rms_by_hand), torch.randn(3, 5, HEADS * DIM)
    graph = exported(model, x)
    nodes, state = len(graph.graph.nodes), dict(graph.named_parameters())
    report = strip_qk_norm(graph)
    assert report.vanished == ("gain",)
    assert all(p is state[n] for n, p in report.model.named_parameters())
    assert len(graph.graph.nodes) == nodes and dict(graph.named_parameters()).keys() == state.keys()
    assert isinstance(report.model, GraphModule)
    (had,), (has,) = find_in_graph(graph).sites, find_in_graph(report.model).sites
    assert had.qk_norm and not has.qk_norm
    assert (had.query, had.key, had.terms) == (has.query, has.key, has.terms)
    assert report.layout.sites == (has,)
    assert report.to_dict()["removed"][0]["module"] is None


@pytest.mark.parametrize("build", [qwen3, olmo2])
def test_module_way_and_graph_way_agree(build: Any) -> None:
    case = build()
    model, ids = case.model, case.inputs["input_ids"]

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            result: Tensor = self.model(ids, use_cache=False).logits
            return result

    graph = exported(Logits(), ids)
    by_graph = strip_qk_norm(graph)
    assert sorted(str(n.module) for n in by_graph.removed) == sorted(
        f"model.{n.module}" for n in strip_qk_norm(model, case.layout).removed
    )
    by_module = Logits()
    assert torch.allclose(by_graph.model(ids), by_module(ids), atol=1e-6, rtol=0)
    ours, theirs = gradients(by_graph.model, ids), gradients(by_module, ids)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-5, rtol=1e-5) for n in ours)


def test_compiled_and_exported_again() -> None:
    model, x = Attention(rms_by_hand), torch.randn(3, 5, HEADS * DIM)
    stripped = strip_qk_norm(exported(model, x)).model
    assert torch.allclose(torch.compile(stripped, backend="aot_eager")(x), stripped(x), atol=1e-6)
    assert torch.equal(exported(stripped, x)(x), stripped(x))


def test_graph_of_make_fx() -> None:
    model, x = Attention(layer_by_hand), torch.randn(3, 5, HEADS * DIM)
    graph = make_fx(model)(x)
    report = strip_qk_norm(graph, QKLayout())
    assert isinstance(report.model, GraphModule) and not report.left


def test_graph_without_qk_norm_comes_back_itself() -> None:
    graph = exported(Attention(lambda m, x: x), torch.randn(3, 5, HEADS * DIM))
    report = strip_qk_norm(graph)
    assert report.model is graph and not report.removed and not report.left


class KeysAreValues(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k = (self.way(self, m(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)) for m in (self.q, self.k))
        return F.softmax(q @ k.mT * DIM**-0.5, -1) @ k


def test_norm_whose_result_is_a_value_stays() -> None:
    graph = exported(KeysAreValues(rms_by_hand), torch.randn(3, 5, HEADS * DIM))
    report = strip_qk_norm(graph)
    (left,) = report.left
    assert left.reason == "what its key norm makes is used outside the logits, too (as values, for example)"
    assert report.model is graph and report.layout.sites[0].qk_norm


class Fused(nn.Module):
    """One norm over queries, keys and values before they are told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Conv1d(6, 18, 1), nn.BatchNorm1d(18)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.norm(self.qkv(x)).split(6, 1)
        return F.softmax(q.mT @ k, -1) @ v.mT


def test_norm_that_values_pass_as_well_stays() -> None:
    model, x = Fused(), torch.randn(2, 6, 5)
    (site,) = find_in_graph(exported(model, x)).sites
    assert {n.module for n in site.qk_norm} == {None}
    (left,) = strip_qk_norm(exported(model, x)).left
    assert "is used outside the logits, too" in left.reason
