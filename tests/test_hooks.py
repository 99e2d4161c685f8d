"""QuacK on optimizers: equal to a learning rate per head, exact where nothing changes, and at home in checkpoints."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emit_cases import example_mla
from hypothesis import given, settings
from hypothesis import strategies as st
from per_head import (
    DIM,
    HEADS,
    KEY_HEADS,
    LAYERS,
    LAYOUT,
    Lion,
    Model,
    PerHeadRun,
    assert_same,
    batch,
    heads,
    loss_of,
    relative_error,
    row_factors,
    site,
    train,
    train_per_head,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, Adam, AdamW, Optimizer

from quack_fx import QuacK, compile_train_step
from quack_fx.errors import FactorError, LayoutError, OptimizerError
from quack_fx.layout import AttentionSite, Norm, QKLayout, WeightBlock
from quack_fx.layout.fit import layout_params

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": partial(AdamW, lr=3e-3, weight_decay=0.1, foreach=False),
    "AdamW foreach": partial(AdamW, lr=3e-3, weight_decay=0.1, foreach=True),
    "AdamW fused": partial(AdamW, lr=3e-3, weight_decay=0.1, fused=True),
    "Adam with coupled decay": partial(Adam, lr=3e-3, weight_decay=0.01),
    "SGD": partial(SGD, lr=0.1),
    "SGD with momentum": partial(SGD, lr=0.03, momentum=0.9, weight_decay=0.01),
    "SGD with nesterov": partial(SGD, lr=0.03, momentum=0.9, nesterov=True, foreach=True),
    "Lion": partial(Lion, lr=1e-3, weight_decay=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_equal_to_a_learning_rate_per_head(make: Callable[[Any], Optimizer]) -> None:
    """50 steps in fp32 under a schedule, against every head as its own parameter in its own group."""

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / 10) * (1 - step / 100)

    model, tau = Model(), 0.5
    reference = train_per_head(model, make, tau, schedule)
    optimizer = make(model.parameters())
    quack = QuacK(optimizer, model, LAYOUT, tau=tau)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for step in range(50):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        scheduler.step()
    for i, layer in enumerate(model.layers):
        for ours, theirs in zip((layer.q.weight, layer.q.bias, layer.kv.weight), reference.weights(i), strict=True):
            assert relative_error(ours, theirs) <= 1e-6
    scales = [s for report in quack.factors().values() for s in report.values()]
    assert max(abs(s / tau - 1) for s in scales) > 1e-3  # the factors did move


def orthogonalised(gradient: Tensor) -> Tensor:
    """Newton-Schulz as the Muon of torch.optim does it: five steps in bfloat16 on the wide side."""
    tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.bfloat16().T if tall else gradient.bfloat16()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if tall else x).to(gradient.dtype)


def row_scales(model: Model, init: dict[nn.Parameter, Tensor], tau: float) -> dict[nn.Parameter, Tensor]:
    """Scale of every row of the tensors with queries and keys; 1 for the values, which come last."""
    scales = {p: tau * now / init[p] for p, now in row_factors(model).items()}
    return {p: torch.cat([s, torch.ones(len(p) - len(s))]) for p, s in scales.items()}


def test_muon_scales_rows_of_the_orthogonalised_whole() -> None:
    """Muon on the matrices and AdamW on all else, biases of queries included: two optimizers, one QuacK each.

    In fp64, since Muon orthogonalises in bfloat16, where one fp32 rounding becomes a difference of 0.4%.
    """
    lr, decay, momentum, tau = 0.01, 0.1, 0.95, 0.5
    model, reference = Model().double(), Model().double()
    muon = torch.optim.Muon(
        [p for layer in model.layers for p in (layer.q.weight, layer.kv.weight)],
        lr=lr,
        weight_decay=decay,
        momentum=momentum,
    )
    adamw = AdamW([p for n, p in model.named_parameters() if not n.endswith(("q.weight", "kv.weight"))], lr=3e-3)
    QuacK(muon, model, LAYOUT, tau=tau)
    QuacK(adamw, model, LAYOUT, tau=tau)
    train(model, muon, adamw)

    matrices = {p: torch.zeros_like(p) for layer in reference.layers for p in (layer.q.weight, layer.kv.weight)}
    biases = [layer.q.bias for layer in reference.layers]
    plain = AdamW([p for p in reference.parameters() if p not in matrices], lr=3e-3)
    init = row_factors(reference)
    for step in range(50):
        reference.zero_grad()
        loss_of(reference, step).backward()
        with torch.no_grad():
            scales = row_scales(reference, init, tau)
            for p, buffer in matrices.items():
                assert p.grad is not None
                buffer.lerp_(p.grad, 1 - momentum)
                update = lr * max(1, p.shape[0] / p.shape[1]) ** 0.5 * orthogonalised(p.grad.lerp(buffer, momentum))
                p -= scales[p][:, None] * (lr * decay * p + update)
            scales = row_scales(reference, init, tau)  # the second optimizer steps from these weights
            before = [bias.clone() for bias in biases]
            plain.step()
            for bias, old in zip(biases, before, strict=True):
                bias.copy_(old + scales[bias] * (bias - old))
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert relative_error(ours, theirs) <= 1e-12, name


def test_muon_in_float32_step_by_step() -> None:
    """50 steps; each from the same weights and momenta against an unscaled whole step whose rows are then scaled."""
    model, tau = Model(), 0.5
    muon = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.01, weight_decay=0.1)
    QuacK(muon, model, LAYOUT, tau=tau)
    init = row_factors(model)
    for step in range(50):
        model.zero_grad()
        loss_of(model, step).backward()
        twin, twin_muon = copy.deepcopy((model, muon))  # the copy of an optimizer has no hooks
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = ours.grad
        scales = dict(zip(row_factors(twin), row_scales(model, init, tau).values(), strict=True))
        before = {p: p.detach().clone() for p in scales}
        muon.step()
        twin_muon.step()
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            with torch.no_grad():
                if theirs in scales and theirs.dim() == 2:
                    theirs.copy_(before[theirs] + scales[theirs][:, None] * (theirs - before[theirs]))
            assert relative_error(ours, theirs) <= 1e-6, name


def test_queries_and_keys_in_two_optimizers() -> None:
    """Each QuacK scales what its optimizer holds; the factors come from the whole model before that step."""
    model, reference, tau = Model().double(), Model().double(), 0.3
    optimizers = []
    for held in ("q.", "kv."):
        optimizer = SGD([p for n, p in model.named_parameters() if held in n], lr=0.1, momentum=0.9)
        QuacK(optimizer, model, LAYOUT, tau=tau)
        optimizers.append(optimizer)
    train(model, *optimizers)

    init = row_factors(reference)
    momenta = {p: torch.zeros_like(p) for p in init}
    for step in range(50):
        reference.zero_grad()
        loss_of(reference, step).backward()
        for held in ("q.", "kv."):
            scales = row_scales(reference, init, tau)
            for name, p in reference.named_parameters():
                if held in name and p.grad is not None:
                    momenta[p] = 0.9 * momenta[p] + p.grad
                    p.data -= 0.1 * scales[p].view(-1, *[1] * (p.dim() - 1)) * momenta[p]
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert relative_error(ours, theirs) <= 1e-12, name


def test_only_query_and_key_rows_are_touched() -> None:
    """tau = 1 leaves the first step bit for bit; another tau scales query and key rows and nothing else."""
    plain, same, scaled, start = Model(), Model(), Model(), Model()
    train(plain, AdamW(plain.parameters()), steps=range(1))
    for model, tau in ((same, 1.0), (scaled, 0.1)):
        optimizer = AdamW(model.parameters())
        QuacK(optimizer, model, LAYOUT, tau=tau)
        train(model, optimizer, steps=range(1))
    assert_same(same, plain)
    for (name, ours), full, old in zip(scaled.named_parameters(), plain.parameters(), start.parameters(), strict=True):
        rows = len(ours) if ".q." in name else KEY_HEADS * DIM if ".kv." in name else 0
        torch.testing.assert_close(ours[:rows], old[:rows] + 0.1 * (full[:rows] - old[:rows]))
        assert torch.equal(ours[rows:], full[rows:])


def test_interleaved_transposed_and_overlapping_rows() -> None:
    """Features along axis 1, values between the heads, and rows that two sites cut differently: the smaller scale."""
    model = nn.Module()
    model.fused = nn.Parameter(torch.randn(6, 24, generator=torch.Generator().manual_seed(0)))
    start = model.fused.detach().clone()

    def head(name: str, query: Any, key: Any) -> AttentionSite:
        blocks = {"query": (WeightBlock("fused", "q", 1, (query,)),), "key": (WeightBlock("fused", "k", 1, (key,)),)}
        return dataclasses.replace(site(0), name=name, query_heads=1, key_heads=1, head_map=(0,), **blocks)

    layout = QKLayout((head("a", ((0, 4),), ((8, 12),)), head("b", ((2, 6),), ((16, 18), (20, 22)))))
    optimizer = SGD(model.parameters(), lr=0.5)
    quack = QuacK(optimizer, model, layout)
    model.fused.grad = torch.ones_like(model.fused)
    optimizer.step()
    before = model.fused.detach().clone()
    optimizer.step()

    def scale_by(*columns: int) -> float:
        """Scale of the rows that are multiplied with these."""
        return float(start[:, columns].norm() / before[:, columns].norm())

    q_a, q_b, k_a, k_b = (0, 1, 2, 3), (2, 3, 4, 5), (8, 9, 10, 11), (16, 17, 20, 21)
    step = torch.full((24,), 0.5)
    step[[0, 1]] *= scale_by(*k_a)
    step[[2, 3]] *= min(scale_by(*k_a), scale_by(*k_b))
    step[[4, 5]] *= scale_by(*k_b)
    step[list(k_a)] *= scale_by(*q_a)
    step[list(k_b)] *= scale_by(*q_b)
    torch.testing.assert_close(before - model.fused.detach(), step.expand(6, 24))
    assert list(quack.factors()["b"]) == ["fused[2:6]", "fused[16:18, 20:22]"]


def test_bfloat16_is_blended_in_float32_and_rounded_once() -> None:
    model, tau = Model().bfloat16(), 0.3
    optimizer = SGD(model.parameters(), lr=0.5)
    with pytest.warns(
        UserWarning, match="are in torch.bfloat16: the optimizer rounds an update before QuacK"
    ) as caught:
        QuacK(optimizer, model, LAYOUT, tau=tau)
    assert len(caught) == 1 and caught[0].filename == __file__
    model.zero_grad()
    loss_of(model, 0).backward()
    weight = model.layers[0].q.weight
    old, new = weight.detach().clone(), (weight - 0.5 * weight.grad).detach()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.lerp(old.float(), new.float(), tau).bfloat16(), rtol=0, atol=0)


def test_nothing_moves_when_the_step_is_skipped() -> None:
    """GradScaler that finds an infinity, fused optimizers told of one, and gradients of zero."""
    model = Model()
    optimizer = AdamW(model.parameters(), fused=True)
    QuacK(optimizer, model, LAYOUT, tau=0.1)
    train(model, optimizer, steps=range(3))
    before = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.zero_grad()
    (scaler.scale(loss_of(model, 3)) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same(model, before)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 3)).backward()
    scaler.step(optimizer)  # and goes on afterwards
    assert not torch.equal(model.layers[0].q.weight, before.layers[0].q.weight)

    still = Model()
    sgd = SGD(still.parameters(), lr=0.1)
    QuacK(sgd, still, LAYOUT, tau=7.0)
    for p in still.parameters():
        p.grad = torch.zeros_like(p)
    sgd.step()
    assert_same(still, Model())


def test_closures() -> None:
    runs = []
    for with_closure in (False, True):
        model = Model()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        QuacK(optimizer, model, LAYOUT, tau=0.5)
        for step in range(5):

            def closure(model: Model = model, optimizer: SGD = optimizer, step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            if with_closure:
                assert optimizer.step(closure) is not None
            else:
                closure()
                optimizer.step()
        runs.append(model)
    assert_same(*runs)


def test_learning_rate_in_a_tensor() -> None:
    runs = []
    for lr in (0.003, torch.tensor(0.003)):
        model = Model()
        optimizer = AdamW(model.parameters(), lr=lr, foreach=False)
        QuacK(optimizer, model, LAYOUT, tau=0.5)
        runs.append(train(model, optimizer, steps=range(5)))
    for ours, theirs in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_step_never_waits_for_the_device() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    QuacK(optimizer, model, LAYOUT, tau=0.5)
    train(model, optimizer, steps=range(2))
    with torch.profiler.profile() as profile:
        optimizer.step()
    operations = {event.key for event in profile.key_averages()}
    assert "aten::lerp" in operations
    assert not operations & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


class Decaying(AdamW):
    """A subclass that does something of its own before the step that it inherits."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.99)
        return super().step(closure)


