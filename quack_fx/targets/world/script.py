"""Runs a training script only as far as its model.

Out: `as_script`, a context in which a file runs as `python FILE` would, required arguments of parsers get made-up
values, and the first gradient raises `TrainingBegins`, since the model exists by then; and `before_training`, a context
in which repeated forward passes raise it, too: a script may evaluate many losses before its first step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from quack_fx.targets.sizes.made_up import made_up

RUNS = 3
"""Forward passes that a file may run while it is imported, to measure sizes or as an example."""


class TrainingBegins(BaseException):
    """A file begins to train while it is imported. Not an Exception, so that handlers in the file do not catch it."""


STOPS = (Exception, SystemExit, TrainingBegins)
"""What code of the user's may raise while it is imported."""


def begins(*args: Any, **kwargs: Any) -> Any:
    """Replaces functions that compute gradients."""
    raise TrainingBegins


@contextmanager
def as_script(file: str) -> Iterator[None]:
    """Context in which a file runs as `python FILE` would."""
    parse = argparse.ArgumentParser.parse_known_args

    def lenient(self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        for action in self._actions:
            needs = action.required and not isinstance(action, argparse._SubParsersAction)
            if needs and args is None:
                kind = action.type if isinstance(action.type, type) else None
                value = next(iter(action.choices)) if action.choices else made_up(action.dest, kind)
                action.default, action.required = value, False
                if not action.option_strings:
                    action.nargs = "?"
        return parse(self, args, namespace)

    with (
        patch.object(sys, "argv", [file]),
        patch.object(argparse.ArgumentParser, "parse_known_args", lenient),
        patch.object(torch.Tensor, "backward", begins),
        patch.object(torch.autograd, "backward", begins),
    ):
        yield


@contextmanager
def before_training() -> Iterator[None]:
    """Context in which a file stops where it begins to train."""
    run, depth, runs = nn.Module.__call__, 0, 0

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal depth, runs
        runs += depth == 0
        if runs > RUNS:
            raise TrainingBegins
        depth += 1
        try:
            return run(self, *args, **kwargs)
        finally:
            depth -= 1

    with patch.object(nn.Module, "__call__", counted), patch.object(torch.autograd, "grad", begins):
        yield
