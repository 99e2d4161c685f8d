"""QuacK itself: learning rates by the rule, relative to the start of training.

In: the scales of a program. Out: the `Method` that hands them on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quack_fx.train.rivals.method import Method


class Quack(Method):
    """QuacK (arXiv 2511.21377, Alg. 1 and 2): `method="quack"`.

    The learning rate of a block of rows is `tau * factor / factor at the start`, with the factor one over the norms of
    what the block is multiplied with in the logits.
    """

    name: ClassVar[str] = "quack"
    uses_tau: ClassVar[bool] = True

    def block_scales(self) -> list[list[Tensor]]:
        """The scale on every head's learning rate as the weights are, [attentions, heads] by kind and block."""
        pairs = zip(self.scaling.factors(), self.scaling.first, strict=True)
        return [
            [
                self.scaling.tau * torch.where(factor.isinf(), 1.0, factor / start)
                for factor, start in zip(now, first, strict=True)
            ]
            for now, first in pairs
        ]

    def row_scales(self) -> Mapping[Tensor, Tensor]:
        """The scale on the update of each row of the weights with heads."""
        return self.scaling.scales()
