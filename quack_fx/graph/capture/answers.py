"""Made-up Python values of fake tensors: what a forward is told when it asks for a number that depends on the weights.

In: a fake tensor. Out: a number, a truth value, or nested lists of numbers. A forward is recorded with the first of
`VARIANTS`; whether the weight rows depend on the answers is seen with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

MOST_READS = 5_000
"""Numbers that one forward may ask for; after more, it is taken for a loop that waits for another answer."""


class TooManyReads(RuntimeError):
    """A forward asks for more numbers than `MOST_READS`."""

    def __init__(self) -> None:
        super().__init__(f"it reads more than {MOST_READS:,} numbers that it computes")


class Answers:
    """Answers of each kind in turn, and from the first again after the last.

    Arguments:
        floating: Floating-point numbers.
        integers: Integers.
        truths: Truth values.
        sizes: Integers in lists, which are mostly sizes.
    """

    def __init__(
        self,
        floating: Sequence[float] = (0.5,),
        integers: Sequence[int] = (1,),
        truths: Sequence[bool] = (False,),
        sizes: Sequence[int] = (1,),
    ) -> None:
        self._floating, self._integers, self._sizes = cycle(floating), cycle(integers), cycle(sizes)
        self._truths = cycle(truths)
        self._left = MOST_READS

    def truth(self) -> bool:
        """Whether something holds.

        Raises:
            TooManyReads: There were too many answers.
        """
        self._left -= 1
        if self._left < 0:
            raise TooManyReads
        return next(self._truths)

    def number(self, like: Tensor, *, size: bool = False) -> float:
        """A number of a tensor's type; `size` if it may be one of several sizes."""
        truth = self.truth()
        if like.is_floating_point() or like.is_complex():
            return next(self._floating)
        return truth if like.dtype is torch.bool else next(self._sizes if size else self._integers)

    def values(self, tensor: Tensor) -> Any:
        """Numbers for all elements of a tensor, nested as `Tensor.tolist` returns them."""

        def nested(shape: Sequence[int]) -> Any:
            if not shape:
                return self.number(tensor, size=tensor.dim() > 0)
            return [nested(shape[1:]) for _ in range(shape[0])]

        return nested(tensor.shape)


VARIANTS: tuple[Callable[[], Answers], ...] = (
    Answers,
    partial(Answers, (0.75,), (2,), (True,)),
    partial(Answers, (-0.75,), (0,), (False,)),
    partial(Answers, (1.5, 2.5, -0.25), (1, 0, 2), (True, False), (0, 1, 2)),
)
"""Answers of a first recording, and other ones, with some of which a forward may fail: they may be out of its range."""
