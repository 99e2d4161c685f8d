"""The whole step: equal to the hooked eager optimizer, resumed to the bit, without waiting, and what loops do to it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from per_head import LAYOUT, Lion, Model, batch
from reference import Reference
from roundings import exact_gradients, gradients_of, off
from test_update import KNOWN, PATHS, assert_equal, follow, graphs, loss_of_part, step_on
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import quack_fx
from quack_fx import QKLayout, QuacK, compile_train_step
from quack_fx.errors import OptimizerError, StepError
from quack_fx.train.step import TrainStep

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import gpt
import mla


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "gpt":  # no biases: that of the keys has gradient zero, and Adam makes steps of its rounding
        return gpt.GPT(gpt.GPTConfig(vocab_size=32, context=8, layers=1, heads=2, width=16, bias=False))
    return mla.MLATransformer(mla.MLAConfig())


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(0, 32, (2, 2, 8), generator=generator)) for _ in range(n)]  # type: ignore[misc]


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    plain = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    return torch.optim.AdamW([{"params": matrices}, {"params": plain, "weight_decay": 0.0, "lr": 2e-3}], lr=1e-2)


def scheduler_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0 / (1 + i / 20))


def train_hooked(model: nn.Module, layout: QKLayout, n: int) -> torch.optim.Optimizer:
    optimizer = optimizer_of(model)
    QuacK(optimizer, model, layout, tau=0.5)
    scheduler = scheduler_of(optimizer)
    for x, y in batches(n):
        model(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return optimizer


@pytest.fixture(scope="module", params=["gpt"])
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Fifty steps of both forms, from the same start."""
    model = small(request.param)
    x, y = batches(1)[0]
    layout = quack_fx.find_qk_pairs(model, x, y)
    start, hooked = copy.deepcopy(model), copy.deepcopy(model)
    reference = train_hooked(hooked, layout, 50)
    optimizer = optimizer_of(model)
    step = compile_train_step(model, optimizer, layout=layout, tau=0.5, clip_grad_norm=0.5)
    scheduler = scheduler_of(optimizer)
    losses, graphs = [], []
    for x, y in batches(50):
        losses.append(step(x, y))
        scheduler.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return dict(
        model=model, hooked=hooked, reference=reference, optimizer=optimizer, step=step, layout=layout,
        start=start, losses=losses, graphs=graphs,
    )  # fmt: skip


@torch.no_grad()
def relative(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).norm() / (q.norm() + 1e-12)) for p, q in pairs)


def test_equals_the_hooked_optimizer(case: dict[str, Any]) -> None:
    assert relative(case["model"], case["hooked"]) < 1e-5
    assert relative(case["model"], case["start"]) > 1e-2


def test_schedule_recompiles_nothing(case: dict[str, Any]) -> None:
    assert case["graphs"][2] == case["graphs"][-1] > 0


def test_state_is_the_optimizers_own(case: dict[str, Any]) -> None:
    ours, theirs = case["optimizer"].state_dict(), case["reference"].state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for key, state in theirs["state"].items():
        assert ours["state"][key].keys() == state.keys()
        torch.testing.assert_close(ours["state"][key]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-6)
        assert torch.equal(ours["state"][key]["step"], state["step"])
    fresh = copy.deepcopy(case["model"])
    other = optimizer_of(fresh)
    QuacK(other, fresh, case["layout"], tau=0.5)
    other.load_state_dict(ours)
    assert other.state_dict()["param_groups"] == ours["param_groups"]


def test_losses_are_detached_scalars(case: dict[str, Any]) -> None:
    assert all(loss.ndim == 0 and not loss.requires_grad for loss in case["losses"])
    assert "compiled update" in repr(case["step"]) and "tau=0.5" in repr(case["step"])


def test_other_forms_equal_the_hooked_optimizer() -> None:
    """Eager, with a layout found on the first batch, a loss function, and an optimizer that is not compiled."""
    model = small("gpt")
    layout = quack_fx.find_qk_pairs(model, *batches(1)[0])
    for make in (torch.optim.AdamW, torch.optim.RMSprop):
        one, two = copy.deepcopy(model), copy.deepcopy(model)
        hooked = make(two.parameters(), lr=1e-2, weight_decay=0.1)
        QuacK(hooked, two, layout)
        step = compile_train_step(
            one, make(one.parameters(), lr=1e-2, weight_decay=0.1), lambda m, x, y: m(x, y)[1], compile=False
        )
        for x, y in batches(5):
            step(x, y)
            two(x, y)[1].backward()
            hooked.step()
            hooked.zero_grad()
        assert relative(one, two) < 1e-6
        assert step.layout == layout
        assert ("its own step()" in repr(step)) == (make is torch.optim.RMSprop)


