"""A candidate of the sweep: one small model with inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


class CannotBeRunError(Exception):
    """The model does not run here even without quack-fx: it needs files or a package, or is broken."""


@dataclass(frozen=True)
class Candidate:
    """One model of a package.

    Attributes:
        package: Package that defines it.
        family: Row of the published table: a model type of transformers, a module of timm.
        name: Its class or architecture.
        build: Builds a small version in evaluation mode with real weights, and returns it with positional and keyword
            arguments of one forward call. Raises if that fails: `CannotBeRunError` (or `ImportError`) if no other
            configuration or inputs would help.
    """

    package: str
    family: str
    name: str
    build: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]
