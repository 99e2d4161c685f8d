"""The compiled update against a learning rate per head, for each optimizer that it knows, over two hundred steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_optim import LAYOUT, Attention, Lion, Model, PerHead, batch, loss_of, relative_error, site, train_per_head
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._pytree import tree_leaves

from quack_fx.errors import OptimizerError
from quack_fx.layout import QKLayout
from quack_fx.optim import QuacK
from quack_fx.step import TrainStep, compile_train_step, loops
from quack_fx.step.rules import rule_of

STEPS, CLIP, PARTS = 200, 0.5, 2


def schedule(step: int) -> float:
    return min(1.0, (step + 1) / 20) * (1 - step / (2 * STEPS))


def loss_of_part(model: nn.Module, x: Tensor) -> Tensor:
    x = x.to(next(model.parameters()).dtype)
    return F.mse_loss(model(x), x.roll(1, -1).sin()) / PARTS


def train(model: nn.Module, make: Callable[[Any], Optimizer], steps: int, **options: Any) -> TrainStep:
    optimizer = make(model.parameters())
    step = compile_train_step(model, optimizer, loss_of_part, layout=LAYOUT, tau=0.7, clip_grad_norm=CLIP, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for i in range(steps):
        for part in range(PARTS):
            step.forward_backward(batch(i * PARTS + part))
        step.update()
        scheduler.step()
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


COMPILED = ("AdamW", "Adam with coupled decay", "SGD with nesterov", "Lion")


@pytest.mark.parametrize(
    ("name", "compile"), [*((n, False) for n in KNOWN), *((n, True) for n in COMPILED)], ids=lambda x: str(x)
)
def test_equals_a_learning_rate_per_head(name: str, compile: bool) -> None:
    """Clipping, accumulation, decay and a schedule on; Lion in fp64, where no rounding turns a sign."""
    torch.manual_seed(0)
    model = Model().double() if name == "Lion" else Model()
    reference = train_per_head(model, KNOWN[name], 0.7, schedule, STEPS, CLIP, PARTS)
    step = train(model, KNOWN[name], STEPS, compile=compile)
    assert "compiled update" in repr(step)
    # Of the loss, the scales, queries with keys and values (they are alike) and what has no heads, and biases, and none
    # anew in 200 steps; none is broken into parts.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (4 + (not loops._TOGETHER) if compile else 0)
    assert not torch._dynamo.utils.counters["graph_break"]
    for i, layer in enumerate(model.layers):
        q_weight, q_bias, kv_weight = reference.weights(i)
        # A bias is one more column of its weight.
        query = [torch.cat([w, b[:, None]], 1) for w, b in ((layer.q.weight, layer.q.bias), (q_weight, q_bias))]
        assert relative_error(*query) < 1e-5
        assert relative_error(layer.kv.weight, kv_weight) < 1e-5
        assert relative_error(layer.out.weight, reference.rest.layers[i].out.weight) < 1e-5
    assert relative_error(model.head.weight, reference.rest.head.weight) < 1e-5


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


@pytest.mark.parametrize("compile", [False, True])
def test_lion_in_single_precision(compile: bool) -> None:
    """Against a learning rate per head, over 200 steps with gradients that are given: those of a model differ by a
    rounding, which turns the sign of what is next to zero; here nothing is."""
    model = Model()
    reference, gradients = PerHead(model), AwayFromZero(model)
    theirs, ours = (partial(Lion, lr=1e-3, weight_decay=0.1)(p) for p in (reference.groups(), model.parameters()))
    step = compile_train_step(model, ours, loss_of_part, layout=LAYOUT, clip_grad_norm=CLIP, compile=compile)
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


@pytest.mark.parametrize("compile", [False, True])
def test_lion_differs_where_a_rounding_turns_a_sign(compile: bool) -> None:
    """In fp32 on a model's own gradients, clipped and accumulated, against QuacK's hooks: where a weight goes the other
    way, what it takes the sign of is next to zero; such weights are set right, and all others are the same."""
    model = Model()
    twin = copy.deepcopy(model)
    ours, theirs = (Lion(m.parameters(), lr=1e-3, weight_decay=0.1) for m in (model, twin))
    step = compile_train_step(model, ours, loss_of_part, layout=LAYOUT, tau=0.7, clip_grad_norm=CLIP, compile=compile)
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


@pytest.mark.parametrize("compile", [False, True])
def test_muon_in_single_precision(compile: bool) -> None:
    """Against torch's own under QuacK's hooks, with gradients that are given and not clipped: its products round to
    bfloat16, which makes much of a last digit."""
    model = Model()
    twin = copy.deepcopy(model)
    both = [[torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.01)] for m in (model, twin)]
    step = compile_train_step(model, both[0], loss_of_part, layout=LAYOUT, compile=compile)
    quack = QuacK(both[1][0], twin, LAYOUT)
    for i in range(STEPS):
        for one, (optimizer,) in zip((model, twin), both, strict=True):
            optimizer.param_groups[0]["lr"] = 0.01 * schedule(i)
            for p, grad in zip(one.parameters(), given(model, i), strict=True):
                p.grad = grad if p.dim() == 2 else None
        both[1][0].step()
        step.update()
    assert quack.plan.units
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(one, other) < 1e-5


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


@pytest.mark.parametrize("compile", [False, True])
def test_muon_differs_as_it_does_from_itself(compile: bool, trained_by_hooks: tuple[Model, Model]) -> None:
    """In fp32 on a model's own gradients, clipped and accumulated: no farther from torch's own under QuacK's hooks than
    that is from itself when sums are rounded otherwise."""
    model, (reference, itself) = Model(), trained_by_hooks
    optimizers = muon_and_adamw(model)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    step = compile_train_step(
        model, optimizers, loss_of_part, layout=LAYOUT, tau=0.7, clip_grad_norm=CLIP, compile=compile
    )
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


class Uneven(nn.Module):
    """Equal attentions, and between them ever more other parameters, so that no two calls find theirs alike."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention() for _ in range(4))
        for i, layer in enumerate(self.layers):
            layer.others = nn.ParameterList(torch.ones(3) for _ in range(i * i))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) * (1 + sum(other.mean() for other in layer.others))
        return x


