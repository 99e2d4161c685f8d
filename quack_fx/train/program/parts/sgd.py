"""SGD: its arithmetic, and a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from quack_fx.train.program.parts.change import Look, Scales, Stepped, change_alike, jobs_of


def sgd(w: Tensor, g: Tensor, state: Sequence[Tensor], numbers: Sequence[Tensor]) -> Stepped:
    """SGD as torch.optim has it, with momentum, dampening, Nesterov's form and coupled decay.

    Arguments:
        w, g: Weight and gradient, [rows, ...].
        state: The momentum, [rows, ...], if there is any.
        numbers: As in `step_sgd`, [] each.
    """
    sign, lr, decay, momentum, rest, nesterov = numbers
    g = sign * g + decay * w
    if not state:
        return lr * g, ()
    moving = momentum * state[0] + rest * g
    return lr * torch.where(nesterov > 0, g + momentum * moving, moving), (moving,)


def step_sgd(optimizer: Optimizer, scales: Scales, look: Look, compiled: Callable[..., None]) -> None:
    """One step on all groups."""
    for group in optimizer.param_groups:
        begun = {weight for weight in group["params"] if "momentum_buffer" in optimizer.state.get(weight, ())}
        names = ("momentum_buffer",) if group["momentum"] else ()
        if not (jobs := jobs_of(group, optimizer.state, names)):
            continue
        # The first gradient of a weight is not dampened.
        rests = [1 - group["dampening"] if weight in begun else 1.0 for weight, *_ in jobs]
        rest = torch.tensor(rests, dtype=torch.float64, device="cpu")
        numbers = -1.0 if group["maximize"] else 1.0, group["lr"], group["weight_decay"], group["momentum"], rest
        table = look.numbers(jobs, *numbers, float(group["nesterov"]))
        change_alike(sgd, table, jobs, names, scales, compiled)
