"""The dtype and the axes of a tensor as the name or the annotation of an argument states them.

In: a name and an annotation. Out: a `Hint`. Python checks neither, so what fits the hint is only tried first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from quack_fx.targets.inputs.values import Array, Size

Numbers = Literal["", "int", "float", "bool"]

_NUMBERS: dict[str, Numbers] = {"long": "int", "int": "int", "short": "int", "uint": "int", "bool": "bool"}
_TENSOR = re.compile(r"\b(Long|Int|Short|Bool|Float|Half|BFloat16|Double)Tensor\b")
_WITH_AXES = re.compile(r"\b(U?Int|Bool|Float|BFloat|Shaped|Num|Complex)\d*\[[^\[\],]+, *['\"]([^'\"]*)['\"]\]")
"""As jaxtyping writes them: `Float[Tensor, "batch tokens width"]`."""

_AXES = re.compile(r"(.+?)_(B[BCDFHKLMNPQSTVW0-9]{0,5}|b[cdfhlnstvw]{2,4})")
"""A name that ends in one letter for each axis, the batch first: tokens_BL, x_bld. Words have vowels."""


@dataclass(frozen=True)
class Hint:
    """What a name and an annotation state.

    Attributes:
        name: The name without the letters of its axes.
        numbers: Kind of dtype; "" where it is not stated.
        axes: A letter or word for each axis; empty where they are not stated.
    """

    name: str
    numbers: Numbers = ""
    axes: tuple[str, ...] = ()

    def fits(self, array: Array) -> bool:
        """Whether an array has such a dtype."""
        if array.kind in ("zeros", "ones"):
            return self.numbers in ("", "float" if array.dtype.is_floating_point else "int")
        kinds = {"ids": "int", "index": "int", "count": "int", "bool": "bool", "half": "bool", "padding": "bool"}
        return self.numbers in ("", kinds.get(array.kind, "float"))

    def first(self, found: list[Array], rank: int | None) -> list[Array]:
        """The arrays, those that fit first; where none fits, with a new one of this rank."""
        if not any(map(self.fits, found)) and self.numbers in ("int", "bool"):
            shape: tuple[Size, ...] = ("B", "T")
            shape = shape[:rank] if rank in (None, 0, 1, 2) else found[0].shape if found else shape
            found = [Array("ids" if self.numbers == "int" else "bool", shape), *found]
        found = sorted(found, key=lambda a: not self.fits(a))
        return [self._of_batch(array) for array in found]

    def _of_batch(self, array: Array) -> Array:
        only: tuple[Size, ...] = ("T",)
        return replace(array, shape=("B",)) if self.axes == ("B",) and array.shape == only else array


def hint_of(name: str, annotation: Any) -> Hint:
    """The hint in the name and the annotation of an argument."""
    numbers: Numbers = ""
    axes: tuple[str, ...] = ()
    if (ends := _AXES.fullmatch(name)) is not None:
        name, axes = ends[1], tuple(ends[2])
    text = annotation if isinstance(annotation, str) else f"{getattr(annotation, '__name__', '')} {annotation}"
    if (tensor := _TENSOR.search(text)) is not None:
        numbers = _NUMBERS.get(tensor[1].lower(), "float")
    elif (written := _WITH_AXES.search(text)) is not None:
        if written[1] not in ("Shaped", "Num"):
            numbers = _NUMBERS.get(written[1].lower(), "float")
        words = written[2].split()
        if words and not any(re.search(r"\.\.\.|^\*", word) for word in words):
            axes = tuple(words)
    return Hint(name, numbers, axes)
