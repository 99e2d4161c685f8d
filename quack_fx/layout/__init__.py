"""The layout: plain frozen data about which weight rows make which attention logits; without torch.

sites.py    the layout
fit.py      checks a layout against a model, looks up its parameters there, and counts them
pattern.py  rows of heads and head maps as formulas of the head's index
walk.py     how one attention was traced, node by node
"""

from __future__ import annotations

from quack_fx.layout.sites import (
    SCHEMA,
    SIDES,
    AttentionSite,
    LogitTerm,
    Norm,
    NormKind,
    QKLayout,
    Range,
    Ranges,
    Role,
    Side,
    SiteKind,
    Skipped,
    WeightBlock,
    merged,
    renamed,
)

__all__ = [
    "SCHEMA",
    "SIDES",
    "AttentionSite",
    "LogitTerm",
    "Norm",
    "NormKind",
    "QKLayout",
    "Range",
    "Ranges",
    "Role",
    "Side",
    "SiteKind",
    "Skipped",
    "WeightBlock",
    "merged",
    "renamed",
]
