"""USER: how functions are compiled.

In: the user's options. Out: a `Compiler`: it wraps each function as that function needs it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compiler:
    """torch.compile with the user's options, or nothing.

    Attributes:
        on: Whether to compile at all.
        mode: `mode` of torch.compile.
    """

    on: bool
    mode: str | None

    def __call__(
        self, function: Callable[..., Any], sizes: Literal["any", "fixed", "same"], fullgraph: bool = False
    ) -> Callable[..., Any]:
        """The function, compiled.

        Arguments:
            function: The function.
            sizes: "fixed": each new size of its arguments is compiled anew. "same": there is nothing to check before
                a call, for whoever calls gives tensors that look the same each time.
            fullgraph: Whether it has to be one graph.
        """
        if not self.on:
            return function
        if sizes != "same":
            dynamic = None if sizes == "any" else False
            return torch.compile(function, mode=self.mode, dynamic=dynamic, fullgraph=fullgraph)
        unchecked = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        options = (torch._inductor.list_mode_options(self.mode) if self.mode else {}) | unchecked
        return torch.compile(function, options=options, dynamic=False, fullgraph=fullgraph)

    def stays(self, tensors: Iterable[Tensor | None]) -> None:
        """Tell CUDA graphs that tensors stay where they are, so that they are written in place."""
        for tensor in tensors if self.on and self.mode else ():
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor, guard=False)

    def begins(self) -> None:
        """Tell CUDA graphs that a step begins: what those of the last one gave is not needed any more."""
        if self.on and self.mode:
            torch.compiler.cudagraph_mark_step_begin()


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own.

    torch.compile keeps its graphs, and counts its recompiles against a limit, by code object: a program that builds
    one step after the other (a sweep) would otherwise fall back to eager at the ninth, without a word.
    """
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
