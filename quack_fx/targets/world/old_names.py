"""Names that Python and packages have given up, moved or narrowed, and that older model files still use.

In: nothing, or a name that a user's file imports. Out: a context in which the names of Python and numpy are there:
`numpy.float`, `collections.Iterable`; for one of another package, what it means today. They mean what they meant.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

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
        with patch.object(dataclasses, "dataclass", _dataclass):
            yield
    finally:
        for module, name in given:
            delattr(module, name)
        while _LENT:
            delattr(*_LENT.pop())


_strict_dataclass = dataclasses.dataclass


def _same(value: Any) -> Any:
    return value


def _dataclass(cls: Any = None, /, **options: Any) -> Any:
    """`dataclasses.dataclass` as before Python 3.11: an object without a hash may be a default, a list may not."""
    if cls is None:
        return functools.partial(_dataclass, **options)
    for name, value in list(vars(cls).items()) if isinstance(cls, type) else ():
        plain = isinstance(value, list | dict | set | dataclasses.Field) or name.startswith("__")
        if not plain and type(value).__hash__ is None and name in vars(cls).get("__annotations__", {}):
            setattr(cls, name, dataclasses.field(default_factory=functools.partial(_same, value)))
    return _strict_dataclass(cls, **options)


_MOVED = {"transformers": ("pytorch_utils", "utils", "modeling_utils", "cache_utils")}
"""Where else a package keeps what its other modules had before."""
_ONLY_DOCUMENTS = re.compile(r"(add|replace)_\w*docstrings\w*")
"""Decorators that write documentation, whose options differ between versions."""


_LENT: list[tuple[type, str]] = []
"""Attributes that classes of packages have until `old_names` ends."""


def _lend(package: str) -> None:
    """Give classes of a package what subclasses and configs of before rely on; only those that are loaded by now."""
    if package != "transformers":
        return
    length = property(lambda self: self.n_positions, lambda self, value: setattr(self, "n_positions", value))
    lent: list[tuple[str, str, str, Any]] = [
        # `post_init` sets them, which ends constructors only today.
        ("modeling_utils", "PreTrainedModel", "all_tied_weights_keys", {}),
        ("modeling_utils", "PreTrainedModel", "get_head_mask", _no_head_mask),
        ("modeling_utils", "PreTrainedModel", "invert_attention_mask", _inverted_mask),
        ("configuration_utils", "PreTrainedConfig", "n_ctx", length),
    ]
    for module, owner, name, value in lent:
        cls = getattr(sys.modules.get(f"{package}.{module}"), owner, None)
        if cls is not None and not hasattr(cls, name):
            setattr(cls, name, value)
            _LENT.append((cls, name))


def _no_head_mask(self: Any, head_mask: Any, num_hidden_layers: int, *args: Any) -> list[None]:
    """`PreTrainedModel.get_head_mask`, for a forward that is given none."""
    if head_mask is not None:
        raise NotImplementedError("masks of heads are gone from transformers; leave head_mask out")
    return [None] * num_hidden_layers


def _inverted_mask(self: Any, encoder_attention_mask: Tensor) -> Tensor:
    """`PreTrainedModel.invert_attention_mask`: what is added to logits for a mask of keys, [B, T] or [B, S, T]."""
    seen = encoder_attention_mask.to(self.dtype)
    seen = seen[:, None, None, :] if seen.dim() == 2 else seen[:, None]
    return (1.0 - seen) * torch.finfo(self.dtype).min


def today(module: str, name: str, is_there: bool) -> Any:
    """What a name imported from a module of a package means today, where that differs; None where it does not."""
    package = module.split(".")[0]
    if package not in _MOVED:
        return None
    _lend(package)
    if _ONLY_DOCUMENTS.fullmatch(name):
        return _as_it_is
    for place in () if is_there else _MOVED[package]:
        try:
            return getattr(importlib.import_module(f"{package}.{place}"), name)
        except (ImportError, AttributeError):
            continue
    return None


def _as_it_is(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    """A decorator that is called with options."""
    return lambda decorated: decorated
