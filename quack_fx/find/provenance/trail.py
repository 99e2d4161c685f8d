"""Record what the tracer computed, for explanations.

In: each node that the tracer runs, with its flow. Out: a `Trail`, with a `Held` for each node. It is made at once,
because in-place writes may change the labels later.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from quack_fx.find.provenance.flow import Flow
from quack_fx.find.provenance.labels import UNKNOWN, Labels, compact, constant_along
from quack_fx.find.provenance.projections import Projections
from quack_fx.layout import merged
from quack_fx.layout.walk import Held, RowsOf


class Trail:
    """The weight rows behind each node walked for one attention."""

    def __init__(self, labels: Labels, projections: Projections) -> None:
        self._labels = labels
        self._projections = projections
        self.held: dict[Node, Held] = {}
        """The weight rows behind each node when it was first walked."""

    def visit(self, node: Node, flow: Flow) -> None:
        """Record a node; called by the tracer."""
        if node not in self.held:
            self.held[node] = self._held(flow)

    def _held(self, flow: Flow) -> Held:
        if flow.statistic is not None:
            return Held(self._rows(set(flow.statistic.features)), statistic=True)
        label, found = flow.label, self._labels.features(flow.label)
        varying = [d for d in range(label.dim()) if not constant_along(label, d)]
        held = Held(
            rows=self._rows(found),
            unknown=UNKNOWN in found,
            norms=tuple((norm.kind, norm.width, norm.module, norm.weight) for norm in flow.norms),
            scale=flow.scale,
        )
        if not varying:
            return held
        lines = compact(label).movedim(varying[-1], -1)
        vectors, order = torch.unique(lines.reshape(-1, lines.shape[-1]), dim=0, return_inverse=True)
        first = self._rows(self._labels.features(vectors[order[0]]))
        return replace(held, features=varying[-1], vectors=len(vectors), axes=tuple(varying[:-1]), first=first)

    def _rows(self, features: set[int]) -> tuple[RowsOf, ...]:
        """Group features by parameter, with their rows as ranges along the projection's first axis."""
        found: dict[tuple[str, int], set[int]] = {}
        for projection, i in map(self._projections.by_feature, sorted(features - {UNKNOWN})):
            rows = found.setdefault((projection.names[i], projection.axes[0] if projection.axes else 0), set())
            rows.update(projection.rows[i, :1].tolist())
        return tuple(RowsOf(name, axis, merged((r, r + 1) for r in rows)) for (name, axis), rows in found.items())
