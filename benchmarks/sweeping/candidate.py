"""What the sweep runs: one small model with inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


class CannotBeRunError(Exception):
    """A model that does not run here without quack-fx either: it needs files or a package, or is broken."""


@dataclass(frozen=True)
class Candidate:
    """One model of a package.

    Attributes:
        package: Package that defines it.
        family: Row of the published table: a model type of transformers, a module of timm.
        name: Its class or architecture.
        build: Builds it, small, in evaluation mode and with real weights, and gives it with the arguments and keyword
            arguments of one forward call; raises where that cannot be done, `CannotBeRunError` (or `ImportError`)
            where it is not for want of a better configuration or better inputs.
    """

    package: str
    family: str
    name: str
    build: Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]
