"""Config objects and module classes that the target's files define, each with the expression for it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from quack_fx.graph.walk import walk
from quack_fx.targets.sizes.signatures import required


@dataclass(frozen=True)
class Ready:
    """An existing config: the expression for it, and its wanted fields."""

    text: str
    config: Any
    fields: dict[str, Any]


def ready_made(names: Mapping[str, Any], attributes: set[str], keys: set[str]) -> Ready | None:
    """The first object with most of the wanted attributes and keys: at least two, and half of them.

    Candidates are objects of the file, results of its functions without arguments whose name contains "config", and of
    a dict of objects (`CONFIGS["small"]`) the first that fits.
    """
    found = []
    for name, value in _objects(names):
        inside = [(f"{name}[{key!r}]", item) for key, item in value.items()] if isinstance(value, Mapping) else []
        for text, item in [(name, value), *inside]:
            fields = _fields(item, attributes, keys)
            if len(fields) > 1 and 2 * len(fields) >= len(attributes | keys):
                found.append(Ready(text, item, fields))
                break
    return max(found, key=lambda ready: len(ready.fields), default=None)


def _fields(value: Any, attributes: set[str], keys: set[str]) -> dict[str, Any]:
    """The wanted fields that a value has."""
    if callable(value) or isinstance(value, ModuleType | nn.Module | Tensor):
        return {}
    found = {name: value[name] for name in keys if isinstance(value, Mapping) and name in value}
    return found | {name: getattr(value, name) for name in attributes if hasattr(value, name)}


def _objects(names: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in names.items():
        if isinstance(value, FunctionType):
            if "config" in name.lower() and not required(value):
                try:
                    yield f"{name}()", value()
                except Exception:  # it may read files or arguments
                    continue
        elif not name.startswith("__"):
            yield name, value


def part_class(kind: type, is_own: Callable[[str], bool]) -> type | None:
    """The class to build a submodule from: its annotated class or, if that is abstract, the subclass in the user's
    files with the fewest required arguments. None for a class of torch, or where several subclasses have as few."""
    if kind.__module__.split(".")[0] == "torch":
        return None
    if not is_abstract(kind):
        return kind
    derived: Iterator[type] = walk(kind.__subclasses__(), type.__subclasses__)
    files = {c: str(getattr(sys.modules.get(c.__module__), "__file__", None) or "") for c in derived}
    below = {c.__qualname__: c for c, file in files.items() if not is_abstract(c) and is_own(file)}
    needs = {made: len(required(made)) for made in below.values()}
    simplest = [made for made, count in needs.items() if count == min(needs.values())]
    return simplest[0] if len(simplest) == 1 else None


def is_abstract(made: type) -> bool:
    """Whether a class has abstract methods, also without the metaclass ABCMeta."""
    return any(getattr(getattr(made, name, None), "__isabstractmethod__", False) for name in dir(made))


def naming(made: type, names: Mapping[str, Any]) -> str:
    """The expression for a class in a file with these names."""
    known = next((n for n, v in names.items() if v is made), None)
    return known or named_in(made.__module__, made.__qualname__)


def named_in(module: str, name: str) -> str:
    """The expression for a name of a module that the file has not imported."""
    return f"__import__({module!r}, fromlist=['']).{name}"


def plainly(text: str) -> str:
    """An expression without the imports that `named_in` writes, for titles."""
    return re.sub(r"__import__\('[\w.]+', fromlist=\[''\]\)\.", "", text)
