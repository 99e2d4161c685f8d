"""The update against a learning rate per head, for each optimizer that programs know, over two hundred steps.

Small weights are stacked and changed eagerly, larger ones two by two by compiled code; see `PATHS`.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from per_head import LAYOUT, Lion, Model, PerHead, batch, loss_of, relative_error, row_factors, site, train_per_head
from reference import Reference
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._pytree import tree_leaves

from quack_fx import QKLayout, QuacK, compile_train_step
from quack_fx.errors import FactorError, OptimizerError
from quack_fx.train.step import TrainStep

STEPS, CLIP, PARTS = 200, 0.5, 2


def schedule(step: int) -> float:
    return min(1.0, (step + 1) / 20) * (1 - step / (2 * STEPS))


def loss_of_part(model: nn.Module, x: Tensor) -> Tensor:
    x = x.to(next(model.parameters()).dtype)
    return F.mse_loss(model(x), x.roll(1, -1).sin()) / PARTS


PATHS = ("stacked", "pairs", "compiled")
"""How weights are changed: stacked, as small ones are; two by two and one left over, eagerly; or that, compiled."""


def step_on(path: str, model: nn.Module, *optimizers: Optimizer, **options: Any) -> TrainStep:
    """A step whose weights are all small, or none is."""
    options = {"layout": LAYOUT, "loss_fn": loss_of_part, **options}
    step = compile_train_step(model, optimizers, compile=path == "compiled", **options)
    if path != "stacked":
        module = type(step._program).__init__.__globals__  # type: ignore[misc]
        assert module["SMALL"] > 0
        module["SMALL"] = 0
    return step


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def train(model: nn.Module, make: Callable[[Any], Optimizer], steps: int, path: str) -> TrainStep:
    optimizer = make(model.parameters())
    step = step_on(path, model, optimizer, tau=0.7, clip_grad_norm=CLIP)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for i in range(steps):
        for part in range(PARTS):
            step.forward_backward(batch(i * PARTS + part))
        step.update()
        scheduler.step()
        if i == 1:
            torch._dynamo.config.error_on_recompile = path == "compiled"
    return step


KNOWN: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": partial(AdamW, lr=3e-3, weight_decay=0.1),
    "AdamW amsgrad, fused": partial(AdamW, lr=3e-3, weight_decay=0.1, amsgrad=True, fused=True),
    "AdamW maximize": partial(AdamW, lr=1e-4, maximize=True, betas=(0.8, 0.9)),
    "Adam with coupled decay": partial(Adam, lr=3e-3, weight_decay=1e-3),
    "Adam decoupled": partial(Adam, lr=3e-3, weight_decay=0.1, decoupled_weight_decay=True),
    "SGD": partial(SGD, lr=0.1),
    "SGD with momentum": partial(SGD, lr=0.03, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "SGD with nesterov": partial(SGD, lr=0.03, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD maximize": partial(SGD, lr=1e-4, maximize=True),
    "Lion": partial(Lion, lr=1e-3, weight_decay=0.1),
}


COMPILED = {"AdamW": "fp32", "Adam with coupled decay": "fp32", "SGD with nesterov": "fp32", "Lion": "fp64"}
CASES = [
    *((name, "stacked", "fp64") for name in KNOWN),
    ("AdamW amsgrad, fused", "stacked", "fp32"),
    *((name, "pairs", "fp64") for name in KNOWN if name not in COMPILED),
    *((name, "compiled", dtype) for name, dtype in COMPILED.items()),  # Lion: in fp32 a rounding turns a sign
]


@pytest.fixture
def recompiles() -> Iterator[None]:
    """Whatever a test says of recompiles holds for it alone."""
    torch._dynamo.reset()
    yield
    torch._dynamo.config.error_on_recompile = False


@cache
def reference_of(name: str) -> PerHead:
    """Trained in fp64 with a group for each head."""
    return train_per_head(Model().double(), KNOWN[name], 0.7, schedule, STEPS, CLIP, PARTS)


@pytest.mark.parametrize(("name", "path", "dtype"), CASES)
def test_equals_a_learning_rate_per_head(name: str, path: str, dtype: str, recompiles: None) -> None:
    """Clipping, accumulation, decay and a schedule on; the reference is in fp64. Nothing is compiled anew after two
    steps."""
    model = Model().double()
    reference = reference_of(name)
    model = model if dtype == "fp64" else model.float()
    step = train(model, KNOWN[name], STEPS, path)
    assert "compiled update" in repr(step)
    # Of the loss, and for weights and biases of two and of one.
    assert 3 <= graphs() <= 5 if path == "compiled" else graphs() == 0
    assert not torch._dynamo.utils.counters["graph_break"]
    within = 1e-6 if dtype == "fp64" else 1e-5  # what clips is in fp32
    for i, layer in enumerate(model.layers):
        q_weight, q_bias, kv_weight = reference.weights(i)
        # A bias is one more column of its weight.
        query = [torch.cat([w, b[:, None]], 1) for w, b in ((layer.q.weight, layer.q.bias), (q_weight, q_bias))]
        assert relative_error(*query) < within
        assert relative_error(layer.kv.weight, kv_weight) < within
        assert relative_error(layer.out.weight, reference.rest.layers[i].out.weight) < within
    assert relative_error(model.head.weight, reference.rest.head.weight) < within


def given(model: Model, step: int) -> list[Tensor]:
    """A gradient for each parameter that no rounding of the weights changes."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


