"""The emitted optimizers: they are what fp64 says, and the library's compiled step bit for bit.

The reference is `emit_cases.Reference`: AdamW and the rule of QuacK in plain fp64 loops, head by head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emit_cases import (
    PAIR,
    SITES,
    Bag,
    Reference,
    Shapes,
    batches,
    block,
    distance,
    example_mla,
    layout_of,
    load,
    rows,
    site,
)
from test_optim import Lion
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from quack_fx.emit import convert, emit
from quack_fx.layout import AttentionSite, QKLayout, WeightBlock
from quack_fx.optim import STATE_KEY, QuacK
from quack_fx.step import compile_train_step

# Importing Inductor meets a deprecated call of torch's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

# ---- the arithmetic -------------------------------------------------------------------------------------------------


def follow_the_reference(module: ModuleType, layout: QKLayout, shapes: Shapes) -> Any:
    """Twelve steps of the emitted AdamW beside the reference, to fp64's last digits; gives the optimizer."""
    model = Bag(shapes, torch.float64)
    names = dict(model.named_parameters())
    reference = Reference(layout, names, tau=0.5)
    optimizer = module.QuacKAdamW(model, lr=0.02, weight_decay=0.1, tau=0.5, compile=False)
    for x in batches(12, torch.float64):
        model(x).backward()
        reference.step({n: p.grad for n, p in names.items() if p.grad is not None}, 0.02, dict.fromkeys(names, 0.1))
        optimizer.step()
        optimizer.zero_grad()
    assert distance(model, reference) < 1e-13
    return optimizer


@pytest.mark.parametrize("name", SITES)
def test_eager_update_equals_the_reference(name: str, emitted: dict[str, ModuleType]) -> None:
    optimizer = follow_the_reference(emitted[name], *layout_of(name))
    scale = optimizer.scales()
    assert float((scale / 0.5 - 1).abs().max()) > 1e-2, "the factors have to move for this test to prove anything"


def test_rows_of_two_heads_take_the_smaller_scale(folder: Path) -> None:
    """Heads that overlap, and two sites that see the same rows with a bias and without."""
    shapes = {"attn.q.weight": (14, 6), "attn.k.weight": (12, 6), "attn.q.bias": (14,)}
    query, key = block("attn.q.weight", "q", rows(3, 4, 2, 3)), block("attn.k.weight", "k", rows(3, 4))
    biased = replace(query, heads=rows(3, 4, 0, 5), bias="attn.q.bias")
    layout = QKLayout((site("attn", [query], [key], PAIR), site("attn.again", [biased], [key], PAIR)))
    follow_the_reference(load(emit(layout, shapes, title="shared rows"), folder), layout, shapes)


TOGETHER = (
    "gqa",
    "conv1d",
    "interleaved",
    "grouped_fused",
    "mla",
    "two_pieces",
    "irregular",
    "joint",
    "shared_query_and_key",
)


@pytest.fixture(scope="module")
def everything(folder: Path) -> tuple[ModuleType, QKLayout, Shapes]:
    """A model with one site of many layouts, so that one compilation proves them all."""
    sites: list[AttentionSite] = []
    shapes: Shapes = {"rest.weight": (5, 7), "rest.bias": (5,)}
    for layout in TOGETHER:
        some, some_shapes = SITES[layout]

        def renamed(b: WeightBlock, at: str = f"{layout}.") -> WeightBlock:
            return replace(b, param=at + b.param, bias=b.bias and at + b.bias)

        one = replace(some[0], query=tuple(map(renamed, some[0].query)), key=tuple(map(renamed, some[0].key)))
        sites.append(one)
        names = {name for _, b in some[0].blocks() for name in (b.param, b.bias) if name}
        shapes |= {f"{layout}.{name}": some_shapes[name] for name in sorted(names)}
    layout_of_all = QKLayout(tuple(sites))
    return load(emit(layout_of_all, shapes, title="everything"), folder), layout_of_all, shapes


