"""The standard deviation of each attention's logits, and the norms of its values.

In: a model that is not on meta, and example inputs. Out: for each attention, the standard deviation of its unmasked
logits, and the norms between the value projection and the attention's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from quack_fx.find import Logits, Pairs, attentions_of, fused_scale, pairs_of
from quack_fx.graph.dataflow import Dataflow

_MASKED = -1e4
"""Logits below this are those of masked keys."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The standard deviation of an attention's logits over all heads and tokens, in its first call, NaN if there are
    none; and the kinds of the norms of its values, each with the module that computes it, or None."""

    std: float
    value_norms: tuple[tuple[str, str | None], ...]


def logit_spread(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Pairs, Spread]:
    """The spread of each attention's logits."""
    attentions, found = attentions_of(model, args, kwargs, real=True), dict[Pairs, Spread]()
    for one, site, _ in attentions.understood():
        norms = {(tag.kind, tag.module): None for tag in attentions.value_norms(one)}
        found.setdefault(pairs_of(site), Spread(_std(attentions.tracer.df, one), tuple(norms)))
    return found


def _std(df: Dataflow, one: Logits) -> float:
    seen = [_seen(df, part) for part in one.parts or (one,)]
    numbers = torch.cat([x.flatten().double() for x in seen if x is not None] or [torch.empty(0).double()])
    numbers = numbers[numbers.isfinite() & (numbers > _MASKED)]
    return float(numbers.std()) if len(numbers) > 1 else float("nan")


def _seen(df: Dataflow, one: Logits) -> Tensor | None:
    """The logits of one softmax; for fused attention, computed from its operands."""
    product = one.products[0]
    if not product.form.startswith("fused"):
        return _numbers(df, one.end)
    q, k = _numbers(df, product.left), _numbers(df, product.right)
    if q is None or k is None:
        return None
    if product.form == "fused-tokens-first":
        q, k = q.transpose(-2, -3), k.transpose(-2, -3)
    if q.dim() > 2 and q.shape[-3] != k.shape[-3]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
    scale = fused_scale(df, product)
    return None if scale is None else q @ k.mT * scale


def _numbers(df: Dataflow, node: Node) -> Tensor | None:
    value = df.value(node)
    return value.detach().double() if isinstance(value, Tensor) and not value.is_meta else None
