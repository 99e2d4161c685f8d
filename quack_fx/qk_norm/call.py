"""Checks and conversions of what users pass.

In: example inputs, a model. Out: call arguments; `StripError` for a wrapped model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from quack_fx.errors import StripError
from quack_fx.graph.capture import first_wrapped

Inputs = Sequence[Any] | Mapping[str, Any]
"""Example inputs of a forward: positional arguments, or keyword arguments."""


def call_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments."""
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a wrapped or sharded model: its wrapper holds the parameters and would not see them change.

    Raises:
        StripError: The model is wrapped or sharded.
    """
    if where := first_wrapped(model):
        raise StripError(f"{where}; take QK norms out, or put them in, before the model is wrapped or sharded")
