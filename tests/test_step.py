"""The compiled step: equal to the hooked eager optimizer, with the optimizer's own state, and no recompiles."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from roundings import exact_gradients, gradients_of, off
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import quack_fx
from quack_fx import QKLayout, QuacK, compile_train_step
from quack_fx.errors import OptimizerError, StepError
from quack_fx.step.compiling import Compiler

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


def test_where_the_compiler_fails_norms_take_a_pass_of_their_own() -> None:
    """A compiler that fails on every loop that sums up squares; nothing else changes."""
    model = small("gpt")
    layout = quack_fx.find_qk_pairs(model, *batches(1)[0])
    twin = copy.deepcopy(model)
    steps = [compile_train_step(one, optimizer_of(one), layout=layout, tau=0.5, compile=False) for one in (model, twin)]

    class Failing(Compiler):
        def __call__(self, function: Any, sizes: str, fullgraph: bool = False, loops_on: Any = None) -> Any:
            cells = [cell.cell_contents for cell in function.__closure__ or ()]

            def run(works: Any, *given: Any) -> Any:
                if True in cells and given[-1] is not None:  # it sums up, and there are scales
                    raise BackendCompilerFailed(function, KeyError("buf7"), None)
                return function(works, *given)

            return run

    (update,) = steps[0]._updates
    assert update is not None
    update._loops._compiler = Failing(True, None)
    with pytest.warns(
        UserWarning, match=r"norms cost a pass of their own: Inductor fails on this update \(KeyError: 'buf7'\)"
    ):
        steps[0](*batches(1)[0])
    steps[1](*batches(1)[0])
    for x, y in batches(5)[1:]:
        for step in steps:
            step(x, y)
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


@pytest.mark.parametrize("compile", [False, True])
def test_resume_is_bitwise(compile: bool) -> None:
    """Saved after three steps and loaded into a fresh model and optimizer, three more give the same bits."""
    config = gpt.GPTConfig(vocab_size=32, context=8, layers=1, heads=2, width=96, bias=False)
    model = gpt.GPT(config)
    layout = quack_fx.find_qk_pairs(model, *batches(1)[0])
    optimizer = optimizer_of(model)
    step = compile_train_step(model, optimizer, layout=layout, compile=compile)
    for x, y in batches(3):
        step(x, y)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for x, y in batches(6)[3:]:
        step(x, y)
    torch.manual_seed(9)
    fresh = gpt.GPT(config)
    fresh.load_state_dict(saved[0])
    again = optimizer_of(fresh)
    resumed = compile_train_step(fresh, again, layout=layout, compile=compile)
    again.load_state_dict(saved[1])
    for x, y in batches(6)[3:]:
        resumed(x, y)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True))


def test_weights_changed_between_steps_are_measured_anew() -> None:
    """Norms are carried from step to step, unless somebody else writes the weights in between."""
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


def test_the_loop_that_writes_heads_sums_up_their_squares() -> None:
    """In the generated code, for many layers: a loop for each piece, and one more that keeps all squared norms."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model = gpt.GPT(gpt.GPTConfig(vocab_size=32, context=8, layers=13, heads=2, width=32, bias=False))
    layout = quack_fx.find_qk_pairs(model, *batches(1)[0])
    step = compile_train_step(model, optimizer_of(model), layout=layout)
    step._loss = lambda x, y: model(x, y)[1]
    _, code = run_and_get_code(step, *batches(1)[0])
    calls = [text for text in code if "tmp_acc0_vec = tmp_acc0_vec +" in text]
    sizes = sorted(text.count("tmp_acc0_vec = tmp_acc0_vec +") for text in calls)
    assert sizes == [6, 7]  # thirteen equal pieces
    for text in calls:
        loops = text.split("for(int64_t x0")[1:]
        summing = [loop for loop in loops if "tmp_acc0_vec = tmp_acc0_vec +" in loop]
        assert len(summing) == text.count("tmp_acc0_vec = tmp_acc0_vec +")
        stores = [loop.split("tmp_acc0_vec = tmp_acc0_vec +")[0].count(".store(") for loop in summing]
        assert stores == [3] * len(summing)  # weight and two moments
        others = [loop for loop in loops if loop not in summing]
        assert not any("x0<static_cast<int64_t>(6L)" in loop and "x1" in loop for loop in others)
        assert not any(f"x0<static_cast<int64_t>({6 * 512}L)" in loop for loop in others)
        kept = [loop for loop in others if loop.count(".store(") != 3]  # not of other weights
        assert len(kept) == 1 and f"x0<static_cast<int64_t>({6 * len(summing)}L)" in kept[0]


@pytest.mark.parametrize("clip", [0, -1.0])
def test_bad_clip(clip: float) -> None:
    model = small("gpt")
    with pytest.raises(StepError, match="clip_grad_norm is"):
        compile_train_step(model, torch.optim.AdamW(model.parameters()), clip_grad_norm=clip)


def test_refusals() -> None:
    model = small("gpt")
    x, y = batches(1)[0]
    layout = quack_fx.find_qk_pairs(model, x, y)
    with pytest.raises(StepError, match="no loss in what the model returned"):
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


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"lr": torch.tensor(0.01)}], ids=str)
@pytest.mark.parametrize("master_weights", [False, True])
def test_update_hands_no_number_to_python(options: dict[str, Any], master_weights: bool) -> None:
    """The first step and later ones, clipping and gate on: on a device, each such number would be waited for."""
    model = small("gpt")
    layout = quack_fx.find_qk_pairs(model, *batches(1)[0])
    model = model.bfloat16() if master_weights else model
    step = compile_train_step(
        model,
        torch.optim.AdamW(model.parameters(), **options),
        layout=layout,
        clip_grad_norm=1.0,
        skip_nonfinite=True,
        master_weights=master_weights,
        compile=False,
    )
    for x, y in batches(3):
        step.forward_backward(x, y)
        with NoSync():
            step.update()


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
def test_options_of_loops_on_a_gpu_are_known_to_the_compiler(mode: str | None) -> None:
    """Which it checks before it compiles; with them a CPU does what it does without."""
    x = torch.arange(6.0)
    compiled = Compiler(True, mode)(lambda x: x * 2, sizes="fixed", loops_on=torch.device("cuda"))
    assert torch.equal(compiled(x), x * 2)


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
