"""Where the numbers of a head stand among those of a program.

In: a layout and its model. Out: the place of every head's rows in the numbers that a program has for each block (norms,
factors, scales), put in a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quack_fx.layout import QKLayout, Ranges, WeightBlock, merged
from quack_fx.layout.fit import with_bare_names
from quack_fx.train.program.kinds import kinds_of

Place = tuple[str, str | None, Ranges]
"""One head's rows: their weight, its bias, the ranges."""


def place_of(block: WeightBlock, ranges: Ranges) -> Place:
    """The rows of one head in a block."""
    return block.param, block.bias, merged(ranges)


def places_of(layout: QKLayout, model: nn.Module) -> tuple[QKLayout, dict[Place, int]]:
    """Places of all heads that the rule is for.

    Arguments:
        layout: The layout.
        model: The model it fits.

    Returns:
        The layout by the names of the program; for the rows of each head their place in `in_a_row`.

    Example:
        >>> layout, places = places_of(layout, model)
        >>> places["layers.0.q.weight", None, ((0, 64),)]
        0
    """
    layout, params = with_bare_names(layout, model)
    places: dict[Place, int] = {}
    # In the order of the program's numbers, which is written for these kinds.
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
    """The numbers of all heads in a row, on one device."""
    each = [numbers.flatten() for blocks in by_block for numbers in blocks]
    return torch.cat([numbers.to(each[0].device) for numbers in each])


def by_block(row: Tensor, like: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Numbers in a row as those of blocks, `in_a_row` the other way around."""
    parts = iter(row.split([numbers.numel() for blocks in like for numbers in blocks]))
    return [[next(parts).view(numbers.shape).to(numbers.device) for numbers in blocks] for blocks in like]
