"""What a recorded forward must leave unchanged: the model's attributes, the random state, global settings.

In: a model. Out: a context in which its forward may run; afterwards every module has the attributes, buffers, hooks and
submodules that it had before, and the random generators of torch and Python and torch's fast paths are restored.
(The *values* of buffers are kept by the recorder, which passes a copy to every op.)
"""

from __future__ import annotations

import functools
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes  # private: there is no public way out of a mode

from quack_fx.graph.forward.eager import op_by_op


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Context in which `model`'s forward may run without lasting effects."""
    before = [(module, Snapshot(module)) for module in model.modules()]
    python_rng = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]), op_by_op():
            yield
    finally:
        random.setstate(python_rng)
        for module, snapshot in before:
            snapshot.restore(module)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Context in which ops are not recorded, and tensors report their real device."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


@contextmanager
def no_autocast() -> Iterator[None]:
    """Context in which autocast does nothing: it would cast real tensors, but not fake ones."""
    original = torch.autocast.__init__

    def init(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        original(self, "cpu", enabled=False)

    with patch.object(torch.autocast, "__init__", init):
        yield


class Snapshot:
    """A module's attributes, with what its containers hold."""

    def __init__(self, module: nn.Module) -> None:
        self._attributes = dict(vars(module))
        # Most containers of a module are empty, and a large model has millions: nothing is copied for those.
        self._contents = {
            n: (kind(v) if v else None)
            for n, v in self._attributes.items()
            if (kind := _kind_of(v.__class__)) is not None
        }

    def holds(self, module: nn.Module) -> bool:
        """Whether the module still has the very same attributes, and its containers hold the very same things."""
        now = vars(module)
        return (
            len(now) == len(self._attributes)
            and all(name in now and now[name] is value for name, value in self._attributes.items())
            and all(_same(self._attributes[name], content) for name, content in self._contents.items())
        )

    def restore(self, module: nn.Module) -> None:
        """Give the module back what it had."""
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
    """The plain container that a class is one of."""
    return next((plain for plain in (dict, list, set) if issubclass(kind, plain)), None)


def _same(value: Any, content: Any) -> bool:
    """Whether a container holds the very same things, in the same order; None is an empty one."""
    if content is None:
        return not value
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(map(operator.is_, value.values(), content.values())) and all(map(operator.is_, value, content))
    if isinstance(value, set):
        return set(map(id, value)) == set(map(id, content))
    return all(map(operator.is_, value, content))
