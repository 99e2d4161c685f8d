"""Weights that start at zero: LoRA's B, queries of muP. What they are multiplied with trains by the bound they have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from per_head import DIM, HEADS, KEY_HEADS, LAYOUT, Model, assert_same, train
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from quack_fx import QuacK, compile_train_step, find_qk_pairs
from quack_fx.errors import FactorError

WIDTH, RANK = 8, 2


class Branch(nn.Module):
    """W x + 2 B A x, W frozen."""

    def __init__(self, b: float) -> None:
        super().__init__()
        self.w, self.a, self.b = (
            nn.Linear(m, n, bias=False) for m, n in ((WIDTH, WIDTH), (WIDTH, RANK), (RANK, WIDTH))
        )
        self.w.weight.requires_grad_(False)
        nn.init.normal_(self.b.weight, std=b) if b else nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x) + 2 * self.b(self.a(x))


class Lora(nn.Module):
    """Two heads; queries and keys each with a branch."""

    def __init__(self, b: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = Branch(b), Branch(b)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, WIDTH // 2)).transpose(-2, -3) for t in (self.q(x), self.k(x), x))
        return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


def head_norms(weight: Tensor, heads: int = 2) -> list[float]:
    return [float(rows.double().norm()) for rows in weight.detach().chunk(heads)]


def step_lora(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(i))
    optimizer.zero_grad()
    (100 * F.mse_loss(model(x), x.roll(1, -1).sin())).backward()
    optimizer.step()


def test_both_factors_of_lora_follow_the_rule() -> None:
    """B has a factor, since A is not zero; A starts where B is as large as A was. Against the terms, in fp64."""
    model = Lora()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
    quack = QuacK(optimizer, model, find_qk_pairs(model, torch.randn(2, 5, WIDTH)), tau=0.5)
    sides = ((model.q, model.k), (model.k, model.q))
    start = [(head_norms(own.a.weight, 1)[0], head_norms(other.w.weight)) for own, other in sides]
    slowest = 1.0
    for i in range(40):
        (report,) = quack.factors().values()
        for (name, (own, other)), (a, w) in zip(zip("qk", sides, strict=True), start, strict=True):
            a_now, b_now = head_norms(own.a.weight, 1)[0], head_norms(own.b.weight)
            branch = [b * head_norms(other.a.weight, 1)[0] for b in head_norms(other.b.weight)]
            met = [max(pair) for pair in zip(w, branch, strict=True)]  # the larger of two terms binds
            met_by_a = max(b * m for b, m in zip(b_now, met, strict=True))
            of_a = min(1.0, a * max(w) / met_by_a) if met_by_a else 1.0
            assert report[f"{name}.a.weight[0:2]"] == pytest.approx(0.5 * of_a, rel=1e-5)
            slowest = min(slowest, of_a)
            for h in range(2):
                expected = 0.5 * (a * w[h]) / (a_now * met[h])
                assert report[f"{name}.b.weight[{4 * h}:{4 * h + 4}]"] == pytest.approx(expected, rel=1e-5)
        step_lora(model, optimizer, i)
    assert slowest < 0.7  # B did grow beyond what A was


def test_lora_whose_b_is_not_zero_is_as_before() -> None:
    """Its first factors are all there, and none is bounded."""
    model = Lora(b=1e-3)
    quack = QuacK(SGD(model.parameters()), model, find_qk_pairs(model, torch.randn(2, 5, WIDTH)))
    assert (quack.init_factors > 0).all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.25])
def test_keys_of_queries_that_start_at_zero(compiled: bool, tau: float) -> None:
    """lr(K) = tau min(1, |K| at the start / |Q|), and the queries' is the rule's."""
    model = zero_queries(Model())
    optimizer = AdamW(model.parameters(), lr=0.1 / tau)
    quack = attach(model, optimizer, tau, compiled)
    layer, share = model.layers[0], HEADS // KEY_HEADS
    first = head_norms(layer.kv.weight[: KEY_HEADS * DIM], KEY_HEADS)
    slowest = 1.0
    for i in range(30):
        report = quack.factors()["layers.0"]
        q = head_norms(torch.cat([layer.q.weight, layer.q.bias[:, None]], 1), HEADS)
        k = head_norms(layer.kv.weight[: KEY_HEADS * DIM], KEY_HEADS)
        for h in range(KEY_HEADS):
            largest = max(q[share * h : share * (h + 1)])
            bound = min(1.0, first[h] / largest) if largest else 1.0
            slowest = min(slowest, bound)
            assert report[f"layers.0.kv.weight[{DIM * h}:{DIM * (h + 1)}]"] == pytest.approx(tau * bound, rel=1e-5)
        for h in range(HEADS):
            expected = tau * first[h // share] / k[h // share]
            assert report[f"layers.0.q.weight[{DIM * h}:{DIM * (h + 1)}]"] == pytest.approx(expected, rel=1e-5)
        train(model, optimizer, steps=range(i, i + 1))
    assert slowest < 1.0
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_run_that_started_at_zero_goes_on_to_the_bit() -> None:
    """The first factors that were bounded are so again after a checkpoint."""
    model = zero_queries(Model())
    optimizer = SGD(model.parameters(), lr=3.0, momentum=0.5)
    attach(model, optimizer, 0.5, False)
    train(model, optimizer, steps=range(5))
    other = copy.deepcopy(model)
    theirs = SGD(other.parameters(), lr=3.0, momentum=0.5)
    attach(other, theirs, 0.5, False)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (other, theirs)):
        train(one, its, steps=range(5, 10))
    assert_same(model, other)


def test_a_run_that_starts_again_from_zero_is_as_one_that_first_does() -> None:
    """A state without steps starts its attentions anew from the weights now, which are zero."""
    kept = []
    for late in (False, True):
        model = Model() if late else zero_queries(Model())
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.5)
        fresh = copy.deepcopy(optimizer.state_dict())
        quack = attach(model, optimizer, 1.0, False)
        zero_queries(model)
        optimizer.load_state_dict(fresh)
        train(model, optimizer, steps=range(1))
        kept.append([optimizer.state[weight]["quack_init"] for weight in quack.scaling.home])
    assert all(map(torch.equal, *kept))


def test_zeros_on_both_sides_are_refused() -> None:
    model = zero_queries(Model())
    nn.init.zeros_(model.layers[0].kv.weight)
    with pytest.raises(FactorError, match=r"layers\.0\.kv\.weight has norm zero.*initialise it"):
        attach(model, SGD(model.parameters()), 1.0, False)


def zero_queries(model: Model) -> Model:
    for layer in model.layers:
        nn.init.zeros_(layer.q.weight)
        nn.init.zeros_(layer.q.bias)
    return model


def attach(model: nn.Module, optimizer: Any, tau: float, compiled: bool) -> QuacK:
    """QuacK by hooks, or that of a step; its steps are then the optimizer's."""
    if compiled:
        return compile_train_step(model, optimizer, layout=LAYOUT, tau=tau, compile=False).quacks[0]
    return QuacK(optimizer, model, LAYOUT, tau=tau)
