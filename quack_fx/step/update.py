"""USER: the compiled update: every weight, its state and QuacK's scales in one graph.

In: an optimizer whose arithmetic is in `RULES`, and the QuacK that keeps its initial factors. Out: `Update.run()`,
which does what `optimizer.step()` under QuacK would do, over the optimizer's own state tensors, in one compiled graph.

The scales of a step come from the norms that the step before left behind: the loop that writes a head's weights also
sums up their squares, so that QuacK adds no pass over any weight. What changes between steps (learning rates, step
counts) enters as a tensor: nothing is ever recompiled for it, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from quack_fx.factors import FactorPlan, factors, norm_dtype
from quack_fx.optim import QuacK
from quack_fx.step.loss import own_code
from quack_fx.step.pieces import Piece, Runs, cut
from quack_fx.step.rules import RULES, UpdateRule

Flags = tuple[bool, ...]
Job = tuple[Tensor, Tensor, tuple[Tensor, ...], int, Flags, Piece | None]
"""A weight or a piece of one, its gradient, its state, its column of coefficients, its options, and which piece."""


class Update:
    """One optimizer's compiled update.

    Arguments:
        optimizer: An optimizer that `knows` accepts.
        quack: QuacK attached to it, or None for the plain update.
        clip_grad_norm: Largest total norm of the gradients, as in `torch.nn.utils.clip_grad_norm_`; None for no limit.
        compile: Wraps the update function, `torch.compile` with the user's options or nothing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        quack: QuacK | None,
        clip_grad_norm: float | None,
        compile: Callable[[Callable[..., None]], Callable[..., None]],
    ) -> None:
        self._optimizer = optimizer
        self._rule: UpdateRule = RULES[type(optimizer)]
        for group in optimizer.param_groups:
            self._rule.check(group)
        self._heads = Heads(quack) if quack is not None else None
        self._apply = compile(_make_apply(self._rule, clip_grad_norm))

    @staticmethod
    def knows(optimizer: Optimizer) -> bool:
        """Whether the update of an optimizer can be compiled here: its exact class is known, nothing is sharded."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return type(optimizer) in RULES and not any(isinstance(p, DTensor) or p.is_complex() for p in params)

    @torch.no_grad()
    def run(self) -> None:
        """Update every parameter that has a gradient."""
        held = [(p, group) for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not held:
            return
        heads, jobs, steps = self._heads, list[Job](), list[Tensor]()
        for column, (param, group) in enumerate(held):
            flags = self._rule.flags(group)
            names = self._rule.slots(flags)
            state = self._state(param, group, names)
            steps.append(state["step"])
            tensors = (param.detach(), _like(param, param.grad), *(state[name] for name in names))
            for piece in heads.pieces_of(param) if heads is not None else (None,):
                weight, grad, *slots = tensors if piece is None else map(piece.of, tensors)
                jobs.append((weight, grad, tuple(slots), column, flags, piece))
        torch._foreach_add_(steps, 1.0)
        counts = torch.stack(steps).double()
        coefficients = torch.stack(self._rule.coefficients(counts, self._numbers(held, counts.device)))
        coefficients = coefficients.to(held[0][0].device, non_blocking=True)
        if heads is None:
            self._apply(jobs, coefficients, None, None)
        else:
            self._apply(jobs, coefficients, heads.squares(), heads.scaling())
            heads.written()

    def _numbers(
        self, held: Sequence[tuple[nn.Parameter, Mapping[str, Any]]], device: torch.device
    ) -> tuple[Tensor, ...]:
        """Hyperparameters of each parameter's group, float64 [n] each."""
        by_group = {id(group): self._rule.numbers(group) for _, group in held}
        rows = zip(*(by_group[id(group)] for _, group in held), strict=True)
        return tuple(torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in row]) for row in rows)

    def _state(self, param: nn.Parameter, group: Mapping[str, Any], slots: tuple[str, ...]) -> dict[str, Tensor]:
        """The optimizer's state of a parameter, made as the optimizer itself makes it."""
        state: dict[str, Tensor] = self._optimizer.state[param]
        if "step" not in state:
            on_device = bool(group.get("capturable") or group.get("fused"))
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device if on_device else "cpu")
            for name in slots:
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state


def _like(param: Tensor, grad: Tensor | None) -> Tensor:
    """A gradient that lies in memory as its parameter does."""
    assert grad is not None
    return grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)