def test_steps_inside_steps_and_steps_that_fail() -> None:
    """torch fires the hooks twice for a subclass that calls super().step(); the whole update is scaled, once."""
    plain, scaled, start = Model(), Model(), Model()
    train(plain, Decaying(plain.parameters()), steps=range(1))
    optimizer = Decaying(scaled.parameters())
    AdamW(Model().parameters())  # from now on the inherited step has hooks of its own
    QuacK(optimizer, scaled, LAYOUT, tau=0.1)

    def failing() -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(failing)
    scaled.load_state_dict(start.state_dict())
    train(scaled, optimizer, steps=range(1))
    for layer, full, old in zip(scaled.layers, plain.layers, start.layers, strict=True):
        expected = old.q.weight + 0.1 * (full.q.weight - old.q.weight)
        torch.testing.assert_close(layer.q.weight, expected)
    assert_same(scaled.head, plain.head)


def test_frozen_weights_and_groups_added_later() -> None:
    """A frozen query counts in its key's factor and stays; a group that joins later is scaled by its first weights."""
    model, reference = Model(), Model()
    model.layers[0].q.requires_grad_(False)
    frozen = model.layers[0].q.weight.detach().clone()
    optimizer = SGD([p for n, p in model.named_parameters() if ".0." in n], lr=0.3)
    quack = QuacK(optimizer, model, LAYOUT, tau=0.5)
    train(model, optimizer, steps=range(5))
    assert torch.equal(model.layers[0].q.weight, frozen)
    init = row_factors(reference)
    optimizer.add_param_group({"params": list(model.layers[1].parameters())})
    for step in range(5, 8):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        q = model.layers[1].q.weight
        scales, old, grad = row_factors(model)[q], q.detach().clone(), q.grad
        optimizer.step()
        scale = 0.5 * scales / init[reference.layers[1].q.weight]
        torch.testing.assert_close(q.detach(), old - 0.3 * scale.float()[:, None] * grad)
    assert "quack_init" in optimizer.state_dict()["state"][len(optimizer.param_groups[0]["params"])]
    assert quack.factors()["layers.0"]["layers.0.q.weight[0:4]"] != 0.5


