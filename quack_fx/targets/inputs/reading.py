"""Reads the source of a forward, without running it, for what it does with its arguments.

In: a model. Out: a `Use` for each parameter of its forward. The reader interprets the statements of the forward and of
the functions that it calls (`calls.py`: single operations), and looks attributes up in the model itself: so
`self.layers[0].proj(x.transpose(1, 2))` shows which layer takes `x`, and `assert T <= self.block_size` the largest T.
Where the condition of an `if` is not known, both branches are read; of a loop, the first and the last iteration.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from quack_fx.targets.inputs import calls
from quack_fx.targets.inputs.uses import UNKNOWN, Data, Dim, Items, Known, Rank, Shape, Unknown, Use, Value
from quack_fx.targets.source import tree_of_function

DEPTH, STATEMENTS = 16, 4000
"""The deepest call that is read, and the most statements in all."""

Scope = dict[str, Value]


def read_uses(model: nn.Module, given: list[str]) -> dict[str, Use]:
    """What the forward of a model does with its parameters of these names, as far as its source can be read."""
    uses = {name: Use() for name in given}
    with suppress(Exception):  # what was recorded until then still holds
        forward = inspect.unwrap(model.forward)
        function = forward if isinstance(forward, types.FunctionType) else forward.__func__
        for name, parameter in inspect.signature(model.forward).parameters.items():
            if name in uses and parameter.kind is parameter.VAR_POSITIONAL:
                uses[name].marks.add("iterated")
        bound: Scope = {name: Data(use) for name, use in uses.items()}
        Reader().run(function, model if forward is not function or function is not model.forward else None, bound)
    return uses


@functools.lru_cache(maxsize=512)
def _definition(code: types.CodeType) -> ast.FunctionDef | None:
    nodes = ast.walk(tree_of_function(code))
    return next((n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == code.co_name), None)


class _Enough(Exception):
    """The limit on statements is reached."""


class Reader:
    """One reading of a forward and of what it calls."""

    def __init__(self) -> None:
        self.left = STATEMENTS
        self.depth = 0

    def run(self, function: types.FunctionType, owner: Any, bound: Scope) -> Value:
        """Read a function with these values of its parameters; returns its result."""
        definition = _definition(function.__code__)
        if definition is None or self.depth >= DEPTH:
            return UNKNOWN
        scope: Scope = {}
        for index, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
            if index == 0 and owner is not None:
                scope[name] = Known(owner)
            elif name in bound:
                scope[name] = bound[name]
            else:
                scope[name] = UNKNOWN if parameter.default is parameter.empty else Known(parameter.default)
        frame = Frame(self, function, scope)
        self.depth += 1
        try:
            frame.block(definition.body)
        finally:
            self.depth -= 1
        return frame.returned


class Frame:
    """The body of one function while it is read."""

    def __init__(self, reader: Reader, function: types.FunctionType, scope: Scope) -> None:
        self.reader, self.function, self.scope = reader, function, scope
        self.returned: Value = UNKNOWN
        closure = function.__closure__ or ()
        self.outer = dict(zip(function.__code__.co_freevars, closure, strict=True))

    # ---- statements --------------------------------------------------------------------------------------------------

    def block(self, body: list[ast.stmt]) -> bool:
        """Read statements; returns whether the function has returned or raised in any case."""
        return any(self.statement(node) for node in body)

    def statement(self, node: ast.stmt) -> bool:
        """Read one statement; returns whether the function has returned or raised in any case."""
        self.reader.left -= 1
        if self.reader.left < 0:
            raise _Enough
        match node:
            case ast.Return():
                value = self.of(node.value) if node.value is not None else UNKNOWN
                self.returned = value if isinstance(self.returned, Unknown) else self.returned
                return True
            case ast.Raise():
                return True
            case ast.Assign():
                value = self.of(node.value)
                for target in node.targets:
                    self.assign(target, value)
            case ast.AnnAssign():
                if node.value is not None:
                    self.assign(node.target, self.of(node.value))
            case ast.AugAssign():
                if isinstance(node.target, ast.Name):
                    combined = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
                    self.assign(node.target, self.of(combined))
                else:
                    self.of(node.value)
            case ast.Expr():
                self.of(node.value)
            case ast.Assert():
                self.require(node.test, True)
            case ast.If():
                return self.branch(node)
            case ast.For() | ast.AsyncFor():
                for value in self.elements(self.of(node.iter)):
                    self.assign(node.target, value)
                    self.block(node.body)
                self.block(node.orelse)
            case ast.While():
                self.of(node.test)
                self.block(node.body)
            case ast.With() | ast.AsyncWith():
                for item in node.items:
                    self.of(item.context_expr)
                return self.block(node.body)
            case ast.Try():
                done = self.block(node.body)
                return self.block(node.finalbody) or (done and not node.handlers)
            case ast.Match():
                for case in node.cases:
                    self.block(case.body)
            case ast.FunctionDef():
                self.scope[node.name] = UNKNOWN
        return False

    def branch(self, node: ast.If) -> bool:
        """Read the branches of an `if` that may run."""
        test = self.of(node.test)
        if isinstance(test, Known):
            return self.block(node.body if test.value else node.orelse)
        if any(isinstance(inner, ast.Raise) for inner in node.body):
            self.require(node.test, False)
            self.block(node.orelse)
            return False
        before = dict(self.scope)
        one = self.block(node.body)
        after, self.scope = self.scope, before
        other = self.block(node.orelse)
        if other and not one:
            self.scope = after
        elif not one:
            # A name that is an argument after either branch may be one after the `if`.
            self.scope |= {n: v for n, v in after.items() if not isinstance(self.scope.get(n), Data | Items)}
        return one and other

    def assign(self, target: ast.expr, value: Value) -> None:
        """Assign a value to a name, or its parts to several."""
        match target:
            case ast.Name():
                self.scope[target.id] = value
            case ast.Starred():
                self.assign(target.value, UNKNOWN)
            case ast.Tuple() | ast.List():
                starred = any(isinstance(element, ast.Starred) for element in target.elts)
                for element, part in zip(target.elts, self.unpacked(value, len(target.elts), starred), strict=True):
                    if isinstance(value, Data) and isinstance(part, Data) and isinstance(element, ast.Name):
                        part.use.name = part.use.name or element.id
                    self.assign(element, part)

    def unpacked(self, value: Value, count: int, starred: bool) -> list[Value]:
        """The parts of a value that is unpacked into so many names."""
        if isinstance(value, Shape):
            if not starred and value.whole:
                value.data.known_rank(count + value.start)
            return [UNKNOWN if starred else Dim(value.data, value.start + axis) for axis in range(count)]
        if isinstance(value, Items) and len(value.values) == count and not starred:
            return list(value.values)
        if isinstance(value, Data) and not starred and not value.views:
            return [Data(value.use.part("at", number)) for number in range(count)]
        if isinstance(value, Known) and isinstance(value.value, tuple | list) and len(value.value) == count:
            return [Known(part) for part in value.value]
        return [UNKNOWN] * count

    def elements(self, value: Value) -> list[Value]:
        """Values of a loop variable: the first element and the last."""
        if isinstance(value, Items):
            return [*value.values[:1], *value.values[1:][-1:]]
        if isinstance(value, Data):
            value.use.marks.add("iterated")
            return [value.then("drop", 0, 0)]
        if isinstance(value, Known):
            try:
                found = list(value.value)[:4096]
            except Exception:
                return [UNKNOWN]
            return [*map(Known, found[:1]), *map(Known, found[1:][-1:])]
        return [UNKNOWN]

    # ---- conditions --------------------------------------------------------------------------------------------------

    def require(self, test: ast.expr, holds: bool) -> None:
        """Record what follows for sizes if a condition holds, or if it does not."""
        match test:
            case ast.BoolOp():
                self.of(test)
                if isinstance(test.op, ast.And) == holds:
                    for value in test.values:
                        self.require(value, holds)
            case ast.UnaryOp(op=ast.Not()):
                self.require(test.operand, not holds)
            case ast.Compare(ops=[op]):
                left, right = self.of(test.left), self.of(test.comparators[0])
                if isinstance(op, ast.IsNot if holds else ast.Is) and calls.is_none(right) and isinstance(left, Data):
                    left.use.marks.add("needed")
                elif isinstance(op, ast.Eq if holds else ast.NotEq):
                    self.equal(left, right)
                    self.equal(right, left)
                elif isinstance(left, Dim) and isinstance(right, Known) and isinstance(right.value, int):
                    at_most = {ast.LtE: 0, ast.Lt: -1} if holds else {ast.Gt: 0, ast.GtE: -1}
                    if type(op) in at_most and left.modulo is None:
                        left.data.known_size(left.axis, "<=", right.value + at_most[type(op)])
                elif isinstance(left, Rank) and holds and isinstance(op, ast.In) and isinstance(right, Known):
                    left.data.known_rank(min(right.value))
            case ast.Compare():
                self.of(test)
            case _:
                rest = self.of(test)
                if isinstance(rest, Dim) and rest.modulo is not None and not holds:
                    rest.data.known_size(rest.axis, "%", rest.modulo)

    def equal(self, value: Value, other: Value) -> None:
        """Record that a size or a rank is equal to a known number."""
        if isinstance(value, Shape) and isinstance(other, Items):
            if value.whole:
                value.data.known_rank(len(other.values) + value.start)
            for axis, size in enumerate(other.values):
                self.equal(Dim(value.data, value.start + axis), size)
        if not isinstance(other, Known) or not isinstance(other.value, int | tuple | list):
            return
        if isinstance(value, Shape) and not isinstance(other.value, int):
            self.equal(value, Items(tuple(Known(size) for size in other.value)))
        elif isinstance(value, Rank) and isinstance(other.value, int):
            value.data.known_rank(other.value)
        elif isinstance(value, Dim) and isinstance(other.value, int):
            if value.modulo is None:
                value.data.known_size(value.axis, "==", other.value)
            elif other.value == 0:
                value.data.known_size(value.axis, "%", value.modulo)

    # ---- expressions -------------------------------------------------------------------------------------------------

    def of(self, node: ast.expr) -> Value:
        """The value of an expression; records what it does with arguments."""
        match node:
            case ast.Constant():
                return Known(node.value)
            case ast.Name():
                return self.name(node.id)
            case ast.Attribute():
                return calls.attribute(self.of(node.value), node.attr)
            case ast.Subscript():
                return calls.subscript(self.of(node.value), node.slice, self.of)
            case ast.Call():
                return self.call(node)
            case ast.Tuple() | ast.List():
                values = tuple(self.of(element) for element in node.elts)
                if values and all(isinstance(v, Known) for v in values):
                    return Known(tuple(v.value for v in values if isinstance(v, Known)))
                return Items(values)
            case ast.BinOp():
                return self.arithmetic(node)
            case ast.Compare():
                return self.compare(node)
            case ast.BoolOp():
                return self.logic(node)
            case ast.UnaryOp():
                value = self.of(node.operand)
                if isinstance(node.op, ast.Invert) and isinstance(value, Data):
                    value.use.marks.add("bool")
                    return value
                if isinstance(value, Known) and isinstance(node.op, ast.Not):
                    return Known(not value.value)
                if isinstance(value, Known) and isinstance(node.op, ast.USub) and isinstance(value.value, int | float):
                    return Known(-value.value)
                return value if isinstance(value, Data) else UNKNOWN
            case ast.IfExp():
                test = self.of(node.test)
                if isinstance(test, Known):
                    return self.of(node.body if test.value else node.orelse)
                either = [self.of(node.body), self.of(node.orelse)]
                return next((v for v in either if isinstance(v, Data)), UNKNOWN)
            case ast.NamedExpr():
                value = self.of(node.value)
                self.assign(node.target, value)
                return value
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp():
                return self.comprehension(node)
            case ast.Dict():
                for entry in node.values:
                    self.of(entry)
            case ast.DictComp():
                return self.same_keys(node)
            case ast.Starred():
                return self.of(node.value)
        return UNKNOWN

    def name(self, name: str) -> Value:
        """The value of a name."""
        if name in self.scope:
            return self.scope[name]
        try:
            if name in self.outer:
                return Known(self.outer[name].cell_contents)
            return Known(self.function.__globals__[name])
        except (KeyError, ValueError):
            builtins = self.function.__globals__.get("__builtins__")
            known = builtins if isinstance(builtins, dict) else vars(builtins)
            return Known(known[name]) if name in known else UNKNOWN

    def arithmetic(self, node: ast.BinOp) -> Value:
        """An arithmetic operator."""
        left, right = self.of(node.left), self.of(node.right)
        if isinstance(left, Known) and isinstance(right, Known):
            return calls.computed(node.op, left.value, right.value)
        if isinstance(left, Dim) and isinstance(node.op, ast.Mod) and isinstance(right, Known):
            return Dim(left.data, left.axis, right.value) if isinstance(right.value, int) else UNKNOWN
        return calls.combined(node.op, left, right)

    def compare(self, node: ast.Compare) -> Value:
        """A comparison; its result is known if both sides are."""
        values = [self.of(node.left), *map(self.of, node.comparators)]
        if len(values) != 2:
            return UNKNOWN
        (left, right), op = values, node.ops[0]
        if isinstance(left, Known) and isinstance(right, Known):
            return calls.compared(op, left.value, right.value)
        if isinstance(left, Data) and isinstance(op, ast.Is | ast.IsNot) and calls.is_none(right):
            left.use.marks.add("checked")
            return Known(isinstance(op, ast.IsNot))
        if isinstance(right, Data) and isinstance(op, ast.In | ast.NotIn) and isinstance(left, Known):
            if isinstance(left.value, str):
                return Known(isinstance(op, ast.NotIn) != (("key", left.value) in right.use.parts))
            return UNKNOWN
        return left if isinstance(left, Data) and not isinstance(op, ast.Is | ast.IsNot) else UNKNOWN

    def logic(self, node: ast.BoolOp) -> Value:
        """`and` and `or`, as Python evaluates them."""
        stops = isinstance(node.op, ast.Or)
        value: Value = UNKNOWN
        known = True
        for operand in node.values:
            value = self.of(operand)
            if isinstance(value, Known):
                if bool(value.value) == stops and known:
                    return value
            else:
                known = False
        return value if known else UNKNOWN

    def comprehension(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp) -> Value:
        """A list comprehension, read for the first and the last element."""
        before = dict(self.scope)
        found: list[Value] = []
        generator = node.generators[0]
        for value in self.elements(self.of(generator.iter)):
            self.assign(generator.target, value)
            found.append(self.of(node.elt))
        self.scope = before
        return Items(tuple(found)) if any(isinstance(v, Data) for v in found) else UNKNOWN

    def same_keys(self, node: ast.DictComp) -> Value:
        """A dict with the keys of an argument, `{k: v.to(x) for k, v in batch.items()}`: that argument itself."""
        parts = [inner for inner in ast.walk(node.value) if isinstance(inner, ast.Subscript)]
        for part in parts if isinstance(node.key, ast.Name) else []:
            found = self.of(part.value) if ast.unparse(part.slice) == ast.unparse(node.key) else UNKNOWN
            if isinstance(found, Data):
                return found
        source = node.generators[0].iter
        if isinstance(source, ast.Call) and isinstance(source.func, ast.Attribute) and source.func.attr == "items":
            return self.of(source.func.value)
        return UNKNOWN

    # ---- calls -------------------------------------------------------------------------------------------------------

    def call(self, node: ast.Call) -> Value:
        """A call of a method, a layer, a function of torch, or a function whose source is read."""
        if isinstance(node.func, ast.Name) and node.func.id == "super" and "__class__" in self.outer:
            owner = self.scope[next(iter(self.scope))]
            own_class = self.outer["__class__"].cell_contents
            return Known(super(own_class, owner.value)) if isinstance(owner, Known) else UNKNOWN
        receiver = self.of(node.func.value) if isinstance(node.func, ast.Attribute) else UNKNOWN
        args = [self.of(a) for a in node.args if not isinstance(a, ast.Starred)]
        kwargs = {k.arg: self.of(k.value) for k in node.keywords if k.arg is not None}
        spread = [self.of(a.value) for a in node.args if isinstance(a, ast.Starred)]
        spread_names = [self.of(k.value) for k in node.keywords if k.arg is None]
        if isinstance(receiver, Data) and isinstance(node.func, ast.Attribute):
            return calls.method(receiver, node.func.attr, args)
        if isinstance(receiver, Items | Shape | Dim | Rank):
            return UNKNOWN
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        function = calls.attribute(receiver, method) if method else self.of(node.func)
        if not isinstance(function, Known):
            if method and not isinstance(function, Data):
                calls.note(method, args, kwargs)
            return UNKNOWN
        for value in spread:
            args += list(value.values) if isinstance(value, Items) else []
        spread_out = calls.spread_of(function.value, spread, spread_names, len(args), set(kwargs))
        return self.apply(function.value, args, {**kwargs, **spread_out})

    def apply(self, function: Any, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """Call a known function."""
        if (kept := calls.kept_tensor(function)) is not None:
            return Known(kept)
        if calls.runs_another(function) and args and isinstance(args[0], Known):
            return self.apply(args[0].value, args[1:], {})
        if isinstance(function, functools.partial):
            by_name = {name: Known(value) for name, value in function.keywords.items()}
            return self.apply(function.func, [*map(Known, function.args), *args], {**by_name, **kwargs})
        if isinstance(function, nn.Module):
            pattern, lengths = getattr(function, "pattern", None), getattr(function, "axes_lengths", None)
            if isinstance(pattern, str) and isinstance(lengths, Mapping) and args:  # a layer of einops
                return calls.rearranged(args[0], Known(pattern), {name: Known(n) for name, n in lengths.items()})
            if isinstance(function, nn.Sequential):
                value = args[0] if args else UNKNOWN
                for layer in function:
                    value = self.apply(layer, [value], {})
                return value
            if calls.is_leaf(function):
                return calls.layer(function, args, kwargs)
            return self.follow(function.forward, args, kwargs)
        known = calls.function(function, args, kwargs)
        return known if known is not None else self.follow(function, args, kwargs)

    def follow(self, function: Any, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """Read a function of the user's, if an argument of the forward is passed to it."""
        # A method without arguments may read attributes of the module.
        if (args or kwargs) and not any(map(_from_caller, (*args, *kwargs.values()))):
            return UNKNOWN
        owner = getattr(function, "__self__", None) if isinstance(function, types.MethodType) else None
        plain = inspect.unwrap(function.__func__ if isinstance(function, types.MethodType) else function)
        if not isinstance(plain, types.FunctionType) or plain.__module__.split(".")[0] in ("torch", "numpy", "einops"):
            return UNKNOWN
        if owner is not None:
            args = [Known(owner), *args]
        try:
            call = inspect.signature(plain).bind_partial(*args, **kwargs)
        except TypeError:
            return UNKNOWN
        bound: Scope = {}
        for name, value in call.arguments.items():
            kind = call.signature.parameters[name].kind
            several = Items(tuple(value)) if kind is inspect.Parameter.VAR_POSITIONAL else value
            bound[name] = UNKNOWN if kind is inspect.Parameter.VAR_KEYWORD else several
        return self.reader.run(plain, owner, bound)


def _from_caller(value: Value) -> bool:
    if isinstance(value, Items):
        return any(map(_from_caller, value.values))
    return isinstance(value, Data | Shape | Dim | Rank)
