"""Configs and parts that the target's files have ready: objects with the fields that are read, classes of modules.

In: the names of a file, and the fields that code reads off a config, or the class that a part has to be of. Out: the
objects and classes that do, each with the expression that names it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from quack_fx.targets.sizes.signatures import required


@dataclass(frozen=True)
class Wanted:
    """Fields that code reads off a config: as attributes, and as keys."""

    attributes: set[str]
    keys: set[str]

    def of(self, value: Any) -> dict[str, Any]:
        """Those of them that a value has."""
        if callable(value) or isinstance(value, ModuleType | nn.Module | Tensor):
            return {}
        found = {name: value[name] for name in self.keys if isinstance(value, Mapping) and name in value}
        return found | {name: getattr(value, name) for name in self.attributes if hasattr(value, name)}

    def __len__(self) -> int:
        return len(self.attributes | self.keys)


@dataclass(frozen=True)
class Ready:
    """A config that is there: the expression that names it, and those of its fields that are wanted."""

    text: str
    config: Any
    fields: dict[str, Any]


def ready_made(names: Mapping[str, Any], wanted: Wanted) -> Ready | None:
    """The object that has most of the wanted fields, at least half of them and two.

    Objects of the file count, what its functions without arguments give that are called after a config, and the first
    that does of those in a dict (`CONFIGS["small"]`).
    """
    best = None
    for ready in _sharing(names, wanted):
        if best is None or len(ready.fields) > len(best.fields):
            best = ready
    return best


def _sharing(names: Mapping[str, Any], wanted: Wanted) -> Iterator[Ready]:
    """Objects that have enough of the wanted fields."""
    for name, value in _objects(names):
        inside = [(f"{name}[{key!r}]", item) for key, item in value.items()] if isinstance(value, Mapping) else []
        for text, item in [(name, value), *inside]:
            have = wanted.of(item)
            if len(have) > 1 and 2 * len(have) >= len(wanted):
                yield Ready(text, item, have)
                break


def _objects(names: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in names.items():
        if isinstance(value, FunctionType):
            if "config" in name.lower() and not required(value):
                try:
                    yield f"{name}()", value()
                except Exception:  # it needs more than it says
                    continue
        elif not name.startswith("__"):
            yield name, value


def part_class(kind: type, is_own: Callable[[str], bool]) -> type | None:
    """The class that a part of an annotated class is made of: that class, or, where it leaves methods open, the one
    class of the loaded files that does not and that needs least. None for torch's own, or where there are several."""
    if kind.__module__.split(".")[0] == "torch":
        return None
    if not _is_open(kind):
        return kind
    below: dict[str, type] = {}
    left = [kind]
    while left:
        following: list[type] = left.pop().__subclasses__()
        below |= {c.__qualname__: c for c in following if not _is_open(c) and is_own(_file(c))}
        left += following
    needs = {name: len(required(made)) for name, made in below.items()}
    simplest = [name for name, count in needs.items() if count == min(needs.values())]
    return below[simplest[0]] if len(simplest) == 1 else None


def _is_open(made: type) -> bool:
    """Whether a class leaves methods to those below it, whatever its metaclass makes of that."""
    return any(getattr(getattr(made, name, None), "__isabstractmethod__", False) for name in dir(made))


def _file(made: type) -> str:
    return str(getattr(sys.modules.get(made.__module__), "__file__", None) or "")


def naming(made: type, names: Mapping[str, Any]) -> str:
    """The expression by which a file that has these names can name a class."""
    known = next((n for n, v in names.items() if v is made), None)
    return known or named_in(made.__module__, made.__qualname__)


def named_in(module: str, name: str) -> str:
    """The expression for a name of a module that is not imported yet."""
    return f"__import__({module!r}, fromlist=['']).{name}"


def plainly(text: str) -> str:
    """An expression without what tells where its names lie, as a title."""
    return re.sub(r"__import__\('[\w.]+', fromlist=\[''\]\)\.", "", text)
