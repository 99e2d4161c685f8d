"""Forwards that use inference mode run under no_grad instead.

In: nothing. Out: a context in which `torch.inference_mode`, as a decorator or a context, is `torch.no_grad`. Tensors
made in inference mode can be neither viewed nor differentiated outside it, and recording a forward does both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def without_inference_mode() -> Iterator[None]:
    """Context in which inference mode is no_grad."""

    def enter(self: Any) -> None:
        self._instead = torch.no_grad() if self.mode else nullcontext()
        self._instead.__enter__()

    def leave(self: Any, *exc: Any) -> None:
        self._instead.__exit__(*exc)

    with patch.object(torch.inference_mode, "__enter__", enter), patch.object(torch.inference_mode, "__exit__", leave):
        yield
