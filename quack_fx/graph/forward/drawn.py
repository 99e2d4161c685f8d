"""Run a forward in training mode without leaving out layers at random.

Provides a context in which uniform random draws with at most one axis are the middle of their range. LayerDrop and its
relatives compare such a draw with the rate at which they skip a layer, so at a rate of up to one half none is skipped.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MOST_DRAWS = 10_000
"""Draws in one forward after which they are random again: a loop may wait for another result."""


@contextmanager
def nothing_dropped() -> Iterator[None]:
    """Fix uniform draws of torch with at most one axis, and single ones of `random` and `numpy.random`.

    They are drawn all the same: the state of a generator tells whether the forward depends on it.
    """
    fixed = _Fixed()
    with fixed, ExitStack() as stack:
        for module in filter(None, (random, getattr(sys.modules.get("numpy"), "random", None))):
            for name in ("random", "rand", "uniform"):
                if draw := getattr(module, name, None):
                    stack.enter_context(patch.object(module, name, fixed.number(draw)))
        yield


class _Fixed(TorchFunctionMode):
    """Function mode that fixes the draws of torch."""

    def __init__(self) -> None:
        super().__init__()
        self._left = MOST_DRAWS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = func(*args, **kwargs)
        if func not in _UNIFORM or drawn.dim() > 1 or not self._is_fixed():
            return drawn
        low, high = _range(*args[1:], **kwargs) if func is Tensor.uniform_ else (0.0, 1.0)
        return drawn.fill_((low + high) / 2)

    def number(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        """A function that draws uniformly, in Python or numpy, with the middle in place of a single number."""

        def fixed(*args: Any, **kwargs: Any) -> Any:
            drawn = draw(*args, **kwargs)
            if not isinstance(drawn, float) or not self._is_fixed():
                return drawn
            low, high = _range(*args, **kwargs) if draw.__name__ == "uniform" else (0.0, 1.0)
            return (low + high) / 2

        return fixed

    def _is_fixed(self) -> bool:
        self._left -= 1
        return self._left >= 0


def _range(*args: float, **kwargs: Any) -> tuple[float, float]:
    """The range that a function is asked for; torch, Python and numpy name its ends differently."""
    low, high = [*args, *(0.0, 1.0)[len(args) :]][:2]
    for name, value in kwargs.items():
        low = value if name in ("from", "a", "low") else low
        high = value if name in ("to", "b", "high") else high
    return low, high


_UNIFORM = {torch.rand, torch.rand_like, Tensor.uniform_}
