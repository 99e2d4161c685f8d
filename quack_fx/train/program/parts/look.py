"""What is looked up in all gradients of a step, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients, [], in single precision at least: in half it would be wrong in the third digit."""
    alike: dict[Any, list[Tensor]] = {}
    for grad in grads:
        grad = grad.coalesce().values() if grad.is_sparse else grad
        alike.setdefault((grad.device, torch.promote_types(grad.dtype, torch.float32)), []).append(grad)
    norms = [norm for (_, exact), own in alike.items() for norm in torch._foreach_norm(own, 2, exact)]
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(grads[0].device) for norm in norms]))
    return total
