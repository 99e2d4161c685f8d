"""Metrics of attention and its learning rates, for a logger.

In: a layout, its model, and the scales of its rows. Out: one flat dict from names to numbers, with a single copy from
device to host for any number of attentions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from statistics import median

import torch
from torch import Tensor, nn

from quack_fx.layout import AttentionSite, QKLayout, WeightBlock
from quack_fx.train.program.kinds import Unit
from quack_fx.train.rivals.method import Method, relative_factors
from quack_fx.train.units import in_a_row, places_of


class Metrics:
    """Computes the metrics of a model's attentions; see `QuacK.metrics`.

    Arguments:
        layout: The layout.
        model: The model it fits.

    Example:
        >>> Metrics(layout, model).read(method)["attention/layers.0.attn/qk_norm_product/max"]
        4.1
    """

    def __init__(self, layout: QKLayout, model: nn.Module) -> None:
        self._every_site = layout.sites
        layout, self._places = places_of(layout, model)
        self._names = _distinct_names([site.name for site in layout.sites])
        named = zip(self._names, layout.sites, strict=True)
        self._sites = [(name, site) for name, site in named if site.terms and not site.qk_norm]

    def read(self, method: Method, heads: bool = False, logits: Tensor | None = None) -> dict[str, float]:
        """The metrics for the current weights; see `QuacK.metrics`.

        Arguments:
            method: The method that scales the learning rates.
            heads: Whether to add the value of each head.
            logits: The largest logit of each query head of all sites, if logits are read.
        """
        scaling = method.scaling
        growth = in_a_row(relative_factors(scaling)).reciprocal()
        rows = [in_a_row(scaling.norms()), growth, in_a_row(method.block_scales())]
        rows += [] if logits is None else [logits.to(growth)]
        numbers = iter(torch.cat(rows).tolist())
        norms, growths, scales, *largest = ([*islice(numbers, len(row))] for row in rows)
        return dict(chain(self._named(norms, growths, scales, heads), *(self._largest(own, heads) for own in largest)))

    def _named(
        self, norms: Sequence[float], growths: Sequence[float], scales: Sequence[float], heads: bool
    ) -> Iterator[tuple[str, float]]:
        """Named metrics, from the numbers of all heads of all blocks."""
        for at, site in self._sites:
            scale = 1.0 if site.logit_scale is None else abs(site.logit_scale)
            products = [scale * self._product(site, head, norms) for head in range(site.query_heads)]
            yield from _summary(f"{at}/qk_norm_product", products, heads)
            growth = []
            for name, block in _named_blocks(site):
                units = dict.fromkeys(Unit.of(block, ranges) for ranges in block.heads)
                places = [self._places[unit] for unit in units if unit in self._places]  # heads in terms
                if places:
                    growth += [growths[place] for place in places]
                    yield from _summary(f"{at}/{name}/norm", [norms[place] for place in places], heads)
                    yield from _summary(f"{at}/{name}/lr_scale", [scales[place] for place in places], heads)
            yield from _summary(f"{at}/growth", growth, False)

    def _largest(self, logits: Sequence[float], heads: bool) -> Iterator[tuple[str, float]]:
        """Named largest logits of all sites that ran."""
        start = 0
        for name, site in zip(self._names, self._every_site, strict=True):
            own = logits[start : start + site.query_heads]
            start += site.query_heads
            if max(own) > -math.inf:
                yield from _summary(f"{name}/max_attn_logit", own, heads)

    def _product(self, site: AttentionSite, head: int, norms: Sequence[float]) -> float:
        """The sum, over the terms of a query head, of the product of their norms."""
        terms = ([self._places[Unit.of(*part)] for part in product] for product in site.head_terms(head))
        return math.fsum(math.prod(norms[place] for place in places) for places in terms)


def _distinct_names(sites: Sequence[str]) -> list[str]:
    """Names for metrics, "attention/layers.0.attn"; the second attention of a module is "attention/layers.0.attn#2"."""
    counts = [sites[: i + 1].count(site) for i, site in enumerate(sites)]
    numbered = (f"{site}#{n}" if n > 1 else site for site, n in zip(sites, counts, strict=True))
    return [f"attention/{name}" if name else "attention" for name in numbered]


def _named_blocks(site: AttentionSite) -> Iterator[tuple[str, WeightBlock]]:
    """The distinct blocks of a site, named by role, or by parameter if the role is "other" or not unique."""
    blocks = list(dict.fromkeys(block for _, block in site.blocks()))
    roles = Counter(block.role for block in blocks)
    for block in blocks:
        plain = block.role != "other" and roles[block.role] == 1
        yield block.role if plain else block.param.removeprefix(f"{site.name}."), block


def _summary(name: str, values: Sequence[float], heads: bool) -> Iterator[tuple[str, float]]:
    """Minimum, median and maximum of some values; with `heads`, also each value."""
    yield f"{name}/min", min(values)
    yield f"{name}/median", median(values)
    yield f"{name}/max", max(values)
    if heads:
        yield from ((f"{name}/head_{head}", value) for head, value in enumerate(values))
