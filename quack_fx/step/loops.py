"""USER: the compiled loops that change weights and state.

In: jobs, each a weight or a piece of one with its gradient and state. Out: nothing; weights and state are written, and
the squared norms that the pieces of heads have now.

What has no heads is one compiled call. Pieces with heads go in calls of a few of equal shape, so that equal layers
share a compiled call; their coefficients and scales enter as tensors. A few, because Inductor fuses nothing that is far
apart in a graph, and the writes of all state stand at its end: in a longer graph, some moments of heads would be read
and written by a loop of their own. But no fewer than that: a call costs a fraction of a millisecond.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from quack_fx.errors import first_line
from quack_fx.step.loss import own_code
from quack_fx.step.pieces import Piece
from quack_fx.step.rules import Flags, Gate, Tensors, UpdateRule

_APART = 64
"""Places in a graph from which on Inductor does not fuse two nodes."""

_MOST = 12
"""Pieces in one call, at most: what is compiled should not grow with the number of layers."""


class Kind(NamedTuple):
    """What a compiled call for pieces with heads depends on; equal for equal pieces, wherever they lie.

    Attributes:
        piece: The piece, as if it lay at the start.
        shape: Shape of the weight's view.
        stride: Its strides.
        dtype: Its type.
    """

    piece: Piece
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Job:
    """A weight, or a piece of one, and what its update reads and writes.

    Attributes:
        weight: What is updated.
        grad: Its gradient.
        slots: Its state, as the rule has it.
        rounded: Where to write the new weight in the parameter's own type, where it is a master; else None.
        row: Which row of coefficients is its own.
        flags: Options of its group.
        piece: Which piece of a weight with heads it is; None where it has none.
        squares: Where to write the squared norms of its spans; None where it has none.
        kind: What its compiled call depends on; None where it has no heads.
    """

    weight: Tensor
    grad: Tensor
    slots: tuple[Tensor, ...]
    rounded: Tensor | None
    row: int
    flags: Flags
    piece: Piece | None
    squares: Tensor | None
    kind: Kind | None


_Work = tuple[Tensor, Tensor, tuple[Tensor, ...], Tensor | None, Tensor | None, Flags]
"""What a loop is given of a job: weight, gradient, state, where to write it rounded and the squares; options."""


class Loops:
    """The compiled calls of one optimizer.

    Arguments:
        rule: Its arithmetic.
        compile: Wraps each function, `torch.compile` with the user's options or nothing.
    """

    def __init__(self, rule: UpdateRule, compile: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._rule, self._compile = rule, compile
        self._made: dict[Any, Callable[..., None]] = {}
        self._indices: dict[Any, Tensor] = {}

    def run(self, jobs: Sequence[Job], coefficients: Tensor, gate: Gate, scales: Tensor | None) -> None:
        """Do all jobs.

        Arguments:
            jobs: The jobs.
            coefficients: Coefficients of the rule for all parameters, [parameters, coefficients].
            gate: What was found out about the gradients and is still to be done.
            scales: Scale of every span, [n_spans]; None without QuacK.
        """
        both = coefficients, coefficients.float()  # rounded in the loop, they would cost a fortieth of its time
        rest = [job for job in jobs if job.kind is None]
        if rest:
            self._call(None, rest, both, gate, None, None)
        if scales is None:
            return
        for (kind, flags), alike in _alike(jobs).items():
            for some in _few(alike, _most(len(alike[0].slots), gate, alike[0].rounded is not None)):
                numbers = [job.piece.numbers() for job in some if job.piece is not None]
                own = self._taken(scales, [part.start for part in numbers], len(numbers[0]))
                self._call((kind, flags, len(some)), some, both, gate, kind.piece, own)

    def _call(
        self,
        key: Any,
        jobs: Sequence[Job],
        coefficients: tuple[Tensor, Tensor],
        gate: Gate,
        piece: Piece | None,
        scales: Tensor | None,
    ) -> None:
        """Run the loop of some jobs, with coefficients in double or single precision as they need them.

        Each key has a loop of its own, so that none counts as another's recompilation.
        """
        works = [(job.weight, job.grad, job.slots, job.rounded, job.squares, job.flags) for job in jobs]
        exact = any(job.weight.dtype == torch.float64 for job in jobs)
        given = works, self._taken(coefficients[0 if exact else 1], [job.row for job in jobs]), gate, piece, scales
        if key not in self._made:
            self._made[key] = self._compile(_make_loop(self._rule, sums=True))
        try:
            self._made[key](*given)
        except BackendCompilerFailed as error:
            # Nothing has run yet. Inductor on CPUs has failed on sums of squares of some shapes.
            self._made[key] = _with_sums_after(self._compile(_make_loop(self._rule, sums=False)))
            reason = first_line(error.inner_exception)
            warnings.warn(f"norms cost a pass of their own: Inductor fails on this update ({reason})", stacklevel=2)
            self._made[key](*given)

    def _taken(self, table: Tensor, starts: Sequence[int], length: int | None = None) -> Tensor:
        """Rows of a table, or with a length so many of its numbers from each start on: [starts, ...].

        A view where they are evenly spaced, as they are for equal layers; else a copy, by indices that are sent to the
        device once.
        """
        step = starts[1] - starts[0] if len(starts) > 1 else 1
        if step > 0 and all(b - a == step for a, b in pairwise(starts)):
            if length is None:
                return table[starts[0] : starts[-1] + 1 : step]
            return table.as_strided((len(starts), length), (step, 1), table.storage_offset() + starts[0])
        key = table.device, length, tuple(starts)
        if key not in self._indices:
            rows = starts if length is None else [list(range(start, start + length)) for start in starts]
            self._indices[key] = torch.tensor(rows, dtype=torch.int64).to(table.device, non_blocking=True)
        return table[self._indices[key]]


def _alike(jobs: Sequence[Job]) -> dict[tuple[Kind, Flags], list[Job]]:
    """Jobs with heads, equal ones together."""
    found: dict[tuple[Kind, Flags], list[Job]] = {}
    for job in jobs:
        if job.kind is not None:
            found.setdefault((job.kind, job.flags), []).append(job)
    return found


def _most(slots: int, gate: Gate, rounded: bool = False) -> int:
    """How many jobs go in a call, so that the writes of the first are near enough to what they write."""
    return min(_MOST, _APART // (1 + 2 * slots + (gate.finite is not None) + rounded))


def _few(jobs: Sequence[Job], most: int) -> list[Sequence[Job]]:
    """Jobs a few at a time, as evenly as can be, so that fewer lengths are compiled."""
    calls = -(-len(jobs) // most)
    edges = [len(jobs) * i // calls for i in range(calls + 1)]
    return [jobs[start:stop] for start, stop in pairwise(edges)]


def _make_loop(rule: UpdateRule, sums: bool) -> Callable[..., None]:
    """The function, to be compiled, that does some jobs and, with `sums`, measures what it wrote."""

    def loop(works: list[_Work], coefficients: Tensor, gate: Gate, piece: Piece | None, scales: Tensor | None) -> None:
        for i, (weight, grad, slots, rounded, squares, flags) in enumerate(works):
            scale = None if piece is None or scales is None else piece.along(scales[i], weight)
            written, new = _changed(rule, weight, grad, slots, flags, coefficients[i], gate, scale)
            if sums and piece is not None and squares is not None:
                squares.copy_(piece.squares(written.to(squares.dtype)))
            weight.copy_(written)
            if rounded is not None:
                rounded.copy_(written.to(rounded.dtype))
            for slot, value in zip(slots, new, strict=True):
                slot.copy_(value)

    return own_code(loop)


def _changed(
    rule: UpdateRule,
    weight: Tensor,
    grad: Tensor,
    slots: Tensors,
    flags: Flags,
    coefficients: Tensor,
    gate: Gate,
    scale: Tensor | None,
) -> tuple[Tensor, Tensors]:
    """The new weight and the new state, each in the type of the old: `weight - scale * change`, if the gate is open."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w, g = weight.to(wide), grad.to(wide)
    g = g if gate.clip is None else g * gate.clip.to(wide)
    scalars = tuple(c.to(wide) for c in coefficients.unbind())
    change, new = rule.change(w, g, tuple(s.to(wide) for s in slots), scalars, flags)
    change = change if scale is None else change * scale.to(wide)
    written = _unless(gate.finite, weight, (w - change).to(weight.dtype))
    return written, tuple(_unless(gate.finite, s, value.to(s.dtype)) for s, value in zip(slots, new, strict=True))


def _with_sums_after(loop: Callable[..., None]) -> Callable[..., None]:
    """A loop that does not measure, and a pass that does."""

    def both(works: list[_Work], coefficients: Tensor, gate: Gate, piece: Piece, scales: Tensor) -> None:
        loop(works, coefficients, gate, piece, scales)
        for weight, *_, squares, _ in works:
            if squares is not None:
                squares.copy_(piece.squares(weight.to(squares.dtype)))

    return both


def _unless(finite: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """The new value, or the old one where the gradients are not finite."""
    return new if finite is None else torch.where(finite, new, old)
