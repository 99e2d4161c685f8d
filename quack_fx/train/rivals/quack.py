"""QuacK itself: learning rates by the rule, relative to the start of training.

In: the scales of a program. Out: the `Method` that uses these scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quack_fx.train.rivals.method import Method


class Quack(Method):
    """QuacK (arXiv 2511.21377, Alg. 1 and 2): `method="quack"`.

    The learning-rate scale of a block of rows is `tau * factor / initial factor`. The factor is one over the norms of
    the blocks that it is multiplied with in the logits.
    """

    name: ClassVar[str] = "quack"
    uses_tau: ClassVar[bool] = True

    def block_scales(self) -> list[list[Tensor]]:
        """Learning-rate scale of every head for the current weights, [attentions, heads] by kind and block."""
        pairs = zip(self.scaling.factors(), self.scaling.first, strict=True)
        return [
            [
                self.scaling.tau * torch.where(factor.isinf(), 1.0, factor / start)
                for factor, start in zip(now, first, strict=True)
            ]
            for now, first in pairs
        ]

    def row_scales(self) -> Mapping[Tensor, Tensor]:
        """Scale of the update of each row of the query and key weights."""
        return self.scaling.scales()
