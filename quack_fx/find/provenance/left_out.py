"""Sites of layers that were not recorded.

In: the sites of a graph in which one node stands for each layer that is equal to a recorded one
(`graph/capture/layers.py`).
Out: the sites of all layers, by renaming, in the order in which they run.

That is right only if a recorded layer's sites were derived from ops inside that layer alone. If the search looked
outside it, or had to look behind a layer that was not recorded, `BehindLayer` asks for a full recording.
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
    """The layers that were not recorded in one graph."""

    def __init__(self, df: Dataflow, repeated: Sequence[RepeatedLayer]) -> None:
        self._df = df
        self._repeated = repeated
        self._given: dict[str, dict[Node, bool]] = {}
        for layer in repeated:
            given = self._given.setdefault(layer.like, dict(layer.given))
            given.update({n: same and given[n] for n, same in layer.given.items()})

    def check(self, logits: Logits, seen: Iterable[Node]) -> None:
        """Check that the site of an attention in a layer with copies was derived from that layer alone.

        Raises:
            BehindLayer: It was not.
        """
        around = self._df.modules(logits.products[0].node)
        home = next(
            (name for name in around if name in self._given), None
        )  # the recorded layer that others are equal to
        if home is None:
            return
        df, given = self._df, self._given[home]
        # What is added to the products (masks, position biases) need only be the same in all layers.
        added = {*logits.path, logits.end} - {p.node for p in logits.products}
        for node in {*seen, *added, logits.output, *(p.node for p in logits.products)}:
            if node in added and node in given and not given[node]:
                raise BehindLayer(node)
            if node in df.activation and home not in df.modules(node) and node not in given and node not in added:
                raise BehindLayer(node)

    def all_sites(self, sites: Sequence[tuple[Node, AttentionSite]]) -> list[AttentionSite]:
        """Sites of all layers, in the order in which they run."""
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
        """Parameters that were reached, with those of the layers left out."""
        return reached | {theirs for layer in self._repeated for ours, theirs in layer.names.items() if ours in reached}
