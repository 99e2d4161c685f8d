"""Detects Lion by behaviour: torch.optim has no Lion, but many packages do.

In: an optimizer of any class. Out: whether it is Lion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from quack_fx.train.suited import remade

_OPTIONS = {"lr", "betas", "weight_decay"}


def is_lion(optimizer: Optimizer) -> bool:
    """Whether an optimizer has Lion's options, state and updates.

    For each parameter group, a new optimizer of the same class and options takes three steps on a tiny weight, which
    are compared with Lion's. An exception means that it is not Lion.
    """
    return all(_steps_as_lion(type(optimizer), group) for group in optimizer.param_groups)


@torch.no_grad()
def _steps_as_lion(kind: Callable[..., Optimizer], group: Mapping[str, Any]) -> bool:
    options = {name: value for name, value in group.items() if name != "params"}
    if not options.keys() >= _OPTIONS or any(isinstance(options[name], Tensor) for name in _OPTIONS):
        return False
    lr, decay = 0.125, 0.25  # large enough to compare; the user's schedule may be at zero
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64, device="cpu"))
    expected, mean = weight.detach().clone(), torch.zeros_like(weight)
    try:
        beta1, beta2 = options["betas"]
        optimizer = remade(kind, group, weight, lr=lr, weight_decay=decay)
        for step in range(3):
            weight.grad = torch.linspace(0.5, -1.5, 8, dtype=torch.float64, device="cpu").roll(step)
            grad = weight.grad.clone()
            optimizer.step()
            expected = expected * (1 - lr * decay) - lr * (mean + (1 - beta1) * (grad - mean)).sign()
            mean = mean + (1 - beta2) * (grad - mean)
        state = optimizer.state[weight]
        same = state.keys() == {"exp_avg"} and torch.allclose(state["exp_avg"], mean, rtol=1e-12)
        return same and torch.allclose(weight, expected, rtol=1e-12)
    except Exception:  # it cannot be constructed from the group's options, or needs other arguments
        return False
