"""QuacK's metrics against loops over heads, by one copy to the host."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

import pytest
import torch
from per_head import DIM, HEADS, KEY_HEADS, LAYOUT, Model, loss_of, train
from tiny_models import example
from torch import nn
from torch.optim import SGD, AdamW
from torch.overrides import TorchFunctionMode

from quack_fx import QuacK, compile_train_step, find_qk_pairs
from quack_fx.layout import QKLayout

WAITING = {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.numpy, torch.Tensor.cpu}
WAITING |= {getattr(torch.Tensor, f"__{name}__") for name in ("bool", "float", "int", "index")}


class Waits(TorchFunctionMode):
    """Counts what copies a tensor to the host, or may."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITING:
            self.calls.append(func.__name__)
        return func(*args, **(kwargs or {}))


def summary(name: str, values: list[float]) -> dict[str, float]:
    return {f"{name}/min": min(values), f"{name}/median": median(values), f"{name}/max": max(values)}


def by_hand(model: Model, layer: int, scale: float, tau: float, first: dict[str, list[float]]) -> dict[str, float]:
    """The metrics of a layer from its norms now and at the start."""
    share, at, now = HEADS // KEY_HEADS, f"attention/layers.{layer}", norms(model, layer)

    def met(of: dict[str, list[float]]) -> dict[str, list[float]]:
        keys, queries = [of["k"][h // share] for h in range(HEADS)], of["q"]
        return {"q": keys, "k": [max(queries[share * h : share * (h + 1)]) for h in range(KEY_HEADS)]}

    growth = {side: [a / b for a, b in zip(met(now)[side], met(first)[side], strict=True)] for side in "qk"}
    found = summary(f"{at}/qk_norm_product", [scale * q * now["k"][h // share] for h, q in enumerate(now["q"])])
    for side in "qk":
        found |= summary(f"{at}/{side}/norm", now[side])
        found |= summary(f"{at}/{side}/lr_scale", [tau / g for g in growth[side]])
    return found | summary(f"{at}/growth", growth["q"] + growth["k"])


def norms(model: Model, layer: int) -> dict[str, list[float]]:
    one = model.layers[layer]
    q = torch.cat([one.q.weight, one.q.bias[:, None]], 1).detach().double()
    k = one.kv.weight.detach().double()[: KEY_HEADS * DIM]
    return {side: rows.unflatten(0, (-1, DIM)).flatten(1).norm(dim=1).tolist() for side, rows in (("q", q), ("k", k))}


@pytest.mark.parametrize("by_step", [False, True])
def test_metrics_are_those_of_a_loop_over_heads(by_step: bool) -> None:
    model = Model()
    layout = find_qk_pairs(model, torch.randn(2, 6, 16))
    optimizer, first = AdamW(model.parameters(), lr=0.02), [norms(model, layer) for layer in range(2)]
    if by_step:
        step = compile_train_step(model, optimizer, loss_of, layout=layout, tau=0.5, compile=False)
        read = step.metrics
        for i in range(5):
            step(i)
    else:
        read = QuacK(optimizer, model, layout, tau=0.5).metrics
        train(model, optimizer, steps=range(5))
    expected = by_hand(model, 0, DIM**-0.5, 0.5, first[0]) | by_hand(model, 1, DIM**-0.5, 0.5, first[1])
    found = read()
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(type(value) is float for value in found.values())
    heads = read(heads=True)
    assert heads.items() >= found.items()
    q = [heads[f"attention/layers.1/q/norm/head_{h}"] for h in range(HEADS)]
    assert q == pytest.approx(norms(model, 1)["q"], rel=1e-6)


def test_growth_goes_on_after_a_checkpoint() -> None:
    """It is relative to the start of the run and not to what was loaded."""
    model = Model()
    optimizer = SGD(model.parameters(), lr=1.0, momentum=0.9)
    quack = QuacK(optimizer, model, LAYOUT)
    train(model, optimizer, steps=range(5))
    theirs = SGD(model.parameters(), lr=1.0, momentum=0.9)
    again = QuacK(theirs, model, LAYOUT)
    assert again.metrics()["attention/layers.0/growth/max"] == 1.0
    theirs.load_state_dict(optimizer.state_dict())
    assert again.metrics() == quack.metrics()
    assert again.metrics()["attention/layers.0/growth/max"] != 1.0


def test_one_copy_to_the_host_and_no_other_wait() -> None:
    """However many attentions, kinds and heads; a step waits for nothing."""
    model = nn.ModuleList([Model(), Model()])
    layout = find_qk_pairs(model[0], torch.randn(2, 6, 16))
    optimizer = SGD(model[0].parameters(), lr=0.1)
    quack = QuacK(optimizer, model[0], layout, tau=torch.tensor(0.5))
    for heads in (False, True, False):
        with Waits() as waits:
            quack.metrics(heads)
        assert waits.calls == ["tolist"]
    with Waits() as waits:
        optimizer.step()
    assert waits.calls == []


def test_the_count_can_fail() -> None:
    with Waits() as waits:
        assert float(torch.ones(())) == torch.ones(1).tolist()[0] == torch.ones(()).item()
    assert waits.calls == ["__float__", "tolist", "item"]


def test_mla_has_its_chains_and_the_sum_of_its_terms() -> None:
    model, inputs = mla()
    layout = find_qk_pairs(model, *inputs)
    quack = QuacK(SGD(model.parameters()), model, layout)
    found = quack.metrics(heads=True)
    at = "attention/blocks.0.attn"
    assert {name.split("/")[2] for name in found if name.startswith(f"{at}/")} == {
        "qk_norm_product",
        "growth",
        *("dq", "uq", "qr", "dkv", "uk", "kr"),
    }
    for h in range(6):
        dq, dkv, kr = (found[f"{at}/{name}/norm/head_0"] for name in ("dq", "dkv", "kr"))
        uq, qr, uk = (found[f"{at}/{name}/norm/head_{h}"] for name in ("uq", "qr", "uk"))
        bound = (uq * dq * uk * dkv + qr * dq * kr) / 48**0.5
        assert found[f"{at}/qk_norm_product/head_{h}"] == pytest.approx(bound, rel=1e-6)


def test_no_logit_of_inputs_of_norm_one_is_larger() -> None:
    """What the product is for: queries times keys of unit vectors, without biases."""
    model = Model()
    for layer in model.layers:
        nn.init.zeros_(layer.q.bias)
    layout = find_qk_pairs(model, torch.randn(2, 6, 16))
    found = QuacK(SGD(model.parameters()), model, layout).metrics(heads=True)
    x = nn.functional.normalize(torch.randn(500, 16), dim=-1)
    q = model.layers[0].q(x).unflatten(-1, (HEADS, DIM)).transpose(0, 1)
    k = model.layers[0].kv(x)[:, : KEY_HEADS * DIM].unflatten(-1, (KEY_HEADS, DIM)).transpose(0, 1)
    logits = (q @ k.repeat_interleave(HEADS // KEY_HEADS, 0).mT / DIM**0.5).abs().flatten(1).amax(1)
    for h in range(HEADS):
        assert float(logits[h].detach()) <= found[f"attention/layers.0/qk_norm_product/head_{h}"]


def test_attentions_of_one_module_have_metrics_of_their_own() -> None:
    """The second one's names have a number; all scales are in the report."""
    model = Model()
    sites = tuple(replace(site, name="layers") for site in LAYOUT.sites)
    found = QuacK(SGD(model.parameters()), model, QKLayout(sites)).metrics()
    expected = QuacK(SGD(model.parameters()), model, LAYOUT).metrics()
    for i, name in enumerate(("layers", "layers#2")):
        for what in ("qk_norm_product/max", "growth/min"):
            assert found[f"attention/{name}/{what}"] == expected[f"attention/layers.{i}/{what}"]
    scales = QuacK(SGD(model.parameters()), model, QKLayout(sites)).factors()
    assert len(scales["layers"]) == sum(map(len, QuacK(SGD(model.parameters()), model, LAYOUT).factors().values()))


def test_what_is_not_scaled_has_no_metrics() -> None:
    model = Model()
    step = compile_train_step(model, SGD(model.parameters()), loss_of, layout=QKLayout(), compile=False)
    assert step.metrics() == {}


def test_a_run_that_diverged_is_told_of_and_not_crashed() -> None:
    model = Model()
    quack = QuacK(SGD(model.parameters()), model, LAYOUT)
    nn.init.constant_(model.layers[0].q.weight, float("inf"))
    assert quack.metrics()["attention/layers.0/q/norm/max"] == float("inf")


def mla() -> tuple[nn.Module, tuple[torch.Tensor]]:

    module = example("mla")
    torch.manual_seed(0)
    return module.MLATransformer(module.MLAConfig()), (torch.randint(64, (1, 4)),)