def adamw_fast(params: Any) -> Optimizer:
    return AdamW(params, lr=1e-2, weight_decay=0.1, foreach=False)


def momentum(params: Any) -> Optimizer:
    return SGD(params, lr=0.05, momentum=0.9)


class Trained:
    """A model under QuacK through hooks and the run by definition, which must agree whatever happens between steps."""

    def __init__(self, make: Callable[[Any], Optimizer], late: int | None) -> None:
        self.model, self.make, self.late, self.steps = Model().double(), make, late, 0
        self.reference = PerHeadRun(self.model, make, tau := 0.5)
        if late is not None:
            self.ask_gradients(late, False)
        absent = set(self.model.layers[late].parameters()) if late is not None else set()
        self.optimizer = make([p for p in self.model.parameters() if p not in absent])
        self.quack = QuacK(self.optimizer, self.model, LAYOUT, tau)

    def step(self) -> None:
        for model, optimizer in ((self.model, self.optimizer), (self.reference.model, self.reference.optimizer)):
            optimizer.zero_grad()
            loss_of(model, self.steps).backward()
        self.optimizer.step()
        self.reference.step()
        self.steps += 1
        for i, layer in enumerate(self.model.layers):
            for ours, theirs in zip(
                (layer.q.weight, layer.q.bias, layer.kv.weight), self.reference.model.weights(i), strict=True
            ):
                assert relative_error(ours, theirs) <= 1e-9
        for ours, theirs in zip(self.model.head.parameters(), self.reference.model.rest.head.parameters(), strict=True):
            assert relative_error(ours, theirs) <= 1e-9

    def freeze(self, layer: int, frozen: bool) -> None:
        """A whole layer: its projections, biases and what follows them."""
        if layer != self.late:
            self.ask_gradients(layer, not frozen)

    def ask_gradients(self, layer: int, asked: bool) -> None:
        pieces = [piece for own in self.reference.model.pieces(layer).values() for piece in own]
        for p in (
            *self.model.layers[layer].parameters(),
            *self.reference.model.rest.layers[layer].parameters(),
            *pieces,
        ):
            p.requires_grad_(asked)

    def join(self, group: bool) -> None:
        """The layer that came late, in a group of its own or appended to the one that is there."""
        if self.late is not None:
            params = list(self.model.layers[self.late].parameters())
            if group:
                self.optimizer.add_param_group({"params": params})
            else:
                self.optimizer.param_groups[0]["params"].extend(params)
            self.ask_gradients(self.late, True)
            self.late = None

    @torch.no_grad()
    def prune(self, layer: int, side: str, head: int) -> None:
        """Set a head to zero, once the run has begun."""
        if "quack_init" not in self.optimizer.state.get(self.model.layers[layer].q.weight, {}):
            return
        rows, own = slice(head % KEY_HEADS * DIM, (head % KEY_HEADS + 1) * DIM), self.model.layers[layer]
        if side == "query":
            rows = slice(head * DIM, (head + 1) * DIM)
            own.q.bias[rows] = 0.0
        (own.q if side == "query" else own.kv).weight[rows] = 0.0
        self.reference.model.read(self.model, layer)

    def replace(self, layer: int, name: str) -> None:
        """Put a new, larger tensor in the place of a weight, in the model and in the optimizer."""
        old = self.model.get_parameter(f"layers.{layer}.{name}")
        if not old.requires_grad:
            return
        new = nn.Parameter(2 * old.detach(), old.requires_grad)
        module, _, attribute = name.rpartition(".")
        setattr(self.model.layers[layer].get_submodule(module), attribute, new)
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        self.optimizer.state.pop(old, None)
        for piece in self.reference.model.pieces(layer)[name]:
            self.reference.optimizer.state.pop(piece, None)
        self.reference.model.read(self.model, layer)

    def retune(self, tau: float) -> None:
        self.quack.tau = self.reference.tau = tau

    def resume(self, way: str) -> None:
        """Go on in other objects, as a new process does."""
        if way in ("deepcopy", "pickle"):
            pair = (self.model, self.optimizer)
            self.model, self.optimizer = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
            self.quack = QuacK(self.optimizer, self.model, LAYOUT, self.reference.tau)
            return
        saved = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        names = {p: name for name, p in self.model.named_parameters()}
        groups = [
            {**{k: v for k, v in g.items() if k != "params"}, "params": [names[p] for p in g["params"]]}
            for g in self.optimizer.param_groups
        ]
        trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
        self.model = Model().double()
        for name, p in self.model.named_parameters():
            nn.init.normal_(p)  # the weights of another start
            p.requires_grad_(name in trained)
        self.optimizer = self.make(
            [{**g, "params": [self.model.get_parameter(name) for name in g["params"]]} for g in groups]
        )
        if way == "attach first":
            self.quack = QuacK(self.optimizer, self.model, LAYOUT, self.reference.tau)
        self.model.load_state_dict(saved[0])
        self.optimizer.load_state_dict(saved[1])
        if way == "load first":
            self.quack = QuacK(self.optimizer, self.model, LAYOUT, self.reference.tau)


