"""Source text and syntax trees of the user's files and functions.

In: a file or a function. Out: its text or its syntax tree; an empty one where there is no source to be had.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import Any


def text_of(file: Path) -> str:
    """The text of a file; "" where it cannot be read."""
    try:
        return file.read_text("utf-8", errors="ignore")
    except OSError:
        return ""


def tree_of(file: Path) -> ast.Module:
    """The syntax tree of a file, parsed once as long as the file stays the same. Nobody may change it."""
    try:
        state = file.stat()
        return _parsed(file, state.st_mtime_ns, state.st_size)
    except (OSError, SyntaxError, ValueError):
        return ast.Module([], [])


@lru_cache(maxsize=256)
def _parsed(file: Path, changed: int, size: int) -> ast.Module:
    return ast.parse(file.read_bytes())


def tree_of_function(function: Callable[..., Any] | CodeType) -> ast.Module:
    """The syntax tree of a function's source, as a file that holds nothing else."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return ast.Module([], [])
