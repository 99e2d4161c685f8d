"""USER: the compiled update: every weight, its state and QuacK's scales, compiled.

In: an optimizer that has an `UpdateRule`, and the QuacK that keeps its initial factors. Out: `Update.run()`,
which does what `optimizer.step()` under QuacK would do, over the optimizer's own state tensors.

The scales of a step come from the norms that the step before left behind: the loop that writes a head's weights also
sums up their squares, so that QuacK adds no pass over any weight. What changes between steps (learning rates, step
counts) enters as a tensor: nothing is ever recompiled for it, and nothing waits for the device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from quack_fx.errors import OptimizerError
from quack_fx.factors import PlanTables, norm_dtype
from quack_fx.optim import QuacK
from quack_fx.step.loops import Job, Kind, Loops
from quack_fx.step.loss import own_code
from quack_fx.step.masters import Masters, weight_of
from quack_fx.step.pieces import Piece, Spans, cut
from quack_fx.step.rules import Flags, Gate, Group, State, UpdateRule, rule_of


class Update:
    """One optimizer's compiled update.

    Arguments:
        optimizer: The optimizer; nothing that it holds is sharded or complex.
        rule: Its arithmetic.
        quack: QuacK attached to it, or None for the plain update.
        clip_grad_norm: Largest total norm of the gradients, as in `torch.nn.utils.clip_grad_norm_`; None for no limit.
        skip_nonfinite: Whether a step whose gradients are not all finite changes nothing.
        master_weights: Whether parameters in half precision are updated in single precision.
        compile: Wraps the update function, `torch.compile` with the user's options or nothing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: UpdateRule,
        quack: QuacK | None,
        clip_grad_norm: float | None,
        skip_nonfinite: bool,
        master_weights: bool,
        compile: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        self._optimizer, self._rule = optimizer, rule
        for group in optimizer.param_groups:
            if group.get("differentiable"):
                raise OptimizerError(
                    f"{rule.name}(differentiable=True) cannot be compiled into a step; set differentiable=False"
                )
            if why := rule.refusal(group, skip_nonfinite):
                raise OptimizerError(why)
        self._masters = Masters(optimizer) if master_weights else None
        self._heads = Heads(quack, self._masters) if quack is not None else None
        # Inductor on CPUs fuses the few numbers of the first into the loops of the others, and fails: apart.
        self._measure = compile(_make_measure(clip_grad_norm, skip_nonfinite))
        self._loops = Loops(rule, compile)
        self._cuts: dict[Tensor, _Cut] = {}

    @staticmethod
    def rule_of(optimizer: Optimizer) -> UpdateRule | None:
        """The arithmetic of an optimizer whose update can be compiled here; None for one that takes its own step."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return None if any(isinstance(p, DTensor) or p.is_complex() for p in params) else rule_of(optimizer)

    @torch.no_grad()
    def run(self, beside: Sequence[Tensor] = (), gate: Gate | None = None) -> Gate | None:
        """Update every parameter that has a gradient.

        Arguments:
            beside: Gradients of other optimizers of the same step, to be clipped and looked at together.
            gate: What another one's update found out about all of them; found out here otherwise.

        Returns:
            What was found out; `gate` where no parameter has a gradient.
        """
        held = [(p, group) for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not held:
            return gate
        heads = self._heads
        squares, scaling = (None, None) if heads is None else (heads.squares(), heads.scaling())
        looked_at = [] if gate is not None else [*gradients([self._optimizer]), *beside]
        seen, scales = self._measure(looked_at, squares, scaling)
        gate = seen if gate is None else gate
        if heads is not None:  # those with heads last, so that what goes into one call stands together
            with_heads = heads.ids
            held = [*(o for o in held if id(o[0]) not in with_heads), *(o for o in held if id(o[0]) in with_heads)]
        params, groups = [param for param, _ in held], [group for _, group in held]
        weights = [weight_of(param, self._masters) for param in params]
        flags = [self._rule.flags(group) for group in groups]
        # What needs no state gets no entry, as in the optimizer itself.
        states = [self._optimizer.state[p] if self._rule.kept(f) else {} for p, f in zip(params, flags, strict=True)]
        grads = [_like(param) for param in params]
        counts = self._rule.count(weights, groups, states, gate.finite)
        left = self._rule.directions(grads, groups, states, gate)
        numbers = numbers_of(self._rule, groups, counts.device)
        counts = counts.to(numbers[0].device, non_blocking=True)
        coefficients = torch.stack(self._rule.coefficients(counts, numbers), 1)
        jobs = [
            job
            for row, work in enumerate(zip(params, weights, grads, flags, states, strict=True))
            for job in self._jobs(row, *work)
        ]
        coefficients = coefficients.to(params[0].device, non_blocking=True)
        self._loops.run(jobs, coefficients, left, scales)
        if self._masters is not None:
            self._masters.written(params)
        if heads is not None:
            heads.written()
        return gate

    def _jobs(self, row: int, param: Tensor, weight: Tensor, grad: Tensor, flags: Flags, state: State) -> Iterator[Job]:
        """What is to be done to a parameter: one job for each of its pieces."""
        slots = [state[name] for name in self._rule.slots(flags)]
        known = self._cuts.get(param)
        # Cut once: weights and state stay where they are, and a view costs as much as a small kernel.
        where = param.data_ptr(), weight.data_ptr()
        if known is None or known.where != where or any(map(operator.is_not, known.slots, slots)):
            known = self._cuts[param] = _Cut(where, slots, list(self._cut(param, weight, slots)))
        for view in known.views:
            place = view.place
            part = grad if place is None else grad.as_strided(place[0], place[1], grad.storage_offset() + place[2])
            yield Job(view.weight, part, view.slots, view.rounded, row, flags, view.piece, view.squares, view.kind)

    def _cut(self, param: Tensor, weight: Tensor, slots: list[Tensor]) -> Iterator[_View]:
        rounded = None if weight.dtype == param.dtype else param.detach()
        for piece in self._heads.pieces_of(param) if self._heads is not None else (None,):
            if piece is None:
                yield _View(None, weight, tuple(slots), rounded, None, None, None)
                continue
            part, low = piece.of(weight), None if rounded is None else piece.of(rounded)
            place = part.shape, part.stride(), int(part.storage_offset() - weight.storage_offset())
            squares = None if self._heads is None else self._heads.squares_of(piece)
            alike = Kind(piece.anywhere(), tuple(part.shape), part.stride(), part.dtype)
            kind = None if squares is None else alike
            yield _View(piece, part, tuple(map(piece.of, slots)), low, place, squares, kind)


@dataclass(frozen=True)
class _View:
    """A piece of a parameter, or the whole.

    Attributes:
        piece: Which; None for the whole.
        weight: That of the weight.
        slots: That of its state.
        rounded: That of the parameter where the weight is its master, else None.
        place: Where it lies: size, stride, offset; None for the whole.
        squares: Where its squared norms go; None where it has none.
        kind: Equal for equal pieces of equal tensors; None where it has no heads.
    """

    piece: Piece | None
    weight: Tensor
    slots: tuple[Tensor, ...]
    rounded: Tensor | None
    place: tuple[Sequence[int], Sequence[int], int] | None
    squares: Tensor | None
    kind: Kind | None


@dataclass(frozen=True)
class _Cut:
    """A parameter and its state, cut.

    Attributes:
        where: Addresses of the parameter and of what is updated.
        slots: Its state tensors.
        views: Its pieces.
    """

    where: tuple[int, int]
    slots: Sequence[Tensor]
    views: Sequence[_View]


def numbers_of(rule: UpdateRule, groups: Sequence[Group], device: torch.device) -> tuple[Tensor, ...]:
    """Hyperparameters of each parameter's group, float64 [n] each; on a device, or where one of them is already.

    Nothing here may wait for a device: what is made on the CPU is sent there without waiting, and nothing is sent
    back.
    """
    distinct = {id(group): group for group in groups}
    rows = [rule.numbers(group) for group in distinct.values()]
    tensors = [x for row in rows for x in row if isinstance(x, Tensor)]
    home = next((x.device for x in tensors if x.device.type != "cpu"), torch.device("cpu"))
    if tensors:
        exact = [[torch.as_tensor(x, dtype=torch.float64).to(home, non_blocking=True) for x in row] for row in rows]
        table = torch.stack([torch.stack(row) for row in exact])
    else:
        table = torch.tensor(rows, dtype=torch.float64)
    place = {key: i for i, key in enumerate(distinct)}
    each = table[torch.tensor([place[id(group)] for group in groups]).to(home, non_blocking=True)]
    return (each.to(device, non_blocking=True) if home.type == "cpu" else each).unbind(1)


def _like(param: Tensor) -> Tensor:
    """The gradient of a parameter, lying in memory as the parameter does."""
    grad = param.grad
    assert grad is not None
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)


@dataclass(frozen=True)
class Scaling:
    """What QuacK's part of the graph reads.

    Attributes:
        tables: Which units are multiplied with each other.
        spans: Which spans are of which units.
        tau: Scale of the learning rate at the start.
        init: Factors at the start of training, [n_units].
    """

    tables: PlanTables
    spans: Spans
    tau: float
    init: Tensor


SQUARES_KEY = "quack_squares"
"""Where a state dict has the squared norms that the last step left, beside the states of the parameters."""


class Heads:
    """The pieces of the query and key weights, and the norms that one step leaves to the next.

    The norms go into the optimizer's `state_dict()`, too: measured anew they would differ in the last digit, and
    training would not go on to the bit.

    Arguments:
        quack: QuacK attached to the optimizer.
        masters: What is updated in place of weights in half precision, if it is.
    """

    def __init__(self, quack: QuacK, masters: Masters | None = None) -> None:
        self._quack, self._masters = quack, masters
        self._pieces, self._spans = cut(quack.plan, quack.params)
        self._names = {id(p): name for name, p in quack.params.items()}
        owners = self._spans.owners
        self._squares = torch.empty(len(owners), dtype=norm_dtype(quack.params), device=owners.device)
        self._seen: list[tuple[int, ...]] = []
        self._saved: Tensor | None = None  # squared norms of a state that was loaded
        quack.optimizer.register_state_dict_post_hook(self._after_state_dict)
        quack.optimizer.register_load_state_dict_pre_hook(self._before_load)

    @property
    def ids(self) -> Set[int]:
        """Of the parameters that have heads."""
        return self._names.keys()

    def pieces_of(self, param: Tensor) -> tuple[Piece | None, ...]:
        """The pieces that a parameter is updated in; the whole of one without heads."""
        name = self._names.get(id(param))
        return (None,) if name is None else self._pieces[name]

    def squares_of(self, piece: Piece) -> Tensor | None:
        """Where the squared norms of a piece are kept, [spans of the piece]; None where it has none."""
        numbers = piece.numbers()
        return self._squares[numbers.start : numbers.stop] if numbers else None

    def squares(self) -> Tensor:
        """Squared norms of the spans, [n_spans]: those that the last step left, or computed anew where it left none or
        somebody has changed a weight since."""
        if self._seen != self._states():
            self._measure()
            if self._saved is not None:
                self._squares.copy_(_exact(self._squares, self._saved))
            self._seen, self._saved = self._states(), None
        return self._squares

    def scaling(self) -> Scaling:
        """What turns them into scales."""
        init = self._quack.init_factors
        return Scaling(self._quack.plan.tables(init.device), self._spans, self._quack.tau, init)

    def written(self) -> None:
        """Take note that a step is done, and that the squared norms are those of the weights that it wrote."""
        self._seen = self._states()
        self._quack.publish()

    @torch.no_grad()
    def _after_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Add the squared norms."""
        state_dict[SQUARES_KEY] = self.squares().clone()

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Keep those of a state that is about to be loaded; of these heads, if they are of equally many."""
        saved: Tensor | None = state_dict.get(SQUARES_KEY)
        fit = saved if saved is not None and saved.shape == self._squares.shape else None
        self._saved, self._seen = None if fit is None else fit.to(self._squares, copy=True), []

    def _states(self) -> list[tuple[int, ...]]:
        """Tells whether a weight was written since: torch counts the writes into each tensor."""
        params = self._quack.params
        if self._masters is None:
            return [(p._version, p.data_ptr()) for p in params.values()]
        return [(p._version, p.data_ptr(), self._masters.of(p).data_ptr()) for p in params.values()]

    def _measure(self) -> None:
        """Squared norms of the spans as the weights are now."""
        for name, pieces in self._pieces.items():
            weight = weight_of(self._quack.params[name], self._masters)
            for piece in pieces:
                squares = self.squares_of(piece)
                if squares is not None:
                    squares.copy_(piece.squares(piece.of(weight).to(squares.dtype)))


def _exact(measured: Tensor, saved: Tensor) -> Tensor:
    """Saved squared norms in place of measured ones, where they are the same but for rounding."""
    return torch.where(torch.isclose(saved, measured, rtol=1e-4), saved, measured)


def _make_measure(clip_grad_norm: float | None, skip_nonfinite: bool) -> Callable[..., Any]:
    """The function, to be compiled, that looks at all gradients and at the norms of the heads."""

    def measure(grads: list[Tensor], squares: Tensor | None, scaling: Scaling | None) -> tuple[Gate, Tensor | None]:
        """What is to be known of all gradients, if there are any, and the scale of every span; None for what is not
        asked."""
        clip = _clip(grads, clip_grad_norm) if grads and clip_grad_norm is not None else None
        finite = all_finite(grads) if grads and skip_nonfinite else None
        return Gate(clip, finite), None if squares is None or scaling is None else _scales(squares, scaling)

    return own_code(measure)


def gradients(optimizers: Sequence[torch.optim.Optimizer]) -> list[Tensor]:
    """All gradients of some optimizers' parameters."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return [p.grad for group in groups for p in group["params"] if p.grad is not None]


def all_finite(grads: Sequence[Tensor]) -> Tensor:
    """Whether no gradient is infinite or not a number, 0-d."""
    return torch.stack([g.isfinite().all() for g in grads]).all()


def _clip(grads: list[Tensor], limit: float) -> Tensor:
    """Factor on all gradients, as `torch.nn.utils.clip_grad_norm_` has it."""
    squares = [g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() for g in grads]
    total = torch.stack(squares).sum().sqrt()
    return (limit / (total + 1e-6)).clamp(max=1.0)


def _scales(squares: Tensor, scaling: Scaling) -> Tensor:
    """tau * factor / initial factor of every span, from the squared norms of the spans: [n_spans] -> [n_spans]."""
    now = scaling.tables.factors(scaling.spans.norms(squares))
    return scaling.spans.spread(scaling.tau * (now / scaling.init))
