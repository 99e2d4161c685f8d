"""Single operations while a forward is read: attributes, indexing, operators, methods of tensors, layers, functions.

In: an operation and the values of its operands. Out: its value, as long as that is an argument of the forward behind
view ops or a known object; else `UNKNOWN`. What the operation requires of an argument is recorded in its `Use`.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.targets.inputs.uses import UNKNOWN, Data, Dim, Items, Known, Rank, Shape, Value
from quack_fx.targets.source import ARITHMETIC

_SAME = set(
    "float double half bfloat16 to cuda cpu type type_as contiguous clone detach requires_grad_ abs clamp clamp_min "
    "masked_fill masked_fill_ fill_ pow add mul div sub log exp sqrt softmax round floor nan_to_num relu sigmoid tanh "
    "clip dropout fillna copy eq ne gt lt ge le normalize rsqrt neg add_ mul_ div_ sub_ roll flip".split()
)
_RESHAPED = set(
    "view reshape flatten unflatten squeeze expand repeat repeat_interleave unfold tile ravel expand_as".split()
)
_KEPT_BY = (
    nn.Dropout, nn.Identity, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout1d, nn.Dropout2d,
)  # fmt: skip
_PURE: set[Any] = {len, int, float, max, min, abs, round, range, list, tuple, sum, bool, isinstance, getattr, hasattr}
_PURE |= {enumerate, zip, reversed, sorted, type, callable, math.sqrt, math.ceil, math.floor, math.prod, math.log2}

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


def is_none(value: Value) -> bool:
    """Whether a value is None."""
    return isinstance(value, Known) and value.value is None


def attribute(value: Value, name: str) -> Value:
    """An attribute of a value."""
    if isinstance(value, Known):
        with suppress(Exception):
            return Known(getattr(value.value, name))
    if not isinstance(value, Data):
        return UNKNOWN
    if name == "shape":
        return Shape(value)
    if name == "ndim":
        return Rank(value)
    if name in ("T", "mT"):
        return value.then("swap", -1, -2)
    if name in ("data", "real"):
        return value
    if hasattr(Tensor, name) or name in ("keys", "values", "items", "get"):
        return UNKNOWN
    return Data(value.use.part("attr", name))


def subscript(value: Value, node: ast.expr, of: Callable[[ast.expr], Value]) -> Value:
    """An index or a slice of a value."""
    if isinstance(value, Shape):
        return _of_shape(value, node, of)
    index = of(node) if not isinstance(node, ast.Slice) else UNKNOWN
    if isinstance(index, Data):
        index.use.marks.add("index")
    if isinstance(value, Data):
        return _of_data(value, node, of)
    if isinstance(value, Items) and isinstance(index, Known) and isinstance(index.value, int):
        return value.values[index.value] if -len(value.values) <= index.value < len(value.values) else UNKNOWN
    if not isinstance(value, Known):
        return UNKNOWN
    if isinstance(index, Data) and isinstance(value.value, Tensor) and value.value.dim() > 1:
        if "bool" in index.use.marks:
            return UNKNOWN
        index.taken_by(value.value, "rows")
        return UNKNOWN
    if isinstance(value.value, nn.ModuleList | nn.ParameterList | nn.ModuleDict | list | tuple | Mapping):
        if isinstance(node, ast.Slice):
            return value  # its elements are as good as those of the slice
        key: Any = index.value if isinstance(index, Known) else 0
        with suppress(Exception):
            return Known(value.value[key])
    return UNKNOWN


def _of_shape(shape: Shape, node: ast.expr, of: Callable[[ast.expr], Value]) -> Value:
    if isinstance(node, ast.Slice):
        start = of(node.lower) if node.lower is not None else Known(0)
        if not isinstance(start, Known) or not isinstance(start.value, int) or node.step is not None:
            return UNKNOWN
        # Axes that count from the end stay negative.
        return Shape(shape.data, shape.start + start.value, shape.whole and node.upper is None and start.value >= 0)
    index = of(node)
    if isinstance(index, Known) and isinstance(index.value, int):
        return Dim(shape.data, index.value + (shape.start if index.value >= 0 else 0))
    return UNKNOWN


def _of_data(data: Data, node: ast.expr, of: Callable[[ast.expr], Value]) -> Value:
    entries = node.elts if isinstance(node, ast.Tuple) else [node]
    if len(entries) == 1 and not isinstance(entries[0], ast.Slice):
        index = of(entries[0])
        if isinstance(index, Known) and isinstance(index.value, str):
            return Data(data.use.part("key", index.value))
        is_sequence = "iterated" in data.use.marks or any(kind == "at" for kind, _ in data.use.parts)
        if isinstance(index, Known) and isinstance(index.value, int) and is_sequence:
            return Data(data.use.part("at", index.value))
    axis, ellipsis = 0, False
    for number, entry in enumerate(entries):
        if isinstance(entry, ast.Slice):
            axis += 1
            continue
        index = of(entry)
        place = axis if not ellipsis else number - len(entries)
        if isinstance(index, Known) and index.value is Ellipsis:
            ellipsis = True
        elif is_none(index):
            data = data.then("new", place)
            axis += 1
        elif isinstance(index, Known) and isinstance(index.value, int) and not isinstance(index.value, bool):
            data = data.then("drop", place, index.value)
        else:
            return data.then("reshape") if isinstance(index, Data) else data.then("drop", place, 0)
    if len(entries) > 1 and not ellipsis:
        data.known_rank(axis)
    return data


def method(data: Data, name: str, args: list[Value]) -> Value:
    """A method of an argument: of a tensor, or of a dict."""
    numbers = [a.value for a in args if isinstance(a, Known)]
    numbers = list(numbers[0]) if len(numbers) == 1 and isinstance(numbers[0], tuple | list) else numbers
    if name in ("get", "pop") and numbers and isinstance(numbers[0], str):
        part = ("key", numbers[0])
        if len(args) > 1 or name == "get":
            data.use.optional.add(part)
        return Data(data.use.part(*part))
    if name in ("items", "keys", "values", "update"):
        return UNKNOWN
    if name == "size":
        return Dim(data, numbers[0]) if numbers and isinstance(numbers[0], int) else Shape(data)
    if name in ("dim", "ndimension"):
        return Rank(data)
    data.use.marks.add("tensor")
    if name in ("long", "int"):
        data.use.marks.add("long" if not data.use.taken else "tensor")
        return data
    if name == "bool":
        return data
    integers = all(isinstance(n, int) for n in numbers)
    if name in ("transpose", "swapaxes", "swapdims") and len(numbers) == 2 and integers:
        return data.then("swap", *numbers)
    if name == "permute" and integers:
        data.known_rank(len(numbers))
        return data.then("permute", tuple(numbers))
    if name in ("t", "movedim") and integers:
        return data.then("swap", 0, 1) if name == "t" else data.then("reshape")
    if name == "unsqueeze" and len(numbers) == 1 and integers:
        return data.then("new", numbers[0])
    if name in _SAME:
        return data
    if name in _RESHAPED:
        return data.then("reshape")
    return UNKNOWN


def combined(op: ast.operator, left: Value, right: Value) -> Value:
    """An arithmetic operator with an argument as one operand."""
    data = left if isinstance(left, Data) else right if isinstance(right, Data) else None
    if data is None:
        return UNKNOWN
    other = right if data is left else left
    if isinstance(op, ast.MatMult):
        if data is left and isinstance(other, Known) and isinstance(other.value, Tensor) and other.value.dim() >= 2:
            data.taken_by(other.value, "matrix")
        return UNKNOWN
    if isinstance(op, ast.Sub | ast.Add):
        data.use.marks.add("number-mask")
    if isinstance(op, ast.Add | ast.Mult) and isinstance(other, Known) and isinstance(other.value, Tensor):
        for axis in (-1, -2):
            if other.value.dim() >= -axis and other.value.shape[axis] > 1:
                data.known_size(axis, "==", other.value.shape[axis])
    # The other operand may be larger, and then the result has its shape.
    return UNKNOWN if data is right and isinstance(other, type(UNKNOWN)) else data


def computed(op: ast.operator, left: Any, right: Any) -> Value:
    """The result of an arithmetic operator on numbers or tuples."""
    if isinstance(left, int | float | tuple) and isinstance(right, int | float | tuple):
        with suppress(Exception):
            return Known(ARITHMETIC[type(op)](left, right))
    return UNKNOWN


def compared(op: ast.cmpop, left: Any, right: Any) -> Value:
    """The result of a comparison."""
    with suppress(Exception):
        return Known(bool(_COMPARE[type(op)](left, right)))
    return UNKNOWN


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one of torch, whose source is not read."""
    return type(module).forward.__module__.split(".")[0] == "torch" or not hasattr(type(module).forward, "__code__")


