"""Models as people train them: wrapped as a whole or in layers, under profilers, with optimizers in other hands.

Several processes (DistributedDataParallel, FSDP, tensor parallel) are in `test_distributed.py`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from per_head import LAYOUT, WIDTH, Model, assert_same, loss_of, train
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.profiler import record_function

from quack_fx import (
    QuacK,
    capture,
    compile_train_step,
    find_qk_pairs,
    insert_qk_norm,
    strip_qk_norm,
    verify_qk_pairs,
)
from quack_fx.errors import CaptureError, LayoutError, OptimizerError, StripError, VerifyError
from quack_fx.layout import QKLayout

INPUT = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(0))


def each_layer(wrap: Callable[[nn.Module], nn.Module]) -> Model:
    model = Model()
    model.layers = nn.ModuleList(map(wrap, model.layers))
    return model


def compiled(module: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    return wrapped


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: compiled(Model()),
    "averaged": lambda: AveragedModel(Model()),
    "averaged of compiled": lambda: AveragedModel(compiled(Model())),
    "DataParallel": lambda: nn.DataParallel(Model()),
    "layers checkpointed": lambda: each_layer(checkpoint_wrapper),
    "layers offloaded": lambda: each_layer(offload_wrapper),
    "layers compiled": lambda: each_layer(compiled),
    "layers compiled in place": lambda: each_layer(compiled_in_place),
    "layers in three wrappers, in a fourth": lambda: compiled(
        each_layer(lambda layer: offload_wrapper(compiled(checkpoint_wrapper(layer))))
    ),
}


@pytest.fixture(scope="module")
def layout() -> QKLayout:
    return find_qk_pairs(Model(), INPUT)


def everything(model: nn.Module) -> list[Any]:
    """What a module and all inside it hold, by identity, and how often weights were written."""
    found: list[Any] = []
    for name, module in model.named_modules():
        found.append((name, type(module), {key: id(value) for key, value in vars(module).items()}))
        held = [module._parameters, module._buffers, module._modules, module._forward_hooks, module._forward_pre_hooks]
        found += [{key: id(value) for key, value in own.items()} for own in held]
    return [*found, [parameter._version for parameter in model.parameters()]]


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_pairs_of_a_wrapped_model_are_those_of_the_model_inside(
    make: Callable[[], nn.Module], layout: QKLayout
) -> None:
    model = make()
    before = everything(model)
    assert find_qk_pairs(model, INPUT) == layout
    assert everything(model) == before
    assert {str(n.target) for n in capture(model, [INPUT]).graph_module.graph.nodes if n.op == "get_attr"} == {
        name for name, _ in Model().named_parameters()
    }


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_the_model_inside_is_proved(make: Callable[[], nn.Module], layout: QKLayout) -> None:
    """Nothing is changed, and a wrong layout is refuted."""
    model = make()
    before = everything(model)
    assert verify_qk_pairs(model, layout, INPUT).complete
    site = layout.sites[1]
    swapped = replace(site, query=(replace(site.query[0], heads=site.query[0].heads[::-1]),))
    with pytest.raises(VerifyError, match=r"'layers\.1': head 0, query side: .* the layout claims rows 12-15"):
        verify_qk_pairs(model, QKLayout((layout.sites[0], swapped)), INPUT)
    assert everything(model) == before


OUTSIDE = {"layers compiled in place": None, "layers checkpointed": "'layers.0' is in CheckpointWrapper"}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_norms_go_out_and_in_before_a_model_is_wrapped(
    make: Callable[[], nn.Module], layout: QKLayout, request: pytest.FixtureRequest
) -> None:
    """Refused in one line, before anything is changed; a module that compiles itself is no wrapper."""
    model, name = make(), request.node.callspec.id
    where = OUTSIDE.get(name, r"('layers\.0'|the model) is in \w+")
    before = everything(model)
    for change in (strip_qk_norm, insert_qk_norm):
        if where is None:
            change(model, layout)
        else:
            with pytest.raises(StripError, match=f"^{where}; take QK norms out, or put them in, before .*wrapped"):
                change(model, layout)
            assert everything(model) == before


class Own(nn.Module):
    """Holds a module as wrappers do, and is none."""

    def __init__(self, inside: Callable[[], nn.Module] = Model) -> None:
        super().__init__()
        self.module = inside()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(2 * x)  # type: ignore[no-any-return]


OWN: dict[str, Callable[[], nn.Module]] = {
    "plain": Own,
    "compiled": lambda: compiled(Own()),
    "parallel": lambda: nn.DataParallel(Own()),
    "compiled and parallel": lambda: nn.DataParallel(compiled(Own())),
}


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_a_module_of_ones_own_called_like_a_wrappers_is_no_wrapper(make: Callable[[], nn.Module]) -> None:
    model = make()
    layout = find_qk_pairs(model, INPUT)
    assert [site.name for site in layout.sites] == ["module.layers.0", "module.layers.1"]
    plain = Own()
    optimizer, theirs = SGD(model.parameters(), lr=0.1), SGD(plain.parameters(), lr=0.1)
    QuacK(optimizer, model, layout, tau=0.5)
    QuacK(theirs, plain, layout, tau=0.5)
    for ours, p in zip(model.parameters(), plain.parameters(), strict=True):
        ours.grad = p.grad = torch.ones_like(p)
    optimizer.step()
    theirs.step()
    assert_same(model, plain)


class Twice(Model):
    """Has parameters that differ in the `module` of their names alone."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Model()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.module(x))


