"""Optimizers of other packages: the rows of docs/optimizers.md, where they are installed; and small ones of our own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

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