MODELS: dict[str, tuple[nn.Module, QKLayout]] = {"grouped": (Model(), LAYOUT), "latent": example_mla()}
LAYER, WAYS = st.integers(0, LAYERS - 1), ("attach first", "load first", "deepcopy", "pickle")
EVENTS = st.one_of(
    st.builds(lambda group: ("join", group), st.booleans()),
    st.tuples(st.just("prune"), LAYER, st.sampled_from(["query", "key"]), st.integers(0, HEADS - 1)),
    st.tuples(st.just("replace"), LAYER, st.sampled_from(["q.weight", "q.bias", "kv.weight"])),
    st.tuples(st.just("freeze"), LAYER, st.booleans()),
    st.tuples(st.just("retune"), st.sampled_from([0.1, 0.5, 2.0])),
    st.tuples(st.just("resume"), st.sampled_from(WAYS)),
)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([adamw_fast, momentum, partial(SGD, lr=0.05)]),
    st.none() | LAYER,
    st.lists(EVENTS, min_size=1, max_size=6),
)
def test_whatever_happens_between_steps(
    make: Callable[[Any], Optimizer], late: int | None, events: list[tuple[Any, ...]]
) -> None:
    """In fp64: heads set to zero, weights replaced, frozen, and joining late; runs that go on elsewhere."""
    run = Trained(make, late)
    for name, *args in events:
        getattr(run, name)(*args)
        run.step()
        run.step()


