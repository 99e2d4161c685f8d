"""USER: the compiled update: every weight, its state and QuacK's scales, compiled.

In: an optimizer that has an `UpdateRule`, and the QuacK that keeps its initial factors. Out: `Update.run()`,
which does what `optimizer.step()` under QuacK would do, over the optimizer's own state tensors.

The scales of a step come from the norms that the step before left behind: the loop that writes a head's weights also
sums up their squares, so that QuacK adds no pass over any weight. What changes between steps (learning rates, step
counts) enters as a tensor: nothing is ever recompiled for it, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from quack_fx.errors import OptimizerError
from quack_fx.optim import QuacK
from quack_fx.step.compiling import Compiler, own_code
from quack_fx.step.gradients import gradients, look_at
from quack_fx.step.heads import Heads, Scaling, span_scales
from quack_fx.step.loops import Call, Job, Loops, Tables, wide
from quack_fx.step.masters import Masters
from quack_fx.step.rules import Flags, Gate, Group, State, UpdateRule
from quack_fx.step.views import Views


class Update:
    """One optimizer's compiled update.

    Arguments:
        optimizer: The optimizer; nothing that it holds is sharded or complex.
        rule: Its arithmetic.
        quack: QuacK attached to it, or None for the plain update.
        heads: The norms that the step keeps; None without QuacK.
        masters: The optimizer's masters; None where parameters in half precision are updated as they are.
        clip_grad_norm: Largest total norm of the gradients, as in `torch.nn.utils.clip_grad_norm_`; None for no limit.
        skip_nonfinite: Whether a step whose gradients are not all finite changes nothing.
        compiler: How to compile.

    Attributes:
        rule: The arithmetic.
        heads: The norms that the step keeps; None without QuacK.
        views: Parameters and state in pieces.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: UpdateRule,
        quack: QuacK | None,
        heads: Heads | None,
        masters: Masters | None,
        clip_grad_norm: float | None,
        skip_nonfinite: bool,
        compiler: Compiler,
    ) -> None:
        self._optimizer, self.rule, self._quack = optimizer, rule, quack
        for group in optimizer.param_groups:
            if group.get("differentiable"):
                raise OptimizerError(
                    f"{rule.name}(differentiable=True) cannot be compiled into a step; set differentiable=False"
                )
            if why := rule.refusal(group, skip_nonfinite):
                raise OptimizerError(why)
        self._masters = masters
        self.heads = None if quack is None else heads
        # Inductor on CPUs fuses the few numbers of the first into the loops of the others, and fails: apart.
        device = next((param.device for param in self.params), None)
        self._measure = compiler(_make_measure(clip_grad_norm, skip_nonfinite), sizes="fixed", loops_on=device)
        self._loops = Loops(rule, compiler)
        self.views = Views(self.heads)
        self._scales = None if self.heads is None else torch.empty_like(self.heads.kept)
        self._plan: _Plan | None = None
        compiler.stays([self._scales, None if self.heads is None else self.heads.kept])

    @property
    def params(self) -> list[Tensor]:
        """All parameters of the optimizer."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def run(self, beside: Sequence[Tensor] = (), gate: Gate | None = None) -> Gate | None:
        """Update every parameter that has a gradient.

        Arguments:
            beside: Gradients of other optimizers of the same step, to be clipped and looked at together.
            gate: What another one's update found out about all of them; found out here otherwise.

        Returns:
            What was found out; `gate` where no parameter has a gradient.
        """
        params = [p for p in self.params if p.grad is not None]
        if not params:
            return gate
        turn, grads = self.turn(params), gradients([self._optimizer])
        looked_at = [] if gate is not None else [*grads, *beside]
        if turn.scaling is not None:
            seen = self._measure(looked_at, turn.squares, turn.scaling, self._scales)
            gate = seen if gate is None else gate
        elif gate is None:
            gate = self._measure(looked_at)
        left = self.rule.directions(grads, turn.groups, turn.states, gate)
        plan = self._planned(turn, left)
        for table in plan.tables.coefficients.values():
            table.copy_(turn.coefficients, non_blocking=True)
        for call in plan.calls:
            call(grads, left)
        self.done(turn, gate.finite)
        return gate

    def turn(self, params: Sequence[Tensor]) -> Turn:
        """What is known of a step before there are gradients.

        Arguments:
            params: The parameters that will have some; all are the optimizer's.
        """
        group_of = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        groups = [group_of[id(param)] for param in params]
        options = {id(group): self.rule.flags(group) for group in self._optimizer.param_groups}
        flags = [options[id(group)] for group in groups]
        weights = params if self._masters is None else [self._masters.of(param) for param in params]
        # What needs no state gets no entry, as in the optimizer itself.
        states = [self._optimizer.state[p] if self.rule.kept(f) else {} for p, f in zip(params, flags, strict=True)]
        counts = self.rule.count(weights, groups, states)
        numbers = numbers_of(self.rule, groups, counts.device)
        counts = counts.to(numbers[0].device, non_blocking=True)
        coefficients = torch.stack(self.rule.coefficients(counts, numbers), 1)
        squares, scaling = None, None
        if self.heads is not None and self._quack is not None:
            squares, scaling = self.heads.squares(), self.heads.scaling(self._quack)
        return Turn(params, weights, groups, flags, states, coefficients, squares, scaling)

    def done(self, turn: Turn, finite: Tensor | None) -> None:
        """Take note that all is written; `finite` tells on the device whether it was."""
        self.rule.advance(turn.states, finite)
        if self._masters is not None:
            self._masters.written(turn.params)
        if self.heads is not None:
            self.heads.written()

    def _planned(self, turn: Turn, gate: Gate) -> _Plan:
        """How to update some parameters: as in the last step, where nothing has moved since."""
        params, weights, flags = turn.params, turn.weights, turn.flags
        slots = turn.slots(self.rule)
        where = [id(param) for param in params], [p.data_ptr() for p in params], [id(s) for own in slots for s in own]
        seen = [*where, flags, [w.data_ptr() for w in weights], gate.clip is None, gate.finite is None]
        if self._plan is None or seen != self._plan.seen:
            jobs = [
                Job(view, row, own)
                for row, (param, weight, kept, own) in enumerate(zip(params, weights, slots, flags, strict=True))
                for view in self.views.of(param, weight.detach(), kept)
            ]
            types, shape = {torch.float32, wide(weights)}, turn.coefficients.shape
            coefficients = {each: torch.empty(shape, dtype=each, device=params[0].device) for each in types}
            tables = Tables(coefficients, self._scales, None if self.heads is None else self.heads.kept)
            self._plan = _Plan(seen, tables, self._loops.calls(jobs, tables, gate))
        return self._plan


@dataclass(frozen=True)
class Turn:
    """What is known of a step of one optimizer before there are gradients.

    Attributes:
        params: The parameters.
        weights: What is updated in place of each: itself, or its master.
        groups: The group of each.
        flags: Options of each one's group, as the rule has them.
        states: The optimizer's state of each.
        coefficients: Those of the rule, float64 [parameters, coefficients].
        squares: Squared norms of all spans, [n_spans]; None without QuacK.
        scaling: What turns them into scales; None likewise.
    """

    params: Sequence[Tensor]
    weights: Sequence[Tensor]
    groups: Sequence[Group]
    flags: Sequence[Flags]
    states: Sequence[State]
    coefficients: Tensor
    squares: Tensor | None
    scaling: Scaling | None

    def slots(self, rule: UpdateRule) -> list[list[Tensor]]:
        """The state tensors of each, as a rule has them."""
        return [[state[n] for n in rule.slots(own)] for own, state in zip(self.flags, self.states, strict=True)]


@dataclass(frozen=True)
class _Plan:
    """How some parameters are updated.

    Attributes:
        seen: What tells whether the plan still holds: which they are, where they and their state lie, their options.
        tables: What is filled in before each step.
        calls: What is called then.
    """

    seen: list[Any]
    tables: Tables
    calls: Sequence[Call]


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


def _make_measure(clip_grad_norm: float | None, skip_nonfinite: bool) -> Callable[..., Any]:
    """The function, to be compiled, that looks at all gradients and at the norms of the heads."""

    def measure(
        grads: list[Tensor],
        squares: Tensor | None = None,
        scaling: Scaling | None = None,
        scales: Tensor | None = None,
    ) -> Gate:
        """What is to be known of all gradients; the scale of every span is written, if there are any."""
        if squares is not None and scaling is not None and scales is not None:
            scales.copy_(span_scales(squares, scaling))
        return look_at(grads, clip_grad_norm, skip_nonfinite)

    return own_code(measure)