def test_names_with_two_meanings_are_refused() -> None:
    """A name would be another parameter's once wrappers are taken out of it."""
    model = Twice()
    layout = find_qk_pairs(model, INPUT)
    assert len(layout.sites) == 4
    with pytest.raises(
        LayoutError, match=r"another parameter is called 'layers.0.q.weight' without its wrappers.* rename"
    ):
        QuacK(SGD(model.parameters()), model, layout)
    parallel = nn.DataParallel(Own(Twice))  # its names have one `module` more
    layout = find_qk_pairs(Twice(), INPUT)
    with pytest.raises(
        LayoutError, match=r"'module.layers.0.q.weight', which is one parameter of this model and another"
    ):
        QuacK(SGD(parallel.module.parameters()), parallel.module, layout)


def test_hooks_of_ones_own_run() -> None:
    """Of the hooks on a model only those of torch.distributed are left out."""
    model, seen = compiled(Model()), list[str]()
    model._orig_mod.layers[0].out.register_forward_hook(lambda *_: seen.append("after"))
    find_qk_pairs(model, INPUT)
    assert seen


class Profiled(Model):
    """Forwards that mark themselves for the profiler, as DistributedDataParallel does."""

    def forward(self, x: Tensor) -> Tensor:
        with record_function("forward"), record_function("layers"):
            return super().forward(x)


def test_ranges_of_the_profiler(layout: QKLayout) -> None:
    """They compute nothing, and are not in the graph; in one that runs neither."""
    model = Profiled()
    assert find_qk_pairs(model, INPUT) == layout
    with torch.profiler.profile():
        assert find_qk_pairs(model, INPUT) == layout
    graph = capture(model, [INPUT], executable=True).graph_module
    assert torch.equal(graph(INPUT), model(INPUT))
    assert "profiler" not in graph.code


