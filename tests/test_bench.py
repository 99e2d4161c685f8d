"""What `quack-fx bench` and benchmarks/ print: counts by hand, ratios within a round, all ways on a small model."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from quack_fx import find_qk_pairs
from quack_fx.bench import MEANING, Case, compare, findings, markdown
from quack_fx.bench.arms import arms
from quack_fx.bench.compare import _flops, _matmul_dtype, _scaled
from quack_fx.bench.measure import Times, interleaved

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import gpt
import mla

LAYERS, WIDTH, TOKENS, VOCABULARY = 2, 32, 8, 64


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = model(tokens, targets)[1]
    return loss


def half_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return loss_of(model, tokens, targets)


def double_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # torch 2.11's own kernel for CPUs fails on float64
        return loss_of(model, tokens, targets)


def loss_that_looks(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    loss = loss_of(model, tokens, targets)
    assert loss.item() > 0
    return loss


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(VOCABULARY, TOKENS, LAYERS, 2, WIDTH, bias=False))
    batch = tuple(torch.randint(0, VOCABULARY, (2, 3, TOKENS)))
    return Case(model, find_qk_pairs(model, *batch), loss_of, batch)


def test_flops_and_scaled_weights_are_those_counted_by_hand(case: Case) -> None:
    """Forward and twice as much backward: 6 for each weight of a product and token, 12 for each width of attention."""
    matrices = LAYERS * 12 * WIDTH**2 + VOCABULARY * WIDTH
    tokens = 3 * TOKENS
    assert _flops(case) == 6 * matrices * tokens + 12 * LAYERS * WIDTH * TOKENS * tokens
    assert _scaled(case) == LAYERS * 2 * WIDTH**2
    assert _flops(replace(case, loss=loss_that_looks)) == _flops(case)
    assert all(p.grad is None for p in case.model.parameters())


def test_matmul_dtype(case: Case) -> None:
    assert _matmul_dtype(case) == torch.float32
    assert _matmul_dtype(Case(case.model, case.layout, half_loss, case.args)) == torch.bfloat16


def test_ratios_are_within_a_round() -> None:
    """A machine that halves its speed for some rounds changes no ratio."""
    slow = (1.0, 1.0, 2.0, 4.0)
    low, middle, high = Times(tuple(1.5 * s for s in slow)).over(Times(slow))
    assert low == middle == high == 1.5
    order: list[str] = []
    interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 2)  # type: ignore[misc]
    assert order == ["a", "b", "b", "a"]


def test_a_way_that_cannot_be_taken_is_told() -> None:
    model = mla.MLATransformer(mla.MLAConfig(layers=1))
    batch = tuple(torch.randint(0, 256, (2, 1, 4)))
    made, missing = arms(["a", "e"], Case(model, find_qk_pairs(model, *batch), loss_of, batch))
    assert made.keys() == {"a"} and "graph" in missing["e"]


@pytest.mark.slow
def test_all_ways_take_the_same_step(case: Case) -> None:
    """All but QK norm's; the table has a row for each, with what they cost.

    In fp64: they sum up in other orders, and Adam makes much of a rounding where a gradient is little. What is left is
    that torch, where it compiles its own AdamW, corrects its moments in fp32, and that its fused kernel, which our step
    takes, is given the clipping in fp32.
    """
    comparison = compare(case, [*MEANING], rounds=1)
    assert comparison.ways.keys() == MEANING.keys() and not comparison.missing
    for name, way in comparison.ways.items():
        assert way.peak > 0, name
        assert way.update is not None and way.step.median > way.update.median > 0, name
    text = markdown(comparison)
    assert all(f"| {name} | {meaning} |" in text for name, meaning in MEANING.items())
    assert "update" in next(iter(findings(comparison)))
    case = replace(case, model=copy.deepcopy(case.model).double(), loss=double_loss, lr=3e-3)
    made, _ = arms([*MEANING], case)
    weights = {}
    for name in (name for name in MEANING if name not in ("e", "f", "quack")):
        for _ in range(5):
            made[name].step()
        weights[name] = torch.cat([p.detach().flatten() for p in made[name].model.parameters()])
    for name, limit in {"b": 1e-9, "c": 1e-5, "plain": 1e-8}.items():
        assert torch.allclose(weights[name], weights["a"], rtol=0, atol=limit)
    made, _ = arms(["quack"], case)
    for _ in range(5):
        made["quack"].step()
    ours = torch.cat([p.detach().flatten() for p in made["quack"].model.parameters()])
    assert torch.allclose(ours, weights["d"], rtol=0, atol=1e-5) and not torch.allclose(ours, weights["a"], atol=1e-4)
