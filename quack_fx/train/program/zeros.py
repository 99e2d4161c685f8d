"""Weights that start at zero: LoRA's B, queries of muP.

In: the module of a program. Out: its `QuacK`, which gives what such weights are multiplied with (LoRA's A, the keys) a
factor to be relative to.

A factor bounds the change of a logit, by the norms that a block is multiplied with; where those are zero it is
infinite. Such a block starts with the factor that it has once they have grown to the norm that it had itself at the
start, and until then trains at `tau`, no faster: the learning rate that the weights of zero have. In the tables of
first factors these are negative, and the number that marks the attention is, too: the file that `convert` writes, which
does not have this, refuses such a state.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_TINY = 1e-100
"""Stands for a norm of zero; what is multiplied with several of them has a factor that stays huge."""

_HUGE = 1e50


def from_zero(program: ModuleType) -> Any:
    """The `QuacK` of a program, for weights that may start at zero."""

    class FromZero(program.QuacK):  # type: ignore[name-defined, misc]
        def __init__(self, model: Any, tau: float | Tensor = 1.0, optimizers: Iterable[Optimizer] = ()) -> None:
            super().__init__(model, tau, optimizers)
            for saved, starts in zip(self.saved, self._starts, strict=True):
                signed = torch.cat(starts, 1)
                # Those of attentions that have begun already are left: theirs are loaded.
                capped = signed < 0
                saved[:, 1:][capped] *= -1
                saved[:, 0] *= torch.where(capped.any(1), -1.0, 1.0)

        def start(self) -> list[Any]:
            """Factors of the blocks at the start of training; negative where a learning rate may only fall."""
            found = []
            for kind, norms in zip(program.KINDS, self.norms(), strict=True):
                near = kind.factors(type(norms)(*(n.where(n != 0, _TINY) for n in norms)))
                starts = (
                    factor.where(factor.isfinite(), -met * _TINY / own)
                    for factor, met, own in zip(kind.factors(norms), near, norms, strict=True)
                )
                # Zeros on both sides could never train: no finite factor.
                found.append(type(norms)(*(x.where(x.abs() < _HUGE, torch.inf) for x in starts)))
            return found

        def restart(self, begun: Container[tuple[int, int]]) -> None:
            """Start training anew, from the weights now, for all attentions but those in `begun`."""
            for kind, (saved, starts) in enumerate(zip(self.saved, self.start(), strict=True)):
                anew = [i for i in range(len(saved)) if (kind, i) not in begun]
                saved[anew, 1:] = torch.cat(list(starts), 1)[anew]
                saved[:, 0] = saved[:, 0].abs() * torch.where((saved[:, 1:] < 0).any(1), -1.0, 1.0)

        def factors(self) -> list[Any]:
            """Factors of the blocks; where a learning rate may only fall, negative, as the first ones are."""
            if not self.first:
                self._starts = self.start()
                return [type(starts)(*(x.abs() for x in starts)) for starts in self._starts]
            pairs = zip(super().factors(), self.first, strict=True)
            return [
                type(now)(*(torch.where(x < 0, torch.maximum(-f, x), f) for f, x in zip(now, first, strict=True)))
                for now, first in pairs
            ]

        def take_over(self, optimizer: Optimizer) -> None:
            """Take over first factors from a state that was loaded, negative ones, too."""
            for weight, (kind, attention) in self.home.items():
                saved = (optimizer.state.get(weight) or {}).get("quack_init")
                if isinstance(saved, Tensor) and saved is not self.kept.get(weight):
                    own = self.saved[kind][attention]
                    if len(saved) == 8 * len(own):
                        mark = saved.to(own.device, torch.uint8)[:8].clone().view(torch.float64)
                        own[:1] = own[:1].where(mark != -own[:1], mark)
            super().take_over(optimizer)

    return FromZero
