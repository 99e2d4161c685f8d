"""The loss of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def pick_loss(output: Any) -> Tensor | None:
    """The loss in what a model returned: a scalar, the attribute or entry `loss`, or the only scalar of a tuple."""
    output = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    parts = output if isinstance(output, (tuple, list)) else (output,)
    found = [part for part in parts if isinstance(part, Tensor) and part.dim() == 0 and part.is_floating_point()]
    return found[0] if len(found) == 1 else None