def layer(module: nn.Module, args: list[Value], kwargs: dict[str, Value]) -> Value:
    """A layer of torch: records that it takes its operands, under the names of its parameters."""
    names = list(type(module).forward.__code__.co_varnames[1 : type(module).forward.__code__.co_argcount])
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for name, value in given.items():
        if isinstance(value, Items):
            value = UNKNOWN
        if isinstance(value, Data):
            value.taken_by(module, name)
    first = next(iter(given.values()), UNKNOWN)
    return first if isinstance(module, _KEPT_BY) and isinstance(first, Data) else UNKNOWN


def kept_tensor(function: Any) -> Tensor | None:
    """The tensor of the model that a method like `self.weight.to` returns in another dtype or on another device."""
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, Tensor) and getattr(function, "__name__", "") in _SAME else None


def runs_another(function: Any) -> bool:
    """Whether a function calls its first argument with the others, as `checkpoint` does."""
    name, module = getattr(function, "__name__", ""), getattr(function, "__module__", "") or ""
    return name == "checkpoint" and module.startswith("torch.utils")


def function(called: Any, args: list[Value], kwargs: dict[str, Value]) -> Value | None:
    """A function of Python, torch, numpy or einops; None for any other."""
    name, module = getattr(called, "__name__", ""), (getattr(called, "__module__", "") or "").split(".")[0]
    every = [*args, *kwargs.values()]
    data = [value for value in every if isinstance(value, Data)]
    if _is_pure(called) and every and not kwargs and all(isinstance(value, Known) for value in every):
        with suppress(Exception):
            return Known(called(*(value.value for value in every if isinstance(value, Known))))
        return UNKNOWN
    if module == "builtins" or called in (math.sqrt, math.ceil, math.floor):
        return _builtin(name, args)
    if module == "numpy" or (module == "torch" and name.endswith("Tensor")) or name in ("from_numpy", "as_tensor"):
        for value in data:
            if name.endswith("Tensor") or name == "from_numpy" or module == "numpy":
                value.use.marks.add("numpy")
        return data[0] if data else UNKNOWN
    if module == "einops" and name in ("rearrange", "reduce", "repeat"):
        return rearranged(args[0], args[1], kwargs) if len(args) > 1 else UNKNOWN
    if module in ("torch", "_VariableFunctionsClass") or isinstance(called, type(torch.add)):
        return _torch(name, args, kwargs)
    return None


