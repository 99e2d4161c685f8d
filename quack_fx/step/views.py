"""USER: a parameter and its state as the compiled loops take them.

In: a parameter, what is updated in its place, its state tensors. Out: `View`s, one for each of its pieces. They are cut
once: weights and state stay where they are, and a view costs as much as a small kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quack_fx.step.heads import Heads
from quack_fx.step.pieces import Piece


class Kind(NamedTuple):
    """What tells which pieces with heads can share a compiled call; equal for equal pieces, wherever they lie.

    Attributes:
        piece: The piece, as if it lay at the start.
        shape: Shape of the weight's view.
        stride: Its strides.
        dtype: Its type.
    """

    piece: Piece
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class View:
    """A parameter, or a piece of one, and what its update reads and writes.

    Attributes:
        weight: What is updated.
        slots: Its state, as the rule has it.
        rounded: Where to write the new weight in the parameter's own type, where it is a master; else None.
        form: Shape and strides of the whole parameter, and so of its gradient.
        piece: Which piece it is; None for the whole.
        kind: With which others it can share a compiled call; None where it has no heads.
    """

    weight: Tensor
    slots: tuple[Tensor, ...]
    rounded: Tensor | None
    form: tuple[tuple[int, ...], tuple[int, ...]]
    piece: Piece | None
    kind: Kind | None


class Views:
    """The views of all parameters.

    Arguments:
        heads: The pieces of those that have heads; None where none has.
    """

    def __init__(self, heads: Heads | None) -> None:
        self._heads = heads
        self._cut: dict[Tensor, _Cut] = {}

    def of(self, param: Tensor, weight: Tensor, slots: Sequence[Tensor]) -> Sequence[View]:
        """Those of a parameter.

        Arguments:
            param: The parameter.
            weight: What is updated in its place: its values, or its master.
            slots: Its state, as the rule has it.
        """
        where, known = (param.data_ptr(), weight.data_ptr()), self._cut.get(param)
        if known is None or known.where != where or any(map(operator.is_not, known.slots, slots)):
            known = self._cut[param] = _Cut(where, slots, list(self._pieces(param, weight, tuple(slots))))
        return known.views

    def _pieces(self, param: Tensor, weight: Tensor, slots: tuple[Tensor, ...]) -> Iterator[View]:
        rounded = None if weight.dtype == param.dtype else param.detach()
        form = tuple(param.shape), param.stride()
        for piece in self._heads.pieces_of(param) if self._heads is not None else (None,):
            if piece is None or self._heads is None:
                yield View(weight, slots, rounded, form, None, None)
                continue
            part, low = piece.of(weight), None if rounded is None else piece.of(rounded)
            kind = None if piece.first is None else Kind(piece.anywhere(), tuple(part.shape), part.stride(), part.dtype)
            yield View(part, tuple(map(piece.of, slots)), low, form, piece, kind)


class _Cut(NamedTuple):
    """A parameter and its state, cut.

    Attributes:
        where: Addresses of the parameter and of what is updated.
        slots: Its state tensors.
        views: Its pieces.
    """

    where: tuple[int, int]
    slots: Sequence[Tensor]
    views: Sequence[View]