class Restoring(AdamW):
    """Looks at the given state again once it is loaded, as third-party optimizers do."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                assert self.state[p].keys() == state_dict["state"][key].keys()


def test_the_given_state_is_what_is_loaded() -> None:
    model = Model()
    optimizer = Restoring(model.parameters())
    QuacK(optimizer, model, LAYOUT)
    train(model, optimizer, steps=range(2))
    optimizer.load_state_dict(optimizer.state_dict())


class ThreeBetas(SGD):
    """Has the options of Adan and AdEMAMix."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0]["betas"] = (0.9, 0.95, 0.99)


def test_options_that_only_the_optimizer_knows() -> None:
    """A compiled step leaves an optimizer that it does not know its own step, which the hooks scale."""
    hooked, stepped = Model(), Model()
    optimizer = ThreeBetas(hooked.parameters())
    QuacK(optimizer, hooked, LAYOUT, tau=0.5)
    step = compile_train_step(stepped, ThreeBetas(stepped.parameters()), loss_of, layout=LAYOUT, tau=0.5, compile=False)
    train(hooked, optimizer, steps=range(3))
    for i in range(3):
        step(i)
    assert "its own step()" in repr(step)
    assert_same(hooked, stepped)


@pytest.mark.parametrize("mode", ["context", "default"])
def test_a_default_device_that_is_not_the_models(mode: str) -> None:
    """Nothing of QuacK is made where `torch.device` or `set_default_device` say; steps are bit for bit the same."""

    def trained(device: str) -> Model:
        model, other = Model(), Model()
        batches = [batch(i) for i in range(3)]
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        context = torch.device(device) if mode == "context" else contextlib.nullcontext()
        if mode == "default":
            torch.set_default_device(device)
        try:
            with context:
                quack = QuacK(optimizer, model, LAYOUT, tau=0.5)
                for x in batches:
                    optimizer.zero_grad()
                    F.mse_loss(model(x), x.roll(1, -1).sin()).backward()
                    optimizer.step()
                assert all(0 < s < 1 for scales in quack.factors().values() for s in scales.values())
                saved = optimizer.state_dict()
                theirs = SGD(other.parameters(), lr=0.1, momentum=0.9)
                theirs.load_state_dict(saved)
                again = QuacK(theirs, other, LAYOUT)
                assert torch.equal(quack.init_factors, again.init_factors)
        finally:
            torch.set_default_device(None)
        return model

    assert_same(trained("meta"), trained("cpu"))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["grouped", "latent"]), st.integers(-40, 40))
def test_weights_of_any_size_are_scaled_alike(kind: str, exponent: int) -> None:
    """Products of up to three norms neither overflow nor vanish: all times a power of two, all scales stay the same.

    But for the one weight that stands in the longer term alone: both terms are of the same size then.
    """
    scales = []
    for size in (1.0, 2.0**exponent):
        model, layout = copy.deepcopy(MODELS[kind])
        optimizer = SGD(model.parameters(), lr=0.5)
        generator = torch.Generator().manual_seed(0)
        params = [p for name, p in layout_params(layout, model).items() if "kv_up" not in name]
        with torch.no_grad():
            for p in params:
                p.mul_(size)
        quack = QuacK(optimizer, model, layout, tau=0.25)
        assert {scale for own in quack.factors().values() for scale in own.values()} == {0.25}
        for p in params:
            p.grad = size * torch.randn(p.shape, generator=generator)
        optimizer.step()
        scales.append(quack.factors())
    assert scales[0] == scales[1] and {0.25} != {scale for own in scales[0].values() for scale in own.values()}


@pytest.mark.parametrize("value", [0.0, 1e20, math.inf, math.nan])
def test_weights_whose_norm_is_no_number_are_refused(value: float) -> None:
    model = Model()
    for rows in (model.layers[0].kv.weight[: KEY_HEADS * DIM], model.layers[0].q.weight, model.layers[0].q.bias):
        nn.init.constant_(rows, value)
    with pytest.raises(FactorError, match=r"a head in layers.0.q.weight.* has norm zero, or one that is not finite"):
        QuacK(SGD(model.parameters()), model, LAYOUT)


def test_compiled_steps_go_on_where_heads_were_set_to_zero() -> None:
    """The state tells that the run had begun; without it, heads of zero are refused."""
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = compile_train_step(model, optimizer, loss_of, layout=LAYOUT, tau=0.5, compile=False)
    for i in range(2):
        step(i)
    zero(model)
    other, theirs = copy.deepcopy((model, optimizer))
    again = compile_train_step(other, theirs, loss_of, layout=LAYOUT, tau=0.5, compile=False)
    for i in range(2, 4):
        step(i)
        again(i)
    assert_same(model, other)
    with pytest.raises(FactorError, match="has norm zero"):
        compile_train_step(
            zero(other, queries=True), SGD(other.parameters(), lr=0.1), loss_of, layout=LAYOUT, compile=False
        )


