"""The layout, plain frozen data about which weight rows make which attention logits; no torch.

sites.py    the layout
fit.py      whether a layout fits a model, and which of its parameters it means
pattern.py  rows of heads and head maps as formulas of the head's number
walk.py     how one attention was understood, node by node
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
]