def test_ops_with_packed_weights() -> None:
    """Objects of TorchScript classes are left out of a graph that is read, and refused in one that runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its quantization moves elsewhere
        linear = torch.ao.nn.quantized.dynamic.Linear(4, 3)
    graph = capture(nn.Sequential(linear), [torch.ones(2, 4)]).graph_module
    assert "quantized.linear_dynamic" in graph.code
    with pytest.raises(CaptureError, match=r"linear_dynamic.* takes an object of a TorchScript class, which no graph"):
        capture(nn.Sequential(linear), [torch.ones(2, 4)], executable=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_models_train_as_the_model_inside(make: Callable[[], nn.Module], layout: QKLayout) -> None:
    """By hooks and by a step, which finds the layout by itself."""
    plain, ours, stepped = Model(), make(), make()
    reference, optimizer, other = (AdamW(model.parameters(), lr=1e-2) for model in (plain, ours, stepped))
    QuacK(reference, plain, layout, tau=0.5)
    QuacK(optimizer, ours, layout, tau=0.5)
    step = compile_train_step(stepped, other, mean_square, tau=0.5, compile=False)
    for i in range(3):
        train(plain, reference, steps=range(i, i + 1))
        train(ours, optimizer, steps=range(i, i + 1))
        step(i)
    assert step.layout == layout
    for theirs, mine, taken in zip(plain.parameters(), ours.parameters(), stepped.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(taken, theirs)


def mean_square(model: nn.Module, step: int) -> Tensor:
    return loss_of(model, step)


# ---- optimizers in other hands ---------------------------------------------------------------------------------------


def masters(model: Model, optimizer: Optimizer) -> None:
    """What trainers in half precision do: the optimizer gets copies of the parameters."""
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone().float()) for p in group["params"]]


def flat(model: Model, optimizer: Optimizer) -> None:
    """What ZeRO does: one flat parameter for all."""
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))]


def one_weight(model: Model, optimizer: Optimizer) -> None:
    params = optimizer.param_groups[0]["params"]
    params[:] = [nn.Parameter(p.detach().clone()) if p is model.layers[1].kv.weight else p for p in params]


SWAPS = {
    "masters": (
        masters,
        r"no longer holds 'layers.0.q.weight', whose steps QuacK scaled, and 5 others: .* attach QuacK a",
    ),
    "flat": (
        flat,
        r"no longer holds 'layers.0.q.weight', whose steps QuacK scaled, and 5 others: .* attach QuacK after",
    ),
    "one weight": (one_weight, r"no longer holds 'layers.1.kv.weight', whose steps QuacK scaled: its parameters were"),
}


@pytest.mark.parametrize(("swap", "message"), SWAPS.values(), ids=SWAPS)
@pytest.mark.parametrize("by_step", [False, True], ids=["hooks", "step"])
def test_swapped_parameters(swap: Callable[..., None], message: str, by_step: bool) -> None:
    """Refused at every step from then on, before anything is changed."""
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    step = compile_train_step(model, optimizer, mean_square, layout=LAYOUT, compile=False) if by_step else None
    if step is None:
        QuacK(optimizer, model, LAYOUT)
    take: Callable[[], Any] = optimizer.step if step is None else lambda: step(0)
    swap(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        with pytest.raises(OptimizerError, match=message) as raised:
            take()
        assert "\n" not in str(raised.value)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_weights_that_are_taken_out_frozen() -> None:
    """Whoever freezes a weight and takes it out of the optimizer says so."""
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    QuacK(optimizer, model, LAYOUT)
    weight = model.layers[0].q.weight.requires_grad_(False)
    params = optimizer.param_groups[0]["params"]
    params[:] = [p for p in params if p is not weight]
    before = weight.clone()
    train(model, optimizer, steps=range(1))
    assert torch.equal(weight, before)


def test_optimizers_made_too_early() -> None:
    """Some of the model's weights were replaced before QuacK was attached; the optimizer holds the former ones."""
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    model.layers[1].q.weight = nn.Parameter(model.layers[1].q.weight.detach().clone())
    with pytest.raises(
        OptimizerError, match=r"not in the model, and not 'layers.1.q.weight', which is; make the optim"
    ):
        QuacK(optimizer, model, LAYOUT)
    extra = nn.Parameter(torch.ones_like(model.layers[1].q.weight))
    QuacK(SGD([*model.parameters(), extra], lr=0.1), model, LAYOUT)  # one that is not the model's is fine


