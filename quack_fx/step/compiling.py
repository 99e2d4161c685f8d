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

_ON_GPU = {"combo_kernels": True, "realize_reads_threshold": 1}
"""Of Inductor, for functions of many small loops. Each loop would be a kernel of its own, and starting them would take
longer than what they do. And a value that is used twice is taken from where it is kept: where the sum of a head's
squares works the new weight out once more, it reads the old one, which then is written by a loop of its own."""


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
        self,
        function: Callable[..., Any],
        sizes: Literal["any", "fixed", "same"],
        fullgraph: bool = False,
        loops_on: torch.device | None = None,
    ) -> Callable[..., Any]:
        """The function, compiled.

        Arguments:
            function: The function.
            sizes: "fixed": each new size of its arguments is compiled anew. "same": there is nothing to check before
                a call, for whoever calls gives tensors that look the same each time.
            fullgraph: Whether it has to be one graph.
            loops_on: Where it works, if it is many small loops.
        """
        if not self.on:
            return function
        options = dict(torch._inductor.list_mode_options(self.mode)) if self.mode else {}
        if loops_on is not None and loops_on.type == "cuda":
            options |= _ON_GPU
        if sizes == "same":
            options |= {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        dynamic = None if sizes == "any" else False
        return torch.compile(function, options=options or None, dynamic=dynamic, fullgraph=fullgraph)

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