class AwayFromZero:
    """Gradients for Lion, no element of which makes it take the sign of what a rounding could turn.

    The interpolation is followed in fp64; where it is next to zero, the gradient is moved.
    """

    def __init__(self, model: Model) -> None:
        self.momenta = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]

    def of(self, model: Model, step: int) -> list[Tensor]:
        grads = [grad.double() for grad in given(model, step)]
        while True:  # what is moved changes the norm a little
            clip = min(1.0, CLIP / float(torch.cat([g.flatten() for g in grads]).norm()))
            signed = [m.lerp(clip * g, 0.1) for m, g in zip(self.momenta, grads, strict=True)]
            near = [s.abs() < 1e-4 * s.abs().mean() for s in signed]
            if not any(n.any() for n in near):
                break
            moved = [torch.where(n, g + g.abs().mean(), g) for n, g in zip(near, grads, strict=True)]
            grads = [g.float().double() for g in moved]
        self.momenta = [m.lerp(clip * g, 0.01) for m, g in zip(self.momenta, grads, strict=True)]
        return [grad.float() for grad in grads]


@pytest.mark.parametrize("path", PATHS)
def test_lion_in_single_precision(path: str) -> None:
    """Against a learning rate per head, over 200 steps with gradients that are given: those of a model differ by a
    rounding, which turns the sign of what is next to zero; here nothing is."""
    model = Model()
    reference, gradients = PerHead(model), AwayFromZero(model)
    theirs, ours = (partial(Lion, lr=1e-3, weight_decay=0.1)(p) for p in (reference.groups(), model.parameters()))
    step = step_on(path, model, ours, clip_grad_norm=CLIP)
    init = reference.factors()
    for i in range(STEPS):
        scales = [f / f0 for f, f0 in zip(reference.factors(), init, strict=True)]
        for group, scale in zip(theirs.param_groups, [*scales, 1.0], strict=True):
            group["lr"] = 1e-3 * schedule(i) * scale
        ours.param_groups[0]["lr"] = 1e-3 * schedule(i)
        for p, grad in zip(model.parameters(), gradients.of(model, i), strict=True):
            p.grad = grad
        reference.take(model)
        nn.utils.clip_grad_norm_(reference.parameters(), CLIP)
        theirs.step()
        step.update()
    for i, layer in enumerate(model.layers):
        for found, expected in zip((layer.q.weight, layer.q.bias, layer.kv.weight), reference.weights(i), strict=True):
            assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("path", PATHS[:2])
