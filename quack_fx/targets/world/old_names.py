"""Names that Python and numpy have given up and that older model files still use.

In: nothing. Out: a context in which they are there: `numpy.float`, `collections.Iterable`. They mean what they meant.
"""

from __future__ import annotations

import collections
import collections.abc
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_NUMPY: dict[str, Any] = {"float": float, "int": int, "bool": bool, "object": object, "complex": complex, "str": str}
_COLLECTIONS = ("Callable", "Iterable", "Iterator", "Mapping", "MutableMapping", "Sequence", "Hashable", "Sized")


@contextmanager
def old_names() -> Iterator[None]:
    """Context in which the old names are there."""
    given: list[tuple[ModuleType, str]] = []
    names = [(collections, name, getattr(collections.abc, name)) for name in _COLLECTIONS]
    if importlib.util.find_spec("numpy") is not None:
        import numpy

        names += [(numpy, name, value) for name, value in _NUMPY.items()]
    for module, name, value in names:
        if name not in vars(module):
            setattr(module, name, value)
            given.append((module, name))
    try:
        yield
    finally:
        for module, name in given:
            delattr(module, name)
