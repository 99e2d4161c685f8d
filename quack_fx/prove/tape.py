"""A record of a forward pass on real values: every ATen op that ran, in order, with its operands.

In: a model and its inputs. Out: a `Tape` of `Op`s over `Value`s. Each op knows which earlier ops it depends on,
including in-place writes, so that a slice of the tape can run again (`replay.py`), and whether it depends on the
model's inputs (`data`) and on parameters (`weight`).

A TorchDispatchMode records the ops below autograd, and so also those under `no_grad` or inside an autograd.Function.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode  # private, but the documented way to intercept ATen ops
from torch.utils._pytree import tree_leaves

from quack_fx.graph.forward.drawn import nothing_dropped
from quack_fx.graph.forward.eager import op_by_op
from quack_fx.graph.forward.fused import AnyLayout
from quack_fx.graph.forward.gpus import OnThisMachine
from quack_fx.graph.forward.jagged import JaggedWrittenOut, takes_itself_apart
from quack_fx.graph.ops import written_by
from quack_fx.prove.opaque import written_out


@dataclass(eq=False, slots=True, repr=False)
class Value:
    """One tensor of the forward pass.

    Attributes:
        tensor: The tensor; the tape keeps it alive, so that no address is reused.
        op: The op that made it; None for inputs, parameters and buffers.
        param: Its name if it is a parameter, or None.
        is_input: Whether it is an input of the model.
        storage: Address of its storage.
    """

    tensor: Tensor
    op: Op | None
    param: str | None
    is_input: bool
    storage: int

    @property
    def is_numeric(self) -> bool:
        """Whether it holds floating-point or complex numbers, as opposed to indices or masks."""
        return self.tensor.is_floating_point() or self.tensor.is_complex()


@dataclass(eq=False, slots=True, repr=False)
class Op:
    """One ATen op that ran.

    Attributes:
        index: Its index on the tape.
        func: The op.
        name: Its name without namespace and overload: "bmm".
        args: Its arguments, with a `Value` for each tensor.
        kwargs: Its keyword arguments, likewise.
        inputs: All values among the arguments.
        outputs: All values among the results, including arguments that are written in place.
        reads: The earlier ops that its results depend on: those that made its inputs or wrote to them.
        modules: Names of the modules that were running, outermost first.
        given: Whether its results depend on the model's inputs.
        weight: Whether its results depend on parameters.
        data: Whether its results depend on the model's inputs, and on floating-point inputs or parameters; what integer
            inputs alone determine (masks, positions, buffers indexed by them) counts as constant.
    """

    index: int
    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    reads: tuple[Op, ...]
    modules: tuple[str, ...]
    given: bool
    weight: bool
    data: bool

    def __repr__(self) -> str:
        return f"<{self.index}: {self.func}>"

    @property
    def out(self) -> Value:
        """Its first result."""
        return self.outputs[0]


@dataclass(repr=False)
class Tape:
    """One forward pass.

    Attributes:
        ops: All ops that ran, in order.
        ran: Names of the modules whose forward was called through hooks.
        writes: For each storage, the ops that wrote to it in place.
        results: The tensors that the model returned.
        params: The parameters by name.
    """

    ops: list[Op] = field(default_factory=list)
    ran: set[str] = field(default_factory=set)
    writes: dict[int, list[Op]] = field(default_factory=dict)
    results: set[Value] = field(default_factory=set)
    params: dict[str, Tensor] = field(default_factory=dict)

    def behind(self, value: Value, before: Op | None = None) -> tuple[Op, ...]:
        """The ops that made the contents of a value as the op `before` reads it: its op and earlier in-place writes."""
        made = (value.op,) if value.op is not None else ()
        writers = self.writes.get(value.storage)
        if not writers:
            return made
        return made + tuple(op for op in writers if op is not value.op and (before is None or op.index < before.index))

    def is_data(self, value: Value, before: Op | None = None) -> bool:
        """Whether a value is an input of the model or made by an op with `data`, as the op `before` reads it."""
        return value.is_input or any(op.data for op in self.behind(value, before))

    def is_weight(self, value: Value, before: Op | None = None) -> bool:
        """Whether a value depends on parameters and is not data."""
        if self.is_data(value, before):
            return False
        return value.param is not None or any(op.weight for op in self.behind(value, before))


def record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tape:
    """Run a model once and record it, with fused attention replaced by plain ops, which make the logits a tensor."""
    try:
        with torch.no_grad():
            return _record(model, args, kwargs)
    except Exception as error:
        try:  # some forwards ask for gradients themselves
            with torch.enable_grad():
                return _record(model, args, kwargs)
        except Exception:
            raise error from None


def _record(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tape:
    watch = _Watch(model)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # for example about running uncompiled
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(op_by_op())
        stack.enter_context(OnThisMachine())
        stack.enter_context(nothing_dropped())
        stack.enter_context(JaggedWrittenOut())
        stack.enter_context(AnyLayout())
        stack.enter_context(_module_stack(model, watch))
        for tensor in tree_leaves((args, dict(kwargs))):
            if isinstance(tensor, Tensor):
                watch.value(tensor).is_input = True
        with watch:
            output = model(*args, **kwargs)
    watch.tape.results = {watch.value(tensor) for tensor in _tensors_in(output)}
    return watch.tape


class _Watch(TorchDispatchMode):
    """The dispatch mode that records the tape."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = Tape()
        self.modules: list[str] = []
        self._values: dict[int, Value] = {}
        self._same: dict[tuple[Any, ...], Value] = {}  # by storage and geometry
        self._alive: list[Tensor] = []
        for name, parameter in model.named_parameters():
            self.value(parameter).param = name
            self.tape.params[name] = parameter

    def value(self, tensor: Tensor, op: Op | None = None) -> Value:
        """The `Value` of a tensor, made on first use."""
        known = self._values.get(id(tensor))
        if known is not None:
            return known
        storage = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
        storage = storage or -id(tensor)  # an empty tensor has no address
        view = (storage, tensor.storage_offset() if storage > 0 else 0, tensor.shape, tensor.stride(), tensor.dtype)
        if op is None and (known := self._same.get(view)) is not None:
            # A new tensor object for the same memory: `.data` makes one without an op.
            self._alive.append(tensor)
            value = known
        else:
            value = Value(tensor, op, None, False, storage)
        self._values[id(tensor)] = value
        if storage > 0:
            self._same.setdefault(view, value)
        return value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if takes_itself_apart(types):
            return NotImplemented
        kwargs = kwargs or {}
        if (plain := written_out(func, args)) is not None:
            with self:
                return plain(*args, **kwargs)
        inputs: list[Value] = []

        def seen(x: Any) -> Any:
            if isinstance(x, Tensor):
                inputs.append(self.value(x))
                return inputs[-1]
            return type(x)(map(seen, x)) if type(x) in (list, tuple) else x

        own_args, own_kwargs = tuple(map(seen, args)), {name: seen(x) for name, x in kwargs.items()}
        result = func(*args, **kwargs)
        tape = self.tape
        name = str(getattr(func, "overloadpacket", func).__name__)
        reads = tuple(dict.fromkeys(op for v in inputs for op in tape.behind(v)))
        shape_only = name.startswith("new_") or name.endswith("_like")
        given = not shape_only and (any(v.is_input for v in inputs) or any(op.given for op in reads))
        weight = not shape_only and (any(v.param for v in inputs) or any(op.weight for op in reads))
        numbers = any(v.is_input and v.is_numeric for v in inputs) or any(op.data for op in reads)
        data = given and (weight or numbers)
        modules = tuple(self.modules)
        op = Op(len(tape.ops), func, name, own_args, own_kwargs, tuple(inputs), (), reads, modules, given, weight, data)
        results = (result,) if isinstance(result, Tensor) else tree_leaves(result)
        op.outputs = tuple(self.value(t, op) for t in results if isinstance(t, Tensor))
        for written in written_by(func, own_args, own_kwargs):
            if isinstance(written, Value):
                tape.writes.setdefault(written.storage, []).append(op)
        tape.ops.append(op)
        return result


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of an output, also in attributes of objects that pytree does not know."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors_in(list(leaf.values()))
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            yield from (t for t in vars(leaf).values() if isinstance(t, Tensor))


@contextmanager
def _module_stack(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Keep the names of the running modules on `watch.modules`."""

    def enter(name: str, *_: Any) -> None:
        watch.modules.append(name)
        watch.tape.ran.add(name)

    def leave(*_: Any) -> None:
        watch.modules.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(partial(enter, name), prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield
