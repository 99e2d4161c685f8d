"""What roundings may do, for tests in low precision: how far gradients are from exact ones.

Two programs that round elsewhere, or one program on two machines, differ by a last digit. In half precision that turns
a rounding now and then, and an optimizer that divides by the size of a gradient, or takes its sign, makes much of it:
whole runs may part although nobody did wrong. So they are compared step by step from the same weights: gradients by how
far they are from exact ones, updates by the same gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def exact_gradients(model: nn.Module, loss: Callable[..., Tensor], *batch: Tensor) -> list[Tensor]:
    """Gradients of a loss in fp64, at the weights that a model has."""
    double = copy.deepcopy(model).double()
    double.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):  # torch 2.11's own kernel for CPUs fails on float64
        loss(double, *batch).backward()
    return gradients_of(double)


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@torch.no_grad()
def off(found: Iterable[Tensor], exact: Iterable[Tensor]) -> float:
    """How far tensors are from exact ones, all of them together, relative to those."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, exact, strict=True)]
    squares: Any = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    return float(squares) ** 0.5
