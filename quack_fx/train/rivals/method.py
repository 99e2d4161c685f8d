"""The interface between the hooks and a method of logit control, and the methods that need only the rule.

In: the scales of a program, which has the rows and norms of all heads. Out: a `Method`, which defines the scale of each
row's update, and what happens to the weights after it.
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
    """A method of logit control. This base class changes nothing: `method="none"`.

    A model then trains bit for bit as without QuacK, and `metrics()` reports the norms and largest logits of its heads.

    Arguments:
        scaling: Norms, factors and rows of the model's heads.

    Attributes:
        name: Value of the `method` argument that selects it.
        uses_tau: Whether it uses `tau`.
        reads_logits: Whether it needs the largest logit of every head.
    """

    name: ClassVar[str] = "none"
    uses_tau: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False

    def __init__(self, scaling: Scaling) -> None:
        self.scaling = scaling

    def block_scales(self) -> list[list[Tensor]]:
        """Learning-rate scale of every head for the current weights, [attentions, heads] by kind and block."""
        return [[torch.ones_like(factor) for factor in first] for first in self.scaling.first]

    def row_scales(self) -> Mapping[Tensor, Tensor] | None:
        """Scale of the update of each row of the query and key weights; None to leave updates unscaled."""
        return by_row(self.scaling, self.block_scales()) if self.uses_tau else None

    def after_step(self, held: Mapping[str, Tensor], largest: Tensor | None) -> None:
        """Change the weights after a step; by default, do nothing.

        Arguments:
            held: The optimizer's query and key weights, by their names in the layout.
            largest: The largest logit of each query head since the last step, if logits are read.
        """


def relative_factors(scaling: Scaling) -> list[list[Tensor]]:
    """Factors of all heads relative to their initial factors; 1 for a head that is multiplied with a pruned one."""
    pairs = zip(scaling.factors(), scaling.first, strict=True)
    return [[torch.where(f.isinf(), 1.0, f / start) for f, start in zip(*pair, strict=True)] for pair in pairs]


def by_row(scaling: Scaling, of_blocks: Sequence[Sequence[Tensor]]) -> dict[Tensor, Tensor]:
    """Expand scales of heads to scales of rows, using QuacK's program with its own scales replaced.

    Arguments:
        scaling: Has the rows of the heads.
        of_blocks: The scales of heads, as returned by `Method.block_scales`.

    Returns:
        For each weight, the scales of the rows that this rank holds, [rows, 1, ...] along the axis of the rows.
    """
    other = copy.copy(scaling)
    other.tau, other.first = 1.0, [[torch.ones_like(scale) for scale in scales] for scales in of_blocks]
    other.factors = lambda: list(of_blocks)  # type: ignore[method-assign]
    return other.scales()


class Quack(Method):
    """QuacK (arXiv 2511.21377, Alg. 1 and 2): `method="quack"`.

    The learning-rate scale of a block of rows is `tau * factor / initial factor`. The factor is one over the norms of
    the blocks that it is multiplied with in the logits.
    """

    name: ClassVar[str] = "quack"
    uses_tau: ClassVar[bool] = True

    def block_scales(self) -> list[list[Tensor]]:
        """Learning-rate scale of every head for the current weights, [attentions, heads] by kind and block."""
        return [[self.scaling.tau * factor for factor in factors] for factors in relative_factors(self.scaling)]

    def row_scales(self) -> Mapping[Tensor, Tensor]:
        """Scale of the update of each row of the query and key weights."""
        return self.scaling.scales()


class Constant(Method):
    """The ablation of the QuacK paper (section 4): `method="constant"`.

    The learning rate of every query and key row is `tau` times that of the other weights, independent of norms. QuacK
    starts with the same learning rates and then changes them. If the optimizer's update is proportional to its learning
    rate, this equals a separate parameter group for these rows with `lr = tau * lr`.
    """

    name: ClassVar[str] = "constant"
    uses_tau: ClassVar[bool] = True

    def block_scales(self) -> list[list[Tensor]]:
        """Learning-rate scale of every head, [attentions, heads] by kind and block."""
        return [[torch.ones_like(factor) * self.scaling.tau for factor in first] for first in self.scaling.first]