def test_lion_differs_where_a_rounding_turns_a_sign(path: str) -> None:
    """In fp32 on a model's own gradients, clipped and accumulated, against QuacK's hooks: where a weight goes the other
    way, what it takes the sign of is next to zero; such weights are set right, and all others are the same."""
    model = Model()
    twin = copy.deepcopy(model)
    ours, theirs = (Lion(m.parameters(), lr=1e-3, weight_decay=0.1) for m in (model, twin))
    step = step_on(path, model, ours, tau=0.7, clip_grad_norm=CLIP)
    QuacK(theirs, twin, LAYOUT, tau=0.7)
    turned = 0
    for i in range(STEPS):
        ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 1e-3 * schedule(i)
        for x in (batch(i * PARTS + part) for part in range(PARTS)):
            loss_of_part(twin, x).backward()
            step.forward_backward(x)
        nn.utils.clip_grad_norm_(twin.parameters(), CLIP)
        between = [
            (theirs.state[p]["exp_avg"] if theirs.state[p] else torch.zeros_like(p)).lerp(p.grad, 0.1)
            for p in twin.parameters()
        ]
        theirs.step()
        theirs.zero_grad()
        step.update()
        for p, q, signed in zip(model.parameters(), twin.parameters(), between, strict=True):
            # A turned sign moves by twice the rate, tau and scale included; roundings of 200 steps are far below.
            other = (p - q).abs() > 0.3 * ours.param_groups[0]["lr"]
            assert (signed[other].abs() < 1e-4 * signed.abs().mean()).all()
            turned += int(other.sum())
            if other.any():
                with torch.no_grad():
                    p.copy_(torch.where(other, q, p))
    assert turned < 10
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(p, q) < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_muon_in_single_precision(path: str) -> None:
    """Against torch's own under QuacK's hooks, with gradients that are given and not clipped: its products round to
    bfloat16, which makes much of a last digit."""
    model = Model()
    twin = copy.deepcopy(model)
    both = [[torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.01)] for m in (model, twin)]
    step = step_on(path, model, *both[0])
    quack = QuacK(both[1][0], twin, LAYOUT)
    for i in range(STEPS):
        for one, (optimizer,) in zip((model, twin), both, strict=True):
            optimizer.param_groups[0]["lr"] = 0.01 * schedule(i)
            for p, grad in zip(one.parameters(), given(model, i), strict=True):
                p.grad = grad if p.dim() == 2 else None
        both[1][0].step()
        step.update()
    assert moved(quack)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(one, other) < 1e-5


def moved(quack: QuacK) -> bool:
    """Whether the factors are others than at the start, so that equal weights say something."""
    scales = [scale / float(quack.tau) for heads in quack.factors().values() for scale in heads.values()]
    return max(abs(scale - 1) for scale in scales) > 1e-4


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    matrices, others = ([p for p in model.parameters() if (p.dim() == 2) == two] for two in (True, False))
    return [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1), AdamW(others, lr=3e-3)]


