"""QK norms out of graphs, inline ones too: bitwise what the same attention written without them computes."""

from __future__ import annotations

import copy
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
from quack_fx.graph.capture import capture
from quack_fx.layout import QKLayout
from quack_fx.qk_norm.strip import strip_qk_norm

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
    """The norm of the keys serves the values, too: `bare` and `gone` leave it out for the logits alone."""

    def __init__(self, norm: Way, fused: bool) -> None:
        super().__init__(norm)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k = (m(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for m in (self.q, self.k))
        bare, gone, self.bare, self.gone = self.bare, self.gone, False, False
        v = self.way(self, k)
        self.bare, self.gone = bare, gone
        q, k = (q, k) if gone else (self.way(self, q), self.way(self, k) if bare else v)
        return F.scaled_dot_product_attention(q, k, v) if self.fused else F.softmax(q @ k.mT * DIM**-0.5, -1) @ v


def statistic_of_all(m: Attention, x: Tensor) -> Tensor:
    return x if m.bare else F.rms_norm(x, (DIM,))


@pytest.mark.parametrize("fused", [False, True], ids=["matmul", "sdpa"])
@pytest.mark.parametrize("gain", ["drop", "keep"])
@pytest.mark.parametrize("way", [rms_by_hand, rms_op, layer_by_hand, layer_op, unit_length, statistic_of_all])
def test_norm_of_keys_that_are_values_stays_for_the_values(way: Way, gain: Any, fused: bool) -> None:
    torch.manual_seed(0)
    model, x = KeysAreValues(way, fused).double(), torch.randn(3, 5, HEADS * DIM).double()
    graph = exported(model, x)
    report = strip_qk_norm(graph, gain=gain, scale="keep")
    model.bare, model.gone = gain == "keep", gain == "drop"
    assert not report.left and len(report.removed) == 2
    assert report.notes == (
        "'': what its key norm makes is used outside the logits, too (as values, for example); for that it stays",
    )
    assert torch.allclose(report.model(x), model(x), rtol=0, atol=1e-12) and not torch.allclose(graph(x), model(x))
    ours, theirs = gradients(report.model, x), gradients(model, x)
    assert all(torch.allclose(ours[n], theirs[n], rtol=1e-9, atol=1e-9) for n in theirs)
    assert isinstance(report.model, GraphModule)
    (had,), (has,) = find_in_graph(graph).sites, find_in_graph(report.model).sites
    assert had.qk_norm and not has.qk_norm
    assert gain == "keep" or (report.layout.sites == (has,) and (had.query, had.key) == (has.query, has.key))


class GainOfKeys(Attention):
    """Queries, keys and values share a statistic; only queries and keys get a gain."""

    def forward(self, x: Tensor) -> Tensor:
        qkv = torch.stack([m(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for m in (self.q, self.k, self.v)])
        normed = F.rms_norm(qkv, (DIM,))
        q, k = (qkv if self.gone else normed * self.gain)[:2]
        return F.softmax(q @ k.mT * DIM**-0.5, -1) @ normed[2]


def test_values_keep_a_statistic_whose_gain_is_for_queries_and_keys_alone() -> None:
    model, x = GainOfKeys(rms_op), torch.randn(3, 5, HEADS * DIM)
    report = strip_qk_norm(exported(model, x), scale="keep")
    model.gone = True
    assert len(report.removed) == 2 and torch.allclose(report.model(x), model(x), rtol=0, atol=1e-6)


class Fused(nn.Module):
    """One norm over queries, keys and values before they are told apart; `bare` and `gone` as in `Attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.bare, self.gone = nn.Conv1d(6, 18, 1), nn.BatchNorm1d(18), False, False
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        given = self.qkv(x)
        q, k, v = self.norm(given).split(6, 1)
        if self.bare:
            given = given * self.norm.weight[:, None] + self.norm.bias[:, None]
        if self.bare or self.gone:
            q, k, _ = given.split(6, 1)
        return F.softmax(q.mT @ k, -1) @ v.mT


@pytest.mark.parametrize("gain", ["drop", "keep"])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_of_a_fused_projection_stays_for_the_values(gain: Any, training: bool) -> None:
    model, x = Fused().train(training), torch.randn(2, 6, 5)
    graph = capture(copy.deepcopy(model), (x,), executable=True).graph_module
    (site,) = find_in_graph(graph).sites
    assert {n.module for n in site.qk_norm} == {None}
    report = strip_qk_norm(graph, gain=gain, scale="keep")
    model.bare, model.gone = gain == "keep", gain == "drop"
    assert not report.left and not report.vanished
    assert torch.equal(report.model(x), model(x))
    ours, theirs = gradients(report.model, x), gradients(model, x)
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in theirs)
    mean = report.model.get_buffer("norm.running_mean")
    assert torch.equal(mean, model.norm.running_mean) and bool(mean.any()) == training


def test_shared_norm_passed_by_twice_is_nothing_more_to_do() -> None:
    stripped = strip_qk_norm(exported(Fused(), torch.randn(2, 6, 5))).model
    assert isinstance(stripped, GraphModule)
    assert strip_qk_norm(stripped).model is stripped


def with_dropout(m: Attention, x: Tensor) -> Tensor:
    return torch.native_dropout(rms_op(m, x), 0.5, True)[0]


def with_writes(m: Attention, x: Tensor) -> Tensor:
    y = rms_op(m, x).clone()
    y[..., 0] *= 2
    return y


@pytest.mark.parametrize(
    ("way", "reason"),
    [(with_dropout, "it meets random numbers ('native_dropout')"), (with_writes, "it is written in place")],
)
def test_way_that_cannot_be_laid_once_more(way: Way, reason: str) -> None:
    x = torch.randn(3, 5, HEADS * DIM)
    graph = make_fx(KeysAreValues(way, fused=False))(x)
    report = strip_qk_norm(graph)
    (left,) = report.left
    assert left.reason == (
        "what its key norm makes is used outside the logits, too (as values, for example), and on its way to them "
        + reason
    )
    assert report.model is graph and report.layout.sites[0].qk_norm


def test_two_norms_in_a_row_leave_one_factor() -> None:
    def twice(m: Attention, x: Tensor) -> Tensor:
        return unit_length(m, unit_length(m, x))

    found = []
    for way in (unit_length, twice):
        torch.manual_seed(0)
        report = strip_qk_norm(exported(Attention(way), torch.randn(3, 5, HEADS * DIM)))
        assert isinstance(report.model, GraphModule)
        (site,) = find_in_graph(report.model).sites
        assert report.layout.sites == (site,)
        found.append(site.logit_scale)
    assert found[0] == found[1] == pytest.approx(DIM**-0.5 / DIM)