def _is_pure(called: Any) -> bool:
    with suppress(Exception):  # it may be not hashable, or compared element by element
        return called in _PURE
    return False


def _builtin(name: str, args: list[Value]) -> Value:
    first = args[0] if args else UNKNOWN
    if name == "len" and isinstance(first, Data):
        return Dim(first, 0)
    if name == "len" and isinstance(first, Shape):
        return Rank(first.data) if first.whole and not first.start else UNKNOWN
    if name in ("range", "int", "float"):
        for value in args:
            if isinstance(value, Data) and not value.views:
                value.use.marks.add("number")
        return first if isinstance(first, Dim) else UNKNOWN
    if name == "enumerate" and isinstance(first, Data | Items):
        inner = first.values if isinstance(first, Items) else (first.then("drop", 0, 0),)
        return Items(tuple(Items((Known(number), value)) for number, value in enumerate(inner)))
    if name == "zip":
        return Items((Items(tuple(_first(value) for value in args)),))
    if name in ("list", "tuple", "reversed", "sorted") and isinstance(first, Data | Items):
        return first
    return UNKNOWN


def _first(value: Value) -> Value:
    if isinstance(value, Data):
        value.use.marks.add("iterated")
        return value.then("drop", 0, 0)
    if isinstance(value, Items) and value.values:
        return value.values[0]
    if isinstance(value, Known):
        with suppress(Exception):
            return Known(next(iter(value.value)))
    return UNKNOWN


