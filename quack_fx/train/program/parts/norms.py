"""Removes QK norms from the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


class PassThrough(nn.Module):
    """Replaces a QK norm: returns its first inputs, times a number."""

    def __init__(self, tensors: int = 1, factor: float = 1.0) -> None:
        super().__init__()
        self.tensors, self.factor = tensors, factor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first inputs, times the number."""
        given = (*args, *kwargs.values())[: self.tensors]
        kept = given if self.factor == 1 else tuple(x * self.factor for x in given)
        return kept[0] if self.tensors == 1 else kept


def strip_qk_norm(model: nn.Module) -> nn.Module:
    """Remove the QK norms from the model, in place; call it on every new model before creating its optimizer."""
    for name, stand_in in qk_norms():
        model.set_submodule(name, stand_in)
    return model


def check_stripped(model: nn.Module) -> None:
    """Refuse a model that still has QK norms."""
    modules = {name.removeprefix("module.").replace("_orig_mod.", ""): one for name, one in model.named_modules()}
    for name, _ in qk_norms():
        if not isinstance(modules.get(name), PassThrough):
            raise ValueError(f"{name} is a QK norm still; call strip_qk_norm(model) before the optimizer is made")


def qk_norms() -> Iterator[tuple[str, PassThrough]]:
    """The QK norms and their replacements; the generator writes this function for the model."""
    yield from ()
