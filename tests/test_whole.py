"""A step as one graph: what the few graphs do, with as little memory, or refused."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from roundings import off
from test_optim import LAYOUT, Lion, Model, batch, relative_error
from test_step import batches, optimizer_of, plain_loss, small
from test_update import assert_equal, loss_of_part, muon_and_adamw, schedule
from torch import Tensor, fx, nn
from torch._prims.rng_prims import run_and_save_rng_state
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.utils.checkpoint import checkpoint

from quack_fx import find_qk_pairs
from quack_fx.bench.measure import peak_bytes
from quack_fx.errors import OptimizerError, StepError
from quack_fx.layout import QKLayout
from quack_fx.step import TrainStep, compile_train_step
from quack_fx.step.joint import _draw_nothing
from quack_fx.step.masters import MASTER
from quack_fx.step.rules import muon

pytestmark = pytest.mark.skipif(not torch.__version__ >= "2.13", reason="refused there")

Make = Callable[[nn.Module], list[Optimizer]]


def scaled_loss(model: nn.Module, x: Tensor, factor: Tensor) -> Tensor:
    """The factor makes gradients that are not finite, when it is asked to."""
    with sdpa_kernel(SDPBackend.MATH):  # torch 2.11's own kernel for CPUs fails on float64
        return loss_of_part(model, x) * factor


def each_kind(make: Callable[[Any], Optimizer]) -> Make:
    return lambda model: [make(model.parameters())]


class Normed(nn.Module):
    """The model behind a batch norm, whose buffers each forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.model = nn.BatchNorm1d(6), Model()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(self.first(x))
        return out


MAKERS: dict[str, tuple[Make, float]] = {
    "AdamW": (each_kind(partial(AdamW, lr=3e-3, weight_decay=0.1, amsgrad=True)), 1e-9),
    "SGD": (each_kind(partial(SGD, lr=0.03, momentum=0.9, nesterov=True)), 1e-9),
    "Lion": (each_kind(partial(Lion, lr=1e-3, weight_decay=0.1)), 1e-9),
    "Muon and AdamW": (muon_and_adamw, 0.0),  # see `rounding_of_muon`
}


def orthogonalised(gradient: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz as torch's, in fp64."""
    a, b, c = coefficients
    x = gradient.double()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if gradient.shape[0] > gradient.shape[1] else x


Run = tuple[TrainStep, list[Optimizer], list[torch.optim.lr_scheduler.LambdaLR]]


def run_of(model: nn.Module, make: Make, **way: Any) -> Run:
    optimizers = make(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, schedule) for o in optimizers]
    options = {"layout": LAYOUT, "tau": 0.7, "clip_grad_norm": 0.05, "skip_nonfinite": True}
    return compile_train_step(model, optimizers, scaled_loss, **options, **way), optimizers, schedules


def factor_of(step: int) -> Tensor:
    return torch.tensor(float("inf") if step == 7 else 1.0, dtype=torch.float64)


