"""Sites of layers that were not recorded because they equal a recorded layer (`graph/capture/layers.py`).

In: the sites of a graph in which each such layer is a single node. Out: the sites of all layers, by renaming, in
execution order.

This is valid only if a recorded layer's sites were derived from ops inside that layer. If the search inspected nodes
outside it, or must walk through a layer that was not recorded, `BehindLayer` asks for a full recording.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch.fx import Node

from quack_fx.find.attention import Logits
from quack_fx.graph.capture import RepeatedLayer
from quack_fx.graph.dataflow import BehindLayer, Dataflow
from quack_fx.layout import AttentionSite, Skipped, renamed


class LeftOut:
    """The layers of one graph that were not recorded."""

    def __init__(self, df: Dataflow, repeated: Sequence[RepeatedLayer]) -> None:
        self._df = df
        self._repeated = repeated
        self._given: dict[str, dict[Node, bool]] = {}
        for layer in repeated:
            given = self._given.setdefault(layer.like, dict(layer.given))
            given.update({n: same and given[n] for n, same in layer.given.items()})

    def check(self, logits: Logits, seen: Iterable[Node]) -> None:
        """Check that the site of an attention in a repeated layer was derived from nodes of that layer only.

        Raises:
            BehindLayer: The search inspected a node outside the layer.
        """
        around = self._df.modules(logits.products[0].node)
        home = next((name for name in around if name in self._given), None)  # the recorded layer that others repeat
        if home is None:
            return
        df, given = self._df, self._given[home]
        # Nodes added to the products (masks, position biases) may come from outside, if all layers get the same.
        added = {*logits.path, logits.end} - {p.node for p in logits.products}
        for node in {*seen, *added, logits.output, *(p.node for p in logits.products)}:
            if node in added and node in given and not given[node]:
                raise BehindLayer(node)
            if node in df.activation and home not in df.modules(node) and node not in given and node not in added:
                raise BehindLayer(node)

    def all_sites(self, sites: Sequence[tuple[Node, AttentionSite]]) -> list[AttentionSite]:
        """Sites of all layers in execution order."""
        placed = [(self._df.index[node], i, site) for i, (node, site) in enumerate(sites)]
        for layer in self._repeated:
            for i, (node, site) in enumerate(sites):
                if node in layer.nodes:
                    placed.append((self._df.index[layer.node], i, renamed(site, layer.name_of)))
        return [site for _, _, site in sorted(placed, key=lambda entry: entry[:2])]

    def all_skipped(self, skipped: Sequence[tuple[Node, Skipped]]) -> list[Skipped]:
        """Skipped attentions of all layers."""
        found = [entry for _, entry in skipped]
        for layer in self._repeated:
            for node, entry in skipped:
                if node in layer.nodes:
                    reason = entry.reason.replace(f"{layer.like}.", f"{layer.name}.")
                    found.append(replace(entry, name=layer.name_of(entry.name), reason=reason))
        return found

    def all_names(self, reached: set[str]) -> set[str]:
        """Add the reached parameters of the layers that were not recorded."""
        return reached | {theirs for layer in self._repeated for ours, theirs in layer.names.items() if ours in reached}
