"""Record equal layers once, if that is provably safe.

In: a model's equal layers (`equal.py`) and the calls of their forwards. Out: a `RepeatedLayer`, with a node that stands
for it, for each layer that was not run.

A call is left out once calls of two other layers of the group, made in the same way, have run the same ops. This
requires that

- the inputs are equal: the same objects, equal values, or fake tensors of the same shape, strides and dtype;
- the attributes that were read have the same values in these layers;
- the recorded calls read only inputs, weights and constants;
- the recorded calls wrote nothing that outlives them: no attribute, no input, no tensor kept outside the output.

Any other call runs as usual. The last layer of a group is always recorded, and must run the same ops. The only thing
missed is code that counts its calls in an object outside the model and changes what it does in mid-stack.
"""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from quack_fx.graph.capture.equal import AttributePath, EqualGroup, renamed
from quack_fx.graph.capture.isolate import Snapshot, unrecorded
from quack_fx.graph.capture.memory import storage_of
from quack_fx.graph.ops import written_by

_PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size)
_CONSTANT = (types.FunctionType, types.BuiltinFunctionType, type)


@dataclass(frozen=True)
class RepeatedLayer:
    """A call of a layer that was not recorded because it repeats the recorded call of another layer.

    Attributes:
        node: Node that stands for the layer in the graph. Nothing is known about its results but that they are data.
        nodes: Nodes of the recorded call (the recorded layer may have been called more than once).
        name: Name of the layer.
        like: Name of the recorded layer.
        given: Nodes of the recorded call's tensor inputs -> whether this call was given the same tensor object.
        names: Name of each parameter, buffer and module of `like` -> the name of its counterpart.
    """

    node: Node
    nodes: frozenset[Node]
    name: str
    like: str
    given: Mapping[Node, bool]
    names: Mapping[str, str]

    def name_of(self, name: str) -> str:
        """Return the counterpart in this layer of a name in `like`; any other name is returned as it is."""
        return self.names.get(name, name)


def equal_layer(*inputs: Any) -> None:
    """Target of the node that stands for a layer. Never called."""


class Tape(Protocol):
    """What this file needs from the recorder."""

    graph: Graph
    alive: list[Any]
    names: dict[int, str]

    def node(self, tensor: Tensor) -> Node:
        """Return the node of a tensor."""

    def twin(self, tensor: Tensor) -> Tensor:
        """Return the tensor that ops receive instead of `tensor`."""

    def append(self, target: Callable[..., Any], inputs: Sequence[Node], results: Sequence[Tensor]) -> Node:
        """Append a node with several results."""


@dataclass
class _Call:
    """A recorded call of a layer's forward."""

    layer: nn.Module
    given: list[Any]
    form: TreeSpec
    result: list[Any]
    result_form: TreeSpec
    read: dict[AttributePath, Any]
    given_nodes: dict[Node, int]
    nodes: list[Node]
    confirmed: bool = False


