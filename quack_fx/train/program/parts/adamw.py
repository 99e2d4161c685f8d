"""Adam and AdamW: their arithmetic, and a step."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam as torch_adam

from quack_fx.train.program.parts.change import Number, Scales, Tensors, change_all, job_of


def adamw(w: Tensor, g: Tensor, state: Tensors, numbers: Tensors) -> tuple[Tensor, Tensors]:
    """AdamW (Loshchilov & Hutter, 2019, Alg. 2), or Adam, which adds the decay to the gradient: step and new state.

    Weight w, gradient g and the state (means of g and of g**2; for amsgrad, the latter's maximum) are [rows, ...].
    """
    clip, added, decay, rest1, beta2, rest2, eps, rate, unbias = numbers
    g = clip * g + added * w
    mean = state[0] + rest1 * (g - state[0])
    square = beta2 * state[1] + rest2 * g * g
    peak = [torch.maximum(old, square) for old in state[2:]]
    step = rate * mean / ([square, *peak][-1].sqrt() * unbias + eps) + decay * w
    return step, (mean, square, *peak)


def step_adamw(optimizer: Optimizer, scales: Scales, clip: Number, finite: Tensor | None, compiled: Any) -> None:
    """One step; weights without query or key rows take torch's own fused kernel, which is as fast."""
    for group in optimizer.param_groups:
        headed, plain = list[list[Any]](), list[list[Any]]()
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]
        for weight in (weight for weight in group["params"] if weight.grad is not None):
            state = optimizer.state[weight]
            if "step" not in state or state["step"].device != weight.device:
                state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32, device=weight.device)
            job = job_of(weight, state, names, scales)
            (plain if job[0] is None else headed).append([state["step"], *job])  # if not masters
            masters = "master_param" in state  # if masters
            (plain if job[0] is None and not masters else headed).append([state["step"], *job])  # if masters
        (beta1, beta2), lr, decay, eps = group["betas"], group["lr"], group["weight_decay"], group["eps"]
        if plain:
            steps, _, params, grads, means, squares, *peaks = (list(column) for column in zip(*plain, strict=True))
            options = {n: group[n] for n in ("lr", "weight_decay", "maximize", "amsgrad", "decoupled_weight_decay")}
            options |= {"beta1": beta1, "beta2": beta2, "eps": eps, "found_inf": None if finite is None else 1 - finite}
            options["grad_scale"] = 1 / clip.float() if isinstance(clip, Tensor) else None
            torch_adam(params, grads, means, squares, list(chain(*peaks)), steps, fused=True, **options)
        if headed:
            steps = [step for step, *_ in headed]
            nth = torch.stack(steps).double() + 1
            rate, unbias = lr / (1 - beta1**nth), (1 - beta2**nth).rsqrt()
            added, decay = (0.0, lr * decay) if group["decoupled_weight_decay"] else (decay, 0.0)
            same = -clip if group["maximize"] else clip, added, decay, 1 - beta1, beta2, 1 - beta2, eps
            change_all(adamw, (*same, rate, unbias), finite, [job for _, *job in headed], compiled)
            torch._foreach_add_(steps, [torch.ones_like(steps[0]) if finite is None else finite] * len(steps))
