"""Example inputs as users give them, and as the arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Inputs = Sequence[Any] | Mapping[str, Any]
"""Example inputs of a forward: positional ones, or named ones."""


def call_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments."""
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