def by_hooks(model: Model, flipped: bool) -> Model:
    """Trained by torch's own Muon and AdamW under QuacK's hooks; on batches upside down, the same but for rounding."""
    optimizers = muon_and_adamw(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    for optimizer in optimizers:
        QuacK(optimizer, model, LAYOUT, tau=0.7)
    for i in range(STEPS):
        for x in (batch(i * PARTS + part) for part in range(PARTS)):
            loss_of_part(model, x.flip(0) if flipped else x).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for one in (*optimizers, *schedulers):
            one.step()
        model.zero_grad()
    return model


@pytest.fixture(scope="module")
def trained_by_hooks() -> tuple[Model, Model]:
    """Twice the same training, but for rounding."""
    return by_hooks(Model(), flipped=False), by_hooks(Model(), flipped=True)


@pytest.mark.parametrize("path", PATHS[:2])
def test_muon_differs_as_it_does_from_itself(path: str, trained_by_hooks: tuple[Model, Model]) -> None:
    """In fp32 on a model's own gradients, clipped and accumulated: no farther from torch's own under QuacK's hooks than
    that is from itself when sums are rounded otherwise."""
    model, (reference, itself) = Model(), trained_by_hooks
    optimizers = muon_and_adamw(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    step = step_on(path, model, *optimizers, tau=0.7, clip_grad_norm=CLIP)
    for i in range(STEPS):
        for part in range(PARTS):
            step.forward_backward(batch(i * PARTS + part))
        step.update()
        for scheduler in schedulers:
            scheduler.step()
    ours, theirs = (
        max(relative_error(p, q) for p, q in zip(one.parameters(), reference.parameters(), strict=True))
        for one in (model, itself)
    )
    assert ours < 3 * theirs < 0.05


class Odd(nn.Module):
    """Weights of all shapes: of no, one, three and four axes, strided, of no numbers, several of a kind and one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes: list[tuple[int, ...]] = [(), (), (5,), (3, 2), (3, 2), (3, 2), (2, 3, 4), (0, 3), (2, 3, 2, 2)]
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)
        self.weights.append(nn.Parameter(torch.randn(4, 6).T))
        self.weights.append(nn.Parameter(torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)))

    def forward(self, x: Tensor) -> Tensor:
        return sum((w * x.mean()).sin().square().sum() for w in self.weights)  # type: ignore[return-value]


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("name", KNOWN)
def test_weights_of_all_shapes(name: str, path: str) -> None:
    """As the optimizer itself does it, with a gradient laid out as torch happens to lay it out."""
    plain, model = Odd(), Odd()
    theirs, ours = (KNOWN[name](m.parameters()) for m in (plain, model))
    step = step_on(path, model, ours, layout=QKLayout(), loss_fn=lambda m, x: m(x))
    for i in range(6):
        plain(batch(i)).backward()
        theirs.step()
        theirs.zero_grad()
        step(batch(i))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert one.stride() == other.stride()


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("name", KNOWN)
def test_state_is_what_the_optimizer_itself_keeps(name: str, path: str) -> None:
    """Names, types and shapes; the optimizer itself goes on from it, and the compiled step from the optimizer's."""
    torch.manual_seed(0)
    plain = Model()
    model = copy.deepcopy(plain)
    optimizer = KNOWN[name](plain.parameters())
    ours = KNOWN[name](model.parameters())
    step = step_on(path, model, ours, layout=QKLayout())
    for i in range(6):
        if i == 3:  # each goes on with the other's
            a, b = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(ours.state_dict())
            assert a["param_groups"] == b["param_groups"]
            assert a["state"].keys() == {key for key, state in b["state"].items() if state}
            for key, state in a["state"].items():
                assert {n: (t.dtype, t.shape) for n, t in state.items()} == {
                    n: (t.dtype, t.shape) for n, t in b["state"][key].items()
                }
            optimizer.load_state_dict(b)
            ours.load_state_dict(a)
        loss_of_part(plain, batch(i)).backward()
        optimizer.step()
        optimizer.zero_grad()
        step(batch(i))
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("path", PATHS[:2])
def test_other_weights_have_gradients_each_time(path: str) -> None:
    """A parameter without a gradient stays as it is."""
    model = Model().double()
    reference = Reference(model, LAYOUT, AdamW, lr=1e-2)
    step = step_on(path, model, AdamW(model.parameters(), lr=1e-2))
    for i, left_out in enumerate(model.parameters()):
        step.forward_backward(batch(i))
        before, left_out.grad = left_out.detach().clone(), None
        reference.take(model)
        reference.step()
        step.update()
        assert torch.equal(left_out, before)
        assert reference.off(model) < 1e-9
    assert moved(step.quacks[0])


class OwnLion(Lion):
    """A class of another name, with an option that changes nothing here."""

    def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
        cautious = options.pop("cautious", False)
        super().__init__(params, lr, **options)
        for group in self.param_groups:
            group.setdefault("cautious", cautious)

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for p in group["params"] if group["cautious"] else ():
                p.data.add_(0.01)
        return result


@pytest.mark.parametrize(
    ("make", "known"),
    [
        (Lion, True),
        (OwnLion, True),
        (partial(OwnLion, cautious=True), False),  # does something else
        (torch.optim.RMSprop, False),
        (type("MyAdam", (Adam,), {}), False),
        (partial(SGD, weight_decay=0.1), True),
        (torch.optim.Muon, True),
    ],
)
def test_an_update_is_compiled_for_what_an_optimizer_does(make: Callable[..., Optimizer], known: bool) -> None:
    """Not for what its class is called; finding out leaves weights and state alone."""
    model = Model()
    before = copy.deepcopy(model.state_dict())
    optimizer = make([p for p in model.parameters() if p.dim() == 2], lr=0.1)
    step = step_on("stacked", model, optimizer)
    assert ("compiled update" in repr(step)) == known and ("its own step()" in repr(step)) != known
    assert_equal(model.state_dict(), before)
    assert not optimizer.state


class ThreeBetas(SGD):
    """An option that Lion has too, of another length."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["betas"] = (0.9, 0.95, 0.99)


def test_an_optimizer_with_three_betas_takes_its_own_step() -> None:
    model = Model().double()
    reference = Reference(model, LAYOUT, SGD, lr=0.1)
    step = step_on("stacked", model, ThreeBetas(model.parameters()))
    assert "its own step()" in repr(step)
    follow(step, model, reference, range(3))
    assert reference.off(model) < 1e-9


def follow(
    step: TrainStep, model: nn.Module, reference: Reference, steps: range, both: Callable[[int], None] = lambda i: None
) -> None:
    """Some steps of both, on the gradients that the model has; first do something to both."""
    for i in steps:
        both(i)
        step.forward_backward(batch(i))
        reference.take(model)
        reference.step()
        step.update()


def muon_and(make: Callable[[Any], Optimizer]) -> Callable[[nn.Module], list[Optimizer]]:
    """Muon on the matrices, another on all else, biases of queries included."""

    def make_both(model: nn.Module) -> list[Optimizer]:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        muon = torch.optim.Muon(matrices, lr=0.01, adjust_lr_fn="match_rms_adamw", nesterov=len(matrices) % 2 == 0)
        return [muon, make([p for p in model.parameters() if p.dim() != 2])]

    return make_both


@torch.no_grad()
def step_scaled(optimizer: Optimizer, scales: dict[Any, Tensor]) -> None:
    """A plain step, after which what it did to the first rows of some weights is scaled, [rows] for each."""
    before = {p: p.detach().clone() for p in optimizer.param_groups[0]["params"] if p in scales}
    optimizer.step()
    for p, old in before.items():
        rows = len(scales[p])
        p[:rows] = old[:rows] + scales[p].view(-1, *[1] * (p.dim() - 1)) * (p[:rows] - old[:rows])


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("beside", [partial(AdamW, lr=3e-3), partial(torch.optim.RMSprop, lr=1e-3)])
def test_two_optimizers_in_one_step(beside: Callable[[Any], Optimizer], clip: float | None, path: str) -> None:
    """Muon with another beside it, in fp64, for Muon rounds to bfloat16: as plain steps whose rows are scaled after.

    Scales are by norms as they are before the step of both; for one that takes its own step, before that one.
    """
    model, make = Model().double(), muon_and(beside)
    twin = copy.deepcopy(model)
    step = step_on(path, model, *make(model), loss_fn=loss_of, tau=0.7, clip_grad_norm=clip)
    assert "Muon: compiled update" in repr(step) and len(step.quacks) == 2
    optimizers, first = make(twin), row_factors(twin)
    for i in range(STEPS):
        step(i)
        loss_of(twin, i).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        factors = row_factors(twin)
        for optimizer in optimizers:
            factors = row_factors(twin) if isinstance(optimizer, torch.optim.RMSprop) else factors
            step_scaled(optimizer, {p: 0.7 * factors[p] / first[p] for p in factors})
            optimizer.zero_grad()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(one, other) < 1e-5
    assert all(map(moved, step.quacks))


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("beside", [partial(AdamW, lr=3e-3), partial(torch.optim.RMSprop, lr=1e-3)])
def test_one_bad_gradient_stops_both_optimizers(beside: Callable[[Any], Optimizer], path: str) -> None:
    torch.manual_seed(0)
    model = Model()
    optimizers = muon_and(beside)(model)
    step = step_on(path, model, *optimizers, clip_grad_norm=0.5, skip_nonfinite=True)
    step(batch(0))
    for bad in (model.layers[0].q.weight, model.head.bias):
        before = copy.deepcopy((model.state_dict(), [o.state_dict()["state"] for o in optimizers]))
        step.forward_backward(batch(1))
        bad.grad[0] = torch.inf
        step.update()
        assert_equal(model.state_dict(), before[0])
        assert_equal([o.state_dict()["state"] for o in optimizers], before[1])


@pytest.mark.parametrize("names", [("head",), ("layers", "head")])
def test_an_optimizer_without_queries_and_keys_stands_beside(names: tuple[str, ...]) -> None:
    """It gets no QuacK; gradients that it alone has are clipped with the others."""
    torch.manual_seed(0)
    model = Model()
    twin = copy.deepcopy(model)

    def make(m: nn.Module) -> list[Optimizer]:
        return [
            AdamW([p for n, p in m.named_parameters() if (".out." in n or "head" in n) == other], lr=1e-2)
            for other in (True, False)
        ]

    step = step_on("stacked", model, *make(model), clip_grad_norm=0.01)
    assert len(step.quacks) == 1
    optimizers = make(twin)
    QuacK(optimizers[1], twin, LAYOUT)
    for i in range(5):
        step.forward_backward(batch(i))
        loss_of_part(twin, batch(i)).backward()
        for m in (model, twin):
            for n, p in m.named_parameters():
                p.grad = p.grad if i % 2 or n.startswith(names) else None
        step.update()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(one, other) < 1e-5


GATED = {
    "AdamW": partial(AdamW, lr=3e-3, weight_decay=0.1, amsgrad=True),
    "SGD": partial(SGD, lr=0.03, momentum=0.9, nesterov=True),
    "Lion": partial(Lion, lr=1e-3, weight_decay=0.1),
}


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(("name", "path"), [*((n, p) for n in GATED for p in PATHS[:2]), ("AdamW", "compiled")])
def test_gradients_that_are_not_finite_change_nothing(name: str, path: str, clip: float | None, bad: float) -> None:
    """Weights, moments, counter: bit for bit; then training goes on as if that step had never been."""
    torch.manual_seed(0)
    model = Model()
    twin = copy.deepcopy(model)
    steps = []
    for one in (model, twin):
        optimizer = GATED[name](one.parameters())
        steps.append((step_on(path, one, optimizer, clip_grad_norm=clip, skip_nonfinite=True), optimizer))
    (step, optimizer), (other, other_optimizer) = steps
    for i in range(6):
        if i in (0, 3):  # the first step, too
            before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
            step.forward_backward(batch(i))
            model.layers[0].q.weight.grad[1, 2] = bad
            step.update()
            assert_equal(model.state_dict(), before[0])
            assert i == 0 or assert_equal(optimizer.state_dict()["state"], before[1]) is None
        for one in (step, other):
            one(batch(i))
        assert_equal(model.state_dict(), twin.state_dict())
        assert_equal(optimizer.state_dict()["state"], other_optimizer.state_dict()["state"])


def assert_equal(found: Any, expected: Any) -> None:
    """The same tensors, bit for bit."""
    pairs = zip(tree_leaves(found), tree_leaves(expected), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("unscaled", ["by the step", "by hand"])
@pytest.mark.parametrize("make", [*GATED.values(), partial(torch.optim.RMSprop, lr=1e-3)])
def test_grad_scaler_skips_and_goes_on(make: Callable[[Any], Optimizer], unscaled: str) -> None:
    """Against the loop that torch documents, through a step whose gradients overflow; in fp64, where Lion's signs are
    no matter of rounding. Gradients that the user has unscaled are not unscaled again."""
    torch.manual_seed(0)
    model = Model().double()
    twin = copy.deepcopy(model)
    optimizer, scalers = make(twin.parameters()), [torch.amp.GradScaler("cpu", init_scale=2.0**8) for _ in range(2)]
    quack, own = QuacK(optimizer, twin, LAYOUT), make(model.parameters())
    clip = 0.5 if unscaled == "by the step" else None
    step = step_on("stacked", model, own, clip_grad_norm=clip, scaler=scalers[0])
    for i in range(8):
        x = batch(i).double() * (1e170 if i == 3 else 1)
        before = copy.deepcopy(model.state_dict())
        step.forward_backward(x)
        if unscaled == "by hand":
            scalers[0].unscale_(own)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        step.update()
        scalers[1].scale(loss_of_part(twin, x)).backward()
        scalers[1].unscale_(optimizer)
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        scalers[1].step(optimizer)
        scalers[1].update()
        optimizer.zero_grad()
        if i == 3:
            assert_equal(model.state_dict(), before)
        assert scalers[0].get_scale() == scalers[1].get_scale() == (2.0**8 if i < 3 else 2.0**7)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert relative_error(one, other) < 1e-6
    assert moved(quack)


def test_a_scaler_that_is_switched_off_changes_nothing() -> None:
    """Not even what is skipped, and so what optimizers may be used with it."""
    model, twin = Model(), Model()
    make = partial(SGD, lr=0.03, momentum=0.9, dampening=0.5)
    off = torch.amp.GradScaler("cpu", enabled=False)
    steps = [step_on("stacked", m, make(m.parameters()), scaler=s) for m, s in ((model, off), (twin, None))]
    for i in range(3):
        for step in steps:
            step(batch(i))
    assert_equal(model.state_dict(), twin.state_dict())
    steps[0].forward_backward(batch(3))
    model.head.bias.grad[0] = torch.inf
    steps[0].update()
    assert not model.head.bias.isfinite().all()


def test_sgd_with_dampening_cannot_skip() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    with pytest.raises(OptimizerError, match="SGD with dampening"):
        compile_train_step(model, optimizer, loss_of_part, layout=LAYOUT, skip_nonfinite=True)


# ---- what somebody does to an optimizer in the middle of a run -------------------------------------------------------

SWITCHED: dict[str, tuple[Callable[[Any], Optimizer], Callable[[int], dict[str, Any]]]] = {
    "momentum to 0": (partial(SGD, lr=0.1, momentum=0.9), lambda i: {"momentum": 0.9 * (i < 2)}),
    "momentum from 0": (partial(SGD, lr=0.1), lambda i: {"momentum": 0.9 * (i >= 2)}),
    "momentum through 0": (partial(SGD, lr=0.1, momentum=0.9), lambda i: {"momentum": 0.9 * (i != 2)}),
    "amsgrad off": (partial(AdamW, lr=1e-2, amsgrad=True), lambda i: {"amsgrad": i < 2}),
    "nesterov": (partial(SGD, lr=0.1, momentum=0.9), lambda i: {"nesterov": i >= 2}),
    "dampening": (partial(SGD, lr=0.1, momentum=0.9), lambda i: {"dampening": 0.5 * (i >= 2)}),
    "maximize": (partial(AdamW, lr=1e-3), lambda i: {"maximize": i >= 2}),
    "coupled decay": (partial(Adam, lr=1e-3, weight_decay=0.1), lambda i: {"decoupled_weight_decay": i >= 2}),
    "betas": (partial(AdamW, lr=1e-3), lambda i: {"betas": (0.9 - 0.1 * i, 0.99 - 0.01 * i)}),
    "beta of 0": (partial(AdamW, lr=1e-3), lambda i: {"betas": (0.9 * (i != 2), 0.99)}),
    "eps": (partial(AdamW, lr=1e-3), lambda i: {"eps": 10.0 ** (-8 + i)}),
    "weight decay": (partial(AdamW, lr=1e-3), lambda i: {"weight_decay": 0.1 * i}),
}


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("name", SWITCHED)
def test_options_that_change_in_the_middle(name: str, path: str) -> None:
    """As plain torch goes on, also where an option adds a tensor to the state or needs one no more."""
    make, options = SWITCHED[name]
    model = Model().double()
    optimizer = make(model.parameters())
    reference = Reference(model, LAYOUT, make, optimizer.param_groups[0]["lr"], tau=0.5)
    step = step_on(path, model, optimizer, tau=0.5)

    def both(i: int) -> None:
        for group in (*optimizer.param_groups, *reference.optimizer.param_groups):
            group.update(options(i))

    follow(step, model, reference, range(6), both)
    assert reference.off(model) < 1e-9
    assert moved(step.quacks[0])


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "SGD with momentum", "Lion"])  # Lion by its own step, if lr is a tensor
def test_tau_and_lr_change(name: str, as_tensor: bool, path: str) -> None:
    """Given as numbers or as tensors."""
    model = Model().double()
    optimizer = KNOWN[name](model.parameters())

    def number(value: float) -> Any:
        return torch.tensor(value, dtype=torch.float64) if as_tensor else value

    optimizer.param_groups[0]["lr"] = number(1e-3)
    reference = Reference(model, LAYOUT, KNOWN[name], lr=1e-3, tau=0.5)
    step = step_on(path, model, optimizer, tau=number(0.5))

    def both(i: int) -> None:
        reference.tau, reference.lr = 0.5 + 0.1 * i, 1e-3 / (1 + i)
        step.quacks[0].tau, optimizer.param_groups[0]["lr"] = number(reference.tau), number(reference.lr)

    follow(step, model, reference, range(6), both)
    assert reference.off(model) < 1e-9
    assert f"tau={number(reference.tau)}" in repr(step)


def make_late(model: nn.Module) -> tuple[AdamW, list[Tensor]]:
    """An optimizer without the first layer, and the weights of that one."""
    late = [p for n, p in model.named_parameters() if n.startswith("layers.0")]
    return AdamW([p for n, p in model.named_parameters() if not n.startswith("layers.0")], lr=1e-2), late


def freeze(params: list[Tensor], frozen: bool = True) -> None:
    for p in params:
        p.requires_grad_(not frozen)


@pytest.mark.parametrize("path", PATHS[:2])
def test_a_group_is_added(path: str) -> None:
    """Layers that are unfrozen later: as with a learning rate per head from then on, by factors of the beginning."""
    model = Model().double()
    reference = Reference(model, LAYOUT, AdamW, lr=1e-2, tau=0.5)
    optimizer, late = make_late(model)
    step = step_on(path, model, optimizer, tau=0.5)
    freeze(late)
    follow(step, model, reference, range(4))
    freeze(late, False)
    optimizer.add_param_group({"params": late})
    follow(step, model, reference, range(4, 8))
    assert reference.off(model) < 1e-9
    assert moved(step.quacks[0])


@pytest.mark.parametrize("model_first", [False, True])
def test_a_run_with_an_added_group_is_resumed(model_first: bool) -> None:
    """The group is added again before the state is loaded; the model's weights may be loaded before or after."""
    model = Model()
    optimizer, late = make_late(model)
    step = step_on("stacked", model, optimizer)
    for i in range(3):
        step(batch(i))
    optimizer.add_param_group({"params": late})
    copy.deepcopy(optimizer.state_dict())  # may be asked for at any time
    for i in range(3, 6):
        step(batch(i))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    fresh = Model()
    if model_first:
        fresh.load_state_dict(saved[0])
    again, late = make_late(fresh)
    resumed = step_on("stacked", fresh, again)
    again.add_param_group({"params": late})
    again.load_state_dict(saved[1])
    fresh.load_state_dict(saved[0])
    for i in range(6, 9):
        step(batch(i))
        resumed(batch(i))
    assert_equal(fresh.state_dict(), model.state_dict())


@pytest.mark.parametrize("path", PATHS[:2])
def test_a_parameter_is_replaced(path: str) -> None:
    """In the model and in the optimizer, by one of another size: scaled by its norm, with a fresh state."""
    model = Model().double()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    reference = Reference(model, LAYOUT, partial(SGD, momentum=0.9), lr=0.1, tau=0.5)
    step = step_on(path, model, optimizer, tau=0.5)
    follow(step, model, reference, range(2))
    old = model.layers[0].q.weight
    new = model.layers[0].q.weight = nn.Parameter(3 * old.detach())
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    reference.pull(model)
    for _, part in reference.parts["layers.0.q.weight"]:
        reference.optimizer.state.pop(part)
    follow(step, model, reference, range(2, 5))
    assert reference.off(model) < 1e-9


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("make", [partial(SGD, lr=1e-2), partial(AdamW, lr=1e-2)])
@pytest.mark.parametrize("pruned", [("q",), ("kv",), ("q", "kv")])
def test_a_head_is_pruned(pruned: tuple[str, ...], make: Callable[[Any], Optimizer], path: str) -> None:
    """What is met by zeros makes logits of zero, so its learning rate is as at the start; nothing becomes infinite."""
    model = Model().double()
    reference = Reference(model, LAYOUT, make, lr=1e-2, tau=0.5)
    step = step_on(path, model, make(model.parameters()), tau=0.5)
    follow(step, model, reference, range(2))

    @torch.no_grad()
    def prune(i: int) -> None:
        for name in pruned:
            for p in getattr(model.layers[0], name).parameters():
                p[: 4 if name == "kv" else 8] = 0  # all queries of the first key, or that key
        reference.pull(model)

    follow(step, model, reference, range(2, 5), prune)
    assert all(p.isfinite().all() for p in model.parameters())
    assert reference.off(model) < 1e-9


def test_weights_that_start_at_zero_on_both_sides_are_refused() -> None:
    model = Model()
    for weight in (model.layers[1].kv.weight, model.layers[1].q.weight, model.layers[1].q.bias):
        nn.init.zeros_(weight)
    with pytest.raises(FactorError, match=r"layers\.1\.kv\.weight has norm zero"):
        step_on("stacked", model, AdamW(model.parameters()))


# ---- how often something is compiled ---------------------------------------------------------------------------------


class Many(nn.Module):
    """Five layers without what they do: heads to scale, experts beside them, and an odd one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Model().layers[0] for _ in range(5))
        self.experts = nn.ModuleList(nn.Linear(6, 4) for _ in range(7))


@pytest.mark.parametrize("make", [partial(AdamW, lr=1e-3), partial(SGD, lr=1e-3, momentum=0.9)], ids=["AdamW", "SGD"])
def test_little_is_compiled(make: Callable[[Any], Optimizer], recompiles: None) -> None:
    """A hundred learning rates and values of tau, other options that schedules change, and other layers, experts and
    single weights without a gradient at each step: after the first ten nothing is compiled anew; by then only what is
    of another number of axes, two weights or one."""
    model, layout = Many(), QKLayout(tuple(map(site, range(5))))
    twin = copy.deepcopy(model)
    steps = [
        step_on(path, m, make(m.parameters()), layout=layout, clip_grad_norm=1.0)
        for path, m in (("compiled", model), ("stacked", twin))
    ]
    rng = random.Random(0)
    for i in range(110):
        dropped = [m for m in (*model.layers, *model.experts) if i >= 2 and rng.random() < 0.3]
        single = [p for p in model.parameters() if i >= 2 and rng.random() < 0.1]
        without = {id(p) for p in (*single, *(p for m in dropped for p in m.parameters()))}
        generator = torch.Generator().manual_seed(i)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = None if id(p) in without else torch.randn(p.shape, generator=generator)
            q.grad = None if p.grad is None else p.grad.clone()
        for step in steps:
            step.quacks[0].tau = 1 + i / 50
            (group,) = step.quacks[0].optimizer.param_groups
            group["lr"], group["weight_decay"] = 1e-3 / (1 + i), 0.1 / (1 + i)
            if "betas" in group:
                group["betas"] = (0.9 - i / 500, 0.99 + i / 20000)
            else:
                group["momentum"] = 0.9 - i / 500
            step.update()
        if i == 10:
            torch._dynamo.config.error_on_recompile = True
            compiled = graphs()
    assert 2 <= graphs() == compiled <= 6  # square matrices, others, biases; two or one of them
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(p, q) < 1e-5