@pytest.mark.parametrize("most", [1, 2, 3])
def test_calls_that_look_alike_but_for_their_tables(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is checked before a call, so one that differs in anything has to have a function of its own."""
    monkeypatch.setattr(loops, "_MOST", most)
    model = Uneven()
    layout = QKLayout(tuple(map(site, range(4))))
    runs = [(m, compile) for m, compile in ((model, True), (copy.deepcopy(model), False))]
    for one, compile in runs:
        make = AdamW(one.parameters(), lr=1e-2)
        step = compile_train_step(one, make, loss_of_part, layout=layout, compile=compile)
        for i in range(6):
            step.forward_backward(batch(i))
            if i in (2, 3):  # other weights have gradients
                one.layers[1].q.weight.grad = None
            step.update()
    for a, b in zip(*(m.parameters() for m, _ in runs), strict=True):
        assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("name", KNOWN)
def test_state_is_what_the_optimizer_itself_keeps(name: str) -> None:
    """Names, types and shapes; the optimizer itself goes on from it, and the compiled step from the optimizer's."""
    torch.manual_seed(0)
    plain = Model()
    model = copy.deepcopy(plain)
    optimizer = KNOWN[name](plain.parameters())
    ours = KNOWN[name](model.parameters())
    step = compile_train_step(model, ours, loss_of_part, layout=QKLayout(), compile=False)
    for i in range(6):
        if i == 3:  # each goes on with the other's
            a, b = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(ours.state_dict())
            assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
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


def test_other_weights_have_gradients_each_time() -> None:
    """A parameter without a gradient stays as it is, its norm with it."""
    torch.manual_seed(0)
    model = Model()
    twin = copy.deepcopy(model)
    optimizer = AdamW(twin.parameters(), lr=1e-2)
    quack = QuacK(optimizer, twin, LAYOUT)
    step = compile_train_step(model, AdamW(model.parameters(), lr=1e-2), loss_of_part, layout=LAYOUT, compile=False)
    parameters = list(zip(model.parameters(), twin.parameters(), strict=True))
    for i in range(len(parameters)):
        step.forward_backward(batch(i))
        loss_of_part(twin, batch(i)).backward()
        left_out = parameters[i]
        before = left_out[0].detach().clone()
        for parameter in left_out:
            parameter.grad = None
        step.update()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(left_out[0], before)
        for one, other in parameters:
            assert relative_error(one, other) < 1e-5
    assert quack.plan.units


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
    ("make", "name"),
    [
        (Lion, "Lion"),
        (OwnLion, "Lion"),
        (partial(OwnLion, cautious=True), None),  # does something else
        (torch.optim.RMSprop, None),
        (type("MyAdam", (Adam,), {}), None),
        (torch.optim.Muon, "Muon"),
    ],
)
def test_a_rule_is_for_what_an_optimizer_does(make: Callable[..., Optimizer], name: str | None) -> None:
    optimizer = make([nn.Parameter(torch.ones(2, 3))], lr=0.1)
    rule = rule_of(optimizer)
    assert (rule.name if rule else None) == name
    assert torch.equal(optimizer.param_groups[0]["params"][0], torch.ones(2, 3)) and not optimizer.state