class EqualLayers:
    """Decides for each call of an equal layer whether it runs, while a forward is recorded."""

    def __init__(self, groups: Sequence[EqualGroup], tape: Tape) -> None:
        self._repeated: list[RepeatedLayer] = []
        self._tape = tape
        self._groups = list(groups)
        self._calls: dict[int, list[_Call]] = {}
        self._contradicted = False
        self._running = False
        self._read: set[tuple[int, str]] = set()
        self._held: dict[int, dict[str, Any]] = {}

    def done(self) -> tuple[RepeatedLayer, ...]:
        """Return the layers that were left out.

        Raises:
            RuntimeError: A layer that was recorded as a check ran other ops than its group.
        """
        if self._contradicted:
            raise RuntimeError("equal layers do different things")
        return tuple(self._repeated)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Intercept calls of the layers. Use inside `isolated`, which restores the model's attributes."""
        if not self._groups:
            yield
            return
        for group in self._groups:
            for layer in group.members:
                self._hold(layer, group)
                own = layer.forward
                vars(layer)["forward"] = functools.wraps(own)(functools.partial(self._forward, group, layer, own))
        original, held, read = nn.Module.__getattr__, self._held, self._read

        def getattr_(module: nn.Module, name: str) -> Any:
            values = held.get(id(module))
            if values is not None and name in values:
                read.add((id(module), name))
                return values[name]
            return original(module, name)

        with patch.object(nn.Module, "__getattr__", getattr_):
            yield

    def _hold(self, layer: nn.Module, group: EqualGroup) -> None:
        """Move the differing attributes out of the instances, so that reads go through `__getattr__`."""
        for path, name in group.differing:
            module = layer.get_submodule(path)
            self._held.setdefault(id(module), {})[name] = vars(module).pop(name)

    # ---- one call ------------------------------------------------------------------------------------------------

    def _forward(
        self, group: EqualGroup, layer: nn.Module, own: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        given, form = tree_flatten((args, kwargs))
        known = all(isinstance(x, (Tensor, *_PLAIN, *_CONSTANT)) for x in given)
        if self._running or not known or group not in self._groups:
            return own(*args, **kwargs)
        calls = self._calls.setdefault(id(group), [])
        if layer is not group.members[-1]:
            with unrecorded():
                for call in calls:
                    if call.confirmed and self._same_call(call, group, layer, given, form):
                        names = renamed(group.trees[call.layer], group.trees[layer], self._tape.names)
                        if names is not None:
                            return self._stand_in(call, layer, given, names)
        return self._record(calls, group, layer, own, args, kwargs, given, form)

    def _record(
        self,
        calls: list[_Call],
        group: EqualGroup,
        layer: nn.Module,
        own: Callable[..., Any],
        args: Any,
        kwargs: Any,
        given: list[Any],
        form: TreeSpec,
    ) -> Any:
        tape = self._tape
        with unrecorded():
            given_nodes: dict[Node, int] = {}
            for i, x in enumerate(given):
                if isinstance(x, Tensor):
                    given_nodes.setdefault(tape.node(x), i)
            last = next(iter(reversed(tape.graph.nodes)), None)
            before = [(module, Snapshot(module)) for module in group.trees[layer]]
        self._read.clear()
        self._running = True
        try:
            output = own(*args, **kwargs)
        finally:
            self._running = False
        with unrecorded():
            result, result_form = tree_flatten(output)
            read = self._values_read(layer)
            nodes = _since(tape.graph, last)
            call = _Call(layer, given, form, result, result_form, read or {}, given_nodes, nodes)
            if any(known.confirmed and self._same_call(known, group, layer, given, form) for known in calls):
                self._contradicted |= not any(self._alike(known, call, group) for known in calls if known.confirmed)
            elif (
                read is not None
                and all(snapshot.holds(module) for module, snapshot in before)
                and _results_are_new(call)
                and _only_given(call)
            ):
                self._confirm(calls, group, call)
        return output

    def _values_read(self, layer: nn.Module) -> dict[AttributePath, Any] | None:
        """Values of the differing attributes that the call read; None if it read one of another layer."""
        paths = {id(module): path for path, module in layer.named_modules()}
        if any(owner not in paths for owner, _ in self._read):
            return None
        return {(paths[owner], name): self._held[owner][name] for owner, name in self._read}

    def _confirm(self, calls: list[_Call], group: EqualGroup, call: _Call) -> None:
        """Mark an earlier call of another layer as confirmed if it ran the same ops; else keep this call."""
        for known in calls:
            same = known.layer is not call.layer and self._same_call(known, group, call.layer, call.given, call.form)
            if same and self._alike(known, call, group):
                known.confirmed = not _escaped([known, call], self._tape.alive)
                if not known.confirmed:
                    self._groups.remove(group)
                return
        calls.append(call)

    def _alike(self, known: _Call, call: _Call, group: EqualGroup) -> bool:
        names = renamed(group.trees[known.layer], group.trees[call.layer], self._tape.names)
        return names is not None and _same_nodes(known, call, names)

    def _same_call(self, known: _Call, group: EqualGroup, layer: nn.Module, given: list[Any], form: TreeSpec) -> bool:
        """Whether a layer is called like the known one, and the attributes that call read have the same values."""
        return (
            form == known.form
            and all(self._same_input(a, b) for a, b in zip(known.given, given, strict=True))
            and _sharing(known.given) == _sharing(given)
            and all(self._value(layer, attribute) == value for attribute, value in known.read.items())
        )

    def _value(self, layer: nn.Module, attribute: AttributePath) -> Any:
        path, name = attribute
        return self._held[id(layer.get_submodule(path))].get(name)

    def _same_input(self, a: Any, b: Any) -> bool:
        if a is b:
            return True
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return type(a) is type(b) and isinstance(a, _PLAIN) and bool(a == b)
        ours, theirs = self._tape.twin(a), self._tape.twin(b)
        if ours.is_meta and theirs.is_meta:
            return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.stride() == theirs.stride()
        return ours.is_meta == theirs.is_meta and ours.dtype == theirs.dtype and torch.equal(ours, theirs)

    def _stand_in(self, call: _Call, layer: nn.Module, given: list[Any], names: Mapping[str, str]) -> Any:
        """Return the layer's outputs as new fake tensors, without running it."""
        result, made = list(call.result), []
        for i, value in enumerate(call.result):
            if isinstance(value, Tensor):
                position = next((j for j, x in enumerate(call.given) if x is value), None)
                if position is not None:
                    result[i] = given[position]
                    continue
                result[i] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
                made.append(result[i])
        inputs = [self._tape.node(x) for x in given if isinstance(x, Tensor)]
        node = self._tape.append(equal_layer, inputs, made)
        name, like = self._tape.names[id(layer)], self._tape.names[id(call.layer)]
        same = {n: call.given[i] is given[i] for n, i in call.given_nodes.items()}
        self._repeated.append(RepeatedLayer(node, frozenset(call.nodes), name, like, same, names))
        return tree_unflatten(result, call.result_form)


# ---- what a call must not have done ----------------------------------------------------------------------------------


def _since(graph: Graph, last: Node | None) -> list[Node]:
    found: list[Node] = []
    for node in reversed(graph.nodes):
        if node is last:
            break
        found.append(node)
    return found[::-1]


def _results_are_new(call: _Call) -> bool:
    """Whether every output is an input, a plain value or a fake tensor with new storage, and not all are inputs."""
    storages: list[int] = [storage_of(x) for x in call.given if isinstance(x, Tensor)]
    for value in call.result:
        if isinstance(value, Tensor):
            if any(value is x for x in call.given):
                continue
            if not value.is_meta or storage_of(value) in storages:
                return False
            storages.append(storage_of(value))
        elif not isinstance(value, _PLAIN):
            return False
    return any(isinstance(v, Tensor) and all(v is not x for x in call.given) for v in call.result)


def _only_given(call: _Call) -> bool:
    """Whether the ops read only inputs, weights and constants, and wrote only into tensors made in the call."""
    inside = set(call.nodes)
    outside = {a for node in call.nodes for a in node.all_input_nodes if a not in inside}
    if any(node.op == "call_function" and node not in call.given_nodes for node in outside):
        return False
    constants = [n for n in call.nodes if n.op != "call_function"]
    written = (n for node in call.nodes for n in written_by(node.target, node.args, node.kwargs) if isinstance(n, Node))
    before = {storage_of(t) for n in {*outside, *call.given_nodes, *constants} for t in _tensors(n)}
    return not any(storage_of(t) in before for n in written for t in _tensors(n))


def _tensors(node: Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [t for t in (value if isinstance(value, list | tuple) else (value,)) if isinstance(t, Tensor)]


def _escaped(calls: list[_Call], alive: list[Any]) -> bool:
    """Whether anything other than the recording, the inputs and the outputs holds a tensor made in the calls."""
    told = {id(x) for call in calls for x in (*call.given, *call.result)}
    nodes = [node for call in calls for node in call.nodes]
    made = [tensor for node in nodes for tensor in _tensors(node) if id(tensor) not in told]
    ours = {id(made), id(alive)}
    for node in nodes:
        ours.update((id(node.meta), id(node.meta.get("val"))))
    return any(id(x) not in ours and not isinstance(x, types.FrameType) for x in gc.get_referrers(*made))


def _sharing(values: list[Any]) -> list[int]:
    """For each tensor, the index of its first occurrence."""
    first: dict[int, int] = {}
    return [first.setdefault(id(x), i) for i, x in enumerate(values) if isinstance(x, Tensor)]


def _same_nodes(known: _Call, other: _Call, names: Mapping[str, str]) -> bool:
    """Whether two calls ran the same ops on corresponding tensors."""
    ours, theirs = (  # without get_attr nodes: a constant enters the graph at its first use, mostly in the first layer
        [n for n in call.nodes if n.op == "call_function"] for call in (known, other)
    )
    if len(ours) != len(theirs):
        return False
    image: dict[Node, Node] = {}
    for a, b in zip(ours, theirs, strict=True):
        image[a] = b

    def same(a: Any, b: Any) -> bool:
        if not isinstance(a, Node) or not isinstance(b, Node):
            return type(a) is type(b) and bool(a == b)
        if a in image:
            return image[a] is b
        if a in known.given_nodes or b in other.given_nodes:
            return known.given_nodes.get(a) == other.given_nodes.get(b)
        if a is b:
            return str(a.target) not in names or names[str(a.target)] == str(a.target)
        if a.op != "get_attr" or b.op != "get_attr":
            return False
        return names.get(str(a.target)) == str(b.target) or _same_constant(a, b, names)

    for a, b in zip(ours, theirs, strict=True):
        left, left_form = tree_flatten((a.args, dict(a.kwargs)))
        right, right_form = tree_flatten((b.args, dict(b.kwargs)))
        if a.target is not b.target or left_form != right_form or not all(map(same, left, right)):
            return False
    return True


def _same_constant(a: Node, b: Node, names: Mapping[str, str]) -> bool:
    """Whether two nodes are constants outside both layers with the same values."""
    x, y = a.meta["val"], b.meta["val"]
    own = str(a.target) in names or str(b.target) in names.values()
    return not own and not x.is_meta and not y.is_meta and x.dtype == y.dtype and torch.equal(x, y)