MAKERS: dict[str, Callable[[Model], list[Optimizer]]] = {
    "AdamW": lambda m: [AdamW(m.parameters(), lr=3e-3)],
    "AdamW fused": lambda m: [AdamW(m.parameters(), lr=3e-3, fused=True)],
    "SGD": lambda m: [SGD(m.parameters(), lr=0.1)],
    "Lion": lambda m: [Lion(m.parameters(), lr=1e-3)],
    "Muon and AdamW": lambda m: [
        torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.01),
        AdamW([p for p in m.parameters() if p.dim() != 2], lr=3e-3),
    ],
}


def build(kind: str, dtype: torch.dtype, attach: bool = True) -> tuple[Model, list[Optimizer]]:
    model = Model().to(dtype)
    optimizers = MAKERS[kind](model)
    for optimizer in optimizers if attach else ():
        attach_quietly(optimizer, model)
    return model, optimizers


def attach_quietly(optimizer: Optimizer, model: Model) -> None:
    """Also to weights in half precision, of which QuacK warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ query and key weights are in torch.bfloat16")
        QuacK(optimizer, model, LAYOUT, tau=0.5)


def resume(path: str) -> None:
    """What a fresh process does: build, attach, load, go on; every second case loads before it attaches."""
    for kind, dtype in torch.load(path):
        for attach_first in (True, False):
            saved = torch.load(path)[kind, dtype]  # afresh: optimizers train on in the tensors that they load
            model, optimizers = build(kind, dtype, attach=attach_first)
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
                if not attach_first:
                    attach_quietly(optimizer, model)
            train(model, *optimizers, steps=range(7, 14))
            for name, p in model.named_parameters():
                assert torch.equal(p, saved["later"][name]), (kind, dtype, attach_first, name)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Bit for bit, in a fresh process, for every kind of optimizer in float32 and bfloat16."""
    saved = {}
    for kind in MAKERS:
        for dtype in (torch.float32, torch.bfloat16):
            model, optimizers = build(kind, dtype)
            train(model, *optimizers, steps=range(7))
            now = copy.deepcopy((model.state_dict(), [o.state_dict() for o in optimizers]))
            train(model, *optimizers, steps=range(7, 14))
            saved[kind, dtype] = {"model": now[0], "optimizers": now[1], "later": model.state_dict()}
    torch.save(saved, tmp_path / "checkpoint.pt")
    program = f"import test_hooks; test_hooks.resume({str(tmp_path / 'checkpoint.pt')!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_state_saved_before_the_first_step() -> None:
    """It carries the factors of the first weights, and Adam, which looks for an empty state, finds one."""
    model, (optimizer,) = build("AdamW", torch.float32)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, steps=range(3))
    for attach_first in (True, False):
        other, (theirs,) = build("AdamW", torch.float32, attach=False)
        if attach_first:  # to weights that the checkpoint replaces
            nn.init.normal_(other.layers[0].q.weight)
            QuacK(theirs, other, LAYOUT, tau=0.5)
        other.load_state_dict(saved[0])
        theirs.load_state_dict(copy.deepcopy(saved[1]))
        if not attach_first:
            QuacK(theirs, other, LAYOUT, tau=0.5)
        assert_same(train(other, theirs, steps=range(3)), model)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Lion"])
