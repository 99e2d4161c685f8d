"""USER: the compiled loops that change weights and state.

In: jobs, each a view of a weight and whose gradient it goes with. Out: `Call`s; each writes some weights and their
state, and the squared norms that the pieces of heads have now.

Pieces with heads go in compiled calls of a few of equal shape, so that equal layers share one; their coefficients and
scales enter as tensors. What has no heads goes with the first of them. A few, because Inductor fuses nothing that is
far apart in a graph, and the writes of all state stand at its end: in a longer graph, some moments of heads would be
read and written by a loop of their own. But no fewer than that: a call costs a fraction of a millisecond.

The calls are made once, and again where weights or state have moved. torch.compile would look at every tensor before
every step, to tell whether what it compiled fits; here each kind of tensors has a function of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from quack_fx.errors import first_line
from quack_fx.step.compiling import Compiler, own_code
from quack_fx.step.pieces import Piece
from quack_fx.step.rules import Flags, Gate, Tensors, UpdateRule
from quack_fx.step.views import Kind, View

_APART = 64
"""Places in a graph from which on Inductor does not fuse two nodes."""

_MOST = 12
"""Pieces in one call, at most: what is compiled should not grow with the number of layers."""


_TOGETHER = torch.__version__ >= "2.13"
"""Whether what has no heads is written by the first call of heads; older Inductors have got that wrong."""


class Job(NamedTuple):
    """What is to be done to a view.

    Attributes:
        view: The view.
        row: Which gradient and which row of coefficients is its own.
        flags: Options of its group.
    """

    view: View
    row: int
    flags: Flags


_Work = tuple[Tensor, tuple[Tensor, ...], Tensor | None, Piece | None, Flags]
"""What a loop is given of a job: views of weight and state, where to write the weight rounded; which piece of the
gradient, that is given whole; options."""


class Rows:
    """Some stretches of equal length of a table that stays where it is.

    Arguments:
        table: The table.
        starts: Numbers of its entries with which they begin.
        length: Their length.

    Attributes:
        own: The stretches, [stretches, length]; a view where they are evenly spaced, as they are for equal layers, else
            a copy to read into and to write from. It stays where it is, too.
    """

    def __init__(self, table: Tensor, starts: Sequence[int], length: int) -> None:
        self._flat = table.view(-1)
        step = starts[1] - starts[0] if len(starts) > 1 else length
        self._indices: Tensor | None = None
        if step > 0 and all(b - a == step for a, b in pairwise(starts)):
            self.own = self._flat.as_strided((len(starts), length), (step, 1), starts[0])
        else:
            indices = torch.tensor([list(range(start, start + length)) for start in starts], dtype=torch.int64)
            self._indices = indices.to(table.device, non_blocking=True)
            self.own = table.new_empty(indices.shape)

    def read(self) -> Tensor:
        """The stretches as the table has them."""
        return self.own if self._indices is None else self.own.copy_(self._flat[self._indices])

    def write(self) -> None:
        """Take over into the table what the stretches have become."""
        if self._indices is not None:
            self._flat[self._indices] = self.own


@dataclass(frozen=True)
class Tables:
    """What the calls of an update read and write besides weights and state; always in the same place.

    Attributes:
        coefficients: Coefficients of the rule for all parameters, [parameters, coefficients]; in the precision that
            each call computes in.
        scales: Scale of every span, [n_spans]; None without QuacK.
        squares: Where to write the squared norm of every span, [n_spans]; None likewise.
    """

    coefficients: Mapping[torch.dtype, Tensor]
    scales: Tensor | None
    squares: Tensor | None


@dataclass(frozen=True)
class Call:
    """A compiled call and what it is given each time.

    Attributes:
        loop: What is compiled.
        works: The works of its jobs.
        grads: Which gradient each reads.
        coefficients: Their coefficients.
        scales: Scales of their spans; None where they have no heads.
        squares: Where to write the squared norms of their spans; None likewise.
    """

    loop: Callable[..., None]
    works: list[_Work]
    grads: Sequence[int]
    coefficients: Rows
    scales: Rows | None
    squares: Rows | None

    def __call__(self, grads: Sequence[Tensor], gate: Gate) -> None:
        """Do its jobs.

        Arguments:
            grads: Gradients of all parameters.
            gate: What was found out about them and is still to be done.
        """
        own = [grads[row] for row in self.grads]
        scales = None if self.scales is None else self.scales.read()
        squares = None if self.squares is None else self.squares.own
        self.loop(self.works, own, self.coefficients.read(), gate, scales, squares)
        if self.squares is not None:
            self.squares.write()


class Loops:
    """The compiled loops of one optimizer.

    Arguments:
        rule: Its arithmetic.
        compiler: How to compile.
    """

    def __init__(self, rule: UpdateRule, compiler: Compiler) -> None:
        self._rule, self._compiler = rule, compiler
        self._made: dict[Any, Callable[..., None]] = {}

    def calls(self, jobs: Sequence[Job], tables: Tables, gate: Gate) -> list[Call]:
        """The calls that do some jobs.

        Arguments:
            jobs: The jobs.
            tables: What they read and write besides.
            gate: Tells what of it there will be.
        """
        rest = [job for job in jobs if job.view.kind is None]
        groups = [
            some
            for alike in _alike(jobs).values()
            for some in _few(alike, _most(len(alike[0].view.slots), gate, alike[0].view.rounded is not None))
        ]
        if groups and _TOGETHER:
            first, *others = groups
            return [self._call([*rest, *first], tables, gate), *(self._call(some, tables, gate) for some in others)]
        return [self._call(some, tables, gate) for some in ([rest] if rest else []) + groups]

    def _call(self, jobs: Sequence[Job], tables: Tables, gate: Gate) -> Call:
        views, rows = [job.view for job in jobs], [job.row for job in jobs]
        pieces = [None if view.piece is None else replace(view.piece, first=None) for view in views]
        works: list[_Work] = [
            (view.weight, view.slots, view.rounded, piece, job.flags)
            for view, piece, job in zip(views, pieces, jobs, strict=True)
        ]
        numbers = [view.piece.numbers() for view in views if view.kind is not None and view.piece is not None]
        firsts = [spans.start for spans in numbers]
        table = tables.coefficients[wide([view.weight for view in views])]
        coefficients = Rows(table, [row * table.shape[1] for row in rows], table.shape[1])
        scales, squares = (
            None if not numbers or whole is None else Rows(whole, firsts, len(numbers[0]))
            for whole in (tables.scales, tables.squares)
        )
        written = [tensor for weight, slots, rounded, *_ in works for tensor in (weight, *slots, rounded)]
        steady = [coefficients.own, *(None if rows is None else rows.own for rows in (scales, squares))]
        self._compiler.stays([*written, *steady])
        given = [*written, *steady]
        aligned = [tensor is None or tensor.data_ptr() % 16 == 0 for tensor in written]
        options = [(view.form, piece, job.flags) for view, piece, job in zip(views, pieces, jobs, strict=True)]
        key = gate.clip is None, gate.finite is None, *options, *aligned, *_looks(given)
        if key not in self._made:
            self._made[key] = _Loop(self._rule, self._compiler, jobs[0].view.weight.device)
        return Call(self._made[key], works, rows, coefficients, scales, squares)


class _Loop:
    """A compiled function, or where the compiler fails on it another that does the same."""

    def __init__(self, rule: UpdateRule, compiler: Compiler, device: torch.device) -> None:
        self._rule, self._compiler, self._device = rule, compiler, device
        self._run: Callable[..., None] = compiler(make_loop(rule), sizes="same", loops_on=device)

    def __call__(self, *given: Any) -> None:
        try:
            self._run(*given)
        except BackendCompilerFailed as error:
            # Nothing has run yet. Inductor on CPUs has failed on sums of squares of some shapes.
            plain = make_loop(self._rule, sums=False)
            self._run = _with_sums_after(self._compiler(plain, sizes="same", loops_on=self._device))
            reason = first_line(error.inner_exception)
            warnings.warn(f"norms cost a pass of their own: Inductor fails on this update ({reason})", stacklevel=2)
            self._run(*given)


def _alike(jobs: Sequence[Job]) -> dict[tuple[Kind, Flags], list[Job]]:
    """Jobs with heads, equal ones together."""
    found: dict[tuple[Kind, Flags], list[Job]] = {}
    for job in jobs:
        if job.view.kind is not None:
            found.setdefault((job.view.kind, job.flags), []).append(job)
    return found


def _most(slots: int, gate: Gate, rounded: bool = False) -> int:
    """How many jobs go in a call, so that the writes of the first are near enough to what they write."""
    return min(_MOST, _APART // (1 + 2 * slots + (gate.finite is not None) + rounded))


def _few(jobs: Sequence[Job], most: int) -> list[Sequence[Job]]:
    """Jobs a few at a time, as evenly as can be, so that fewer lengths are compiled."""
    calls = -(-len(jobs) // most)
    edges = [len(jobs) * i // calls for i in range(calls + 1)]
    return [jobs[start:stop] for start, stop in pairwise(edges)]


def _looks(tensors: Sequence[Tensor | None]) -> list[Any]:
    """What compiled code depends on of tensors: their types and forms, and which overlap."""
    looks: list[Any] = []
    stretches: dict[int, list[tuple[int, int, int]]] = {}  # of each storage: first number, last number, which tensor
    for i, t in enumerate(tensors):
        if t is None:
            looks.append(None)
            continue
        looks.append((t.shape, t.stride(), t.dtype, t.device))
        first = int(t.storage_offset())
        last = first + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        stretches.setdefault(t.untyped_storage().data_ptr(), []).append((first, int(last), i))
    for own in stretches.values():
        own.sort()
        if any(after[0] <= before[1] for before, after in pairwise(own)):
            looks.append(tuple((first - own[0][0], i) for first, _, i in own))
    return looks


def make_loop(rule: UpdateRule, sums: bool = True) -> Callable[..., None]:
    """The function, to be compiled, that does some jobs and, with `sums`, keeps the squared norms of what it wrote.

    Weight, gradient and state are read once and written once: the norms cost no pass of their own.
    """

    def loop(
        works: list[_Work],
        grads: list[Tensor],
        coefficients: Tensor,
        gate: Gate,
        scales: Tensor | None,
        squares: Tensor | None,
    ) -> None:
        found, rest = [], len(works) - (0 if scales is None else scales.shape[0])
        for weight, slots, rounded, *_ in [*works[rest:], *works[:rest]]:
            meet((weight, *slots, rounded))
        for i, (weight, slots, rounded, piece, flags) in enumerate(works):
            grad = grads[i] if piece is None else piece.of(grads[i])
            scale = None
            if piece is not None and scales is not None and i >= rest:
                scale = piece.along(scales[i - rest], weight)
            written = change(rule, weight, grad, slots, rounded, flags, coefficients[i], gate, scale)
            if sums and piece is not None and squares is not None and i >= rest:
                found.append(piece.squares(written.to(squares.dtype)))
        if found and squares is not None:
            squares.copy_(torch.cat(found).view_as(squares))

    return own_code(loop)


def wide(weights: Sequence[Tensor]) -> torch.dtype:
    """In what weights are updated together; coefficients that a loop had to round would cost a fortieth of its time."""
    return torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32


def meet(tensors: Sequence[Tensor | None]) -> None:
    """Have the compiler take note of inputs that will be written.

    It writes them at the end of its graph, in the order in which it meets them, and fuses what stands near to that.
    Heads are changed last and so have to be met first.
    """
    for tensor in tensors:
        if tensor is not None:
            tensor.dim()


def change(
    rule: UpdateRule,
    weight: Tensor,
    grad: Tensor,
    slots: Tensors,
    rounded: Tensor | None,
    flags: Flags,
    coefficients: Tensor,
    gate: Gate,
    scale: Tensor | None,
) -> Tensor:
    """Write the new weight, `weight - scale * change` if the gate is open, and the new state, each in the type of the
    old; gives the new weight."""
    exact = wide([weight])
    w, g = weight.to(exact), grad.to(exact)
    g = g if gate.clip is None else g * gate.clip.to(exact)
    scalars = tuple(c.to(exact) for c in coefficients.unbind())
    step, new = rule.change(w, g, tuple(s.to(exact) for s in slots), scalars, flags)
    step = step if scale is None else step * scale.to(exact)
    written = _unless(gate.finite, weight, (w - step).to(weight.dtype))
    values = [_unless(gate.finite, slot, value.to(slot.dtype)) for slot, value in zip(slots, new, strict=True)]
    weight.copy_(written)
    if rounded is not None:
        rounded.copy_(written.to(rounded.dtype))
    for slot, value in zip(slots, values, strict=True):
        slot.copy_(value)
    return written


def _with_sums_after(loop: Callable[..., None]) -> Callable[..., None]:
    """A loop that does not measure, and a pass that does."""

    def both(
        works: list[_Work],
        grads: list[Tensor],
        coefficients: Tensor,
        gate: Gate,
        scales: Tensor,
        squares: Tensor,
    ) -> None:
        loop(works, grads, coefficients, gate, scales, squares)
        heads = works[len(works) - len(squares) :]
        pieces = [(weight, piece) for weight, _, _, piece, _ in heads if piece is not None]
        squares.copy_(torch.cat([piece.squares(weight.to(squares.dtype)) for weight, piece in pieces]).view_as(squares))

    return both


def _unless(finite: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """The new value, or the old one where the gradients are not finite."""
    return new if finite is None else torch.where(finite, new, old)
