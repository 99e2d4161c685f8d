"""What a forward does with one argument: the layers that take it, its rank and sizes, its parts.

`Use` is the record for a parameter; it has one inside for each part of a dict, a namespace or a tuple. `Value` is what
an expression may be while a forward is read: an argument (`Data`), its sizes (`Shape`, `Dim`, `Rank`), an existing
object (`Known`), a tuple (`Items`), or anything else (`UNKNOWN`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

View = tuple[Any, ...]
"""A view op on an argument before it is used: ("swap", 1, 2), ("permute", (0, 2, 1)), ("new", 1) for a new axis,
("drop", 0, 3) for index 3 of axis 0, ("einops", pattern, lengths), ("pad",) for other sizes of the same axes,
("reshape",) for any other change of rank."""


@dataclass(frozen=True)
class Taken:
    """A layer that takes an argument, or a matrix that it multiplies or indexes, and the view ops before that."""

    by: Any
    views: tuple[View, ...]
    how: str = ""
    """Name of the layer's parameter. For a matrix: "rows" if the argument is an index of its rows, "matrix" for
    `x @ matrix`, "columns" for `x @ matrix.T`."""


@dataclass(eq=False)
class Use:
    """What a forward does with an argument, or with a part of one.

    Attributes:
        taken: The layers that take it, in order.
        rank: Its rank, where the forward unpacks or checks its shape.
        sizes: Requirements on its sizes: (axis, "==", "%" or "<=", number).
        parts: Uses of its parts: ("key", name) of a dict, ("attr", name) of a namespace, ("at", index) of a tuple.
        optional: Parts that are read with `get`.
        marks: "number" if it is used as a Python number, "numpy" if a tensor is made of it, "checked" if it is compared
            with None, "needed" if it must not be None, "bool", "number-mask" and "long" for operations on such
            elements, "index" if it indexes something, "ids" for the target of a cross-entropy, "iterated" if it is
            looped over, "tensor" if a method of tensors is called, "broadcast" if it masks logits without a view op.
        steps: Sequences of view ops on it.
        name: The name that the forward gives it, where it is an element of a tuple.
    """

    taken: list[Taken] = field(default_factory=list)
    rank: int | None = None
    sizes: list[tuple[int, str, int]] = field(default_factory=list)
    parts: dict[tuple[str, Any], Use] = field(default_factory=dict)
    optional: set[tuple[str, Any]] = field(default_factory=set)
    marks: set[str] = field(default_factory=set)
    steps: set[tuple[View, ...]] = field(default_factory=set)
    name: str = ""

    def part(self, kind: str, name: Any) -> Use:
        """The use of a part; recorded from the first time it is read."""
        return self.parts.setdefault((kind, name), Use())


@dataclass(frozen=True)
class Known:
    """An existing Python object."""

    value: Any


@dataclass(frozen=True)
class Data:
    """An argument of the forward, or a part of one, after some view ops."""

    use: Use
    views: tuple[View, ...] = ()

    def then(self, *view: Any) -> Data:
        """The argument after one more view op."""
        self.use.steps.add((*self.views, view))
        return Data(self.use, (*self.views, view))

    def known_rank(self, rank: int) -> None:
        """Record the rank that the argument has after these view ops."""
        for view in reversed(self.views):
            if view[0] in ("reshape", "einops"):
                return
            rank += {"new": -1, "drop": 1}.get(view[0], 0)
        if self.use.rank is None and rank >= 0:
            self.use.rank = rank

    def known_size(self, axis: int, relation: str, number: int) -> None:
        """Record a requirement on a size, unless view ops have changed the axes."""
        if not self.views and number > 0:
            self.use.sizes.append((axis, relation, number))

    def taken_by(self, layer: Any, how: str = "") -> None:
        """Record that a layer takes the argument."""
        known = any(t.by is layer and t.views == self.views for t in self.use.taken)
        if len(self.use.taken) < 16 and not known:
            self.use.taken.append(Taken(layer, self.views, how))


@dataclass(frozen=True)
class Shape:
    """The shape of an argument, or a slice of the shape from `start`."""

    data: Data
    start: int = 0
    whole: bool = True


@dataclass(frozen=True)
class Dim:
    """One size of an argument; with `modulo` its remainder."""

    data: Data
    axis: int
    modulo: int | None = None


@dataclass(frozen=True)
class Rank:
    """The rank of an argument."""

    data: Data


@dataclass(frozen=True)
class Items:
    """A tuple or list that the forward makes."""

    values: tuple[Value, ...]


@dataclass(frozen=True)
class Unknown:
    """Any other value."""


UNKNOWN = Unknown()
Value = Known | Data | Shape | Dim | Rank | Items | Unknown