def test_distributed_checkpoints(kind: str, flatten: bool) -> None:
    """The state dicts of torch.distributed.checkpoint, by names of parameters, carry the factors as well."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, (optimizer,) = build(kind, torch.float32)
    train(model, optimizer, steps=range(3))
    saved = (model.state_dict(), get_optimizer_state_dict(model, optimizer, options=options))
    for used in (0, 2):
        weights, state = copy.deepcopy(saved)
        other, (theirs,) = build(kind, torch.float32)
        train(other, theirs, steps=range(20, 20 + used))
        get_optimizer_state_dict(other, theirs, options=options)  # the template that a loader fills
        other.load_state_dict(weights)
        set_optimizer_state_dict(other, theirs, state, options=options)
        again, (ours,) = build(kind, torch.float32)
        assert_same(train(other, theirs, steps=range(3, 6)), train(again, ours, steps=range(6)))


def test_the_state_is_open_to_plain_optimizers() -> None:
    """A checkpoint of a run with QuacK loads into the optimizer alone, at any point of the run."""
    for kind, make in MAKERS.items():
        for steps in (0, 3):
            model, optimizers = build(kind, torch.float32)
            model.layers[0].q.requires_grad_(False)
            train(model, *optimizers, steps=range(steps))
            plain = copy.deepcopy(model)
            for optimizer, theirs in zip(optimizers, alone := make(plain), strict=True):
                theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            plain.layers[0].q.requires_grad_(True)
            train(plain, *alone, steps=range(steps, steps + 2))


def test_copies_and_pickles_carry_the_factors() -> None:
    for through in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        model, (optimizer,) = build("AdamW", torch.float32)
        train(model, optimizer, steps=range(5))
        other, theirs = through((model, optimizer))
        QuacK(theirs, other, LAYOUT, tau=0.5)
        assert_same(train(other, theirs, steps=range(5, 10)), train(model, optimizer, steps=range(5, 10)))


def test_detach() -> None:
    model, (optimizer,) = build("AdamW", torch.float32, attach=False)
    quack = QuacK(optimizer, model, LAYOUT, tau=0.1)
    train(model, optimizer, steps=range(3))
    quack.detach()
    state = optimizer.state_dict()
    assert "quack_init" not in state and all("quack_init" not in entry for entry in state["state"].values())
    plain, theirs = copy.deepcopy((model, optimizer))
    assert_same(train(model, optimizer, steps=range(3, 6)), train(plain, theirs, steps=range(3, 6)))
    with pytest.warns(UserWarning, match=STARTS_ANEW):
        QuacK(optimizer, model, LAYOUT)


STARTS_ANEW = (
    r"AdamW has taken steps.*'quack_init'.* for 'layers.0.q.weight': QuacK starts from these weights; to go on"
)


def other_heads(layout: QKLayout) -> QKLayout:
    """The same model cut into heads of another size."""
    wide = tuple(
        dataclasses.replace(
            s,
            query=(dataclasses.replace(s.query[0], heads=heads(2, dim=8)),),
            key=(dataclasses.replace(s.key[0], heads=heads(1, dim=8)),),
            query_heads=2,
            key_heads=1,
            head_map=(0, 0),
        )
        for s in layout.sites
    )
    return QKLayout(wide)


def test_states_that_do_not_fit() -> None:
    model, (plain,) = build("AdamW", torch.float32, attach=False)
    train(model, plain, steps=range(2))
    without = copy.deepcopy(plain.state_dict())
    plain.load_state_dict(without)  # loaded before attaching, and again afterwards: the advice is to detach
    with pytest.warns(UserWarning, match=STARTS_ANEW) as caught:
        quack = QuacK(plain, model, LAYOUT)
    assert len(caught) == 1 and caught[0].filename == __file__
    with_quack = copy.deepcopy(plain.state_dict())
    before = quack.factors()
    with pytest.raises(
        OptimizerError, match=r"no initial factors of QuacK.* to start .*, detach\(\) it, load .* again"
    ):
        plain.load_state_dict(without)
    with pytest.raises(ValueError, match="a different number of parameter groups"):
        plain.load_state_dict({"state": {}, "param_groups": []})
    del with_quack["state"][0]["quack_init"]  # there since QuacK was attached: the run had begun
    with pytest.raises(OptimizerError, match=r"no initial factors of QuacK .* for 'layers.0.q.weight'"):
        plain.load_state_dict(with_quack)
    assert quack.factors() == before  # a refused state changes nothing
    saved = copy.deepcopy(plain.state_dict())
    quack.detach()
    message = "no initial factors of QuacK for these heads and norm"
    for layout, norm in ((other_heads(LAYOUT), "frobenius"), (LAYOUT, "spectral")):
        with pytest.warns(UserWarning, match=STARTS_ANEW):
            quack = QuacK(plain, model, layout, norm=norm)  # type: ignore[arg-type]
        with pytest.raises(OptimizerError, match=message):
            plain.load_state_dict(saved)
        quack.detach()
    plain.load_state_dict(saved)  # before attaching: refused when it is read, and still there for another try
    for _ in range(2):
        with pytest.raises(OptimizerError, match=message):
            QuacK(plain, model, other_heads(LAYOUT))
    assert QuacK(plain, model, LAYOUT).factors() == before


def test_state_that_belongs_to_no_parameter() -> None:
    """Optimizers may keep some under keys of their own."""
    model, (optimizer,) = build("Lion", torch.float32)
    train(model, optimizer, steps=range(2))
    optimizer.state["rounds"] = 2  # type: ignore[index]
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.state["rounds"] = 3  # type: ignore[index]
    optimizer.load_state_dict(saved)
    assert optimizer.state["rounds"] == 2  # type: ignore[index]


def test_sites_in_another_order_read_the_same_state() -> None:
    model, (optimizer,) = build("AdamW", torch.float32)
    train(model, optimizer, steps=range(2))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, steps=range(2, 4))
    other, (theirs,) = build("AdamW", torch.float32, attach=False)
    QuacK(theirs, other, QKLayout(LAYOUT.sites[::-1]), tau=0.5)
    other.load_state_dict(saved[0])
    theirs.load_state_dict(saved[1])
    assert_same(train(other, theirs, steps=range(2, 4)), model)


def test_spectral_norm_end_to_end() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.3)
    quack = QuacK(optimizer, model, LAYOUT, norm="spectral")
    q = model.layers[0].q

    def largest() -> float:
        """The larger norm of the two query heads that read the first key head."""
        rows = torch.cat([q.weight, q.bias[:, None]], 1).detach()[: 2 * DIM]
        return float(torch.linalg.svdvals(rows.view(2, DIM, -1))[:, 0].max())

    start = largest()
    train(model, optimizer, steps=range(10))
    scale = quack.factors()["layers.0"][f"layers.0.kv.weight[0:{DIM}]"]
    assert scale == pytest.approx(start / largest(), rel=1e-5) and scale != 1.0


def test_wrapped_models() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    QuacK(optimizer, torch.compile(model, backend="eager"), LAYOUT, tau=0.5)
    plain = Model()
    theirs = SGD(plain.parameters(), lr=0.1)
    QuacK(theirs, plain, LAYOUT, tau=0.5)
    assert_same(train(model, optimizer, steps=range(3)), train(plain, theirs, steps=range(3)))


class Wrapper(Optimizer):
    """What trainers put around an optimizer: an Optimizer by type, without what Optimizer.__init__ makes."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner


