"""What an error of the user's code tells: where it was raised, the condition that failed, the sizes in its message.

In: an exception with its traceback. The frames are still alive, so expressions can be evaluated in them.
"""

from __future__ import annotations

import ast
import linecache
import re
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from quack_fx.targets.source import parsed

_NOT_THE_USERS = ("torch.", "quack_fx.", "importlib", "einops")


def cause_of(error: BaseException) -> BaseException:
    """The error that the user's code raised, where ours was raised from it."""
    return error.__cause__ or error


def frames_of(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames of a traceback, outermost first, each with the line that it was at."""
    return traceback.walk_tb(error.__traceback__)


def users_frame(error: BaseException) -> tuple[FrameType, int] | None:
    """The innermost frame of the user's own code, and its line."""
    frames = [(f, n) for f, n in frames_of(error) if not f.f_globals.get("__name__", "").startswith(_NOT_THE_USERS)]
    return frames[-1] if frames else None


def none_names(frame: FrameType, line: int) -> set[str]:
    """Words in a line of code that are local variables which are None."""
    words = re.findall(r"\w+", linecache.getline(frame.f_code.co_filename, line))
    return {word for word in words if frame.f_locals.get(word, 0) is None}


def statements_at(frame: FrameType, line: int) -> list[ast.stmt]:
    """The statements that contain a line, outermost first; none where there is no source."""
    tree = parsed("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.stmt))
    return [node for node in statements if node.lineno <= line <= (node.end_lineno or node.lineno)]


def condition_of(statements: list[ast.stmt]) -> tuple[ast.expr, bool] | None:
    """The condition that the innermost statement checks, and the value it should have: `assert X`, or `if X: raise`."""
    match statements[-2:]:
        case [*_, ast.Assert(test=test)]:
            return test, True
        case [ast.If(test=test), ast.Raise()]:
            return test, False
    return None


def evaluator(frame: FrameType) -> Callable[[ast.expr], Any]:
    """A function that evaluates expressions in a frame; it raises what they raise."""
    return lambda node: eval(compile(ast.Expression(node), "<condition>", "eval"), frame.f_globals, frame.f_locals)


def factors_in(text: str) -> tuple[int, int] | None:
    """The inner sizes of a product of matrices in a message of torch: 3 and 4 of "(2x3 and 4x5)"."""
    found = re.search(r"\(\d+x(\d+) and (\d+)x\d+\)|\[[\d, ]*?(\d+)\] X \[(\d+), ", text)
    if found is None:
        return None
    left, right = (int(size) for size in found.groups() if size is not None)
    return left, right


def shapes_in(text: str) -> list[tuple[int, ...]]:
    """Shapes with at least two axes in a message, in brackets or parentheses."""
    written = re.findall(r"[\[(](\d+(?:, \d+)+)[\])]", text)
    return [tuple(map(int, re.findall(r"\d+", shape))) for shape in written]