def rearranged(data: Value, pattern: Value, lengths: Mapping[str, Value]) -> Value:
    """An argument after einops' rearrange, whose pattern shows its rank: "b c (h p) w -> ...\"."""
    if not isinstance(data, Data) or not isinstance(pattern, Known):
        return UNKNOWN
    left = str(pattern.value).split("->")[0]
    if "..." in left:
        return data.then("reshape")
    data.known_rank(len(re.findall(r"\([^)]*\)|\S+", left)))
    known = {n: v.value for n, v in lengths.items() if isinstance(v, Known) and isinstance(v.value, int)}
    return data.then("einops", str(pattern.value), tuple(sorted(known.items())))


def note(name: str, args: list[Value], kwargs: dict[str, Value]) -> None:
    """Record an argument that is an index (of `gather`) or a mask (of `masked_fill`, of torch's attention)."""
    index = kwargs.get("index", kwargs.get("indices", args[-1] if args else UNKNOWN))
    if name in ("gather", "index_select", "take_along_dim") and isinstance(index, Data):
        index.use.marks.add("long")
    place = {"masked_fill": 0, "masked_fill_": 0, "where": 0, "scaled_dot_product_attention": 3}.get(name)
    if place is None:
        return
    value = kwargs.get("attn_mask", args[place] if len(args) > place else UNKNOWN)
    if isinstance(value, Data):
        value.use.marks.add("broadcast")
        value.use.steps.add(value.views)


def _torch(name: str, args: list[Value], kwargs: dict[str, Value]) -> Value:
    first = args[0] if args else kwargs.get("input", UNKNOWN)
    second = args[1] if len(args) > 1 else kwargs.get("weight", kwargs.get("target", UNKNOWN))
    if name in ("cross_entropy", "nll_loss") and isinstance(second, Data):
        second.use.marks.add("ids")
    note(name, args, kwargs)
    if name == "stack" and isinstance(first, Items) and first.values and isinstance(first.values[0], Data):
        axis = args[1] if len(args) > 1 else kwargs.get("dim", Known(0))
        is_first = isinstance(axis, Known) and axis.value == 0
        return first.values[0].then("new", 0) if is_first else UNKNOWN
    if name == "where" and len(args) == 3 and not isinstance(first, Data):
        # The argument, or a constant where it is masked, as for a class that is dropped at random.
        given, other = args[1:] if isinstance(args[1], Data) else args[:0:-1]
        number = isinstance(other, Known) and isinstance(other.value, int | float)
        return given if isinstance(given, Data) and number else UNKNOWN
    if not isinstance(first, Data):
        return UNKNOWN
    if isinstance(second, Known) and isinstance(second.value, Tensor):
        how = {"embedding": "rows", "linear": "columns", "matmul": "matrix", "mm": "matrix", "bmm": "matrix"}.get(name)
        if how is not None:
            first.taken_by(second.value, how)
            return UNKNOWN
    if name in ("layer_norm", "rms_norm"):
        if isinstance(second, Known) and isinstance(second.value, tuple | list):
            first.taken_by(nn.LayerNorm(second.value, device="meta"), "input")
        return first
    if name == "pad":
        return first.then("pad")
    if name in ("cat", "stack", "matmul", "bmm", "einsum", "cross_entropy", "where", "scaled_dot_product_attention"):
        return UNKNOWN
    return method(first, name, args[1:])


def spread_of(
    function: Any, spread: list[Value], spread_names: list[Value], given: int, named: set[str]
) -> dict[str, Value]:
    """The required parameters that `*args` and `**batch` fill, with their values."""
    data = [v for v in spread if isinstance(v, Data)]
    data_names = [v for v in spread_names if isinstance(v, Data)]
    if not data and not data_names:
        return {}
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = list(inspect.signature(target).parameters.values())[given:]
    except (TypeError, ValueError):
        return {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    left = [p.name for p in parameters if p.name not in named and p.default is p.empty and p.kind in kinds]
    if not data:
        return {name: Data(data_names[0].use.part("key", name)) for name in left}
    parts = {name: data[0].use.part("at", number) for number, name in enumerate(left)}
    for name, part in parts.items():
        part.name = part.name or name
    return {name: Data(part) for name, part in parts.items()}
