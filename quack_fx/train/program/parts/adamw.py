"""Adam and AdamW: their arithmetic, and a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam as torch_adam

from quack_fx.train.program.parts.change import Compiled, Number, Scales, Tensors, change_alike, job_of


def adamw(w: Tensor, g: Tensor, state: Tensors, numbers: Tensors) -> tuple[Tensor, Tensors]:
    """AdamW (Loshchilov & Hutter, 2019, Alg. 2), or Adam, which adds the decay to the gradient: its step and new state.

    Weight w, gradient g and the state (means of g, of its square, with amsgrad the peak of that) are [rows, ...] each.
    """
    sign, coupled, decay, rate, rest1, beta2, rest2, unbias2, eps = numbers
    g = sign * g + coupled * w
    mean = state[0] + rest1 * (g - state[0])
    square = beta2 * state[1] + rest2 * g * g
    peak = [torch.maximum(old, square) for old in state[2:]]
    step = rate * mean / ([square, *peak][-1].sqrt() * unbias2 + eps) + decay * w
    return step, (mean, square, *peak)


def step_adamw(optimizer: Optimizer, scales: Scales, clip: Number, finite: Number, compiled: Compiled) -> None:
    """One step: weights without heads take torch's own fused kernel, which is as fast."""
    for group in optimizer.param_groups:
        headed, plain = list[list[Any]](), list[list[Any]]()
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]
        for weight in group["params"]:
            if weight.grad is not None:
                state = optimizer.state[weight]
                if "step" not in state:
                    state["step"] = torch.zeros((), device=weight.device)
                state["step"] = state["step"].to(weight.device, non_blocking=True)
                job = [state["step"], *job_of(weight, state, names, scales)]
                (plain if job[1] is None else headed).append(job)  # if not masters
                (headed if job[1] is not None or "master_param" in state else plain).append(job)  # if masters
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        options = {name: group[name] for name in ("lr", "weight_decay", "eps", "maximize", "amsgrad")}
        options |= {"beta1": beta1, "beta2": beta2, "decoupled_weight_decay": group["decoupled_weight_decay"]}
        if plain:
            steps, _, params, grads, means, squares, *peaks = (list(column) for column in zip(*plain, strict=True))
            scale = 1 / clip.float() if isinstance(clip, Tensor) else None
            found_inf = 1 - finite if isinstance(finite, Tensor) else None
            moments = means, squares, peaks[0] if peaks else []
            torch_adam(params, grads, *moments, steps, fused=True, grad_scale=scale, found_inf=found_inf, **options)
        if headed:
            counts = [step for step, *_ in headed]
            nth = torch.stack(counts).double() + 1
            coupled, decay = (0.0, lr * decay) if group["decoupled_weight_decay"] else (decay, 0.0)
            rate, unbias2 = lr / (1 - beta1**nth), (1 - beta2**nth).rsqrt()
            numbers = -1.0 if group["maximize"] else 1.0, coupled, decay, rate, 1 - beta1, beta2, 1 - beta2, unbias2
            change_alike(adamw, (clip, finite, *numbers, group["eps"]), [job for _, *job in headed], compiled)
            torch._foreach_add_(counts, [finite] * len(counts) if isinstance(finite, Tensor) else finite)