def test_mla_eager() -> None:
    model = small("mla")
    x, y = batches(1)[0]
    layout = quack_fx.find_qk_pairs(model, x, y)
    assert layout.sites[0].kind == "mla"
    hooked = copy.deepcopy(model)
    train_hooked(hooked, layout, 6)
    optimizer = optimizer_of(model)
    step = compile_train_step(model, optimizer, layout=layout, tau=0.5, clip_grad_norm=0.5, compile=False)
    scheduler = scheduler_of(optimizer)
    for x, y in batches(6):
        step(x, y)
        scheduler.step()
    assert relative(model, hooked) < 1e-5


def test_mla_update_compiled() -> None:
    """The same gradients, compiled and not: heads of unlike sizes, factors that heads share."""
    model = small("mla")
    layout = quack_fx.find_qk_pairs(model, *batches(1)[0])
    twin = copy.deepcopy(model)
    steps = [
        compile_train_step(one, optimizer_of(one), layout=layout, tau=0.5, clip_grad_norm=0.5, compile=one is model)
        for one in (model, twin)
    ]
    for i in range(4):
        generator = torch.Generator().manual_seed(i)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for step in steps:
            step.update()
        assert relative(model, twin) < 1e-6


def test_layout_without_sites_is_plain_adamw() -> None:
    model = small("gpt")
    other = copy.deepcopy(model)
    step = compile_train_step(model, torch.optim.AdamW(model.parameters(), lr=1e-2), layout=QKLayout(), compile=False)
    plain = torch.optim.AdamW(other.parameters(), lr=1e-2)
    for x, y in batches(3):
        step(x, y)
        other(x, y)[1].backward()
        plain.step()
        plain.zero_grad()
    assert relative(model, other) < 1e-6
    assert "without QuacK" in repr(step)


RESUMED: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (lambda m: [torch.optim.AdamW(m.parameters(), lr=1e-2, amsgrad=True)], {"clip_grad_norm": 0.5}),
    "AdamW, compiled": (lambda m: [optimizer_of(m)], {"compile": True}),
    "SGD": (lambda m: [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.3)], {}),
    "Lion": (lambda m: [Lion(m.parameters(), lr=1e-3)], {}),
    "Muon and AdamW": (lambda m: muon_and_adamw(m), {"skip_nonfinite": True}),
    "its own step": (lambda m: [torch.optim.NAdam(m.parameters(), lr=1e-2)], {}),
    "masters": (lambda m: [optimizer_of(m.bfloat16())], {"master_weights": True}),
}


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices, others = ([p for p in model.parameters() if (p.dim() == 2) == two] for two in (True, False))
    return [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1), torch.optim.AdamW(others, lr=3e-3)]


def wide(name: str, seed: int) -> tuple[nn.Module, list[torch.optim.Optimizer], TrainStep]:
    """A model whose projection is too large to be stacked."""
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(vocab_size=32, context=8, layers=3, heads=2, width=96, bias=False))
    layout = quack_fx.find_qk_pairs(model, *batches(1)[0])
    make, options = RESUMED[name]
    optimizers = make(model)
    return model, optimizers, compile_train_step(model, optimizers, layout=layout, **{"compile": False, **options})


def go_on(folder: str) -> None:
    """Resume each run and take three more steps; run in a process of its own."""
    torch.set_num_threads(1)
    for i, name in enumerate(RESUMED):
        model, optimizers, step = wide(name, seed=9)
        weights, states = torch.load(Path(folder, f"{i}.pt"))
        model.load_state_dict(weights)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        for x, y in batches(6)[3:]:
            step(x, y)
        torch.save(model.state_dict(), Path(folder, f"{i}_after.pt"))


def test_resume_is_bitwise_in_a_fresh_process(tmp_path: Path) -> None:
    """Saved after three steps; three more give the same bits here and there, where the model began with others."""
    ends = []
    for i, name in enumerate(RESUMED):
        model, optimizers, step = wide(name, seed=0)
        for x, y in batches(3):
            step(x, y)
        torch.save((model.state_dict(), [o.state_dict() for o in optimizers]), tmp_path / f"{i}.pt")
        for x, y in batches(6)[3:]:
            step(x, y)
        ends.append(model.state_dict())
    code = f"import test_step; test_step.go_on({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
    for i, end in enumerate(ends):
        assert_equal(torch.load(tmp_path / f"{i}_after.pt"), end)


