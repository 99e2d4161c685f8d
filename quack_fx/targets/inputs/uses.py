"""What was read about one argument of a forward: which layers take it, its dimensions, its parts.

In: what `reading.py` tells while it reads a forward. Out: one `Use` for each parameter, and one inside it for each part
of a dict, a namespace or a tuple. The reader's own values stand here too: data from the caller (`Data`), what was
computed from their shapes (`Shape`, `Dim`, `Rank`), what is known already (`Known`), and all else (`UNKNOWN`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

View = tuple[Any, ...]
"""One step between the caller's data and where they are used: ("swap", 1, 2), ("permute", (0, 2, 1)), ("new", 1) for a
new axis, ("drop", 0, 3) for index 3 of axis 0, ("einops", pattern, lengths), ("pad",) for other sizes of the same
axes, ("reshape",) for anything else that changes the number of dimensions."""


@dataclass(frozen=True)
class Taken:
    """A layer, or a matrix that data are multiplied with or that they index, and the steps before."""

    by: Any
    views: tuple[View, ...]
    how: str = ""
    """Name of the layer's parameter; "rows" where data index the rows of a matrix, "matrix" where they meet its rows in
    a product, "columns" where they meet its columns (as a Linear's weight has them)."""


@dataclass(eq=False)
class Use:
    """What a forward does with one piece of data.

    Attributes:
        taken: The layers that it is given to, in order.
        rank: Number of its dimensions, where the forward unpacks its shape or says so.
        sizes: What is required of its sizes: (axis, "==", "%" or "<=", number).
        parts: Its parts: of a dict by ("key", name), of a namespace by ("attr", name), of a tuple by ("at", number).
        optional: Parts that are asked for with `get`.
        marks: "number" for one used as a Python number, "numpy" for one that a tensor is made of, "checked" where it is
            compared with None, "needed" where it must not be, "bool", "number-mask" and "long" for operations that need
            such elements, "index" where something is indexed with it, "ids" for the target of a cross-entropy,
            "iterated", "tensor" where a method of tensors is called, "broadcast" where it masks attention scores as it
            is.
        steps: Steps that lead from it to anything.
        name: What the forward calls it, where it is a part without a name.
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
        """A part of this piece of data; what is asked for a part is a group of parts."""
        return self.parts.setdefault((kind, name), Use())


@dataclass(frozen=True)
class Known:
    """A Python object that exists already."""

    value: Any


@dataclass(frozen=True)
class Data:
    """What the caller gives, after some steps that leave its numbers in place."""

    use: Use
    views: tuple[View, ...] = ()

    def then(self, *view: Any) -> Data:
        """The same data, one step further."""
        self.use.steps.add((*self.views, view))
        return Data(self.use, (*self.views, view))

    def known_rank(self, rank: int) -> None:
        """Note the number of dimensions that these data have here."""
        for view in reversed(self.views):
            if view[0] in ("reshape", "einops"):
                return
            rank += {"new": -1, "drop": 1}.get(view[0], 0)
        if self.use.rank is None and rank >= 0:
            self.use.rank = rank

    def known_size(self, axis: int, relation: str, number: int) -> None:
        """Note what is required of a size of these data, if no step before has changed the axes."""
        if not self.views and number > 0:
            self.use.sizes.append((axis, relation, number))

    def taken_by(self, layer: Any, how: str = "") -> None:
        """Note that a layer takes these data."""
        known = any(t.by is layer and t.views == self.views for t in self.use.taken)
        if len(self.use.taken) < 16 and not known:
            self.use.taken.append(Taken(layer, self.views, how))


@dataclass(frozen=True)
class Shape:
    """The shape of data, or a slice of it that begins at `start`."""

    data: Data
    start: int = 0
    whole: bool = True


@dataclass(frozen=True)
class Dim:
    """One size of data; with `modulo` what is left when it is divided."""

    data: Data
    axis: int
    modulo: int | None = None


@dataclass(frozen=True)
class Rank:
    """The number of dimensions of data."""

    data: Data


@dataclass(frozen=True)
class Items:
    """A tuple or list that the forward itself writes down."""

    values: tuple[Value, ...]


@dataclass(frozen=True)
class Unknown:
    """Anything else."""


UNKNOWN = Unknown()
Value = Known | Data | Shape | Dim | Rank | Items | Unknown
