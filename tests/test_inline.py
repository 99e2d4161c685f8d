"""QuacK in graphs of optimizer steps that were traced: the steps are those of the same optimizer with hooks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import tiny_models
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import SGD, AdamW, Muon, NAdam, Optimizer

from quack_fx import QKLayout, QuacK, StepBackend, inline_quack
from quack_fx.errors import InlineError

Make = Callable[[list[nn.Parameter]], Optimizer]

LR = torch.tensor(1e-2, dtype=torch.float64)
OPTIMIZERS: dict[str, Make] = {
    "adamw foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
    "adamw single": lambda p: AdamW(p, lr=1e-2, foreach=False),
    "adamw amsgrad": lambda p: AdamW(p, lr=1e-2, amsgrad=True, weight_decay=0.1, foreach=True),
    "sgd foreach": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd single": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=False),
    "nadam": lambda p: NAdam(p, lr=1e-2, foreach=True),
    "muon": lambda p: Muon([w for w in p if w.dim() == 2], lr=1e-2),
}


def a_model(name: str = "our_mla") -> tuple[nn.Module, QKLayout]:
    case = tiny_models.CASES[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in case.model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return case.model.double(), case.layout


def give_gradients(seed: int, *models: nn.Module) -> None:
    generator = torch.Generator().manual_seed(seed)
    for params in zip(*(model.parameters() for model in models), strict=True):
        grad = torch.randn(params[0].shape, generator=generator, dtype=torch.float64)
        for p in params:
            p.grad = grad.clone() if p.grad is None else p.grad.copy_(grad)


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((p - q).abs().max() / q.abs().max().clamp_min(1e-30)) for p, q in pairs)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's about profilers
        yield
    torch._dynamo.reset()


def trained_by_hooks(make: Make, model: nn.Module, layout: QKLayout, tau: float) -> Optimizer:
    optimizer = make(list(model.parameters()))
    QuacK(optimizer, model, layout, tau=tau)
    return optimizer


# ---- AOTAutograd -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_step_with_the_backend_is_the_hooked_one(name: str) -> None:
    model, layout = a_model()
    make = OPTIMIZERS[name]
    plain, plainly_compiled, hooked = (copy.deepcopy(model) for _ in range(3))
    optimizer, reference = make(list(model.parameters())), trained_by_hooks(make, hooked, layout, 0.5)
    by_torch, compiled_by_torch = make(list(plain.parameters())), make(list(plainly_compiled.parameters()))
    step = torch.compile(optimizer.step, backend=StepBackend(model, layout, tau=0.5, backend="aot_eager"))
    without = torch.compile(compiled_by_torch.step, backend="aot_eager")
    for seed in range(4):
        give_gradients(seed, model, hooked, plain, plainly_compiled)
        for take in (step, reference.step, by_torch.step, without):
            take()
    assert distance(model, plain) > 1e-3
    # Compiled, torch counts steps in float32; what that makes of a step without QuacK is allowed here, too.
    assert distance(model, hooked) < 1e-6 + 2 * distance(plainly_compiled, plain)


def test_the_backend_goes_on_where_another_stopped() -> None:
    model, layout = a_model()
    backend = StepBackend(model, layout, tau=0.5, backend="aot_eager")
    optimizer = SGD(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend=backend)
    for seed in range(3):
        give_gradients(seed, model)
        step()
    again = copy.deepcopy(model)
    later = StepBackend(again, layout, tau=1.0, backend="aot_eager")
    later.load_state_dict(copy.deepcopy(backend.state_dict()))
    other = torch.compile(SGD(again.parameters(), lr=0.1).step, backend=later)
    for seed in range(3, 5):
        give_gradients(seed, model, again)
        step()
        other()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


# ---- make_fx ---------------------------------------------------------------------------------------------------------


def state_of(optimizer: Optimizer) -> list[Tensor]:
    return [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]


def traced(optimizer: Optimizer) -> fx.GraphModule:
    """The optimizer's step as a graph that writes into the weights and state that it holds; they stay as they are."""
    held = [p for group in optimizer.param_groups for p in group["params"]] + state_of(optimizer)
    saved = [x.detach().clone() for x in held]
    take = type(optimizer).step.__wrapped__  # without the profiler around it
    for group in optimizer.param_groups:
        group["capturable"] = True  # step counts in tensors, so that the graph is that of any step
    with patch("torch.compiler.is_compiling", lambda: True), patch("torch.compiler.is_dynamo_compiling", lambda: True):
        graph = make_fx(lambda: take(optimizer))()
    with torch.no_grad():
        for x, old in zip(held, saved, strict=True):
            x.copy_(old)
    return graph


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_traced_by_make_fx_is_the_hooked_one(name: str) -> None:
    model, layout = a_model()
    first = copy.deepcopy(model)
    make = OPTIMIZERS[name]
    hooked = copy.deepcopy(model)
    optimizer, reference = trained_by_hooks(make, model, layout, 0.5), trained_by_hooks(make, hooked, layout, 0.5)
    give_gradients(0, model, hooked)
    optimizer.step()  # makes the state
    reference.step()
    trained = {n: p.detach().clone() for n, p in model.named_parameters()}
    graph = traced(make_bare(optimizer))
    model.load_state_dict(first.state_dict())  # first factors are those of the initial weights
    inlined = inline_quack(graph, layout, model, tau=0.5)
    model.load_state_dict(trained, strict=False)
    for seed in range(1, 4):
        give_gradients(seed, model, hooked)
        with torch.no_grad():
            inlined()
        reference.step()
    assert distance(model, hooked) < 1e-6


