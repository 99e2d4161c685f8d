"""A module of weights by name and a function that uses them: the smallest way to write an attention by hand."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Toy(nn.Module):
    """Weights by name and a function that uses them."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)