def two_groups(module: ModuleType, model: nn.Module, compile: bool) -> Any:
    """The emitted optimizer, with biases in a group of their own."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0, "lr": 0.01},
    ]
    return module.QuacKAdamW(model, lr=0.02, tau=0.7, param_groups=groups, compile=compile)


def schedule(step: int) -> float:
    return min(1.0, (step + 1) / 10) * 0.99**step


@pytest.mark.parametrize("compile", [False, True])
def test_fifty_steps_with_groups_and_schedule(everything: tuple[ModuleType, QKLayout, Shapes], compile: bool) -> None:
    """Two parameter groups, a scheduler, 50 steps in fp32: within 1e-5 of fp64, and compiled only once."""
    module, layout, shapes = everything
    model = Bag(shapes)
    names = dict(model.named_parameters())
    reference = Reference(layout, names, tau=0.7)
    optimizer = two_groups(module, model, compile)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    decay = {n: 0.1 if p.dim() > 1 else 0.0 for n, p in names.items()}
    double = Bag(shapes, torch.float64)
    for step, x in enumerate(batches(50, torch.float32)):
        model(x).backward()
        with torch.no_grad():
            for name, p in double.named_parameters():
                p.copy_(reference.params[name])
        double(x.double()).backward()
        grads = {n: p.grad for n, p in double.named_parameters() if p.grad is not None}
        _step_two_rates(reference, grads, decay, schedule(step))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        double.zero_grad()
        if step == 0:
            compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert distance(model, reference) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled, "once for all learning rates"
    assert (compiled > 0) == compile
    assert not torch._dynamo.utils.counters["graph_break"]


def _step_two_rates(reference: Reference, grads: dict[str, Tensor], decay: dict[str, float], factor: float) -> None:
    """A step in which biases have half the learning rate: twice the same step, each keeping its own parameters."""
    slow = copy.deepcopy(reference)
    reference.step(grads, 0.02 * factor, decay)
    slow.step(grads, 0.01 * factor, decay)
    for name, p in slow.params.items():
        if p.dim() == 1:
            reference.params[name] = p


@pytest.mark.parametrize("compile", [False, True])
def test_resume_is_bitwise(everything: tuple[ModuleType, QKLayout, Shapes], compile: bool, tmp_path: Path) -> None:
    """Save after three steps, load into new objects, go on: the same bits as without the stop."""
    module, _, shapes = everything

    def train(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            model(torch.tensor(0.3 * step)).backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = Bag(shapes)
    optimizer = two_groups(module, straight, compile)
    train(straight, optimizer, range(3))
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(straight, optimizer, range(3, 6))

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = Bag(shapes, seed=1)
    optimizer = two_groups(module, resumed, compile)
    optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["model"])
    train(resumed, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_state_dict_is_torchs_own_and_ours(emitted: dict[str, ModuleType]) -> None:
    """Plain AdamW goes on from it; a plain one's state is refused, for it has no norms."""
    _, shapes = layout_of("mla")
    model = Bag(shapes)
    optimizer = emitted["mla"].QuacKAdamW(model, compile=False)
    model(torch.tensor(0.1)).backward()
    optimizer.step()
    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    plain.step()
    assert all(float(state["step"]) == 2 for state in plain.state.values())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"not a state_dict\(\) of QuacKAdamW"):
        optimizer.load_state_dict(plain.state_dict())
    assert repr(optimizer.state_dict()) == repr(before)


def test_low_precision_and_frozen_weights(emitted: dict[str, ModuleType]) -> None:
    """bf16 weights keep fp32 norms through a save; a frozen key weight still counts and stays as it is."""
    _, shapes = layout_of("gqa")
    model = Bag(shapes, torch.bfloat16)
    key = dict(model.named_parameters())["layers.0.attn.k_proj.weight"].requires_grad_(False)
    before = key.clone()
    optimizer = emitted["gqa"].QuacKAdamW(model, lr=0.01, compile=False)
    for x in batches(3, torch.bfloat16):
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(key, before)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["quack_squares"].dtype == saved["quack"]["first"].dtype == torch.float32
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.heads.squares(), saved["quack_squares"])


def test_weights_that_are_loaded_are_measured(emitted: dict[str, ModuleType]) -> None:
    """Weights written from outside count at once; norms of a checkpoint of other weights do not."""
    _, shapes = layout_of("gqa")
    model, other = Bag(shapes), Bag(shapes, seed=1)
    optimizer = emitted["gqa"].QuacKAdamW(model, compile=False)
    saved = copy.deepcopy(optimizer.state_dict())
    model.load_state_dict(other.state_dict())
    fresh = emitted["gqa"].QuacKAdamW(other, compile=False).heads.squares()
    assert torch.equal(optimizer.heads.squares(), fresh)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.heads.squares(), fresh)


def test_closure_and_learning_rate_as_tensor(emitted: dict[str, ModuleType]) -> None:
    """Both ways to give a learning rate, with and without a closure, make the same step."""
    _, shapes = layout_of("fused")
    ends = []
    for lr in (0.02, torch.tensor(0.02)):
        model = Bag(shapes)
        optimizer = emitted["fused"].QuacKAdamW(model, lr=lr, compile=False)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(torch.tensor(0.2))
            loss.backward()
            return loss

        first = optimizer.step(closure)
        scheduler.step()
        assert optimizer.step(closure).item() < first.item()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, rtol=1e-6)


