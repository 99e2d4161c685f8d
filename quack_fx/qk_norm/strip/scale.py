"""The factors that keep logits at their usual scale when QK norms are removed.

In: a site with QK norms. Out: a factor for the features of each side, and a note on each factor.

An RMS or layer norm does not change features of RMS 1, so the logits keep their usual scale without it. An L2 norm also
divides by sqrt(width). Some models omit the factor 1/sqrt(head_dim) because their norms bound the logits; without the
norms they need it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from quack_fx.layout import SIDES, AttentionSite, Side

_SLACK = 1.01
"""A scale up to this factor above the usual one counts as the usual one, rounded."""


@dataclass(frozen=True, slots=True)
class Scales:
    """Factors of the features of both sides without norms, and notes on them."""

    query: float = 1.0
    key: float = 1.0
    notes: tuple[str, ...] = ()

    def of(self, side: Side) -> float:
        """Factor of one side."""
        return self.query if side == "query" else self.key


def scale_back(site: AttentionSite) -> Scales:
    """The factors of a site's features without its norms, and a note on each that is unknown or differs from 1."""
    width = {norm.side: norm.width for norm in site.qk_norm if norm.kind == "l2"}
    scales = Scales(1 / math.sqrt(width.get("query", 1)), 1 / math.sqrt(width.get("key", 1)))
    notes: list[str] = []
    if width:
        told = " and ".join(f"{side} features by {scales.of(side):.4g}" for side in SIDES if side in width)
        notes.append(f"{site.name!r}: multiplied {told}, as its L2 norm did to features of RMS 1")
    usual = 1 / math.sqrt(site.head_dim)
    if site.logit_scale is None:
        notes.append(
            f"{site.name!r}: its logit scale is learned or unknown and stays; without a norm {usual:.4g} is usual"
        )
    elif (now := site.logit_scale * scales.query * scales.key) > _SLACK * usual:
        scales = replace(scales, query=scales.query * usual / now)
        notes.append(
            f"{site.name!r}: logits were scaled by {site.logit_scale:.4g}, which relied on the norm; queries are "
            f"multiplied by {scales.query:.4g}, so that q.k is scaled by {usual:.4g} = 1/sqrt({site.head_dim})"
        )
    return replace(scales, notes=tuple(notes))
