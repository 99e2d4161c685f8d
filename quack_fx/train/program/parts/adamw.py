"""Adam and AdamW: their arithmetic, and a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adam import adam as torch_adam

from quack_fx.train.program.parts.change import Job, Look, Scales, Stepped, change_alike, jobs_of
from quack_fx.train.program.parts.sharded import local


def adamw(w: Tensor, g: Tensor, state: Sequence[Tensor], numbers: Sequence[Tensor]) -> Stepped:
    """AdamW (Loshchilov & Hutter, 2019, Alg. 2), or Adam, which adds the decay to the gradient.

    Arguments:
        w, g: Weight and gradient, [rows, ...].
        state: Mean of the gradients, that of their squares and, with amsgrad, its peak; [rows, ...] each.
        numbers: As in `step_adamw`, [] each.
    """
    sign, coupled, decay, rate, rest1, beta2, rest2, unbias2, eps = numbers
    g = sign * g + coupled * w
    mean = state[0] + rest1 * (g - state[0])
    square = beta2 * state[1] + rest2 * g * g
    peak = [torch.maximum(old, square) for old in state[2:]]
    step = rate * mean / ([square, *peak][-1].sqrt() * unbias2 + eps) + decay * w
    return step, (mean, square, *peak)


def step_adamw(optimizer: Optimizer, scales: Scales, look: Look, compiled: Callable[..., None]) -> None:
    """One step on all groups: weights without heads take torch's own fused kernel, which is as fast."""
    for group in optimizer.param_groups:
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]
        headed, plain = list[Job](), list[Job]()
        for job in jobs_of(group, optimizer.state, names):
            step = job.state.get("step")
            job.state["step"] = torch.zeros((), device=look.device) if step is None else step.to(look.device)
            by_us = job.weight in scales
            by_us = by_us or "master_param" in job.state  # if masters
            (headed if by_us else plain).append(job)
        columns = [[job.weight.detach() for job in plain], [job.grad for job in plain]]
        columns += [[job.state[name] for job in plain] for name in names]
        columns = [[local(tensor) for tensor in column] for column in columns]  # if sharded
        (beta1, beta2), lr, weight_decay, eps = group["betas"], group["lr"], group["weight_decay"], group["eps"]
        maximize, amsgrad, decoupled = group["maximize"], group["amsgrad"], group["decoupled_weight_decay"]
        params, grads, means, squares, peaks, *_ = *columns, []
        torch_adam(
            params, grads, means, squares, peaks, [job.state["step"] for job in plain], fused=True,
            grad_scale=1 / look.clip.float() if isinstance(look.clip, Tensor) else None,
            found_inf=1 - look.finite if isinstance(look.finite, Tensor) else None,
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
            maximize=maximize, amsgrad=amsgrad, decoupled_weight_decay=decoupled,
        )  # fmt: skip
        if headed:
            counts = [job.state["step"] for job in headed]
            steps = torch.stack(counts).double() + 1
            lr = lr.double() if isinstance(lr, Tensor) else lr
            coupled, decay = (0.0, lr * weight_decay) if decoupled else (weight_decay, 0.0)
            # 1 - beta**step; in double, for in single 1 - 0.999 is wrong in the fifth digit.
            logs = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
            unbias1, unbias2 = (-torch.expm1(steps * log) for log in logs)
            numbers = -1.0 if maximize else 1.0, coupled, decay, lr / unbias1, 1 - beta1, beta2, 1 - beta2
            table = look.numbers(headed, *numbers, unbias2.rsqrt(), eps)
            change_alike(adamw, table, headed, names, scales, compiled)
            torch._foreach_add_(counts, [table[0, 1].to(counts[0])] * len(counts))