class Container(Optimizer):
    """Optimizers side by side as one, which loads and saves their states."""

    def __init__(self, *inside: Optimizer) -> None:
        super().__init__([p for o in inside for group in o.param_groups for p in group["params"]], {})
        self.inside = list(inside)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.inside:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.inside)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, optimizer in enumerate(self.inside):
            optimizer.load_state_dict(state_dict[str(i)])


def test_containers_of_optimizers() -> None:
    """QuacK is refused on them, and attached to what they hold a run resumes to the bit."""

    def build() -> tuple[Model, Container]:
        model = Model()
        queries = [p for name, p in model.named_parameters() if ".q." in name]
        others = [p for name, p in model.named_parameters() if ".q." not in name]
        return model, Container(AdamW(queries, lr=1e-2), AdamW(others, lr=1e-2))

    model, optimizer = build()
    with pytest.raises(OptimizerError, match=r"the optimizer in its 'inside'; attach QuacK to that one, or to each"):
        QuacK(optimizer, model, LAYOUT)
    for inside in optimizer.inside:
        QuacK(inside, model, LAYOUT, tau=0.5)
    train(model, optimizer, steps=range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, steps=range(3, 6))
    other, theirs = build()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.3)
    for inside in theirs.inside:
        QuacK(inside, other, LAYOUT, tau=0.5)
    other.load_state_dict(saved[0])
    theirs.load_state_dict(saved[1])
    assert_same(train(other, theirs, steps=range(3, 6)), model)


@pytest.mark.parametrize("by_step", [False, True], ids=["hooks", "step"])
def test_states_that_come_in_by_another_door(by_step: bool) -> None:
    """Put into the optimizer by somebody else, after attaching: without first factors they are refused at the step."""
    model, trained = Model(), Model()
    optimizer, theirs = AdamW(model.parameters(), lr=1e-2), AdamW(trained.parameters(), lr=1e-2)
    step = compile_train_step(model, optimizer, mean_square, layout=LAYOUT, compile=False) if by_step else None
    if step is None:
        QuacK(optimizer, model, LAYOUT)
    train(trained, theirs, steps=range(2))
    for ours, p in zip(model.parameters(), trained.parameters(), strict=True):
        optimizer.state[ours] = copy.deepcopy(theirs.state[p])
    with pytest.raises(OptimizerError, match=r"no first factors of QuacK .*'layers.0.q.weight'; to start .*detach\(\)"):
        train(model, optimizer, steps=range(1)) if step is None else step(0)


class Failing(AdamW):
    """Its step fails in the middle once it has changed the state of some weights."""

    fails = True

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        if self.fails:
            raise MemoryError("in the middle of a step")


@pytest.mark.parametrize("by_step", [False, True], ids=["hooks", "step"])
def test_states_of_a_step_that_failed_are_no_others(by_step: bool) -> None:
    """The next step goes on, from the first factors of the weights that QuacK was attached to."""
    model = Model()
    optimizer = Failing(model.parameters(), lr=1e-2)
    step = compile_train_step(model, optimizer, mean_square, layout=LAYOUT, compile=False) if by_step else None
    quack = QuacK(optimizer, model, LAYOUT) if step is None else step.quacks[0]
    take: Callable[[], Any] = (lambda: train(model, optimizer, steps=range(1))) if step is None else lambda: step(0)
    first = quack.init_factors.clone()
    with pytest.raises(MemoryError):
        take()
    optimizer.fails = False
    take()
    assert torch.equal(quack.init_factors, first)
    assert all("quack_init" in optimizer.state[p] for p in model.layers.parameters() if p in quack.scaling.home)


def test_states_that_show_no_step_are_a_start() -> None:
    """Of an optimizer that makes its state when it is made; attached with warnings as errors."""
    model = Model()
    QuacK(torch.optim.Adagrad(model.parameters(), lr=1e-2), model, LAYOUT)