def zero(model: Model, queries: bool = False) -> Model:
    """The keys of a head, and maybe the queries that read them."""
    with torch.no_grad():
        model.layers[1].kv.weight[DIM : 2 * DIM].zero_()
        if queries:
            model.layers[1].q.weight[2 * DIM :].zero_()
            model.layers[1].q.bias[2 * DIM :].zero_()
    return model


def normed() -> QKLayout:
    return QKLayout(tuple(dataclasses.replace(s, qk_norm=(Norm("query", "rms", DIM),)) for s in LAYOUT.sites))


def attach(model: Model | None = None, layout: QKLayout = LAYOUT, only: str = "", **options: Any) -> QuacK:
    model = model or Model()
    return QuacK(SGD([p for n, p in model.named_parameters() if only in n], lr=0.1), model, layout, **options)


def attach_to(optimizer: Any) -> QuacK:
    return QuacK(optimizer, Model(), LAYOUT)


def attach_twice() -> None:
    quack = attach()
    QuacK(quack.optimizer, Model(), LAYOUT)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no optimizer": (
        lambda: QuacK(Model(), Model(), LAYOUT),
        OptimizerError,
        "optimizer is Model, which is no torch.optim",
    ),  # type: ignore[arg-type]
    "a wrapper": (
        lambda: QuacK(Wrapper(SGD(Model().parameters())), Model(), LAYOUT),
        OptimizerError,
        "Wrapper has no hooks",
    ),
    "attached twice": (attach_twice, OptimizerError, "this SGD has a QuacK attached already"),
    "other weights": (lambda: attach(only="head"), OptimizerError, "SGD holds none of .*'layers.0.q.weight'"),
    "weights of another model": (
        lambda: QuacK(SGD(Model().parameters()), Model(), LAYOUT),
        OptimizerError,
        "holds none of",
    ),
    "empty layout": (lambda: attach(layout=QKLayout()), OptimizerError, "the layout has no query or key weights"),
    "norms kept": (lambda: attach(layout=normed()), OptimizerError, r"\(2 sites keep a QK norm\); use SGD as it is"),
    "tau of zero": (lambda: attach(tau=0.0), OptimizerError, "tau is 0.0; need a positive number"),
    "tau that turns negative": (lambda: setattr(attach(), "tau", -1), OptimizerError, "tau is -1; need"),
    "negative tau": (lambda: attach(tau=-1), OptimizerError, "tau is -1; need"),
    "infinite tau": (lambda: attach(tau=math.inf), OptimizerError, "tau is inf; need"),
    "tau of no type": (lambda: attach(tau="0.1"), OptimizerError, "tau is '0.1'; need"),
    "unknown norm": (lambda: attach(norm="max"), FactorError, "norm is 'max'; use 'frobenius' or 'spectral'"),
    "head of zeros": (
        lambda: attach(zero(Model(), queries=True)),
        FactorError,
        "a head in .*layers.1.kv.weight has norm zero",
    ),
    "meta weights": (lambda: attach(Model().to("meta")), OptimizerError, "'layers.0.q.weight' is on the meta device"),
    "another model": (lambda: attach(nn.Linear(2, 2)), LayoutError, "no parameter of this model"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("run", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input(run: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        run()
    assert "\n" not in str(raised.value)


UNSUITED: dict[str, tuple[Callable[[Any], Optimizer], str]] = {
    "LBFGS": (torch.optim.LBFGS, "LBFGS: it evaluates the loss at several points"),
    "Adafactor": (torch.optim.Adafactor, "Adafactor: its steps are relative"),
}


@pytest.mark.parametrize(("make", "message"), UNSUITED.values(), ids=UNSUITED)
def test_optimizers_that_quack_does_not_suit(make: Callable[[Any], Optimizer], message: str) -> None:
    model = Model()
    with pytest.warns(UserWarning, match=f"QuacK does not suit {message}") as caught:
        QuacK(make(model.parameters()), model, LAYOUT)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_the_report_names_sites_and_heads() -> None:
    model = Model()
    quack = attach(model, tau=0.25)
    report = quack.factors()
    assert list(report) == ["layers.0", "layers.1"]
    assert set(report["layers.1"]) == {
        *(f"layers.1.q.weight[{h * DIM}:{(h + 1) * DIM}]" for h in range(HEADS)),
        *(f"layers.1.kv.weight[{h * DIM}:{(h + 1) * DIM}]" for h in range(KEY_HEADS)),
    }
    assert {s for scales in report.values() for s in scales.values()} == {0.25}
    train(model, quack.optimizer, steps=range(3))
    init = dict(zip(row_factors(model), row_factors(Model()).values(), strict=True))
    expected = row_scales(model, init, 0.25)
    now = quack.factors()["layers.0"]
    for h in range(HEADS):
        found = now[f"layers.0.q.weight[{h * DIM}:{(h + 1) * DIM}]"]
        assert found == pytest.approx(float(expected[model.layers[0].q.weight][h * DIM]), rel=1e-6)
