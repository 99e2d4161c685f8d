"""Undo what a recorded forward changes in the model, the random state and global settings.

In: a model. Out: a context in which its forward may run. On exit, every module gets back its attributes, buffers, hooks
and submodules, and the RNGs of torch, Python and numpy and torch's fast-path setting are restored. (The *values* of
buffers never change: the recorder passes copies to the ops.)
"""

from __future__ import annotations

import functools
import operator
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes  # private: there is no public way to leave a mode

from quack_fx.graph.forward.eager import op_by_op


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Run `model`'s forward in this context without lasting effects."""
    before = [(module, Snapshot(module)) for module in model.modules()]
    python, numpy = random_states()
    try:
        with torch.random.fork_rng(devices=[]), op_by_op():
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)
        for module, snapshot in before:
            snapshot.restore(module)


def random_states() -> tuple[Any, Any]:
    """States of the RNGs of Python and numpy; None for numpy where it was not imported."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state(legacy=False)


def seed_all(number: int) -> None:
    """Seed the RNGs of torch on the CPU, of Python and of numpy."""
    torch.default_generator.manual_seed(number)
    random.seed(number)
    if numpy := sys.modules.get("numpy"):
        with suppress(TypeError):  # it has another generator, without a seed
            numpy.random.seed(number)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Disable recording; tensors report their actual device."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


@contextmanager
def no_autocast() -> Iterator[None]:
    """Disable autocast, which would cast real tensors but not fake ones."""
    original = torch.autocast.__init__

    def init(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu", enabled=False)

    with patch.object(torch.autocast, "__init__", init):
        yield


class Snapshot:
    """A module's attributes and the contents of its containers."""

    def __init__(self, module: nn.Module) -> None:
        self._attributes = dict(vars(module))
        # A large model has millions of containers, most of them empty: an empty one is stored as None.
        self._contents = {
            n: (kind(v) if v else None)
            for n, v in self._attributes.items()
            if (kind := _kind_of(v.__class__)) is not None
        }

    def holds(self, module: nn.Module) -> bool:
        """Whether the module's attributes and the contents of its containers are still the same objects."""
        now = vars(module)
        return (
            len(now) == len(self._attributes)
            and all(name in now and now[name] is value for name, value in self._attributes.items())
            and all(_same(self._attributes[name], content) for name, content in self._contents.items())
        )

    def restore(self, module: nn.Module) -> None:
        """Restore the module's attributes and the contents of its containers."""
        now = vars(module)
        for name in now.keys() - self._attributes.keys():
            del now[name]
        now.update(self._attributes)
        for name, content in self._contents.items():
            value = self._attributes[name]
            if not _same(value, content):
                value.clear()
                if content is not None:
                    (value.extend if isinstance(value, list) else value.update)(content)


@functools.cache
def _kind_of(kind: type) -> type | None:
    """Return which of dict, list and set a class derives from, or None."""
    return next((plain for plain in (dict, list, set) if issubclass(kind, plain)), None)


def _same(value: Any, content: Any) -> bool:
    """Whether a container holds the same objects in the same order; a `content` of None means empty."""
    if content is None:
        return not value
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(map(operator.is_, value.values(), content.values())) and all(map(operator.is_, value, content))
    if isinstance(value, set):
        return set(map(id, value)) == set(map(id, content))
    return all(map(operator.is_, value, content))
