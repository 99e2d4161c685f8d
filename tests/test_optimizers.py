"""Optimizers of other packages: the rows of docs/optimizers.md, where they are installed; and small ones of our own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.optimizers import PACKAGES, OneHead, judge, maker
from quack_fx import QuacK, find_qk_pairs
from quack_fx.errors import OptimizerError

PAGE = (Path(__file__).parent.parent / "docs" / "optimizers.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")][
    1:
]


def param_of(row: list[str]) -> Any:
    package = row[0].split()[0]
    long = [pytest.mark.slow] if package == "pytorch-optimizer" else []
    return pytest.param(row, id=f"{package}-{row[1]}", marks=long)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", [param_of(row) for row in ROWS])
def test_the_page_tells_what_happens(row: list[str]) -> None:
    package, name, outcome, _, resumed = row
    module = PACKAGES[package.split()[0]][0]
    if importlib.util.find_spec(module.split(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    verdict = judge(maker(importlib.import_module(module), name))
    assert (verdict.outcome, verdict.resumed) == (outcome, resumed), verdict.detail


def test_the_page_has_every_class() -> None:
    assert [(row[0].split()[0], row[1]) for row in ROWS] == [
        (p, c) for p, (_, names) in PACKAGES.items() for c in names
    ]


class Around(Optimizer):
    """Steps another optimizer on its groups."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Any = None) -> None:
        self.inner.step()


class Recomputed(SGD):
    """The weight is a start that is kept, less all gradients so far."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state.setdefault("start", param.clone())
                state["sum"] = state.get("sum", 0) + param.grad
                param.copy_(state["start"] - group["lr"] * state["sum"])


class Synced(SGD):
    """Falls back half the way to where it was, every fifth step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for param in (param for group in self.param_groups for param in group["params"]):
            state = self.state[param]
            slow: Tensor = state.setdefault("slow", param.clone())
            state["n"] = state.get("n", 0) + 1
            if state["n"] % 5 == 0:
                param.copy_(slow.lerp_(param, 0.5))