def test_weights_changed_between_steps_are_measured_anew() -> None:
    """Written in place, or given other storage."""
    model = small("gpt")
    layout = quack_fx.find_qk_pairs(model, *batches(1)[0])
    hooked = copy.deepcopy(model)
    theirs = torch.optim.AdamW(hooked.parameters(), lr=1e-2)
    QuacK(theirs, hooked, layout)
    step = compile_train_step(model, torch.optim.AdamW(model.parameters(), lr=1e-2), layout=layout, compile=False)
    for i, (x, y) in enumerate(batches(6)):
        if i == 2:  # in place, by load_state_dict
            for one in (model, hooked):
                one.load_state_dict({n: 3 * v if "qkv" in n else v for n, v in one.state_dict().items()})
        if i == 4:  # other storage
            for one in (model, hooked):
                weight = one.blocks[0].attn.qkv.weight
                weight.data = weight.data * 0.5
        step(x, y)
        hooked(x, y)[1].backward()
        theirs.step()
        theirs.zero_grad()
        assert relative(model, hooked) < 1e-6


@pytest.mark.parametrize("clip", [0, -1.0])
def test_bad_clip(clip: float) -> None:
    model = small("gpt")
    with pytest.raises(StepError, match="clip_grad_norm is"):
        compile_train_step(model, torch.optim.AdamW(model.parameters()), clip_grad_norm=clip)


def test_refusals() -> None:
    model = small("gpt")
    x, y = batches(1)[0]
    layout = quack_fx.find_qk_pairs(model, x, y)
    with pytest.raises(StepError, match="holds no loss"):
        compile_train_step(model, torch.optim.AdamW(model.parameters()), layout=layout, compile=False)(x)
    with pytest.raises(OptimizerError, match="holds none"):
        compile_train_step(model, torch.optim.AdamW([nn.Parameter(torch.ones(2))]), layout=layout)
    mlp = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    step = compile_train_step(mlp, torch.optim.AdamW(mlp.parameters()), lambda m, x: m(x).mean(), compile=False)
    with pytest.raises(StepError, match="no query/key pairs"):
        step(torch.ones(2, 4))


class Block(nn.Module):
    """Layers that are computed again in the backward pass, or not."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again, self.gpt = again, small("gpt")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        def run(x: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = self.gpt(x, y)[1]
            return loss

        return checkpoint(run, x, y, use_reentrant=False) if self.again else run(x, y)


@pytest.mark.parametrize("compile", [False, True])
def test_activation_checkpointing_changes_nothing(compile: bool) -> None:
    torch._dynamo.reset()
    models = [Block(again) for again in (False, True)]
    for model in models:
        step = compile_train_step(model, optimizer_of(model), compile=compile)
        for x, y in batches(5):
            step(x, y)
        assert step.layout is not None and len(step.layout.sites) == 1
    assert relative(*models) < 1e-6


def plain_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    value: Tensor = model(x, y)[1]
    return value


def half_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return plain_loss(model, x, y)


@pytest.mark.parametrize("compile", [False, True])
def test_autocast(compile: bool) -> None:
    """Under autocast to bfloat16, each step from the same weights as the eager loop with a QuacK on its optimizer.

    Gradients are that loop's bit for bit, or, compiled, no farther from exact ones than twice what that loop's are. Of
    the same gradients both make the same update. (Weights a last digit apart would round to bfloat16 otherwise here and
    there, which differs by the machine, and Adam makes much of little.)
    """
    torch._dynamo.reset()
    model = small("gpt")
    start, twin = copy.deepcopy(model), copy.deepcopy(model)
    layout = quack_fx.find_qk_pairs(model, *batches(1)[0])
    step = compile_train_step(
        model, optimizer_of(model), half_loss, layout=layout, tau=0.5, clip_grad_norm=0.5, compile=compile
    )
    optimizer = optimizer_of(twin)
    QuacK(optimizer, twin, layout, tau=0.5)
    for x, y in batches(10):
        found, expected = step.forward_backward(x, y), half_loss(twin, x, y)
        expected.backward()
        ours, theirs, exact = gradients_of(model), gradients_of(twin), exact_gradients(twin, plain_loss, x, y)
        if compile:
            assert abs(float(found / expected.detach()) - 1) < 2**-8  # what bfloat16 can tell
            assert off(ours, exact) < 2 * off(theirs, exact) < 0.1
        else:
            assert torch.equal(found, expected) and all(map(torch.equal, ours, theirs))
        for p, grad in zip(twin.parameters(), ours, strict=True):
            p.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        step.update()
        assert relative(model, twin) < 2**-22  # decay, product, difference: a rounding each
        twin.load_state_dict(model.state_dict())
    assert relative(start, twin) > 1e-2


class NoSync(TorchDispatchMode):
    """Refuses every op that hands a number of a tensor to Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name().split("::")[-1] not in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("name", [*KNOWN, "AdamW lr as a tensor", "Muon"])
