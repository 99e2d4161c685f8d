"""What a report shows besides the layout: the model, its inputs, its graph, a proof.

In: plain values. Out: `Facts`. Imports no torch, so a saved layout can be shown anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Proof:
    """The result of a proof by gradients for the attentions of a layout.

    Attributes:
        where: The model that it ran on: "a copy with random weights".
        open: Names of the attentions that it could not decide, with reasons; all others are proved.
    """

    where: str
    open: Mapping[str, str] = field(default_factory=dict)

    def proved(self, names: Sequence[str]) -> int:
        """How many of some attentions are proved."""
        return sum(name not in self.open for name in names)

    def text(self, names: Sequence[str]) -> str:
        """The result for some attentions: "✓", "-", or the number of each."""
        right = self.proved(names)
        wrong = len(names) - right
        return f"✓ {right}  - {wrong}" if wrong and right else "-" if wrong else "✓"

    def summary(self, names: Sequence[str]) -> str:
        """How many attentions are proved, and on which model."""
        return f"{self.proved(names)} of {len(names)} proved by gradients on {self.where}"


@dataclass(frozen=True)
class Facts:
    """How a layout was found.

    Attributes:
        title: The model.
        how: How it was built, and the inputs of its recorded forward.
        graph: Its graph: "567 nodes, recorded with fake weights".
        seconds: Time from the target to the layout.
        shapes: Shape of every parameter by name.
        proof: The result of a proof, if one was run.
        notes: More lines about how the model was built: pairs of a heading and a sentence.
    """

    title: str
    how: str = ""
    graph: str = ""
    seconds: float = 0.0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    proof: Proof | None = None
    notes: Sequence[tuple[str, str]] = ()

    @property
    def parameters(self) -> int:
        """Total number of elements of all parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def count_text(n: int) -> str:
    """A count as text, in units of k, M or G if it is large: "405.9 G"."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)
