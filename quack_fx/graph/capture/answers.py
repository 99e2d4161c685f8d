"""Made-up Python values of fake tensors: what a forward is told when it asks for a number that depends on the weights.

In: a fake tensor. Out: a number, a truth value, or nested lists of numbers. A forward is recorded with the first of
`VARIANTS`; whether the weight rows depend on the answers is seen with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
        self._floating, self._integers = cycle(floating), cycle(integers)
        self._truths, self._sizes = cycle(truths), cycle(sizes)
        self._left = MOST_READS

    def truth(self) -> bool:
        """Whether something holds.

        Raises:
            TooManyReads: There were too many answers.
        """
        self._count()
        return next(self._truths)

    def number(self, tensor: Tensor) -> float:
        """The number in a tensor of one element.

        Raises:
            TooManyReads: There were too many answers.
        """
        self._count()
        return next(self._kind(tensor, self._integers))

    def values(self, tensor: Tensor) -> Any:
        """Numbers for all elements of a tensor, nested as `Tensor.tolist` returns them.

        Raises:
            TooManyReads: There were too many answers.
        """
        self._count()
        numbers = self._kind(tensor, self._sizes if tensor.dim() else self._integers)

        def nested(shape: Sequence[int]) -> Any:
            return [nested(shape[1:]) for _ in range(shape[0])] if shape else next(numbers)

        return nested(tensor.shape)

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise TooManyReads

    def _kind(self, tensor: Tensor, integers: Iterator[int]) -> Iterator[float]:
        """The answers of a tensor's type."""
        if tensor.is_floating_point() or tensor.is_complex():
            return self._floating
        return self._truths if tensor.dtype is torch.bool else integers


VARIANTS: tuple[Callable[[], Answers], ...] = (
    Answers,
    partial(Answers, (0.75,), (2,), (True,)),
    partial(Answers, (-0.75,), (0,), (False,)),
    partial(Answers, (1.5, 2.5, -0.25), (1, 0, 2), (True, False), (0, 1, 2)),
)
"""Answers of a first recording, and other ones, with some of which a forward may fail: they may be out of its range."""