@pytest.mark.parametrize("master_weights", [False, True])
def test_update_hands_no_number_to_python(name: str, master_weights: bool, path: str) -> None:
    """The first step and later ones, clipping and gate on: on a device, each such number would be waited for."""
    model = Model().bfloat16() if master_weights else Model()
    more = {
        "AdamW lr as a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
        "Muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2]),
    }
    optimizer = {**KNOWN, **more}[name](model.parameters())
    gate = not optimizer.defaults.get("dampening")
    step = step_on(path, model, optimizer, clip_grad_norm=1.0, skip_nonfinite=gate, master_weights=master_weights)
    for i in range(3):
        step.forward_backward(batch(i))
        with NoSync():
            step.update()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_of_the_compiler(case: dict[str, Any], mode: str) -> None:
    """On a CPU they choose other kernels at most; CUDA graphs were not to be had."""
    torch._dynamo.reset()
    model = copy.deepcopy(case["start"])
    optimizer = optimizer_of(model)
    step = compile_train_step(model, optimizer, layout=case["layout"], tau=0.5, clip_grad_norm=0.5, mode=mode)
    scheduler = scheduler_of(optimizer)
    for x, y in batches(50):
        step(x, y)
        scheduler.step()
    assert relative(model, case["hooked"]) < 1e-5


# ---- what training loops do to a step --------------------------------------------------------------------------------


class Breaks(torch.autograd.Function):
    """Runs out of memory in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("where", ["forward", "backward", "a step hook", "no loss", "the loss of constants"])
def test_what_a_broken_batch_leaves_behind_is_dropped(where: str) -> None:
    """The loop goes on with the next batch as if the broken one had never been, gradients added up before included."""
    model = Model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    reference = Reference(model, LAYOUT, partial(torch.optim.SGD, momentum=0.9), lr=0.1)
    broken = ""

    def loss(m: nn.Module, x: Tensor) -> Any:
        if broken == "forward":
            raise torch.OutOfMemoryError("out of memory")
        if broken == "no loss":
            return None
        value = loss_of_part(m, x)
        if broken == "the loss of constants":
            return value.detach()
        return Breaks.apply(value) if broken == "backward" else value

    def interrupt(*_: Any) -> None:
        if broken == "a step hook":
            raise KeyboardInterrupt

    optimizer.register_step_pre_hook(interrupt)
    step = step_on("stacked", model, optimizer, loss_fn=loss)
    follow(step, model, reference, range(2))
    step.forward_backward(batch(2))
    broken = where
    with pytest.raises((torch.OutOfMemoryError, KeyboardInterrupt, StepError)):
        step(batch(3))
    broken = ""
    assert all(p.grad is None for p in model.parameters())
    follow(step, model, reference, range(4, 7))
    assert reference.off(model) < 1e-9


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "a tuple with something beside": lambda loss: (torch.ones(3), loss),
    "a list": lambda loss: [loss, {"logits": loss}],
    "a dict": lambda loss: {"loss": loss, "aux": loss},
    "an object": lambda loss: SimpleNamespace(loss=loss, aux=loss),
    "a tuple in an object": lambda loss: SimpleNamespace(loss=(loss, torch.ones(2))),
    "counts beside": lambda loss: (torch.tensor(3), loss),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_where_the_loss_is(name: str) -> None:
    model, twin = Model(), Model()
    wrapped = step_on(
        "stacked", model, torch.optim.AdamW(model.parameters()), loss_fn=lambda m, x: OUTPUTS[name](loss_of_part(m, x))
    )
    plain = step_on("stacked", twin, torch.optim.AdamW(twin.parameters()))
    for i in range(2):
        assert torch.equal(wrapped(batch(i)), plain(batch(i)))
    assert_equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.NAdam], ids=["compiled", "its own step"])
def test_hooks_on_the_optimizer_are_called(make: Any) -> None:
    """Once a step each, in torch's order, with the gradients there before and the new weights after."""
    model = Model()
    optimizer = make(model.parameters(), lr=1e-3)
    step = step_on("stacked", model, optimizer)
    seen: list[tuple[str, bool]] = []
    start: list[Tensor] = []

    def hook(name: str) -> Callable[..., None]:
        def note(one: Any, args: Any, kwargs: Any) -> None:
            if one is optimizer:
                assert model.head.weight.grad is not None
                seen.append((name, torch.equal(model.head.weight, start[-1])))

        return note

    handles = [
        register_optimizer_step_pre_hook(hook("pre of all")),
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
        register_optimizer_step_post_hook(hook("post of all")),
    ]
    try:
        for i in range(2):
            start.append(model.head.weight.detach().clone())
            step(batch(i))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == 2 * [("pre of all", True), ("pre", True), ("post", False), ("post of all", False)]