def test_equals_the_hooked_optimizer(everything: tuple[ModuleType, QKLayout, Shapes]) -> None:
    """The emitted file and quack_fx.QuacK on torch's AdamW take the same 50 steps in fp32."""
    module, layout, shapes = everything
    ours, hooked = Bag(shapes), Bag(shapes)
    emitted_optimizer = module.QuacKAdamW(ours, lr=0.02, weight_decay=0.1, compile=False)
    optimizer = torch.optim.AdamW(hooked.parameters(), lr=0.02, weight_decay=0.1)
    QuacK(optimizer, hooked, layout)
    for x in batches(50, torch.float32):
        for model, step in ((ours, emitted_optimizer), (hooked, optimizer)):
            model(x).backward()
            step.step()
            step.zero_grad()
    for a, b in zip(ours.parameters(), hooked.parameters(), strict=True):
        assert float((a - b).detach().norm() / b.detach().norm()) < 1e-5


# ---- bit for bit the library's step ---------------------------------------------------------------------------------


Make = Callable[[Any], Optimizer]

OPTIMIZERS: dict[str, tuple[str, dict[str, Any], Make]] = {
    # What the file is asked for, its options, and the library's optimizer.
    "AdamW": ("adamw", {"lr": 0.02, "weight_decay": 0.1}, AdamW),
    "AdamW amsgrad maximize": ("adamw", {"lr": 1e-4, "amsgrad": True, "maximize": True, "betas": (0.8, 0.9)}, AdamW),
    "Adam": ("adam", {"lr": 0.02, "weight_decay": 1e-3}, Adam),
    "SGD": ("sgd", {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, SGD),
    "SGD dampening": ("sgd", {"lr": 1e-3, "momentum": 0.9, "dampening": 0.3}, SGD),
    "Lion": ("lion", {"lr": 1e-3, "weight_decay": 0.1}, Lion),
}


def assert_same_bits(
    module: ModuleType,
    layout: QKLayout,
    shapes: Shapes,
    options: dict[str, Any],
    make: Make,
    compile: bool,
    **more: Any,
) -> None:
    """Eight steps of both, with groups, a schedule, and where `more` asks for it clipping and a bad gradient."""
    dtype = torch.bfloat16 if more.get("master_weights") else torch.float32
    ours, theirs = Bag(shapes, dtype), Bag(shapes, dtype)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        return [{"params": matrices}, {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 1e-3}]

    emitted = getattr(module, f"QuacK{make.__name__}")(
        ours,
        param_groups=groups(ours),
        tau=0.7,
        compile=compile,
        **options,
        **{name: value for name, value in more.items() if name in ("master_weights", "mode")},
    )  # type: ignore[attr-defined]
    optimizer = make(groups(theirs), **options)  # type: ignore[call-arg]
    step = compile_train_step(theirs, optimizer, layout=layout, tau=0.7, compile=compile, **more)
    train_step = module.compile_train_step(
        ours, emitted, **{name: value for name, value in more.items() if name != "master_weights"}
    )
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (emitted, optimizer)]
    for i, x in enumerate(batches(8, torch.float32)):
        x = x / 0 if i == 4 and more.get("skip_nonfinite") else x
        assert torch.equal(train_step(x.to(dtype)), step(x.to(dtype))) or x.isinf()
        for scheduler in schedulers:
            scheduler.step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert all(p.isfinite().all() for p in ours.parameters())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert emitted.state[p].keys() == optimizer.state[q].keys() - {STATE_KEY}
        assert all(torch.equal(value, optimizer.state[q][name]) for name, value in emitted.state[p].items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_same_bits_without_compiling(optimizer: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layout."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    name, options, make = OPTIMIZERS[optimizer]
    more = {} if "dampening" in options else {"skip_nonfinite": True, "clip_grad_norm": 30.0}
    for layout_name in SITES:
        layout, shapes = layout_of(layout_name)
        module = load(emit(layout, shapes, title=layout_name, optimizer=name), folder)  # type: ignore[arg-type]
        assert_same_bits(module, layout, shapes, options, make, compile=False, **more)
        assert_same_bits(module, layout, shapes, options, make, compile=False, master_weights=True)


@pytest.mark.parametrize(
    ("optimizer", "layout_name", "more"),
    [
        ("AdamW amsgrad maximize", "conv1d", {"clip_grad_norm": 30.0, "skip_nonfinite": True}),
        ("Adam", "mqa_with_bias", {}),
        ("SGD", "mla", {"clip_grad_norm": 30.0}),
        ("Lion", "interleaved", {"skip_nonfinite": True}),
        ("AdamW", "gqa", {"clip_grad_norm": 30.0, "master_weights": True, "mode": "reduce-overhead"}),
    ],
)
def test_same_bits_compiled(optimizer: str, layout_name: str, more: dict[str, Any], folder: Path) -> None:
    name, options, make = OPTIMIZERS[optimizer]
    layout, shapes = layout_of(layout_name)
    module = load(emit(layout, shapes, title=layout_name, optimizer=name), folder)  # type: ignore[arg-type]
    assert_same_bits(module, layout, shapes, options, make, compile=True, **more)


@pytest.mark.slow
def test_same_bits_compiled_for_everything(everything: tuple[ModuleType, QKLayout, Shapes]) -> None:
    _, options, make = OPTIMIZERS["AdamW"]
    assert_same_bits(*everything, options, make, compile=True, clip_grad_norm=30.0, skip_nonfinite=True)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("layout_name", ["mla", "mqa_with_bias"])
def test_same_bits_of_muon_and_adamw(
    layout_name: str, compile: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Muon for matrices, AdamW beside it; biases of queries and keys are AdamW's, and scaled there."""
    if not compile:
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    layout, shapes = layout_of(layout_name)
    shapes = shapes | {"rest.bias": (5,)}
    module = load(emit(layout, shapes, title=layout_name, optimizer="muon"), folder)
    ours, theirs = Bag(shapes), Bag(shapes)

    def parts(model: nn.Module) -> list[list[nn.Parameter]]:
        return [[p for p in model.parameters() if p.dim() == dim] for dim in (2, 1)]

    muon, adamw = {"lr": 0.02, "weight_decay": 0.1}, {"lr": 1e-3}
    emitted = [
        module.QuacKMuon(ours, param_groups=parts(ours)[0], compile=compile, **muon),
        module.QuacKAdamW(ours, param_groups=parts(ours)[1], compile=compile, **adamw),
    ]
    both = [Muon(parts(theirs)[0], **muon), AdamW(parts(theirs)[1], **adamw)]  # type: ignore[arg-type]
    step = compile_train_step(theirs, both, layout=layout, compile=compile, clip_grad_norm=30.0)
    train_step = module.compile_train_step(ours, emitted, clip_grad_norm=30.0)
    for x in batches(5, torch.float32):
        assert torch.equal(train_step(x), step(x))
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert (emitted[1].heads is None) == (layout_name == "mla")
    saved = copy.deepcopy([one.state_dict() for one in emitted])
    for one, state in zip(emitted, saved, strict=True):
        one.load_state_dict(state)
    with pytest.raises(ValueError, match="no optimizer holds some query or key weights"):
        module.compile_train_step(ours, [module.QuacKMuon(ours, param_groups=parts(ours)[0][1:])])


# ---- the compiled step on a real model ------------------------------------------------------------------------------


def test_compiled_step_trains_the_example(folder: Path) -> None:
    """With a schedule, the compiled step follows the eager loop and is the library's, the loss falls, and nothing
    compiles twice."""
    torch._dynamo.reset()  # after batches of other lengths it would compile one of the losses for any length
    model, layout = example_mla()
    module = load(convert(model, layout=layout), folder)
    twin, third = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = module.QuacKAdamW(model, lr=3e-3)
    eager = module.QuacKAdamW(twin, lr=3e-3, compile=False)
    librarys = AdamW(third.parameters(), lr=3e-3)
    train_step = module.compile_train_step(model, optimizer)
    same_step = compile_train_step(third, librarys, layout=layout)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: (i + 1) / 10) for o in (optimizer, eager, librarys)]
    text = torch.arange(2 * 17).view(2, 17) % 7
    losses, compiled = [], 0
    for _ in range(8):
        loss = train_step(text[:, :-1], text[:, 1:])
        assert not loss.requires_grad
        assert torch.equal(loss, same_step(text[:, :-1], text[:, 1:]))
        _, expected = twin(text[:, :-1], text[:, 1:])
        expected.backward()
        expected = expected.detach()
        eager.step()
        eager.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)
        losses.append(float(loss))
        compiled = compiled or torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert losses[-1] < 0.8 * losses[0]
    assert all(map(torch.equal, model.parameters(), third.parameters()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("returns", "loss_fn"),
    [
        ("loss", None),
        ("tuple", None),
        ("object", None),
        ("logits", lambda model, x: model(x).square().mean()),
    ],
)
def test_where_the_loss_comes_from(
    returns: str, loss_fn: Any, emitted: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scalar, a tuple with one, an object with `.loss`, or a loss function of the model and the batch."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    class Output:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    class Model(Bag):
        def forward(self, x: Tensor) -> Any:
            logits = x + sum(p.sum() for p in self.parameters())
            loss = logits.square().mean()
            return {"loss": loss, "tuple": (logits, None, loss), "object": Output(loss), "logits": logits}[returns]

    _, shapes = layout_of("fused")
    model = Model(shapes)
    optimizer = emitted["fused"].QuacKAdamW(model, lr=0.01, compile=False)
    step = emitted["fused"].compile_train_step(model, optimizer, loss_fn)
    x = torch.ones(3)
    first = step(x)
    assert first.dim() == 0 and step(x) < first
