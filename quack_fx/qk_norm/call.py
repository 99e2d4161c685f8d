"""Example inputs as users give them, and the call arguments that they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Inputs = Sequence[Any] | Mapping[str, Any]
"""Example inputs of a forward: positional arguments, or keyword arguments."""


def call_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments."""
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
