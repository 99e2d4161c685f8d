"""USER: the norms of heads that one step leaves to the next, and the scales that follow from them.

In: the QuacK that keeps the initial factors. Out: `Heads`: the pieces of query and key weights, their squared norms as
the last step left them, and `span_scales`, which turns those into a scale for every span.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from quack_fx.factors import PlanTables, norm_dtype
from quack_fx.optim import QuacK
from quack_fx.step.masters import Masters, weight_of
from quack_fx.step.pieces import Piece, Spans, cut


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

    All optimizers of a training step share them. The norms go into each one's `state_dict()`: measured anew they would
    differ in the last digit, and training would not go on to the bit.

    Arguments:
        quack: QuacK as attached to an optimizer; others join.
        masters: What that updates in place of weights in half precision; None where it updates those.
    """

    def __init__(self, quack: QuacK, masters: Masters | None = None) -> None:
        self._params, self._masters = quack.params, list[Masters]()
        self._pieces, self._spans = cut(quack.plan, self._params)
        self._names = {id(p): name for name, p in self._params.items()}
        owners = self._spans.owners
        self._squares = torch.empty(len(owners), dtype=norm_dtype(self._params), device=owners.device)
        self._seen: list[tuple[int, ...]] = []
        self._saved: Tensor | None = None  # squared norms of a state that was loaded
        self.join(quack, masters)

    def join(self, quack: QuacK, masters: Masters | None = None) -> None:
        """Keep the norms of what another optimizer updates, too."""
        self._masters += [] if masters is None else [masters]
        quack.optimizer.register_state_dict_post_hook(self._after_state_dict)
        quack.optimizer.register_load_state_dict_pre_hook(self._before_load)

    def pieces_of(self, param: Tensor) -> tuple[Piece | None, ...]:
        """The pieces that a parameter is updated in; the whole of one without heads."""
        name = self._names.get(id(param))
        return (None,) if name is None else self._pieces[name]

    @property
    def kept(self) -> Tensor:
        """Where the squared norms of all spans are kept, [n_spans]; always the same tensor."""
        return self._squares

    def squares(self) -> Tensor:
        """Squared norms of the spans, [n_spans]: those that the last step left, or computed anew where it left none or
        somebody has changed a weight since."""
        if self._seen != self._states():
            self._measure()
            if self._saved is not None:
                self._squares.copy_(_exact(self._squares, self._saved))
            self._seen, self._saved = self._states(), None
        return self._squares

    def scaling(self, quack: QuacK) -> Scaling:
        """What turns them into scales for one of the optimizers."""
        return Scaling(quack.tables, self._spans, quack.tau, quack.init_factors)

    def written(self) -> None:
        """Take note that the squared norms are those of the weights as they are now."""
        self._seen = self._states()

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
        params = self._params.values()
        if not self._masters:
            return [(p._version, p.data_ptr()) for p in params]
        return [(p._version, p.data_ptr(), weight_of(p, self._masters).data_ptr()) for p in params]

    def _measure(self) -> None:
        """Squared norms of the spans as the weights are now."""
        for name, pieces in self._pieces.items():
            weight = weight_of(self._params[name], self._masters)
            for piece in pieces:
                spans = piece.numbers()
                if spans:
                    squares = piece.squares(piece.of(weight).to(self._squares.dtype))
                    self._squares[spans.start : spans.stop] = squares.flatten()


def _exact(measured: Tensor, saved: Tensor) -> Tensor:
    """Saved squared norms in place of measured ones, where they are the same but for rounding."""
    return torch.where(torch.isclose(saved, measured, rtol=1e-4), saved, measured)


def unit_scales(squares: Tensor, scaling: Scaling) -> Tensor:
    """tau * factor / initial factor of every unit, from the squared norms of the spans: [n_spans] -> [n_units]."""
    return scaling.tau * (scaling.tables.factors(scaling.spans.norms(squares)) / scaling.init)


def span_scales(squares: Tensor, scaling: Scaling) -> Tensor:
    """The same of every span: [n_spans] -> [n_spans]."""
    return scaling.spans.spread(unit_scales(squares, scaling))
