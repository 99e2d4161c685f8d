"""Reads the attention logits of a batch where the model calls torch's attention.

In: a model and a batch. Out: one tensor of logits for each attention. This works in the same way for every method, also
for a graph of the model with QK norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_SOFTMAX = ("aten::_softmax", "aten::_safe_softmax")
"""If no fused op supports an attention, torch decomposes it; the logits are then the input of one of these ops."""


class _Watch(TorchDispatchMode):
    """Collects the logits of every causal attention that runs, for the first sequences of the batch."""

    def __init__(self, sequences: int) -> None:
        super().__init__()
        self._sequences = sequences
        self.logits: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "scaled_dot_product" in func.name():
            q_BHTK, k_BHTK = (side[: self._sequences].float() for side in args[:2])
            scale = kwargs.get("scale") or q_BHTK.shape[-1] ** -0.5
            self._take(q_BHTK @ k_BHTK.mT * scale)
        elif func.name() in _SOFTMAX:
            self._take(args[0][: self._sequences].float())
        return func(*args, **kwargs)

    def _take(self, logits_BHTT: Tensor) -> None:
        seen = torch.ones(logits_BHTT.shape[-2:], dtype=torch.bool, device=logits_BHTT.device).tril()
        self.logits.append(logits_BHTT[..., seen])


@torch.no_grad()
def attention_logits(model: nn.Module, batch: Sequence[Tensor], sequences: int, attentions: int) -> list[Tensor]:
    """The logits of all attentions, each [sequences, heads, unmasked pairs of positions].

    Arguments:
        model: The model, not compiled, with causal attention.
        batch: The model's arguments.
        sequences: Number of sequences of the batch to read.
        attentions: Number of attentions in the model.

    Raises:
        RuntimeError: A different number of attentions called torch's attention.
    """
    with _Watch(sequences) as watch:
        model(*batch)
    if len(watch.logits) != attentions:
        raise RuntimeError(f"{len(watch.logits)} of {attentions} attentions were seen")
    return watch.logits


def largest(logits: Sequence[Tensor]) -> float:
    """The largest absolute value; NaN if a logit is NaN."""
    return max((float(one.abs().max()) for one in logits), key=lambda x: (x != x, x))


def mean_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean absolute change, over all attentions, heads and pairs, as in figure 4 of the paper."""
    total = sum(float((b - a).abs().sum(dtype=torch.float64)) for a, b in zip(before, after, strict=True))
    return total / sum(one.numel() for one in before)