def test_the_optimizers_own_step_is_scaled_once() -> None:
    """Called by somebody else, between steps of ours."""
    model = Model().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    reference = Reference(model, LAYOUT, torch.optim.AdamW, lr=1e-2, tau=0.3)
    step = step_on("stacked", model, optimizer, tau=0.3)
    for i in range(6):
        step.forward_backward(batch(i))
        reference.take(model)
        reference.step()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
        else:
            step.update()
        assert reference.off(model) < 1e-9


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("begun", [False, True])
def test_a_step_cannot_be_copied(copied: Callable[[Any], Any], begun: bool) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    step = step_on("stacked", model, optimizer) if begun else compile_train_step(model, optimizer)
    with pytest.raises(StepError, match="cannot be copied or pickled"):
        copied(step)


class Bag(nn.Module):
    """An attention behind an embedding that may have sparse gradients."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.body = Model()
        self.layers, self.head = self.body.layers, self.body.head
        self.tokens = nn.Embedding(50, 16, sparse=sparse)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(self.tokens(tokens)).square().mean()


def sparse_and_adamw(model: Bag) -> list[torch.optim.Optimizer]:
    rest = [p for p in model.parameters() if p is not model.tokens.weight]
    return [torch.optim.SparseAdam([model.tokens.weight], lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize(
    "make", [lambda m: [torch.optim.SGD(m.parameters(), lr=0.1)], sparse_and_adamw], ids=["SGD", "SparseAdam"]
)
def test_sparse_gradients(make: Callable[[Any], list[torch.optim.Optimizer]], clip: float | None) -> None:
    """As the usual loop with QuacK on its optimizer, clipped by the norm that dense gradients have."""
    torch.manual_seed(0)
    model = Bag(sparse=True)
    twin = copy.deepcopy(model)
    optimizers, theirs = make(model), make(twin)
    names = [n for n, p in twin.named_parameters()]
    layout = layout_of_body(twin)
    step = step_on("stacked", model, *optimizers, loss_fn=None, layout=layout, clip_grad_norm=clip)
    QuacK(theirs[-1], twin, layout)
    for i in range(4):
        tokens = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(i))
        step(tokens)
        twin(tokens).backward()
        assert twin.tokens.weight.grad.is_sparse and names
        if clip is not None:
            squares = [p.grad.to_dense().square().sum() for p in twin.parameters()]
            ratio = min(1.0, clip / (float(sum(squares)) ** 0.5 + 1e-6))  # type: ignore[arg-type]
            for p in twin.parameters():
                p.grad.mul_(ratio)
        for optimizer in theirs:
            optimizer.step()
            optimizer.zero_grad()
    assert relative(model, twin) < 1e-6


def layout_of_body(model: nn.Module) -> QKLayout:
    return quack_fx.find_qk_pairs(model, torch.zeros(2, 6, dtype=torch.long))


@pytest.mark.parametrize("name", KNOWN)
def test_another_default_device(name: str) -> None:
    """Nothing of ours is made where the default says; meta tensors would have no numbers."""
    model, twin = Model(), Model()
    inputs = [batch(i) for i in range(3)]
    for m, default in ((model, "meta"), (twin, "cpu")):
        optimizer = KNOWN[name](m.parameters())
        gate = not optimizer.defaults.get("dampening")
        with torch.device(default):
            step = step_on("stacked", m, optimizer, clip_grad_norm=0.5, skip_nonfinite=gate)
            for x in inputs:
                step(x)
    assert_equal(model.state_dict(), twin.state_dict())


def test_batches_of_other_sizes_compile_little() -> None:
    """Nothing for the update."""
    torch._dynamo.reset()
    model = small("gpt")
    layout = quack_fx.find_qk_pairs(model, *batches(1)[0])
    step = step_on("compiled", model, optimizer_of(model), loss_fn=None, layout=layout)
    assert step._program is not None
    step._program.loss = step._program.loss_of  # not compiled
    counts = []
    for n, length in [(4, 8), (3, 8), (4, 7), (2, 5), (7, 6), (5, 3), (9, 4), (6, 8), (3, 2)]:
        x, y = torch.randint(0, 32, (2, n, length))
        step(x, y)
        counts.append(graphs())
    assert counts[0] == counts[-1] > 0
