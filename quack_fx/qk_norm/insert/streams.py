"""Heads that several projections make, each for tokens of its own kind.

In: a model and example inputs. Out: the sides of attentions whose every vector of features comes from one projection
alone, though there are several: joint attention over text and image tokens. In all others the features of a token are
put together: added up (low-rank adapters) or laid side by side (MLA).
"""

from __future__ import annotations

from torch import nn

from quack_fx.find import Pairs, Vector, attentions_of, pairs_of
from quack_fx.layout import SIDES, Side
from quack_fx.qk_norm.call import Inputs, call_of


def sides_of_streams(model: nn.Module, inputs: Inputs) -> set[tuple[Pairs, Side]]:
    """Attentions and sides whose heads are vectors of one projection each.

    Arguments:
        model: The model.
        inputs: Example inputs of its forward.
    """
    found: set[tuple[Pairs, Side]] = set()
    for _, site, heads in attentions_of(model, *call_of(inputs)).understood():
        for side, of_heads in zip(SIDES, (heads.query, heads.key), strict=True):
            if all(_is_of_one(vector) for head in of_heads for vector in head):
                found.add((pairs_of(site), side))
    return found


def _is_of_one(vector: Vector) -> bool:
    """Whether all features are rows of one parameter, rotated or not."""
    return len({name for rows in vector for name, _ in rows}) == 1
