"""AdamW: its arithmetic on a weight with heads, and a step on one group of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as plain_adamw

from quack_fx.train.program.parts.look import Look
from quack_fx.train.program.parts.sharded import local


def adamw(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, scale: Tensor, numbers: Tensor) -> None:
    """AdamW (Loshchilov & Hutter, 2019, Alg. 2) of a weight with heads, in place.

    Arguments:
        weight, grad, mean, square: [rows, ...].
        scale: What the learning rate of each row is multiplied with, [rows, 1, ...].
        numbers: Those of this step, as `adamw_numbers` has them.
    """
    rate, decay, rest1, beta2, rest2, unbias, eps, clip, finite = numbers.unbind()
    w, g = weight.to(scale.dtype), grad.to(scale.dtype) * clip
    m = mean + rest1 * (g - mean)
    v = beta2 * square + rest2 * g * g
    w = w - scale * (rate * m / (v.sqrt() * unbias + eps) + decay * w)
    for old, new in ((weight, w), (mean, m), (square, v)):
        old.copy_(torch.where(finite > 0, new.to(old.dtype), old))


def adamw_numbers(group: Mapping[str, Any], steps: Tensor, look: Look) -> Tensor:
    """Numbers of a step for some weights, in the order of `adamw`: [weights, 9]; `steps` counts the step itself."""
    (beta1, beta2), lr = group["betas"], torch.as_tensor(group["lr"], dtype=torch.float64, device=steps.device)
    # 1 - beta**step; in double, for in single 1 - 0.999 is wrong in the fifth digit.
    unbias1, unbias2 = (-torch.expm1(steps.double() * math.log(beta)) for beta in (beta1, beta2))
    gate = [1.0 if number is None else number for number in look]
    same = [lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2, group["eps"], *gate]
    decay, rest1, keep2, rest2, eps, clip, finite = (
        torch.as_tensor(n, dtype=torch.float64, device=steps.device).expand_as(unbias1) for n in same
    )
    return torch.stack((lr / unbias1, decay, rest1, keep2, rest2, unbias2.rsqrt(), eps, clip, finite), -1)


def start_adamw(weight: Tensor) -> dict[str, Tensor]:
    """The state of a weight before its first step."""
    zeros = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=weight.device), **zeros}


def step_adamw(
    group: Mapping[str, Any],
    state: Mapping[Tensor, dict[str, Tensor]],
    scales: Mapping[Tensor, Tensor],
    look: Look,
    arithmetic: Callable[..., None],
) -> None:
    """One step on a group of the optimizer: torch's own kernel for weights without heads, `adamw` for the others."""
    weights = [weight for weight in group["params"] if weight.grad is not None]
    plain = [weight for weight in weights if weight not in scales]
    columns: list[list[Tensor]] = [plain, [weight.grad for weight in plain if weight.grad is not None]]
    columns += [[state[weight][name] for weight in plain] for name in ("exp_avg", "exp_avg_sq")]
    columns = [[local(tensor) for tensor in column] for column in columns]  # if sharded
    params, grads, means, squares = columns
    plain_adamw(
        params,
        grads,
        means,
        squares,
        max_exp_avg_sqs=[],
        state_steps=[state[weight]["step"] for weight in plain],
        fused=True,
        grad_scale=None if look.clip is None else 1 / look.clip,
        found_inf=None if look.finite is None else 1 - look.finite,
        amsgrad=False,
        maximize=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )

    headed = [weight for weight in weights if weight in scales]
    if headed:
        steps = torch.stack([state[weight]["step"] for weight in headed]) + 1
        for weight, numbers in zip(headed, adamw_numbers(group, steps, look).unbind(), strict=True):
            assert weight.grad is not None
            tensors = [weight.detach(), weight.grad, state[weight]["exp_avg"], state[weight]["exp_avg_sq"]]
            tensors = [local(tensor) for tensor in tensors]  # if sharded
            arithmetic(*tensors, scales[weight], numbers.to(scales[weight].dtype))
        for weight in headed:
            state[weight]["step"] += 1 if look.finite is None else look.finite