@dataclass(frozen=True)
class Scaling:
    """What QuacK's part of the graph reads.

    Attributes:
        plan: The plan.
        runs: Which runs are which units.
        tau: Scale of the learning rate at the start.
        init: Factors at the start of training, [n_units].
    """

    plan: FactorPlan
    runs: Runs
    tau: float
    init: Tensor

    def of(self, squares: Tensor) -> Tensor:
        """tau * factor / initial factor of every run, from the squared norms of the runs: [n_runs] -> [n_runs]."""
        return self.runs.spread(self.tau * (factors(self.plan, self.runs.norms(squares)) / self.init))


class Heads:
    """The pieces of the query and key weights, and the norms that one step leaves to the next.

    Arguments:
        quack: QuacK attached to the optimizer.
    """

    def __init__(self, quack: QuacK) -> None:
        self._quack = quack
        self._pieces, self._runs = cut(quack.plan, quack.params)
        self._names = {id(p): name for name, p in quack.params.items()}
        self._squares: Tensor | None = None
        self._seen: list[tuple[int, int]] = []

    def pieces_of(self, param: Tensor) -> tuple[Piece | None, ...]:
        """The pieces that a parameter is updated in; the whole of one without heads."""
        name = self._names.get(id(param))
        return (None,) if name is None else self._pieces[name]

    def squares(self) -> Tensor:
        """Squared norms of the runs, [n_runs], for the graph to read and to write: those that the last step left if
        nobody has changed a weight since, or else computed anew."""
        if self._squares is None or self._seen != self._states():
            self._squares = self._measured()
        return self._squares

    def scaling(self) -> Scaling:
        """What turns them into scales."""
        return Scaling(self._quack.plan, self._runs, self._quack.tau, self._quack.init_factors)

    def written(self) -> None:
        """Take note that a step is done: the norms are those of the weights as they are now."""
        self._seen = self._states()
        self._quack.publish()

    def _states(self) -> list[tuple[int, int]]:
        """Tells whether a weight was written since: torch counts the writes into each tensor."""
        return [(p._version, p.data_ptr()) for p in self._quack.params.values()]

    def _measured(self) -> Tensor:
        """Squared norms of the runs as the weights are now."""
        dtype = norm_dtype(self._quack.params)
        squares = [
            piece.squares(piece.of(self._quack.params[name].detach()).to(dtype)).to(self._runs.owners.device)
            for name, pieces in self._pieces.items()
            for piece in pieces
            if piece.first is not None
        ]
        return torch.cat(squares)


def _make_apply(rule: UpdateRule, clip_grad_norm: float | None) -> Callable[..., None]:
    """The function that is compiled."""

    def apply(jobs: list[Job], coefficients: Tensor, squares: Tensor | None, scaling: Scaling | None) -> None:
        clip = _clip([grad for _, grad, *_ in jobs], clip_grad_norm)
        scales = scaling.of(squares) if scaling is not None and squares is not None else None
        new_squares: dict[int, Tensor] = {}
        for weight, grad, slots, column, flags, piece in jobs:
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            scalars = tuple(c.to(wide) for c in coefficients[:, column].unbind())
            w, g = weight.to(wide), grad.to(wide)
            g = g if clip is None else g * clip.to(wide)
            change, new = rule.change(w, g, tuple(s.to(wide) for s in slots), scalars, flags)
            if piece is not None and piece.first is not None and scales is not None:
                own = scales[piece.first : piece.first + piece.count]
                written = (w - change * piece.along(own, w).to(wide)).to(weight.dtype)
                new_squares[piece.first] = piece.squares(written.to(scales.dtype))
            else:
                written = (w - change).to(weight.dtype)
            weight.copy_(written)
            for slot, value in zip(slots, new, strict=True):
                slot.copy_(value)
        if squares is not None:
            squares.copy_(_filled(new_squares, squares))

    return own_code(apply)


def _filled(parts: dict[int, Tensor], old: Tensor) -> Tensor:
    """New squared norms by the number of their first run, with the old ones where none are new."""
    laid: list[Tensor] = []
    place = 0
    for first in sorted(parts):
        laid += [old[place:first]] if place < first else []
        laid.append(parts[first])
        place = first + len(parts[first])
    return torch.cat([*laid, old[place:]])


def _clip(grads: list[Tensor], limit: float | None) -> Tensor | None:
    """Factor on all gradients, as `torch.nn.utils.clip_grad_norm_` has it."""
    if limit is None:
        return None
    total = torch.stack([g.float().square().sum() for g in grads]).sum().sqrt()
    return (limit / (total + 1e-6)).clamp(max=1.0)