class Noisy(SGD):
    """Draws random numbers, and says so."""

    def __init__(self, params: Any, lr: float) -> None:
        print("made")
        super().__init__(params, lr=lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in (param for group in self.param_groups for param in group["params"]):
            param.grad.add_(torch.randn(param.shape))
        super().step()


REFUSED: dict[str, tuple[Callable[[Any], Optimizer], str]] = {
    "around": (lambda params: Around(SGD(params, lr=0.1)), "Around is around the optimizer in its 'inner'"),
    "recomputed": (lambda params: Recomputed(params, lr=0.1), "Recomputed makes the weights anew from copies"),
    "synced": (lambda params: Synced(params, lr=0.1), "Synced makes the weights anew from copies"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_optimizer_that_would_undo_the_scaling_is_refused(case: str) -> None:
    make, message = REFUSED[case]
    model = OneHead()
    layout = find_qk_pairs(model, torch.randn(1, 3, 64))
    with pytest.raises(OptimizerError, match=message):
        QuacK(make(model.parameters()), model, layout)


def test_trying_an_optimizer_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """No output, no random numbers drawn, no state; a large decay is not taken for a weight made anew."""
    model = OneHead()
    layout = find_qk_pairs(model, torch.randn(1, 3, 64))
    optimizer = Noisy(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["weight_decay"] = 5.0
    capsys.readouterr()
    before = torch.get_rng_state()
    QuacK(optimizer, model, layout)
    assert capsys.readouterr().out == "" and torch.equal(before, torch.get_rng_state()) and not optimizer.state


# ---- sharpness-aware minimization: a step up, a gradient there, back, and the step --------------------------------


class Sharp(Optimizer):
    """As most packages have it: around an optimizer, in two steps; `step` takes a closure for both."""

    def __init__(self, params: Any, base: type[Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        up(self, 0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        down(self)
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class SharpItself(AdamW):
    """An optimizer that takes both steps in its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        up(self, 0.05)
        with torch.enable_grad():
            closure()
        down(self)
        return super().step()


class Minimizer:
    """Is no optimizer; steps one that it was given."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @torch.no_grad()
    def ascent_step(self) -> None:
        up(self.optimizer, 0.05)

    @torch.no_grad()
    def descent_step(self) -> None:
        down(self.optimizer)
        self.optimizer.step()


def up(optimizer: Optimizer, rho: float) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    for p in params:
        optimizer.state[p]["old"] = p.clone()
        p.add_(p.grad, alpha=rho / float(norm))


def down(optimizer: Optimizer) -> None:
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.copy_(optimizer.state[p].pop("old"))


def in_two_steps(groups: Any, loss: Callable[[], Tensor]) -> tuple[Optimizer, Callable[[], None]]:
    sharp = Sharp(groups, AdamW, lr=1e-2)

    def step() -> None:
        loss()
        sharp.first_step()
        loss()
        sharp.second_step()

    return sharp.base_optimizer, step


def by_closure(groups: Any, loss: Callable[[], Tensor]) -> tuple[Optimizer, Callable[[], None]]:
    sharp = Sharp(groups, AdamW, lr=1e-2)

    def step() -> None:
        loss()
        sharp.step(loss)

    return sharp.base_optimizer, step


def in_itself(groups: Any, loss: Callable[[], Tensor]) -> tuple[Optimizer, Callable[[], None]]:
    sharp = SharpItself(groups, lr=1e-2)

    def step() -> None:
        loss()
        sharp.step(loss)

    return sharp, step


def by_a_minimizer(groups: Any, loss: Callable[[], Tensor]) -> tuple[Optimizer, Callable[[], None]]:
    minimizer = Minimizer(AdamW(groups, lr=1e-2))

    def step() -> None:
        loss()
        minimizer.ascent_step()
        loss()
        minimizer.descent_step()

    return minimizer.optimizer, step


@pytest.mark.parametrize("make", [in_two_steps, by_closure, in_itself, by_a_minimizer])
def test_sharpness_aware_minimization(make: Callable[..., tuple[Optimizer, Callable[[], None]]]) -> None:
    """Attached to the optimizer inside it is the rule: learning rates by norms of the weights where the step begins."""
    ends = []
    for by_quack in (True, False):
        model = OneHead().double()
        x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).double()

        def loss(model: OneHead = model, x: Tensor = x) -> Tensor:
            model.zero_grad()
            found = (model(x) - x.sin()).square().mean()
            found.backward()
            return found

        groups = [{"params": [layer.weight]} for layer in (model.q, model.k, model.v)]
        optimizer, step = make(groups, loss)
        norms = [float(layer.weight.detach().norm()) for layer in (model.k, model.q)]
        if by_quack:
            QuacK(optimizer, model, find_qk_pairs(OneHead(), torch.randn(1, 3, 64)), tau=0.5)
        for _ in range(10):
            for group, layer, first in zip(optimizer.param_groups, (model.k, model.q), norms, strict=False):
                if not by_quack:
                    group["lr"] = 1e-2 * 0.5 * first / float(layer.weight.detach().norm())
            step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0.0, atol=1e-12)


def flat_parts(params: list[Tensor]) -> list[torch.nn.Parameter]:
    """As Megatron's distributed optimizer and ZeRO make them: each rank steps a stretch of all weights in a row."""
    row = torch.cat([p.detach().flatten() for p in params])
    return [torch.nn.Parameter(row[: len(row) // 2].clone())]


def test_flat_parts_of_weights_are_refused() -> None:
    model = OneHead()
    layout = find_qk_pairs(model, torch.randn(1, 3, 64))
    with pytest.raises(
        OptimizerError, match=r"holds none .* 'q.weight', .* flat parts of weights, .* rows are lost: use FSDP2"
    ):
        QuacK(AdamW(flat_parts(list(model.parameters()))), model, layout)
    gain = torch.nn.Parameter(torch.ones(3))
    model.register_parameter("gain", gain)
    with pytest.raises(OptimizerError, match="AdamW holds none of the query and key weights"):
        QuacK(AdamW([gain]), model, layout)
