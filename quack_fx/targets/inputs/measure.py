"""Finds the input size for which two sizes in a forward become equal, by measuring how they grow with it.

After convolutions and patches the sizes in an error are not sizes of the inputs. But two failures of one statement, for
two sizes of one input axis, show how fast the sizes (`Mismatch`) grow with that axis, and so for which size of it they
are equal: linearly, or quadratically as the area of an image does.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from quack_fx.targets import failure
from quack_fx.targets.inputs.changes import LARGEST, changed, refilled, tensors
from quack_fx.targets.inputs.values import Inputs

DEPTH = 5
"""How many statements, each failing once the one before it holds, are solved."""

_LENGTH = re.compile(r"(max_?)?(seq|context|input|block|history)_?(len|length|window|size)|n_ctx|context_window")


@dataclass
class Budget:
    """How many inputs may be tried for measuring: for one model, and for all models that are built for a target."""

    each: int = 90
    total: int = 240


@dataclass(frozen=True)
class Mismatch:
    """Sizes that should be equal and are not.

    `place` is the file and line of the statement, and the error's message without numbers, or which axes differ.
    `pairs` are indices in `numbers` of two that should be equal, likeliest first.
    """

    place: tuple[str, int, str]
    numbers: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def ratio(self) -> Fraction | None:
        """For a failed view: elements of the wanted shape over elements of the tensor."""
        is_view = "is invalid for input of size" in self.place[2]
        return Fraction(self.numbers[0], self.numbers[1]) if is_view and self.pairs else None


def mismatch(error: BaseException) -> Mismatch | None:
    """The sizes that differ where a forward failed; None for an error that is not about sizes."""
    cause = failure.cause_of(error)
    if (found := failure.users_frame(cause)) is None:
        return None
    frame, line = found
    text = str(cause)
    without_numbers = re.sub(r"-?\d+", "#", text)
    place = (frame.f_code.co_filename, line, f"{type(cause).__name__}: {without_numbers}")
    condition = failure.condition_of(failure.statements_at(frame, line))
    if condition is not None and (sides := _sides(condition[0], failure.evaluator(frame))) is not None:
        return _of_pairs(place, sides) if sides else None
    if mask := re.search(r"shape of the mask \[(.*?)\] at index (\d+) .*indexed tensor \[(.*?)\] at index (\d+)", text):
        numbers = tuple(int(mask[n].split(",")[int(mask[n + 1])]) for n in (1, 3))
        return Mismatch((*place[:2], f"sizes [{mask[4]}]"), numbers, ((0, 1),))
    about_sizes = isinstance(cause, RuntimeError | ValueError | AssertionError)
    if not about_sizes or re.search(r"values to unpack|satisfy the constraint", text):
        return None
    if (factors := failure.factors_in(text)) is not None:
        return Mismatch(place, factors, ((0, 1),))
    if one := re.search(r"tensor a \((\d+)\) must match .*tensor b \((\d+)\) at non-singleton dimension (\d+)", text):
        return Mismatch((*place[:2], f"sizes [{one[3]}]"), (int(one[1]), int(one[2])), ((0, 1),))
    shapes = failure.shapes_in(text)
    if len(shapes) == 2 and len(shapes[0]) == len(shapes[1]):
        return _of_pairs(place, list(zip(*shapes, strict=True)))
    without_axes = re.sub(r"dim(ension)? -?\d+", "", text)
    numbers = tuple(map(int, re.findall(r"(?<![\w.])-?\d+(?![.\w]*[a-wyzA-Z])", without_axes)))
    if len(numbers) < 2:
        return None
    if "is invalid for input of size" in text:
        wanted = math.prod(numbers[:-1])
        return Mismatch(place, (wanted, *numbers[::-1]), ((0, 1),) if min(numbers) > 0 else ())
    pairs = [(i, j) for i, j in itertools.combinations(range(len(numbers)), 2) if numbers[i] != numbers[j]]
    return Mismatch(place, numbers, tuple(pairs[:12]))


def _of_pairs(place: tuple[str, int, str], sides: list[tuple[int, int]]) -> Mismatch:
    """The mismatch of two shapes, given as pairs of sizes."""
    wrong = [n for n, pair in enumerate(sides) if pair[0] != pair[1]]
    wrong = [n for n in wrong if 1 not in sides[n]] or wrong  # a size of 1 broadcasts
    numbers = tuple(itertools.chain.from_iterable(sides[n] for n in wrong))
    return Mismatch((*place[:2], f"sizes {wrong}"), numbers, tuple((2 * n, 2 * n + 1) for n in range(len(wrong))))


def _sides(test: ast.expr, value: Callable[[ast.expr], Any]) -> list[tuple[int, int]] | None:
    """The sizes on the two sides of each equality in a condition; None where they cannot be evaluated."""
    found: list[tuple[int, int]] = []
    try:
        for part in test.values if isinstance(test, ast.BoolOp) else [test]:
            if isinstance(part, ast.Compare) and isinstance(part.ops[0], ast.Eq | ast.NotEq):
                sides = value(part.left), value(part.comparators[0])
                is_remainder = isinstance(part.left, ast.BinOp) and isinstance(part.left.op, ast.Mod)
                found += [] if is_remainder else _pairs(*sides)
    except Exception:  # the user's expression may raise anything
        return None
    return found


def _pairs(have: Any, want: Any) -> list[tuple[int, int]]:
    if isinstance(have, int) and isinstance(want, int) and not isinstance(have, bool):
        return [(have, want)]
    if isinstance(have, tuple | list) and isinstance(want, tuple | list) and len(have) == len(want):
        return [pair for sides in zip(have, want, strict=True) for pair in _pairs(*sides)]
    return []


Axes = frozenset[tuple[int, int]]
"""Axes of one size: pairs of (index of the tensor, axis)."""


def _axes(inputs: Inputs) -> list[tuple[Axes, int]]:
    """Axes that change together, with their size: one axis, both sides of an image, all axes of one size, the batch."""
    shapes = [tuple(x.shape) for x in tensors(inputs)]
    found: dict[Axes, int] = {}
    for number, shape in enumerate(shapes):
        is_image = len(shape) >= 4 and shape[-1] == shape[-2]
        if is_image:
            found[frozenset({(number, len(shape) - 1), (number, len(shape) - 2)})] = shape[-1]
        for axis in range(max(0, min(1, len(shape) - 1)), len(shape) - (2 if is_image else 0)):
            found[frozenset({(number, axis)})] = shape[axis]
    inner = {(n, axis): size for n, shape in enumerate(shapes) for axis, size in enumerate(shape) if axis}
    batch = {(n, 0): shape[0] for n, shape in enumerate(shapes) if shape}
    for places in (inner, batch):
        for size in dict.fromkeys(places.values()):
            found.setdefault(frozenset(place for place, other in places.items() if other == size), size)
    return [(axes, size) for axes, size in found.items() if size > 0]


def _resized(inputs: Inputs, axes: Axes, size: int) -> Inputs | None:
    """The inputs with another size of these axes; None where they are too large or the same."""
    number = itertools.count()
    too_large = False

    def change(x: Tensor) -> Tensor | None:
        nonlocal too_large
        this = next(number)
        shape = tuple(size if (this, axis) in axes else old for axis, old in enumerate(x.shape))
        too_large |= math.prod(shape) > LARGEST
        return None if shape == tuple(x.shape) or math.prod(shape) > LARGEST else refilled(x, shape)

    made = changed(inputs, change)
    return None if too_large or made.text == inputs.text else made


def declared_lengths(model: nn.Module) -> list[int]:
    """Sequence lengths that a model declares."""
    found = []
    for module in itertools.islice(model.modules(), 8):
        own = vars(module)  # not getattr: an inert stand-in raises
        for owner in filter(None, (own, getattr(own.get("config", own.get("configs")), "__dict__", None))):
            found += [v for n, v in owner.items() if _LENGTH.fullmatch(n) and type(v) is int and v < 4096]
    return list(dict.fromkeys(found))


Answer = Mismatch | None


class Search:
    """The search for sizes that fit: it yields inputs to measure with, and solutions."""

    def __init__(self, model: nn.Module, budget: Budget) -> None:
        self._lengths = declared_lengths(model)
        self._starts: deque[tuple[Inputs, Mismatch, int]] = deque()
        self._places: set[tuple[str, int, str]] = set()
        self._solved: set[tuple[str, int, str]] = set()
        self._known: dict[str, Answer] = {}
        self._budget, self._left = budget, budget.each

    def note(self, inputs: Inputs, answer: Answer) -> None:
        """Record the mismatch of inputs."""
        self._known[inputs.text] = answer

    def start(self, inputs: Inputs, sizes: Mismatch, depth: int = 0) -> None:
        """Add inputs to start from, if they are the first to fail at their place."""
        if sizes.place not in self._places and depth < DEPTH:
            self._places.add(sizes.place)
            self._starts.append((inputs, sizes, depth))

    def run(self) -> Generator[Inputs, Answer, None]:
        """Yields inputs to try; each is answered with its mismatch."""
        while self._starts and self._may_try():
            yield from self._around(*self._starts.popleft())

    def _around(self, inputs: Inputs, sizes: Mismatch, depth: int) -> Generator[Inputs, Answer, None]:
        for axes, size in _axes(inputs):
            yield from self._along(inputs, axes, size, sizes, depth)

    def _may_try(self) -> bool:
        return self._left > 0 and self._budget.total > 0

    def _try(self, inputs: Inputs, axes: Axes, size: int) -> Generator[Inputs, Answer, tuple[Inputs, Answer] | None]:
        made = _resized(inputs, axes, size)
        if made is None:
            return None
        if made.text not in self._known:
            if not self._may_try():
                return None
            self._left -= 1
            self._budget.total -= 1
            self._known[made.text] = yield made
        return made, self._known[made.text]

    def _along(
        self, inputs: Inputs, axes: Axes, size: int, sizes: Mismatch, depth: int
    ) -> Generator[Inputs, Answer, None]:
        """Measure along these axes, and try the sizes for which the mismatch is solved."""
        declared = [length for length in self._lengths if length > size and all(axis for _, axis in axes)]
        for other in (*declared[:1], 2 * size, 4 * size):
            answer = yield from self._try(inputs, axes, other)
            if answer is None or answer[1] is None:
                continue
            if answer[1].place == sizes.place:
                break
            self.start(*answer, depth + 1)  # type: ignore[arg-type]
        else:
            return
        measured, is_area = answer[1], len({number for number, _ in axes}) < len(axes)
        for best in _solutions(sizes, measured, size, other, is_area):
            # A stride rounds, so the solution may be close only: solve again from there.
            for _ in range(3):
                found = yield from self._try(inputs, axes, best)
                if found is None or found[1] is None:
                    break
                if found[1].place != sizes.place:
                    if found[1].place not in self._solved and depth + 1 < DEPTH:
                        self._solved.add(found[1].place)
                        yield from self._around(found[0], found[1], depth + 1)
                    break
                nearer = next(_solutions(sizes, found[1], size, best, is_area), best)
                if nearer == best:
                    break
                best = nearer


def _solutions(one: Mismatch, two: Mismatch, size: int, other: int, is_area: bool) -> Iterator[int]:
    """Sizes of an axis for which a pair of numbers becomes equal, by the mismatches at its sizes `size` and `other`;
    with `is_area`, quadratic growth is tried before linear growth."""
    seen = {size, other}
    if len(one.numbers) != len(two.numbers):
        return
    for i, j in one.pairs:
        before, after = _differences((one.numbers[i], one.numbers[j]), (two.numbers[i], two.numbers[j]))
        if before == 0 or after == before:
            continue
        linear = size - before * (other - size) / (after - before)
        square = size**2 - before * (other**2 - size**2) / (after - before)
        exacts = (linear, math.sqrt(square) if square > 0 else 0.0)
        for exact in reversed(exacts) if is_area else exacts:
            found = round(exact)
            if found > 0 and found not in seen and found < 1 << 16:
                seen.add(found)
                yield found


def _differences(one: tuple[int, int], two: tuple[int, int]) -> tuple[int, int]:
    """Differences of a pair before and after; an error may list it in either order."""
    if one[0] != two[0] and one[1] != two[1] and set(one) & set(two):
        two = two[::-1]
    return one[0] - one[1], two[0] - two[1]
