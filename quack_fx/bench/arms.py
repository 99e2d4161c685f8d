"""Implementations of the same training step, for comparison.

In: a model, its layout and a loss. Out: `Arm`s: `forward()` computes gradients, `update()` applies them.

    a  eager model, fused optimizer
    b  torch.compile(model), fused optimizer
    c  torch.compile(model), torch.compile(optimizer.step)
    d  c, with QuacK as in the paper's algorithm: a loop over heads around the step
    e  the model with QK norm (RMS with a gain), the compiled step of this package, no QuacK
    f  a, for the model with QK norm
    plain, quack   the compiled step of this package without and with QuacK
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.bench.normed import with_qk_norm
from quack_fx.layout import QKLayout, Ranges
from quack_fx.train.step import compile_train_step

Loss = Callable[..., Tensor]
"""`loss(model, *args, **kwargs)`: a scalar."""

MEANING = {
    "a": "eager model, fused AdamW",
    "b": "torch.compile(model), fused AdamW",
    "c": "torch.compile(model), torch.compile(optimizer.step)",
    "d": "c with QuacK as a loop over heads",
    "e": "QK norm in the model, our step, no QuacK",
    "f": "QK norm in the model, eager, fused AdamW",
    "plain": "our step, no QuacK",
    "quack": "our step with QuacK",
}

_PAIR = ("plain", "quack")


@dataclass(frozen=True)
class Case:
    """A model and batch to train.

    Attributes:
        model: The model; arms train copies of it.
        layout: Its layout.
        loss: The loss.
        args: Positional arguments of the loss after the model.
        kwargs: Keyword arguments of the loss.
        lr: Learning rate.
        clip: Maximum total norm of the gradients.
        normed: The same model with its own QK norm; None to add one.
    """

    model: nn.Module
    layout: QKLayout
    loss: Loss
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    lr: float = 1e-4
    clip: float = 1.0
    normed: nn.Module | None = None


@dataclass(frozen=True)
class Arm:
    """One implementation of the training step.

    Attributes:
        model: The model that it trains.
        forward: Computes gradients and returns the loss.
        update: Applies the gradients and clears them.
    """

    model: nn.Module
    forward: Callable[[], Tensor]
    update: Callable[[], None]

    def step(self) -> Tensor:
        """Run a whole training step."""
        loss = self.forward()
        self.update()
        return loss


def arms(names: Sequence[str], case: Case) -> tuple[dict[str, Arm], dict[str, str]]:
    """Build arms by name, each on a copy of the model, with AdamW and the same gradient clipping.

    "plain" and "quack" share a model and optimizer state, because tensor addresses change times by a few percent.

    Arguments:
        names: The arms to build; keys of `MEANING`.
        case: What is trained.

    Returns:
        The arms, and the reason for each arm that cannot be built for this model.
    """
    made: dict[str, Arm] = {}
    missing: dict[str, str] = {}
    for name in (name for name in names if name not in _PAIR):
        model = _model_of(name, case)
        if isinstance(model, str):
            missing[name] = model
        elif name == "e":
            made[name] = _ours(model, _adamw(model, case), QKLayout(), case)
        else:
            made[name] = _torchs(name, model, case)
    shared = copy.deepcopy(case.model)
    optimizer, second = _adamw(shared, case), _adamw(shared, case)
    second.state = optimizer.state
    # "quack" comes first: it refuses an existing optimizer state that lacks its initial factors.
    for name in sorted((name for name in names if name in _PAIR), key="quack".__ne__):
        own, layout = (optimizer, case.layout) if name == "quack" else (second, QKLayout())
        made[name] = _ours(shared, own, layout, case)
    return made, missing


def _model_of(name: str, case: Case) -> nn.Module | str:
    """A copy of the model for one arm, or the reason why it cannot have QK norm."""
    if name not in ("e", "f"):
        return copy.deepcopy(case.model)
    return with_qk_norm(case.model, case.layout) if case.normed is None else copy.deepcopy(case.normed)


def _adamw(model: nn.Module, case: Case) -> torch.optim.AdamW:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=case.lr, fused=True if parameters[0].is_cuda else None)


def _ours(model: nn.Module, optimizer: torch.optim.Optimizer, layout: QKLayout, case: Case) -> Arm:
    step = compile_train_step(model, optimizer, case.loss, layout=layout, clip_grad_norm=case.clip)
    return Arm(model, lambda: step.forward_backward(*case.args, **case.kwargs), step.update)


def _torchs(name: str, model: nn.Module, case: Case) -> Arm:
    """An arm with a torch optimizer."""
    loss = case.loss if name in ("a", "f") else torch.compile(case.loss)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name in ("a", "b", "f"):
        optimizer = torch.optim.AdamW(parameters, lr=case.lr, fused=True)
        step_of: Callable[[], Any] = optimizer.step
    else:
        # The learning rate is a tensor: a float would be a constant, and a schedule would recompile at every step.
        rate = torch.tensor(case.lr, device=parameters[0].device)
        optimizer = torch.optim.AdamW(parameters, lr=rate, capturable=parameters[0].is_cuda)
        step_of = torch.compile(optimizer.step)

    def forward() -> Tensor:
        value = loss(model, *case.args, **case.kwargs)
        value.backward()
        return value.detach()

    around = _ByHand(model, case.layout).around if name == "d" else nullcontext

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, case.clip)
        with around():
            step_of()
        optimizer.zero_grad(set_to_none=True)

    return Arm(model, forward, update)


class _ByHand:
    """Alg. 1 and 2 head by head: norms before the step, rows scaled after it."""

    def __init__(self, model: nn.Module, layout: QKLayout) -> None:
        params = dict(model.named_parameters())
        heads: dict[tuple[str, int, Ranges], int] = {}
        self._terms = [
            [heads.setdefault((block.param, block.axis, ranges), len(heads)) for block, ranges in term]
            for site in layout.sites
            if not site.qk_norm
            for head in range(site.query_heads)
            for term in site.head_terms(head)
        ]
        self._rows = [[params[name].detach().narrow(axis, a, b - a) for a, b in ranges] for name, axis, ranges in heads]
        self._first = self._factors()

    def _factors(self) -> list[Tensor]:
        norms = [torch.stack([part.float().square().sum() for part in rows]).sum().sqrt() for rows in self._rows]
        found: list[list[Tensor]] = [[] for _ in norms]
        for term in self._terms:
            for i, unit in enumerate(term):
                others = [norms[other] for j, other in enumerate(term) if j != i]
                found[unit].append(1 / torch.stack(others).prod())
        return [torch.stack(factors).amin() for factors in found]

    @contextmanager
    def around(self) -> Iterator[None]:
        """Scale the changes that a step makes in this context."""
        with torch.no_grad():
            scales = [now / first for now, first in zip(self._factors(), self._first, strict=True)]
            before = [[part.clone() for part in rows] for rows in self._rows]
        yield
        with torch.no_grad():
            for rows, old, scale in zip(self._rows, before, scales, strict=True):
                for part, was in zip(rows, old, strict=True):
                    part.copy_(was + scale * (part - was))
