"""Recordings that run: bitwise what the model computes, with its gradients, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CASES
from torch import Tensor, nn
from torch.fx import GraphModule
from toy import Toy

import quack_fx
from quack_fx.errors import CaptureError
from quack_fx.find import find_in_graph
from quack_fx.qk_norm.strip import strip_qk_norm


def graph_of(model: nn.Module, *args: Any, **kwargs: Any) -> GraphModule:
    return quack_fx.capture(model, args, kwargs, executable=True).graph_module


def tensors(output: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_flatten(output)[0] if isinstance(t, Tensor)]


@pytest.mark.parametrize("name", ["llama_eager", "qwen3", "gemma3", "gpt2", "deepseek_v3", "swin", "our_mla", "joint"])
def test_other_numbers_give_what_the_model_gives(name: str) -> None:
    """The check inside the capture saw the example inputs and these weights only."""
    torch.manual_seed(0)
    case = CASES[name]()
    model = case.model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    graph = graph_of(model, **case.inputs)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert {s.name for s in find_in_graph(graph).sites} == {s.name for s in case.layout.sites}
    named = dict(model.named_parameters())
    assert all(p is named[n] for n, p in graph.named_parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(parameter.shape) + 0.5)
    inputs = {n: _other(x) for n, x in case.inputs.items()}
    made: list[list[Tensor]] = []
    gradients: list[dict[str, Tensor]] = []
    for one in (model, graph):
        torch.manual_seed(1)
        output = one(**inputs)
        made.append(tensors(output))
        model.zero_grad()
        sum(t.square().mean() for t in made[-1] if t.requires_grad).backward()  # type: ignore[union-attr]
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert all(map(torch.equal, *made)) and len(made[0]) == len(made[1])
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][n], gradients[1][n], rtol=1e-4, atol=1e-7) for n in gradients[0])


def _other(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.dtype == torch.bool:
        return x
    return torch.rand_like(x) if x.is_floating_point() else x.flip(-1)


def test_result_has_the_form_of_the_models() -> None:
    case = CASES["qwen3"]()
    ids = case.inputs["input_ids"]
    graph = graph_of(case.model, ids, use_cache=False)
    assert type(graph(ids, use_cache=False)) is type(case.model(ids, use_cache=False))


def test_a_stripped_training_forward_trains_like_the_stripped_model() -> None:
    torch.manual_seed(0)
    case = CASES["qwen3"]()
    twin = copy.deepcopy(case.model)
    stripped = strip_qk_norm(graph_of(case.model, **case.inputs)).model
    strip_qk_norm(twin, case.layout)
    losses: list[list[float]] = []
    for one in (stripped, twin):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        losses.append([])
        for _ in range(3):
            logits = one(**case.inputs).logits
            loss = F.cross_entropy(logits.flatten(0, 1), case.inputs["input_ids"].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_dropout_draws_anew() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), torch.randn(4, 8)
    graph = graph_of(model, x)
    torch.manual_seed(3)
    expected = model(x), model(x)
    torch.manual_seed(3)
    assert torch.equal(graph(x), expected[0]) and torch.equal(graph(x), expected[1])


def test_running_statistics_go_on() -> None:
    model, x = nn.BatchNorm1d(4), torch.randn(16, 4)
    before = model.running_mean.clone()  # type: ignore[union-attr]
    graph = graph_of(model, x)
    assert torch.equal(model.running_mean, before)  # type: ignore[arg-type]
    graph(x)
    assert not torch.equal(model.running_mean, before)  # type: ignore[arg-type]


def test_what_gets_no_gradient_gets_none() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = m.a(x)
        return (m.b(x) - target).square() + m.a(x).detach()

    model, x = Toy(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), torch.randn(3, 4)
    graph_of(model, x)(x).sum().backward()
    assert model.a.weight.grad is None and model.b.weight.grad is not None  # type: ignore[union-attr]


def test_inputs_that_are_not_contiguous() -> None:
    model = Toy(lambda m, x: m.a(x.reshape(-1, 4)), a=nn.Linear(4, 4))
    x = torch.randn(4, 2, 1).expand(4, 2, 2)
    assert torch.equal(graph_of(model, x)(x), model(x)) and not x.is_contiguous()


class Straight(torch.autograd.Function):
    """Rounds, and lets gradients through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "own backward": (lambda m, x: Straight.apply(m.a(x)), "backward of its own"),
    "broken": (
        lambda m, x: m.a(x) @ torch.zeros(7),
        "the forward of Toy, or its backward, fails on the example inputs",
    ),
    "decision": (lambda m, x: m.a(x) if m.a(x).sum() > 0 else x, "looks at computed numbers"),
    "own generator": (
        lambda m, x: m.a(x) + torch.randn(4, generator=torch.Generator().manual_seed(0)),
        "random generator of its own",
    ),
    "cache": (lambda m, x: {"y": m.a(x), "cache": object()}, "returns a object, which no graph can hold"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    run, reason = REFUSED[case]
    model = Toy(run, a=nn.Linear(4, 4))
    with pytest.raises(CaptureError, match=reason):
        graph_of(model, torch.randn(3, 4))


def test_weights_without_numbers_are_refused() -> None:
    with pytest.raises(CaptureError, match="needs numbers, and weights of Linear are on the meta device"):
        graph_of(nn.Linear(4, 4, device="meta"), torch.randn(3, 4))
