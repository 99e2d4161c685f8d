"""Python's operators on known values while reading a forward.

In: an operator of the syntax tree and two values. Out: the result, or `UNKNOWN` where the operator raises.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from quack_fx.targets.inputs.uses import UNKNOWN, Known, Value

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def computed(op: ast.operator, left: Any, right: Any) -> Value:
    """The result of an arithmetic operator on numbers or tuples."""
    numbers = isinstance(left, int | float | tuple) and isinstance(right, int | float | tuple)
    try:
        return Known(_ARITHMETIC[type(op)](left, right)) if numbers else UNKNOWN
    except Exception:
        return UNKNOWN


def compared(op: ast.cmpop, left: Any, right: Any) -> Value:
    """The result of a comparison."""
    try:
        return Known(bool(_COMPARE[type(op)](left, right)))
    except Exception:
        return UNKNOWN