def rounding_of_muon(model: nn.Module, make: Make) -> float:
    """How far the few graphs come to be from what they would be, did Muon's products not round to bfloat16."""
    ends = []
    for exact in (False, True):
        one = copy.deepcopy(model)
        with patch.object(muon, "_zeropower_via_newtonschulz", orthogonalised) if exact else nullcontext():
            step, _, schedules = run_of(one, make, compile=False)
            for i in range(20):
                step(batch(i).double(), factor_of(i))
                for each in schedules:
                    each.step()
        ends.append(one)
    return max(relative_error(a, b) for a, b in zip(*(one.parameters() for one in ends), strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_does_what_the_few_graphs_do(name: str) -> None:
    """In fp64: weights, state, norms, a schedule, clipping, and a step whose gradients are not finite.

    Muon rounds to bfloat16, elsewhere in one graph: that comes no farther from the few graphs than three times what
    those are from exact ones.
    """
    torch._dynamo.reset()
    (make, tolerance), model = MAKERS[name], Model().double()
    if not tolerance:
        tolerance = 3 * rounding_of_muon(model, make)
        assert 0 < tolerance < 0.05
    twin = copy.deepcopy(model)
    runs = [run_of(one, make, **way) for one, way in ((model, {"whole_graph": True}), (twin, {"compile": False}))]
    for i in range(20):
        factor = factor_of(i)
        before = copy.deepcopy((model.state_dict(), [o.state_dict() for o in runs[0][1]])) if i == 7 else None
        losses = [step(batch(i).double(), factor) for step, _, _ in runs]
        assert i == 7 or relative_error(*losses) < max(1e-12, tolerance)
        if before is not None:
            assert_equal((model.state_dict(), [o.state_dict() for o in runs[0][1]]), before)
        for *_, schedules in runs:
            for one in schedules:
                one.step()
        if i == 1:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "compiled once for all learning rates"
    assert not torch._dynamo.utils.counters["graph_break"]
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(a, b) < tolerance and a.grad is None
    for ours, theirs in zip(runs[0][1], runs[1][1], strict=True):
        a, b = ours.state_dict(), theirs.state_dict()
        assert a["state"].keys() == b["state"].keys()
        for key in a["state"]:
            assert a["state"][key].keys() == b["state"][key].keys()
            assert torch.equal(*(one["state"][key].get("step", torch.zeros(1)) for one in (a, b)))
        assert relative_error(a["quack_squares"], b["quack_squares"]) < tolerance


def masters_of(model: nn.Module, step: TrainStep) -> dict[str, Tensor]:
    """The masters of those weights that have one, by name."""
    state = step._optimizers[0].state
    return {n: state[p][MASTER] for n, p in model.named_parameters() if MASTER in state.get(p, {})}


def test_buffers_masters_frozen_and_unused_parameters() -> None:
    """A batch norm's statistics; bfloat16 weights with masters; weights without gradient stay as they are.

    Gradients in bfloat16 differ by roundings, of which Adam makes no more than they are: its eps is far above them.
    """
    torch._dynamo.reset()
    model = Normed()
    model.model.layers.bfloat16()
    model.model.layers[1].kv.weight.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    layout = find_qk_pairs(Normed(), batch(0))

    def loss(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        for layer in m.model.layers:
            x = x + layer(x.bfloat16()).float()
        out: Tensor = m.model.head(x).square().mean()
        return out

    steps = [
        compile_train_step(
            one, AdamW(one.parameters(), lr=0.5, eps=0.5), loss, layout=layout, master_weights=True, **way
        )
        for one, way in ((model, {"whole_graph": True}), (twin, {"compile": False}))
    ]
    for i in range(5):
        for step in steps:
            step(batch(i))
    assert model.first.num_batches_tracked == 5
    assert torch.equal(model.unused, torch.ones(3))
    assert torch.equal(model.model.layers[1].kv.weight, twin.model.layers[1].kv.weight)
    states = [{**one.state_dict(), **masters_of(one, step)} for one, step in zip((model, twin), steps, strict=True)]
    for name, old in start.state_dict().items():
        ours, theirs, old = (value.double() for value in (states[0][name], states[1][name], old))
        assert (ours - theirs).norm() <= 0.05 * (theirs - old).norm(), name
    for name, master in masters_of(model, steps[0]).items():
        assert torch.equal(model.get_parameter(name), master.bfloat16())
        moved = relative_error(master, start.get_parameter(name))
        assert moved > 1e-3 if model.get_parameter(name).requires_grad else moved == 0


def test_gradients_that_are_there_are_added_to() -> None:
    """Accumulation: `forward_backward` leaves gradients, and the step after it adds its own."""
    torch._dynamo.reset()
    model = Model()
    twin = copy.deepcopy(model)
    step = compile_train_step(model, AdamW(model.parameters()), loss_of_part, layout=LAYOUT, whole_graph=True)
    other = compile_train_step(twin, AdamW(twin.parameters()), loss_of_part, layout=LAYOUT, compile=False)
    for one in (step, other):
        one.forward_backward(batch(0))
        one(batch(1))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class Dropping(nn.Module):
    """A weight of ones whose gradient is what dropout left of ones."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again, self.weight = again, nn.Parameter(torch.ones(1000))

    def forward(self) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return nn.functional.dropout(x.sin(), 0.25).sum()

        out: Tensor = checkpoint(run, self.weight, use_reentrant=False) if self.again else run(self.weight)
        return out


@pytest.mark.parametrize("again", [False, True])
def test_backward_drops_what_forward_dropped(again: bool) -> None:
    """Computed again or not; another time, others are dropped."""
    torch._dynamo.reset()
    model = Dropping(again)
    step = compile_train_step(model, SGD([model.weight], lr=1.0), layout=QKLayout(), whole_graph=True)
    seen = []
    for _ in range(2):
        with torch.no_grad():
            model.weight.fill_(1.0)
        try:
            loss = step()
        except StepError as error:  # newer torch redraws inside what is computed again
            assert again and "random numbers are drawn" in str(error)
            return
        changed = 1 - model.weight.detach()
        seen.append(changed)
        kept = changed > 0
        assert 650 < kept.sum() < 850
        torch.testing.assert_close(changed[kept], torch.ones(1000)[kept].cos() / 0.75)
        torch.testing.assert_close(loss, kept.sum() * torch.ones(()).sin() / 0.75)
    assert not torch.equal(*seen)


def test_refuses_dropout_in_attention_that_is_computed_again() -> None:
    """Its random numbers are the kernel's own, on devices whose kernels drop."""
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in ("query", "key", "value")]
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    found = graph.call_function(run_and_save_rng_state, (op, *inputs, 0.5))
    graph.output([graph.call_function(operator.getitem, (found, 1))])
    with pytest.raises(StepError, match="random numbers are drawn inside what is computed again"):
        _draw_nothing(graph)


def again_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """Under autocast, with layers that are computed again in the backward pass."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss: Tensor = checkpoint(plain_loss, model, x, y, use_reentrant=False)
        return loss


@pytest.mark.slow
def test_autocast_and_checkpoints() -> None:
    """One graph rounds products to bfloat16 elsewhere than the few do, and comes no farther from a step in fp64 than
    twice what they do. By SGD, whose step is the gradient; each step from the same weights."""
    torch._dynamo.reset()
    model = small("gpt")
    twin, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    layout = find_qk_pairs(model, *batches(1)[0])

    def exact_loss(m: Any, x: Tensor, y: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return plain_loss(m, x, y)

    ways = ((model, again_loss, {"whole_graph": True}), (twin, again_loss, {}), (exact, exact_loss, {"compile": False}))
    steps = [
        compile_train_step(
            one, SGD(one.parameters(), lr=1.0), loss, layout=layout, tau=0.5, clip_grad_norm=0.5, **options
        )
        for one, loss, options in ways
    ]
    for tokens in batches(10):
        start = [p.detach().double() for p in model.parameters()]
        for step in steps:
            step(*tokens)
        ours, theirs, right = (
            [p.detach().double() - q for p, q in zip(one.parameters(), start, strict=True)]
            for one in (model, twin, exact)
        )
        assert off(ours, right) < 2 * off(theirs, right) < 0.1
        for one in (twin, exact):
            one.load_state_dict(model.state_dict())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_memory_is_that_of_the_few_graphs() -> None:
    """What is cheap is computed again in the backward part, as there; and layouts are found on the first batch."""
    torch._dynamo.reset()
    model = small("gpt")
    tokens = torch.randint(0, 32, (2, 64, 8))
    steps = [
        compile_train_step(m, optimizer_of(m), whole_graph=whole)
        for m, whole in ((model, True), (copy.deepcopy(model), False))
    ]
    for step in steps:
        step(*tokens)
        step(*tokens)
    whole, few = (peak_bytes(partial(step, *tokens)) for step in steps)
    assert whole < 1.15 * few


def hooked(model: nn.Module) -> nn.Module:
    model.head.weight.register_hook(lambda grad: grad)
    return model


def broken_loss(model: nn.Module, x: Tensor) -> Tensor:
    loss = loss_of_part(model, x)
    torch._dynamo.graph_break()
    return loss


def keeping_loss(model: Any, x: Tensor) -> Tensor:
    model.kept = model(x)
    out: Tensor = model.kept.mean()
    return out


@pytest.mark.parametrize(
    ("model", "make", "loss", "options", "error", "says"),
    [
        (Model, AdamW, loss_of_part, {"compile": False}, StepError, "leave out compile=False"),
        (Model, AdamW, loss_of_part, {"scaler": torch.amp.GradScaler("cpu")}, StepError, "knows no GradScaler"),
        (Model, AdamW, loss_of_part, {"norm": "spectral"}, OptimizerError, "norm='spectral'"),
        (Model, RMSprop, loss_of_part, {}, OptimizerError, "RMSprop with norm='frobenius' takes its own step"),
        (lambda: hooked(Model()), AdamW, loss_of_part, {}, StepError, "hooks on gradients"),
        (Model, AdamW, broken_loss, {}, StepError, "in one graph"),
        (Model, AdamW, keeping_loss, {}, StepError, "keeps tensors from one batch to the next"),
        (Model, AdamW, lambda m, x: m(x), {}, StepError, "no loss in what the model returned: a tensor of shape"),
    ],
)
def test_refusals(
    model: Callable[[], nn.Module], make: Any, loss: Any, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    """With a reason, and nothing has changed."""
    torch._dynamo.reset()
    one = model()
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(error, match=says):
        compile_train_step(one, make(one.parameters()), loss, layout=LAYOUT, whole_graph=True, **options)(batch(0))
    assert_equal(one.state_dict(), before)


def test_refuses_processes_whose_gradients_it_would_not_average() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(Model())
        with pytest.raises(StepError, match="would not average gradients"):
            compile_train_step(model, AdamW(model.parameters()), loss_of_part, layout=LAYOUT, whole_graph=True)
    finally:
        dist.destroy_process_group()
