"""Parameters in half precision with fp32 masters: as a loop that keeps them itself, and at home in checkpoints."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from per_head import LAYOUT, Model, batch, relative_error, row_factors
from roundings import exact_gradients, gradients_of, off
from test_update import PATHS, assert_equal, loss_of_part, step_on, step_scaled
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from quack_fx import QKLayout
from quack_fx.errors import OptimizerError
from quack_fx.train.step import TrainStep

CLIP, MASTER = 0.5, "master_param"

MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": partial(AdamW, lr=3e-3, weight_decay=0.1),
    "SGD": partial(SGD, lr=0.1),
    "SGD with momentum": partial(SGD, lr=0.03, momentum=0.9, weight_decay=0.01),
}


def step_of(model: nn.Module, make: Callable[[Any], Optimizer], path: str = "stacked", **options: Any) -> TrainStep:
    options = {"clip_grad_norm": CLIP, "master_weights": True, **options}
    return step_on(path, model, make(model.parameters()), **options)


def masters_of(step: TrainStep) -> list[Tensor]:
    (optimizer,) = step._optimizers
    return [optimizer.state[p][MASTER] for group in optimizer.param_groups for p in group["params"]]


class ByHand:
    """The usual loop: gradients of a rounded copy, given to an optimizer of the fp32 weights; scales by its norms."""

    def __init__(self, model: nn.Module, make: Callable[[Any], Optimizer], layout: QKLayout) -> None:
        self.rounded, self.model = copy.deepcopy(model), copy.deepcopy(model).float()
        self.optimizer = make(self.model.parameters())
        self.first = row_factors(self.rounded) if layout.sites else {}
        self.scales: dict[Any, Tensor] = {}

    def step(self, gradients: list[Tensor]) -> None:
        for weight, grad in zip(self.model.parameters(), gradients, strict=True):
            weight.grad = grad.float()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        now = row_factors(self.rounded)
        exact = dict(zip(self.rounded.parameters(), self.model.parameters(), strict=True))
        self.scales = {exact[p]: now[p] / first for p, first in self.first.items()}
        step_scaled(self.optimizer, self.scales)

    @torch.no_grad()
    def take(self, masters: list[Tensor]) -> None:
        """Go on from these weights."""
        for weight, low, master in zip(self.model.parameters(), self.rounded.parameters(), masters, strict=True):
            weight.copy_(master)
            low.copy_(master)
            low.grad = None


@pytest.mark.parametrize("layout", [QKLayout(), LAYOUT], ids=["plain", "QuacK"])
@pytest.mark.parametrize(("name", "path"), [*((n, p) for n in MAKERS for p in PATHS[:2]), ("AdamW", "compiled")])
def test_equals_the_loop_that_keeps_masters_itself(name: str, path: str, layout: QKLayout) -> None:
    """For 50 steps, each from the same masters, with QuacK and without: gradients are that loop's bit for bit, or,
    compiled, no farther from exact ones than twice what that loop's are; of the same gradients both make the same
    masters to fp32 rounding, and what the model has are those rounded."""
    model = Model().bfloat16()
    step, loop = step_of(model, MAKERS[name], path, layout=layout), ByHand(model, MAKERS[name], layout)
    start = copy.deepcopy(loop.model)
    for i in range(50):
        step.forward_backward(batch(i))
        loss_of_part(loop.rounded, batch(i)).backward()
        ours, theirs = gradients_of(model), gradients_of(loop.rounded)
        if path == "compiled":
            exact = exact_gradients(loop.rounded, loss_of_part, batch(i))
            assert off(ours, exact) < 2 * off(theirs, exact) < 0.2
        else:
            assert all(map(torch.equal, ours, theirs))
        loop.step(ours)
        step.update()
        masters = masters_of(step)
        for parameter, master, expected in zip(model.parameters(), masters, loop.model.parameters(), strict=True):
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, master.bfloat16())
            assert relative_error(master, expected) < 2**-22  # decay, product, difference: a rounding each
        loop.take(masters)
    assert all((scale - 1).abs().max() > 1e-4 for scale in loop.scales.values())
    assert all(relative_error(p, q) > 1e-3 for p, q in zip(masters_of(step), start.parameters(), strict=True))


def test_moments_are_in_single_precision_and_small_steps_are_not_lost() -> None:
    model = Model().bfloat16()
    before = copy.deepcopy(model.state_dict())
    step = step_of(model, partial(AdamW, lr=1e-7))
    for i in range(5):
        step(batch(i))
    changed = torch.cat([(x != before[n]).flatten() for n, x in model.state_dict().items()])
    assert changed.float().mean() < 0.01  # less than what bfloat16 can tell, but for weights next to zero
    (optimizer,) = step._optimizers
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert {k: x.dtype for k, x in optimizer.state[p].items() if x.is_floating_point()} == dict.fromkeys(
                ("step", "exp_avg", "exp_avg_sq", MASTER), torch.float32
            )
            assert not torch.equal(optimizer.state[p][MASTER], p.float())


@pytest.mark.parametrize("name", MAKERS)
def test_resume_is_exact(name: str) -> None:
    """Through a file, into a fresh model and optimizer: the optimizer's own loading would round all to bfloat16."""
    model = Model().bfloat16()
    step = step_of(model, MAKERS[name])
    for i in range(5):
        step(batch(i))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": step._optimizers[0].state_dict()}, file)
    fresh = Model().bfloat16()
    other = step_of(fresh, MAKERS[name])
    file.seek(0)
    saved = torch.load(file)
    fresh.load_state_dict(saved["model"])
    other._optimizers[0].load_state_dict(saved["optimizer"])
    assert_equal(masters_of(other), masters_of(step))
    for i in range(5, 10):
        step(batch(i))
        other(batch(i))
    assert_equal(fresh.state_dict(), model.state_dict())
    assert_equal(masters_of(other), masters_of(step))


