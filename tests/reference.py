"""What QuacK is by definition: a plain optimizer over a model in which every head is a group of its own.

The heads' rows are copied out of a model's weights by a layout whose sites have one block of queries and one of keys.
Gradients are taken from the model that is tested, and the weights that come out are compared with its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_fx import QKLayout
from quack_fx.layout import AttentionSite


class Reference:
    """The model's weights with every head's rows in a group of their own, and an optimizer over them.

    Arguments:
        model: The model with its initial weights.
        layout: Its layout.
        make: The optimizer, from groups.
        lr: Learning rate of what has no heads; may be changed.
        tau: As QuacK's; may be changed.
    """

    def __init__(
        self, model: nn.Module, layout: QKLayout, make: Callable[[Any], Optimizer], lr: float, tau: float = 1.0
    ) -> None:
        self.lr, self.tau, self.layout = lr, tau, layout
        params = dict(model.named_parameters())
        self.parts: dict[str, list[tuple[list[int], nn.Parameter]]] = {name: [] for name in params}
        self.heads: dict[tuple[str, str, int], list[nn.Parameter]] = {}
        for site in layout.sites:
            for side, (block,) in (("q", site.query), ("k", site.key)):
                for h, ranges in enumerate(block.heads):
                    rows = [row for start, stop in ranges for row in range(start, stop)]
                    names = [name for name in (block.param, block.bias) if name is not None]
                    self.heads[site.name, side, h] = [self._part(params, name, rows) for name in names]
        groups = [{"params": own, "lr": lr} for own in self.heads.values()]
        rest = []
        for name, param in params.items():
            taken = {row for rows, _ in self.parts[name] for row in rows}
            if not taken:
                self.parts[name].append(([], nn.Parameter(param.detach().clone())))
                rest.append(self.parts[name][-1][1])
            elif others := [row for row in range(len(param)) if row not in taken]:
                rest.append(self._part(params, name, others))
        self.optimizer = make([*groups, {"params": rest, "lr": lr}])
        self.init = self.factors()

    def _part(self, params: dict[str, nn.Parameter], name: str, rows: list[int]) -> nn.Parameter:
        part = nn.Parameter(params[name].detach()[rows].clone())
        self.parts[name].append((rows, part))
        return part

    def factors(self) -> list[float]:
        """Factors in the order of the groups, by the loops of Alg. 1; infinite where what a head meets is zero."""
        return [factor for site in self.layout.sites for factor in self._factors(site)]

    def _factors(self, site: AttentionSite) -> list[float]:
        norms = {
            side: [self._norm(self.heads[site.name, side, h]) for h in range(len(blocks[0].heads))]
            for side, blocks in (("q", site.query), ("k", site.key))
        }
        met = {
            "q": [norms["k"][site.head_map[h]] for h in range(len(norms["q"]))],
            "k": [
                max(norms["q"][h] for h in range(len(norms["q"])) if site.head_map[h] == g)
                for g in range(len(norms["k"]))
            ],
        }
        return [1 / norm if norm else math.inf for side in ("q", "k") for norm in met[side]]

    @staticmethod
    def _norm(params: list[nn.Parameter]) -> float:
        return math.sqrt(sum(float(p.detach().double().square().sum()) for p in params))

    def scales(self) -> list[float]:
        """The scale of each group with a head."""
        now = zip(self.factors(), self.init, strict=True)
        return [self.tau * (factor / first if math.isfinite(factor) else 1.0) for factor, first in now]

    def take(self, model: nn.Module) -> None:
        """Take the model's gradients, each part its own."""
        for name, param in model.named_parameters():
            for rows, part in self.parts[name]:
                part.grad = None if param.grad is None else param.grad[rows].clone() if rows else param.grad.clone()

    def clip(self, most: float) -> None:
        """Clip all gradients by their total norm."""
        nn.utils.clip_grad_norm_([part for parts in self.parts.values() for _, part in parts], most)

    def step(self) -> None:
        """A plain step, with the learning rate of each head."""
        for group, scale in zip(self.optimizer.param_groups, [*self.scales(), 1.0], strict=True):
            group["lr"] = self.lr * scale
        self.optimizer.step()

    @torch.no_grad()
    def pull(self, model: nn.Module) -> None:
        """Take the model's weights, after somebody has written them."""
        for name, param in model.named_parameters():
            for rows, part in self.parts[name]:
                part.copy_(param[rows] if rows else param)

    @torch.no_grad()
    def off(self, model: nn.Module) -> float:
        """How far the model is: the largest relative error of a weight."""
        errors = [0.0]
        for name, param in model.named_parameters():
            whole = torch.empty_like(param)
            for rows, part in self.parts[name]:
                if rows:
                    whole[rows] = part
                else:
                    whole.copy_(part)
            errors.append(relative_error(param, whole))
        return max(errors)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of a weight; infinite where one of the two is not finite."""
    error = float((found - expected).detach().norm() / expected.detach().norm().clamp_min(1e-30))
    return error if math.isfinite(error) else math.inf
