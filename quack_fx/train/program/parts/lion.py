"""Lion: its arithmetic, and a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from quack_fx.train.program.parts.change import Look, Scales, Stepped, change_alike, jobs_of


class Lion(Optimizer):
    """Groups and state of Lion, which torch.optim does not have; the steps are `TrainStep`'s.

    Arguments:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: What is kept of the momentum for the step, and what for the next one.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Steps are taken by `TrainStep`."""
        raise NotImplementedError("call the TrainStep: it takes the steps of Lion")


def lion(w: Tensor, g: Tensor, state: Sequence[Tensor], numbers: Sequence[Tensor]) -> Stepped:
    """Lion (Chen et al., 2023, Alg. 2).

    Arguments:
        w, g: Weight and gradient, [rows, ...].
        state: The momentum, [rows, ...].
        numbers: As in `step_lion`, [] each.
    """
    lr, decay, rest1, rest2 = numbers
    mean = state[0]
    return lr * (mean + rest1 * (g - mean)).sign() + lr * decay * w, (mean + rest2 * (g - mean),)


def step_lion(optimizer: Optimizer, scales: Scales, look: Look, compiled: Callable[..., None]) -> None:
    """One step on all groups."""
    for group in optimizer.param_groups:
        if jobs := jobs_of(group, optimizer.state, ("exp_avg",)):
            beta1, beta2 = group["betas"]
            table = look.numbers(jobs, group["lr"], group["weight_decay"], 1 - beta1, 1 - beta2)
            change_alike(lion, table, jobs, ("exp_avg",), scales, compiled)
