"""USER: how functions are compiled.

In: the user's options. Out: a function that wraps others: `torch.compile`, as each of them needs it, or nothing.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

Compiler = Callable[..., Callable[..., Any]]
"""What `compiler` gives."""


def compiler(compile: bool, mode: str | None) -> Compiler:
    """What wraps functions.

    Arguments:
        compile: Whether to compile at all.
        mode: `mode` of torch.compile.

    Returns:
        Called with a function. With `sizes="fixed"`, each new size is compiled anew; with `sizes="same"`, there is
        nothing to check before a call: whoever calls gives tensors that look the same each time.
    """

    def compiled(function: Callable[..., Any], sizes: str | None = None) -> Callable[..., Any]:
        if not compile:
            return function
        if sizes is None:
            return torch.compile(function, mode=mode)
        # Not fullgraph: where other weights have gradients each time, the compiler may give up and run it eagerly.
        if sizes == "fixed":
            return torch.compile(function, mode=mode, dynamic=False)
        unchecked = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        options = (torch._inductor.list_mode_options(mode) if mode else {}) | unchecked
        return torch.compile(function, options=options, dynamic=False)

    return compiled


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
