"""The layout: frozen dataclasses, free of torch, that say which weight rows produce which attention logits.

sites.py    the layout
fit.py      checks a layout against a model, resolves its parameter names and counts its weights
pattern.py  per-head rows and head maps as formulas of the head index
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