def muon_and(make: Callable[[Any], Optimizer]) -> Callable[[nn.Module], list[Optimizer]]:
    """Muon on the matrices, another on all else, biases of queries included."""

    def make_both(model: nn.Module) -> list[Optimizer]:
        matrices = [p for p in model.parameters() if p.dim() == 2]
        muon = torch.optim.Muon(matrices, lr=0.01, adjust_lr_fn="match_rms_adamw", nesterov=len(matrices) % 2 == 0)
        return [muon, make([p for p in model.parameters() if p.dim() != 2])]

    return make_both


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("beside", [partial(AdamW, lr=3e-3), partial(torch.optim.RMSprop, lr=1e-3)])
def test_two_optimizers_in_one_step(beside: Callable[[Any], Optimizer], clip: float | None) -> None:
    """Muon with another beside it, as the eager loop with a QuacK on each, in fp64: Muon rounds to bfloat16."""
    torch.manual_seed(0)
    model, make = Model().double(), muon_and(beside)
    twin = copy.deepcopy(model)
    step = compile_train_step(
        model, make(model), lambda m, i: loss_of(m, i), layout=LAYOUT, tau=0.7, clip_grad_norm=clip, compile=False
    )
    assert "Muon: compiled update" in repr(step) and len(step.quacks) == 2
    optimizers = make(twin)
    quacks = [QuacK(optimizer, twin, LAYOUT, tau=0.7) for optimizer in optimizers]
    for i in range(STEPS):
        step(i)
        loss_of(twin, i).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative_error(one, other) < 1e-5
    assert all(quack.plan.units for quack in quacks)


@pytest.mark.parametrize("beside", [partial(AdamW, lr=3e-3), partial(torch.optim.RMSprop, lr=1e-3)])
def test_one_bad_gradient_stops_both_optimizers(beside: Callable[[Any], Optimizer]) -> None:
    torch.manual_seed(0)
    model = Model()
    optimizers = muon_and(beside)(model)
    step = compile_train_step(
        model, optimizers, loss_of_part, layout=LAYOUT, clip_grad_norm=0.5, skip_nonfinite=True, compile=False
    )
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

    step = compile_train_step(model, make(model), loss_of_part, layout=LAYOUT, clip_grad_norm=0.01, compile=False)
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
}


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", GATED)
def test_gradients_that_are_not_finite_change_nothing(name: str, clip: float | None, bad: float) -> None:
    """Weights, moments, norms, counter: bit for bit; then training goes on as if that step had never been."""
    torch.manual_seed(0)
    model = Model()
    twin = copy.deepcopy(model)
    steps = []
    for one in (model, twin):
        optimizer = GATED[name](one.parameters())
        options = {"clip_grad_norm": clip, "skip_nonfinite": True, "compile": False}
        steps.append((compile_train_step(one, optimizer, loss_of_part, layout=LAYOUT, **options), optimizer))
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


@pytest.mark.parametrize("make", [*GATED.values(), partial(torch.optim.RMSprop, lr=1e-3)])
def test_grad_scaler_skips_and_goes_on(make: Callable[[Any], Optimizer]) -> None:
    """Against the loop that torch documents, through a step whose gradients overflow."""
    torch.manual_seed(0)
    model = Model()
    twin = copy.deepcopy(model)
    optimizer, scalers = make(twin.parameters()), [torch.amp.GradScaler("cpu", init_scale=2.0**8) for _ in range(2)]
    quack = QuacK(optimizer, twin, LAYOUT)
    step = compile_train_step(
        model,
        make(model.parameters()),
        loss_of_part,
        layout=LAYOUT,
        clip_grad_norm=0.5,
        scaler=scalers[0],
        compile=False,
    )
    for i in range(8):
        x = batch(i) * (1e30 if i == 3 else 1)
        before = copy.deepcopy(model.state_dict())
        step(x)
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
            assert relative_error(one, other) < 1e-5
    assert quack.plan.units


def test_a_step_that_may_be_none_needs_a_counter_on_the_device() -> None:
    on_meta = AdamW([nn.Parameter(torch.empty(2, device="meta"))])
    rule = rule_of(on_meta)
    assert rule is not None
    why = rule.refusal(on_meta.param_groups[0], skipping=True)
    assert why is not None and why.endswith("must count them there: AdamW(fused=True)")
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    with pytest.raises(OptimizerError, match="SGD with dampening"):
        compile_train_step(model, optimizer, loss_of_part, layout=LAYOUT, skip_nonfinite=True)
