"""One fixed learning rate for all queries and keys.

In: the scales of a program. Out: the `Method` that scales every query and key row by `tau`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from quack_fx.train.rivals.method import Method, by_row


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

    def row_scales(self) -> Mapping[Tensor, Tensor]:
        """Scale of the update of each row of the query and key weights."""
        return by_row(self.scaling, self.block_scales())
