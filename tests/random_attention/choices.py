"""Where a random model's decisions come from: a seed, a recorded list of numbers, or hypothesis.

In: a function that draws a number below n. Out: a `Choices` that picks among options and remembers what it picked, so
that a model can be made again, and made smaller: the first option is always the plainest, and `shrink` turns as many
decisions as possible into it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Decisions of one model.

    Arguments:
        draw: Gives a number from 0 to n - 1.
    """

    def __init__(self, draw: Callable[[int], int]) -> None:
        self._draw = draw
        self.numbers: list[int] = []
        self.told: list[str] = []

    @classmethod
    def seeded(cls, seed: int) -> Choices:
        """Decisions that follow from a seed."""
        generator = random.Random(seed)
        return cls(generator.randrange)

    @classmethod
    def replayed(cls, numbers: Sequence[int]) -> Choices:
        """Decisions made before; the plainest ones after their end."""
        rest: Iterator[int] = iter(numbers)
        return cls(lambda n: min(next(rest, 0), n - 1))

    def pick(self, what: str, options: Sequence[T]) -> T:
        """One of the options; the plainest stands first."""
        i = self._draw(len(options))
        self.numbers.append(i)
        if i:
            self.told.append(f"{what}={getattr(options[i], '__name__', options[i])}")
        return options[i]

    def chance(self, what: str, one_in: int) -> bool:
        """Whether something rare happens: once in so many times."""
        yes = self._draw(one_in) == one_in - 1
        self.numbers.append((one_in - 1) * yes)
        if yes:
            self.told.append(what)
        return yes

    def shuffled(self, what: str, items: Sequence[T]) -> list[T]:
        """The items in any order; the given one is the plainest."""
        left, order = list(items), []
        while len(left) > 1:
            i = self._draw(len(left))
            self.numbers.append(i)
            order.append(left.pop(i))
        order += left
        if order != list(items):
            self.told.append(f"{what}={order}")
        return order


def shrink(numbers: Sequence[int], still_fails: Callable[[Sequence[int]], bool], tries: int = 400) -> list[int]:
    """Fewer and smaller decisions that fail in the same way."""
    best = list(numbers)
    left = tries

    def better(candidate: list[int]) -> bool:
        nonlocal best, left
        left -= 1
        if left < 0 or candidate == best or not still_fails(candidate):
            return False
        best = candidate
        return True

    size = len(best)
    while size and left > 0:  # cut the tail
        if len(best) < size or not better(best[: len(best) - size]):
            size //= 2
    changed = True
    while changed and left > 0:
        changed = False
        for i in range(len(best)):
            if i < len(best) and best[i]:
                changed |= better([*best[:i], 0, *best[i + 1 :]]) or (
                    best[i] > 1 and better([*best[:i], 1, *best[i + 1 :]])
                )
            if i < len(best):
                changed |= better([*best[:i], *best[i + 1 :]])
    while best and not best[-1]:
        best.pop()
    return best
