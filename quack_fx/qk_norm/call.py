"""What users give: example inputs, as the call arguments that they stand for, and models, which must not be wrapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from quack_fx.errors import StripError
from quack_fx.graph.capture import first_wrapped

Inputs = Sequence[Any] | Mapping[str, Any]
"""Example inputs of a forward: positional arguments, or keyword arguments."""


def call_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments."""
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that is wrapped or sharded: what holds its parameters would not see that they change.

    Raises:
        StripError: It is.
    """
    if where := first_wrapped(model):
        raise StripError(f"{where}; take QK norms out, or put them in, before the model is wrapped or sharded")
