"""Lion: its arithmetic, and a step."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from quack_fx.train.program.parts.change import Number, Scales, Tensors, change_all, job_of


class Lion(Optimizer):
    """Parameter groups and state of Lion, which torch.optim does not have; `TrainStep` takes its steps.

    Arguments:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Share of the old momentum in the step, and in the new momentum.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Not available; `TrainStep` takes the steps."""
        raise NotImplementedError("call the TrainStep: it takes the steps of Lion")


def lion(w: Tensor, g: Tensor, state: Tensors, numbers: Tensors) -> tuple[Tensor, Tensors]:
    """Lion (Chen et al., 2023, Alg. 2): step and new state.

    Weight w, gradient g and the state (the momentum) are [rows, ...] each.
    """
    clip, lr, decay, rest1, rest2 = numbers
    g, mean = clip * g, state[0]
    return lr * (mean + rest1 * (g - mean)).sign() + lr * decay * w, (mean + rest2 * (g - mean),)


def step_lion(optimizer: Optimizer, scales: Scales, clip: Number, finite: Tensor | None, compiled: Any) -> None:
    """One step."""
    for group in optimizer.param_groups:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        jobs = [job_of(weight, optimizer.state[weight], ("exp_avg",), scales) for weight in weights]
        if jobs:
            beta1, beta2 = group["betas"]
            same = clip, group["lr"], group["weight_decay"], 1 - beta1, 1 - beta2
            change_all(lion, same, finite, jobs, compiled)