def make_bare(optimizer: Optimizer) -> Optimizer:
    """The optimizer without hooks."""
    optimizer._optimizer_step_pre_hooks.clear()
    optimizer._optimizer_step_post_hooks.clear()
    return optimizer


def sgd(params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (1 - 0.1 * 0.01) * param - 0.1 * grads[name] for name, param in params.items()}


def test_new_values_that_are_returned() -> None:
    model, layout = a_model()
    hooked = copy.deepcopy(model)
    reference = SGD(hooked.parameters(), lr=0.1, weight_decay=0.01)
    QuacK(reference, hooked, layout, tau=0.5)
    give_gradients(0, model, hooked)
    params = {n: p.detach() for n, p in model.named_parameters()}
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    graph = make_fx(sgd)(params, grads)
    names = {name: i for i, name in enumerate(params)}
    inlined = inline_quack(graph, layout, model, weights=names, tau=0.5)
    for seed in range(3):
        give_gradients(seed, model, hooked)
        params = inlined(params, {n: p.grad for n, p in model.named_parameters()})
        reference.step()
    for name, p in hooked.named_parameters():
        torch.testing.assert_close(params[name], p.detach(), rtol=1e-9, atol=1e-12)


def test_tau_is_a_buffer_of_the_graph() -> None:
    model, layout = a_model()
    give_gradients(0, model)
    params = {n: p.detach() for n, p in model.named_parameters()}
    grads = {n: p.grad for n, p in model.named_parameters()}
    inlined = inline_quack(make_fx(sgd)(params, grads), layout, model, weights={n: i for i, n in enumerate(params)})
    at_one = inlined(params, grads)
    inlined.quack_tau.fill_(0.0)
    at_zero = inlined(params, grads)
    block = layout.sites[0].query[0]
    rows = slice(*block.heads[0][0])
    assert torch.equal(at_zero[block.param][rows], params[block.param][rows])
    assert not torch.equal(at_one[block.param][rows], params[block.param][rows])


# ---- refusals --------------------------------------------------------------------------------------------------------


def both_moved(params: list[Tensor], grads: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """New weights, and an average of them beside: which of the two is the weight?"""
    new = [param - 0.1 * grad for param, grad in zip(params, grads, strict=True)]
    return new, [param * 0.9 + x * 0.1 for param, x in zip(params, new, strict=True)]


def unrelated(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    return [grad.sign() * param.abs() for param, grad in zip(params, grads, strict=True)]


@pytest.mark.parametrize(
    ("step", "known", "words"),
    [
        (both_moved, True, "2 outputs of the graph may be the new value of"),
        (unrelated, True, "the new value of .* cannot be identified among the outputs"),
        (sgd, False, "are not among the inputs of the graph and what it holds"),
    ],
    ids=["two outputs", "no output", "which inputs"],
)
def test_graphs_in_which_weights_cannot_be_told(step: Any, known: bool, words: str) -> None:
    model, layout = a_model()
    give_gradients(0, model)
    names = [n for n, _ in model.named_parameters()]
    params, grads = [p.detach() for p in model.parameters()], [p.grad for p in model.parameters()]
    given = (params, grads) if known else (dict(zip(names, params, strict=True)), dict(zip(names, grads, strict=True)))
    graph = make_fx(step)(*given)
    with pytest.raises(InlineError, match=words):
        inline_quack(graph, layout, model, weights={n: i for i, n in enumerate(names)} if known else None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": {"blocks.0.attn.q_up.weight": "nothing"}}, "names the placeholder 'nothing'"),
        ({"inputs": [torch.zeros(1)]}, "1 inputs were given for a graph with"),
        ({"norm": "spectral"}, "cannot be part of a graph"),
    ],
    ids=["placeholder", "inputs", "norm"],
)
def test_bad_arguments(options: dict[str, Any], words: str) -> None:
    model, layout = a_model()
    give_gradients(0, model)
    named = dict(model.named_parameters())
    graph = make_fx(sgd)({n: p.detach() for n, p in named.items()}, {n: p.grad for n, p in named.items()})
    with pytest.raises(InlineError, match=words):
        inline_quack(graph, layout, model, **options)
