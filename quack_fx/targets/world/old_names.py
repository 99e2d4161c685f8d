"""Names that Python, numpy and transformers have removed or moved, and that older model files still use.

Out: a context in which removed names of Python and numpy exist (`collections.Iterable`, `numpy.float`) with their
former meaning; for a name that a user's file imports from transformers, its value today. What objects of transformers
had before is in `old_transformers.py`.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

from quack_fx.targets.world.old_transformers import as_before, as_today

_NUMPY: dict[str, Any] = {"float": float, "int": int, "bool": bool, "object": object, "complex": complex, "str": str}
_COLLECTIONS = ("Callable", "Iterable", "Iterator", "Mapping", "MutableMapping", "Sequence", "Hashable", "Sized")


@contextmanager
def old_names() -> Iterator[None]:
    """Context in which the removed names exist."""
    names: list[tuple[ModuleType, str, Any]] = [(collections, n, getattr(collections.abc, n)) for n in _COLLECTIONS]
    if importlib.util.find_spec("numpy") is not None:
        import numpy

        names += [(numpy, name, value) for name, value in _NUMPY.items()]
    with ExitStack() as stack:
        for module, name, value in names:
            if name not in vars(module):
                stack.enter_context(patch.object(module, name, value, create=True))
        stack.enter_context(patch.object(dataclasses, "dataclass", _dataclass))
        stack.callback(as_today)
        yield


_strict_dataclass = dataclasses.dataclass


def _identity(value: Any) -> Any:
    return value


def _dataclass(cls: Any = None, /, **options: Any) -> Any:
    """`dataclasses.dataclass` as before Python 3.11: of defaults it refuses lists, dicts and sets only."""
    if cls is None:
        return functools.partial(_dataclass, **options)
    for name, value in list(vars(cls).items()) if isinstance(cls, type) else ():
        plain = isinstance(value, list | dict | set | dataclasses.Field) or name.startswith("__")
        if not plain and type(value).__hash__ is None and name in vars(cls).get("__annotations__", {}):
            setattr(cls, name, dataclasses.field(default_factory=functools.partial(_identity, value)))
    return _strict_dataclass(cls, **options)


_MOVED = ("pytorch_utils", "utils", "modeling_utils", "cache_utils")
"""Modules of transformers in which names are looked up that were moved."""
_ONLY_DOCUMENTS = re.compile(r"(add|replace)_\w*docstrings\w*")
"""Decorators that write docstrings, whose options differ between versions."""


def today(module: str, name: str, is_there: bool) -> Any:
    """The value today of a name that is imported from a module; None where nothing has changed."""
    if module.split(".")[0] != "transformers":
        return None
    as_before()
    if _ONLY_DOCUMENTS.fullmatch(name):
        return as_it_is
    for place in () if is_there else _MOVED:
        try:
            return getattr(importlib.import_module(f"transformers.{place}"), name)
        except (ImportError, AttributeError):
            continue
    return None


def as_it_is(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    """A decorator with options that changes nothing."""
    return lambda decorated: decorated
