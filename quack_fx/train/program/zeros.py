"""Support for weights that are zero at the start: LoRA's B, queries in muP.

In: the module of a program. Out: a subclass of its `QuacK` with finite initial factors for the partners of such weights
(LoRA's A, the keys).

A factor is one over the norms that a block is multiplied with, so it is infinite if one of them is zero. The initial
factor of such a block is the one that it has when the zero weights have grown to the block's own initial norm. Until
then, the block trains at `tau`, where the zero weights start, and no faster. In the tables of initial factors, these
factors are negative, and so is the number that identifies the kind. The file that `convert` writes does not support
this and refuses such a state.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_TINY = 1e-100
"""Replaces a norm of zero; the factor of a block that is multiplied with several of these stays huge."""

_HUGE = 1e50


def from_zero(program: ModuleType) -> Any:
    """The `QuacK` of a program, for weights that may start at zero."""

    class FromZero(program.QuacK):  # type: ignore[name-defined, misc]
        def __init__(self, model: Any, tau: float | Tensor = 1.0, optimizers: Iterable[Optimizer] = ()) -> None:
            super().__init__(model, tau, optimizers)
            self._save(self._starts, ())

        def start(self) -> list[Any]:
            """Initial factors of the blocks; negative if the learning rate may only decrease."""
            found = []
            for kind, norms in zip(program.KINDS, self.norms(), strict=True):
                near = kind.factors(type(norms)(*(n.where(n != 0, _TINY) for n in norms)))
                starts = (
                    factor.where(factor.isfinite(), -met * _TINY / own)
                    for factor, met, own in zip(kind.factors(norms), near, norms, strict=True)
                )
                # Zeros on both sides could never train, so these factors become infinite.
                found.append(type(norms)(*(x.where(x.abs() < _HUGE, torch.inf) for x in starts)))
            return found

        def restart(self, begun: Container[tuple[int, int]]) -> None:
            """Compute new initial factors from the current weights for all attentions that are not in `begun`."""
            self._save(self.start(), begun)

        def _save(self, found: list[Any], begun: Container[tuple[int, int]]) -> None:
            for kind, (saved, starts) in enumerate(zip(self.saved, found, strict=True)):
                anew = [i for i in range(len(saved)) if (kind, i) not in begun]
                saved[anew, 1:] = torch.cat(list(starts), 1)[anew]
                saved[:, 0] = saved[:, 0].abs() * torch.where((saved[:, 1:] < 0).any(1), -1.0, 1.0)

        def factors(self) -> list[Any]:
            """Factors of the blocks; negative, like the initial factor, if the learning rate may only decrease."""
            if not self.first:
                self._starts = self.start()  # with signs, which __init__ saves
                return [type(starts)(*(x.abs() for x in starts)) for starts in self._starts]
            pairs = zip(super().factors(), self.first, strict=True)
            return [
                type(now)(*(torch.where(x < 0, torch.maximum(-f, x), f) for f, x in zip(now, first, strict=True)))
                for now, first in pairs
            ]

        def take_over(self, optimizer: Optimizer) -> None:
            """Load initial factors from the optimizer's state, negative ones included."""
            for weight, (kind, attention) in self.home.items():
                saved = (optimizer.state.get(weight) or {}).get("quack_init")
                if isinstance(saved, Tensor) and saved is not self.kept.get(weight):
                    own = self.saved[kind][attention]
                    if len(saved) == 8 * len(own):
                        mark = saved.to(own.device, torch.uint8)[:8].clone().view(torch.float64)
                        own[:1] = own[:1].where(mark != -own[:1], mark)
            super().take_over(optimizer)

    return FromZero
