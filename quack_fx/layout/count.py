"""Number of weights in the blocks of a layout.

In: a layout and the shapes of the parameters that it names. Out: a count, in which rows of several blocks count once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from quack_fx.layout.sites import QKLayout, Range, merged


def qk_count(layout: QKLayout, shapes: Mapping[str, Sequence[int]]) -> int:
    """Number of weights in blocks of the layout, each counted once, with biases.

    Arguments:
        layout: The layout.
        shapes: Shapes of parameters by name; a parameter without a shape counts as empty.
    """
    rows: dict[tuple[str, int], set[Range]] = {}
    for site in layout.sites:
        for _, block in site.blocks():
            ranges = {r for head in block.heads for r in head}
            rows.setdefault((block.param, block.axis), set()).update(ranges)
            if block.bias:
                rows.setdefault((block.bias, 0), set()).update(ranges)
    total = 0
    for (param, axis), ranges in rows.items():
        shape = shapes.get(param, ())
        if axis < len(shape) and shape[axis]:
            count = sum(stop - start for start, stop in merged(ranges))
            total += count * (math.prod(shape) // shape[axis])
    return total
