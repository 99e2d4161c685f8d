"""What is looked up in all gradients of a step, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Look(NamedTuple):
    """What was found about all gradients of a step.

    Attributes:
        clip: What to multiply them with, []; None for nothing.
        finite: 1 if their norm is finite; 0 if not, and then the step changes nothing, []; None where nobody asked.
    """

    clip: Tensor | None
    finite: Tensor | None


def look_at(grads: Sequence[Tensor], clip_grad_norm: float | None, skip_nonfinite: bool) -> Look:
    """Look at all gradients at once: their total norm tells both."""
    if not grads or (clip_grad_norm is None and not skip_nonfinite):
        return Look(None, None)
    norm = torch.nn.utils.get_total_norm(grads)
    clip = None if clip_grad_norm is None else (clip_grad_norm / (norm + 1e-6)).clamp(max=1.0).float()
    return Look(clip, norm.isfinite().float() if skip_nonfinite else None)
