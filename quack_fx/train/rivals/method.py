"""What a method of logit control does in a step of an optimizer: the one interface that the hooks know.

In: the scales of a program, from which the rows and norms of all heads are had. Out: a `Method`, which says by how much
the update of each row is scaled, and what happens to the weights after it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quack_fx.train.program.parts.quack import QuacK as Scaling


class Method:
    """A method of logit control. By itself it changes nothing: `method="none"`.

    With it a model trains as without QuacK, bit for bit, and `metrics()` tells the norms and largest logits of its
    heads.

    Arguments:
        scaling: Norms, factors and rows of the model's heads.

    Attributes:
        name: What it is asked for by.
        uses_tau: Whether `tau` means something to it.
        reads_logits: Whether it needs the largest logit of every head.
    """

    name: ClassVar[str] = "none"
    uses_tau: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False

    def __init__(self, scaling: Scaling) -> None:
        self.scaling = scaling

    def block_scales(self) -> list[list[Tensor]]:
        """The scale on every head's learning rate as the weights are, [attentions, heads] by kind and block."""
        return [[torch.ones_like(factor) for factor in first] for first in self.scaling.first]

    def row_scales(self) -> Mapping[Tensor, Tensor] | None:
        """The scale on the update of each row of the weights with heads; None where updates stay as they are."""
        return None

    def after_step(self, held: Mapping[str, Tensor], largest: Tensor | None) -> None:
        """What is done to the weights after a step.

        Arguments:
            held: The optimizer's weights by their names in the layout.
            largest: The largest logit of each query head since the last step, where they are read.
        """


def by_row(scaling: Scaling, of_blocks: Sequence[Sequence[Tensor]]) -> dict[Tensor, Tensor]:
    """The scales of heads as those of rows, by the program of QuacK with these in place of its own.

    Arguments:
        scaling: Where the rows of the heads are.
        of_blocks: As `Method.block_scales`.

    Returns:
        For each weight the scales of the rows that this rank holds, [rows, 1, ...] along the axis that counts them.
    """
    other = copy.copy(scaling)
    other.tau, other.first = 1.0, [[torch.ones_like(scale) for scale in scales] for scales in of_blocks]
    other.factors = lambda: list(of_blocks)  # type: ignore[method-assign]
    return other.scales()
