"""The index of each head in the flattened numbers of a program.

In: a layout and its model. A program has tensors of norms, factors and scales for each block. Out: the index of every
head's rows in one such list of tensors, flattened and concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quack_fx.layout import QKLayout, Ranges, WeightBlock, merged
from quack_fx.layout.fit import with_bare_names
from quack_fx.train.program.kinds import kinds_of

Place = tuple[str, str | None, Ranges]
"""The rows of one head: names of the weight and its bias, and the ranges."""


def place_of(block: WeightBlock, ranges: Ranges) -> Place:
    """The rows of one head in a block."""
    return block.param, block.bias, merged(ranges)


def places_of(layout: QKLayout, model: nn.Module) -> tuple[QKLayout, dict[Place, int]]:
    """Indices of all heads that the rule scales.

    Arguments:
        layout: The layout.
        model: The model it fits.

    Returns:
        The layout with the parameter names of the program; the index of each head's rows in `in_a_row`.

    Example:
        >>> layout, places = places_of(layout, model)
        >>> places["layers.0.q.weight", None, ((0, 64),)]
        0
    """
    layout, params = with_bare_names(layout, model)
    places: dict[Place, int] = {}
    # The same order as in the program, which is written from these kinds.
    start = 0
    for kind in kinds_of(layout, {name: tuple(param.shape) for name, param in params.items()}):
        own = [kind.names(numbers) for numbers in kind.instances]
        for block in kind.blocks:
            for names in own:
                weight, *bias = (names[i] for i in block.tensors)
                heads = [(weight, bias[0] if bias else None, ranges) for ranges in block.heads]
                places.update(zip(heads, range(start, start + len(heads)), strict=True))
                start += len(heads)
    return layout, places


def in_a_row(by_block: Sequence[Sequence[Tensor]]) -> Tensor:
    """The numbers of all heads as one flat tensor, on one device."""
    each = [numbers.flatten() for blocks in by_block for numbers in blocks]
    return torch.cat([numbers.to(each[0].device) for numbers in each])


def by_block(row: Tensor, like: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Split a flat tensor into tensors for each block, shaped like those in `like`; the inverse of `in_a_row`."""
    parts = iter(row.split([numbers.numel() for blocks in like for numbers in blocks]))
    return [[next(parts).view(numbers.shape).to(numbers.device) for numbers in blocks] for blocks in like]