def test_weights_that_somebody_writes_are_taken_over() -> None:
    """Elements that still are their masters rounded keep what the masters know beyond that."""
    model = Model().bfloat16()
    step = step_of(model, MAKERS["AdamW"])
    step(batch(0))
    weight, (master, *_) = next(model.parameters()), masters_of(step)
    expected = master.clone()
    with torch.no_grad():
        weight[0] = 0.5
        expected[0] = 0.5
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    (optimizer,) = step._optimizers
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step.update()
    assert torch.equal(masters_of(step)[0], expected)


def test_gradients_that_are_not_finite_change_no_master() -> None:
    model = Model().bfloat16()
    step = step_of(model, MAKERS["AdamW"], skip_nonfinite=True)
    step(batch(0))
    before = copy.deepcopy((model.state_dict(), step._optimizers[0].state_dict()["state"]))
    step.forward_backward(batch(1))
    next(model.parameters()).grad[0] = torch.nan
    step.update()
    assert_equal((model.state_dict(), step._optimizers[0].state_dict()["state"]), before)


def test_muon_and_weights_in_full_precision_beside() -> None:
    """Muon's momentum is in fp32; a parameter in fp32 has no master."""
    model = Model().bfloat16()
    model.head.float()

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        for layer in m.layers:
            x = x + layer(x.bfloat16()).float()
        return m.head(x).square().mean()

    matrices = [p for p in model.parameters() if p.dim() == 2]
    optimizers = [Muon(matrices, lr=0.01), AdamW([p for p in model.parameters() if p.dim() != 2], lr=0.01)]
    step = step_on("stacked", model, *optimizers, loss_fn=loss, master_weights=True)
    start = copy.deepcopy(model.state_dict())
    for i in range(3):
        step(batch(i))
    for p in model.parameters():
        state = optimizers[p.dim() != 2].state[p]
        assert (MASTER in state) == (p.dtype == torch.bfloat16)
        assert all(x.dtype == torch.float32 for n, x in state.items() if n in (MASTER, "momentum_buffer", "exp_avg"))
    for optimizer in optimizers:  # no state of what the other one holds
        assert len(optimizer.state_dict()["state"]) == len(optimizer.param_groups[0]["params"])
    assert not any(torch.equal(now, start[n]) for n, now in model.state_dict().items() if n.endswith("weight"))


def test_optimizers_that_know_no_masters() -> None:
    model = Model().bfloat16()
    with pytest.raises(OptimizerError, match="RMSprop takes its own step, which knows no master_weights"):
        step_of(model, torch.optim.RMSprop)
