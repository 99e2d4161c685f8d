"""Attention logits of a batch, read where the model hands queries and keys to torch's attention.

In: a model and a batch. Out: one tensor of logits for each attention. It is the same for every method, also for a
graph of the model with QK norms in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_SOFTMAX = ("aten::_softmax", "aten::_safe_softmax")
"""Where torch writes attention out as products, because no fused op takes it, the logits enter one of these."""


class _Watch(TorchDispatchMode):
    """Takes the logits of every causal attention that runs, of the first sequences."""

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
    """The logits of all attentions, each [sequences, heads, pairs of a position and one that it sees].

    Arguments:
        model: The model, not compiled; its attentions are causal.
        batch: What it is called with.
        sequences: How many sequences of the batch are looked at.
        attentions: Number of attentions that it has.

    Raises:
        RuntimeError: Another number of them handed queries and keys to torch's attention.
    """
    with _Watch(sequences) as watch:
        model(*batch)
    if len(watch.logits) != attentions:
        raise RuntimeError(f"{len(watch.logits)} of {attentions} attentions were seen")
    return watch.logits


def largest(logits: Sequence[Tensor]) -> float:
    """The largest absolute value; not a number where one of the logits is none."""
    return max((float(one.abs().max()) for one in logits), key=lambda x: (x != x, x))


def mean_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean absolute change, over all attentions, heads and pairs, as in figure 4 of the paper."""
    total = sum(float((b - a).abs().sum(dtype=torch.float64)) for a, b in zip(before, after, strict=True))
    return total / sum(one.numel() for one in before)
