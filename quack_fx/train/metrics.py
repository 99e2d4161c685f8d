"""Attention and its learning rates as numbers for a logger.

In: a layout, its model, and the scales of its rows. Out: one flat dict of names and numbers, by one copy from the
device to the host, whatever the number of attentions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quack_fx.layout import AttentionSite, QKLayout, Ranges, WeightBlock, merged
from quack_fx.layout.fit import with_bare_names
from quack_fx.train.program.kinds import kinds_of

if TYPE_CHECKING:
    from quack_fx.train.program.parts.quack import QuacK as Scaling

_Unit = tuple[str, str | None, Ranges]
"""One head's rows: their weight, its bias, the ranges."""


class Metrics:
    """What can be read of some attentions; see `QuacK.metrics`.

    Arguments:
        layout: The layout.
        model: The model it fits.

    Example:
        >>> Metrics(layout, model).read(scaling)["attention/layers.0.attn/qk_norm_product/max"]
        4.1
    """

    def __init__(self, layout: QKLayout, model: nn.Module) -> None:
        layout, params = with_bare_names(layout, model)
        self._sites = [site for site in layout.sites if site.terms and not site.qk_norm]
        # In the order of the program's numbers, which is written for these kinds.
        self._places: dict[_Unit, int] = {}
        start = 0
        for kind in kinds_of(layout, {name: tuple(param.shape) for name, param in params.items()}):
            own = [kind.names(numbers) for numbers in kind.instances]
            for block in kind.blocks:
                for names in own:
                    weight, *bias = (names[i] for i in block.tensors)
                    units = [(weight, bias[0] if bias else None, ranges) for ranges in block.heads]
                    self._places.update(zip(units, range(start, start + len(units)), strict=True))
                    start += len(units)

    def read(self, scaling: Scaling, heads: bool = False) -> dict[str, float]:
        """The metrics as the weights are now; see `QuacK.metrics`."""
        factors, first = _flat(scaling.factors()), _flat(scaling.first)
        relative = torch.where(factors.isinf(), 1.0, factors / first)
        norm, growth, scale = torch.stack(
            [_flat(scaling.norms()), relative.reciprocal(), relative * scaling.tau]
        ).tolist()
        return dict(self._named(norm, growth, scale, heads))

    def _named(
        self, norms: Sequence[float], growths: Sequence[float], scales: Sequence[float], heads: bool
    ) -> Iterator[tuple[str, float]]:
        """Names and numbers, from those of every head of every block."""
        for site in self._sites:
            at = "/".join(filter(None, ("attention", site.name)))
            scale = 1.0 if site.logit_scale is None else abs(site.logit_scale)
            products = [scale * self._product(site, head, norms) for head in range(site.query_heads)]
            yield from _summary(f"{at}/qk_norm_product", products, heads)
            growth = []
            for name, block in _named_blocks(site):
                units = dict.fromkeys(_unit(block, ranges) for ranges in block.heads)
                places = [self._places[unit] for unit in units if unit in self._places]  # of heads that terms have
                if places:
                    growth += [growths[place] for place in places]
                    yield from _summary(f"{at}/{name}/norm", [norms[place] for place in places], heads)
                    yield from _summary(f"{at}/{name}/lr_scale", [scales[place] for place in places], heads)
            yield from _summary(f"{at}/growth", growth, False)

    def _product(self, site: AttentionSite, head: int, norms: Sequence[float]) -> float:
        """The products of the norms in the terms of a query head, added up."""
        terms = ([self._places[_unit(*part)] for part in product] for product in site.head_terms(head))
        return math.fsum(math.prod(norms[place] for place in places) for places in terms)


def _unit(block: WeightBlock, ranges: Ranges) -> _Unit:
    return block.param, block.bias, merged(ranges)


def _named_blocks(site: AttentionSite) -> Iterator[tuple[str, WeightBlock]]:
    """The blocks of a site, each once, by role; by parameter where a role says too little."""
    blocks = list(dict.fromkeys(block for _, block in site.blocks()))
    roles = Counter(block.role for block in blocks)
    for block in blocks:
        plain = block.role != "other" and roles[block.role] == 1
        yield block.role if plain else block.param.removeprefix(f"{site.name}."), block


def _summary(name: str, values: Sequence[float], heads: bool) -> Iterator[tuple[str, float]]:
    """Smallest, median and largest of some numbers; all of them, too, where heads are asked for."""
    yield f"{name}/min", min(values)
    yield f"{name}/median", median(values)
    yield f"{name}/max", max(values)
    if heads:
        yield from ((f"{name}/head_{head}", value) for head, value in enumerate(values))


def _flat(by_block: Sequence[Sequence[Tensor]]) -> Tensor:
    """The numbers of all heads in a row, on one device."""
    each = [numbers.flatten() for blocks in by_block for numbers in blocks]
    return torch.cat([numbers.to(each[0].device) for numbers in each])
