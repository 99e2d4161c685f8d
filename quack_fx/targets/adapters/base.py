"""What an adapter is, and what adapters share: package imports, suggestions of names.

In: what a user typed. Out: `Adapted`: the names that expressions may use, how the model is built, and example inputs
where the source of the model has better ones than can be inferred.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import nn

from quack_fx.errors import TargetError
from quack_fx.targets.files import Namespace, name_and_text
from quack_fx.targets.inputs.values import Inputs
from quack_fx.targets.pick import Recipe

Examples = Callable[[nn.Module], list[Inputs]]
"""Gives inputs for a model, most likely first; none where they are to be inferred."""


@dataclass(frozen=True)
class Adapted:
    """What an adapter makes of a target.

    Attributes:
        namespace: The names for --build and --inputs: the package, and what the adapter made of the target.
        recipe: How the model is built.
        examples: Gives inputs for the model; None to infer them.
        smaller: Gives small targets of the same structure, the smallest first, each with its size in words ("2 layers,
            width 64"): a proof for a large model runs on one of them. None where there are none.
    """

    namespace: Namespace
    recipe: Recipe
    examples: Examples | None = None
    smaller: Callable[[], Iterator[tuple[Adapted, str]]] | None = None


@dataclass(frozen=True)
class Adapter:
    """A way to write a target.

    Attributes:
        form: How such a target is written: "timm:NAME".
        open: Makes an `Adapted` of what follows the prefix and, for errors, the target as typed.
        prefix: What precedes the colon; empty for targets without a prefix.
        takes: Whether the adapter takes a target without a prefix; None if it takes none.
    """

    form: str
    open: Callable[[str, str], Adapted]
    prefix: str = ""
    takes: Callable[[str], bool] | None = None


def package(name: str, typed: str) -> ModuleType:
    """Import a package that a target needs.

    Arguments:
        name: The package or a module in it; the distribution on PyPI has the name of the package.
        typed: The target, for the error.

    Raises:
        TargetError: It is not installed, or its import fails; with what to type.
    """
    root = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == root:
            raise TargetError(f"{typed!r} needs {root}: pip install {root}") from error
        if isinstance(error, ModuleNotFoundError):
            raise TargetError(
                f"{typed!r} needs the module {error.name!r}, which {name} imports and is not installed; install it, too"
            ) from error
        raise TargetError(f"{typed!r} needs {root}, whose import fails: {name_and_text(error)}") from error


def saved_file(rest: str, typed: str) -> Path:
    """The path of a saved file that a target names; a name after a colon is refused, as the file holds one model.

    Raises:
        TargetError: There is no such file, or a name follows it.
    """
    path = Path(rest).expanduser()
    place, _, name = rest.rpartition(":")
    if place and not path.is_file():
        raise TargetError(f"{typed!r}: {place!r} holds one model; leave ':{name}' away or take a part with --build")
    if not path.is_file():
        raise TargetError(f"{typed!r} is a folder" if path.is_dir() else f"no file {rest!r} (seen from {Path.cwd()})")
    return path


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """A hint for an unknown name: the nearest known ones, or else `otherwise`."""
    close = difflib.get_close_matches(name, list(known), 3)
    return f"did you mean {' or '.join(close)}?" if close else otherwise
