"""What a recorded forward must leave as it was: the model's attributes, random numbers, global switches.

In: a model. Out: a context in which its forward may run; afterwards every module has the attributes, buffers, hooks and
submodules that it had before, and the random generators of torch and Python and torch's fast paths are restored.
(That buffers keep their *values* is the recorder's work: it hands every op a copy.)
"""

from __future__ import annotations

import operator
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Context in which `model`'s forward may run without leaving a trace."""
    before = [(module, _snapshot(module)) for module in model.modules()]
    python_rng = random.getstate()
    # nn.MultiheadAttention and TransformerEncoder would otherwise run as one opaque op.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # A model wrapped in torch.compile, or that compiles a part of itself, must run op by op to be seen.
        with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"), _autocast_knows_meta():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        random.setstate(python_rng)
        for module, snapshot in before:
            _restore(module, *snapshot)


@contextmanager
def _autocast_knows_meta() -> Iterator[None]:
    """Let models write `torch.autocast(x.device.type)` where x is fake: torch refuses the device type "meta"."""
    original = torch.autocast.__init__

    def init(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        if device_type == "meta":
            device_type, args, kwargs = "cpu", (), {"enabled": False}
        original(self, device_type, *args, **kwargs)

    with patch.object(torch.autocast, "__init__", init):
        yield


_CONTAINERS = frozenset({dict, OrderedDict, list, set})


def _snapshot(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's attributes, and copies of those that are plain containers (None for an empty one)."""
    attributes = dict(vars(module))
    contents = {n: v.copy() if v else None for n, v in attributes.items() if v.__class__ in _CONTAINERS}
    return attributes, contents


def _restore(module: nn.Module, attributes: dict[str, Any], contents: dict[str, Any]) -> None:
    now = vars(module)
    for name in now.keys() - attributes.keys():
        del now[name]
    now.update(attributes)
    for name, content in contents.items():
        value = attributes[name]
        if content is None:
            if value:
                value.clear()
        elif isinstance(value, list):
            value[:] = content
        elif not _same(value, content):
            value.clear()
            value.update(content)


def _same(value: Any, content: Any) -> bool:
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        return all(map(operator.is_, value.values(), content.values())) and list(value) == list(content)
    return bool(value == content)
