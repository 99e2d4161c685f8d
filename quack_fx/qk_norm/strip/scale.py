"""What a logit scale has to be once the norm is gone.

In: a site with QK norm. Out: a number for each side to multiply its features with, and a sentence that tells why.

Features of RMS 1 pass an RMS or layer norm as they are, so its removal keeps the scale of usual logits. An L2 norm
divides them by sqrt(width) besides. And some models drop the factor 1/sqrt(head_dim), since their norms bound the
logits: without the norm it has to come back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from quack_fx.layout import SIDES, AttentionSite, Side

_SLACK = 1.01
"""A scale this much above the usual one is the usual one, rounded."""


@dataclass(frozen=True, slots=True)
class Scales:
    """What the features of both sides are multiplied with once the norms are gone, and why."""

    query: float = 1.0
    key: float = 1.0
    notes: tuple[str, ...] = ()

    def of(self, side: Side) -> float:
        """Factor of one side."""
        return self.query if side == "query" else self.key


def scale_back(site: AttentionSite) -> Scales:
    """What to multiply a site's features with after its norms are gone, 1 where nothing is to be done.

    Arguments:
        site: The site, with its norms.

    Returns:
        The factors, and a sentence for each that is not 1, or that could not be told.
    """
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
