"""Run a forward op by op, with ops that can be recorded and differentiated.

Provides a context in which `torch.compile` runs eagerly, torch's attention layers skip their fast path (one opaque op),
and `torch.inference_mode`, as a decorator or a context, acts as `torch.no_grad`: tensors made in inference mode can be
neither viewed nor differentiated outside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def op_by_op() -> Iterator[None]:
    """Disable compilation, the attention fast path and inference mode."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"), _without_inference_mode():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _without_inference_mode() -> Iterator[None]:
    def enter(self: Any) -> None:
        self._instead = torch.no_grad() if self.mode else nullcontext()
        self._instead.__enter__()

    def leave(self: Any, *exc: Any) -> None:
        self._instead.__exit__(*exc)

    with patch.object(torch.inference_mode, "__enter__", enter), patch.object(torch.inference_mode, "__exit__", leave):
        yield
