"""What an adapter is, and what adapters share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import nn

from quack_fx.errors import TargetError
from quack_fx.targets.files import Namespace, name_and_text
from quack_fx.targets.inputs.values import Inputs
from quack_fx.targets.pick import Recipe

Examples = Callable[[nn.Module], list[Inputs]]
"""Gives inputs for a model, likeliest first; none where they are to be inferred."""


@dataclass(frozen=True)
class Adapted:
    """What an adapter makes of a target: names for --build and --inputs, and how the model is built.

    `examples` gives inputs for the model, unless they are to be inferred. `smaller` gives small targets of the same
    structure, smallest first, each with its size in words ("2 layers, width 64"): a proof for a large model runs on one
    of them.
    """

    namespace: Namespace
    recipe: Recipe
    examples: Examples | None = None
    smaller: Callable[[], Iterator[tuple[Adapted, str]]] | None = None


@dataclass(frozen=True)
class Adapter:
    """A way to write a target, such as "timm:NAME" (`form`).

    `open` makes an `Adapted` of what follows the prefix and, for errors, the target as typed; `prefix` is what precedes
    the colon. `takes` tells whether the adapter takes a target without a prefix.
    """

    form: str
    open: Callable[[str, str], Adapted]
    prefix: str = ""
    takes: Callable[[str], bool] | None = None


def package(name: str, typed: str) -> ModuleType:
    """Import a package, or a module in one, that a target needs; the package has the same name on PyPI."""
    root = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except Exception as error:
        if not isinstance(error, ModuleNotFoundError):
            raise TargetError(f"{typed!r} needs {root}, whose import fails: {name_and_text(error)}") from error
        if error.name == root:
            raise TargetError(f"{typed!r} needs {root}: pip install {root}") from error
        raise TargetError(
            f"{typed!r} needs the module {error.name!r}, which {name} imports and is not installed; install it, too"
        ) from error


def saved_file(rest: str, typed: str) -> Path:
    """The path of a saved file that a target names; it holds one model, so a name after a colon is refused."""
    path = Path(rest).expanduser()
    place, _, name = rest.rpartition(":")
    if place and not path.is_file():
        raise TargetError(f"{typed!r}: {place!r} holds one model; leave ':{name}' away or take a part with --build")
    if not path.is_file():
        raise TargetError(f"{typed!r} is a folder" if path.is_dir() else f"no file {rest!r} (seen from {Path.cwd()})")
    return path
