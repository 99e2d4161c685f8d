"""Finds joint attention: several projections of one side, each for one kind of token.

In: a model and example inputs. Out: the sides of attentions where the features of each token come from one projection.
Otherwise those of several are summed (low-rank adapters) or concatenated (MLA).
"""

from __future__ import annotations

from torch import nn

from quack_fx.find import Pairs, Vector, attentions_of, pairs_of
from quack_fx.layout import SIDES, Side
from quack_fx.qk_norm.call import Inputs, call_of


def sides_of_streams(model: nn.Module, inputs: Inputs) -> set[tuple[Pairs, Side]]:
    """Attentions and sides where each vector of features comes from one projection.

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
    """Whether all features come from one parameter, with or without a rotation."""
    return len({name for rows in vector for name, _ in rows}) == 1
