"""Determine what every node of an ATen graph depends on, and which nodes are views of the same memory.

In: a `torch.fx.GraphModule` of ATen ops (ours, or one from torch.export or make_fx) and the names of its parameters.
Out: a `Dataflow`, which says whether a node is a weight or an activation and whether it depends on the input. That is
enough to find attention without looking at names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from quack_fx.graph.ops import FACTORY, VALUE_FREE, Op, op_of


class BehindLayer(Exception):
    """The search needs to look inside a layer that was not recorded and is a single node of the graph."""

    def __init__(self, node: Node) -> None:
        super().__init__(f"{node.name} is a layer that was not recorded")


class Dataflow:
    """Dependencies and memory aliasing of all nodes of one graph.

    Attributes:
        nodes: The nodes in execution order.
        index: Index of each node in that order.
        op: Name and kind of each node's op.
        weights: Fully qualified name of each node that is a parameter.
        weight_shapes: Shapes of these parameters by name.
        from_weight: Nodes that depend on a parameter.
        from_input: Nodes that depend on an input of the model.
        activation: Nodes that depend on an op of a weight with an input, or on a product or lookup with a weight.
        drawn: Nodes that depend on a random draw.
        group: For each node, the first node that has the same memory (mostly the node itself).
        writes: For each group that is written in place, the writing nodes in execution order.
    """

    def __init__(self, graph_module: GraphModule, weights: Mapping[Node, str]) -> None:
        self.nodes: list[Node] = list(graph_module.graph.nodes)
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.op: dict[Node, Op] = {node: op_of(node) for node in self.nodes}
        self.weights = dict(weights)
        self.weight_shapes = {name: self.shape(node) for node, name in weights.items()}
        self.from_weight: set[Node] = set(weights)
        self.from_input: set[Node] = set()
        self.activation: set[Node] = set()
        self.drawn: set[Node] = set()
        self.group: dict[Node, Node] = {}
        self.writes: dict[Node, list[Node]] = {}
        self._members: dict[Node, list[Node]] = {}
        self._constants: dict[Node, Tensor | None] = {}
        for node in self.nodes:
            self._visit(node)

    def _visit(self, node: Node) -> None:
        base, written = _aliases(node)
        group = self.group.get(base, base) if base is not None else node
        self.group[node] = group
        self._members.setdefault(group, []).append(node)
        if node.op == "placeholder" and node not in self.weights:
            self.from_input.add(node)
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            self.drawn.add(node)
        if node.op != "call_function" or self.op[node].name in VALUE_FREE | FACTORY:
            return
        inputs = list(node.all_input_nodes)
        drawn = node in self.drawn or any(n in self.drawn for n in inputs)
        weight = any(n in self.from_weight for n in inputs)
        given = any(n in self.from_input for n in inputs)
        active = any(n in self.activation for n in inputs)
        # A product with a weight, or any op of a weight with an input, gives an activation.
        active |= weight and (given or self.op[node].kind in ("contraction", "convolution", "lookup", "attention"))
        for member in self._members[group] if written else [node]:
            if weight:
                self.from_weight.add(member)
            if given:
                self.from_input.add(member)
            if active:
                self.activation.add(member)
            if drawn:
                self.drawn.add(member)
        if written:
            self.writes.setdefault(group, []).append(node)

    def open(self, node: Node) -> Node:
        """Return the node; a walk calls this for every node that it passes through.

        Raises:
            BehindLayer: The node stands for a layer that was not recorded.
        """
        if self.op[node].kind == "layer":
            raise BehindLayer(node)
        return node

    def value(self, node: Node) -> Any:
        """Recorded value: a real, meta or fake tensor, a tuple of tensors, or a Python number."""
        return node.meta.get("val")

    def shape(self, node: Node) -> torch.Size:
        """Shape of a node's tensor; empty if its value is not a single tensor."""
        value = self.value(node)
        return value.shape if isinstance(value, Tensor) else torch.Size()

    def is_weight(self, node: Node) -> bool:
        """Whether a node is a weight, possibly cast or sliced: it depends on parameters and is no activation."""
        return node in self.from_weight and node not in self.activation

    def is_given(self, node: Node) -> bool:
        """Whether a node is a floating-point or complex tensor that depends on an input and on no parameter."""
        value = self.value(node)
        floating = isinstance(value, Tensor) and is_numeric(value)
        return floating and node in self.from_input and node not in self.from_weight

    def is_constant(self, node: Node) -> bool:
        """Whether a node depends on no parameter and `is_given` is false: a table, a mask, positions."""
        return node not in self.from_weight and not self.is_given(node)

    def constant(self, node: Node) -> Tensor | None:
        """Values of a node that depends on no parameter, if they are recorded or can be computed; else None.

        Our captures record these values. Graphs of torch.export do not, but their tables (`arange` and what is made
        from it) depend on nothing and are computed here. Indices that depend on parameters (the tokens of an expert) or
        on random draws are no constants even where a value is recorded: it is made up, or that of one batch.
        """
        if node not in self._constants:
            self._constants[node] = self._compute_constant(node)
        return self._constants[node]

    def _compute_constant(self, node: Node) -> Tensor | None:
        value = self.value(node)
        varies = node in self.from_weight or node in self.drawn
        if isinstance(value, Tensor) and varies and not is_numeric(value):
            return None
        if isinstance(value, Tensor) and _has_numbers(value):
            return value
        known = varies or node in self.from_input or node.op != "call_function"
        if known or not isinstance(value, Tensor) or value.numel() > 1 << 22 or self.group[node] in self.writes:
            return None
        arguments = {n: self.constant(n) for n in node.all_input_nodes}
        if any(v is None for v in arguments.values()):
            return None
        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: arguments[n])
        result = node.target(*args, **{k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")})  # type: ignore[operator]
        return result if isinstance(result, Tensor) else None

    def is_zero(self, node: Node) -> bool:
        """Whether a node is known to be all zeros, even without its values (zero-initialized queries, for example)."""
        if self.group[node] in self.writes:
            return False
        if self.op[node].name in ("zeros", "zeros_like", "new_zeros"):
            return True
        if self.op[node].kind == "view" and node.all_input_nodes:
            return all(map(self.is_zero, node.all_input_nodes))
        numbers = self.constant(node)
        return numbers is not None and not numbers.any()

    def modules(self, node: Node) -> tuple[str, ...]:
        """Names of the modules whose forward was running, outermost first, without the root."""
        stack = node.meta.get("nn_module_stack") or {}
        return tuple(name for name in (_module_name(entry) for entry in stack.values()) if name)

    def home(self, node: Node) -> str:
        """Innermost module whose forward was running; "" for the root."""
        return (self.modules(node) or ("",))[-1]

    def describe(self, node: Node) -> str:
        """Describe a node for an error message: its op, shape and module."""
        return f"{self.op[node].name} {list(self.shape(node))} in {self.home(node) or 'the model itself'}"

    def reads(self, node: Node) -> Iterator[Node]:
        """Yield what a node reads: its arguments, and every earlier write into the memory of one of them.

        Factory ops (`new_full`, `zeros_like`) read nothing: they use only the shape of their argument.
        """
        for argument in node.all_input_nodes if self.op[node].kind != "factory" else ():
            yield argument
            for write in self.writes.get(self.group[argument], ()):
                if self.index[argument] < self.index[write] < self.index[node]:
                    yield write

    def common_module(self, nodes: list[Node]) -> str:
        """Innermost module that was running at all of `nodes`."""
        stacks = [self.modules(node) for node in nodes]
        common = ""
        for level in zip(*stacks, strict=False):
            if len(set(level)) != 1:
                break
            common = level[0]
        return common


def factors_of(df: Dataflow, node: Node) -> tuple[Node, Node, Node | None] | None:
    """Left operand, right operand and addend of a product; None if the op is not a single product."""
    name, args = df.op[node].name, node.args
    pick: tuple[object, object, object]
    if name in ("mm", "bmm", "matmul", "mv", "dot"):
        pick = (args[0], args[1], None)
    elif name in ("addmm", "baddbmm", "addmv"):
        pick = (args[1], args[2], args[0])
    elif name == "linear" or df.op[node].kind == "convolution":
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
        pick = (args[0], args[1], bias)
    else:
        return None
    left, right, bias = pick
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    return left, right, bias if isinstance(bias, Node) else None


def is_depthwise(df: Dataflow, node: Node) -> bool:
    """Whether a node is a depthwise convolution: no channel depends on another."""
    sides = factors_of(df, node)
    if sides is None or df.op[node].kind != "convolution":
        return False
    x, weight = df.shape(sides[0]), df.shape(sides[1])
    return len(weight) > 2 and weight[1] == 1 and x[1] == weight[0] == df.shape(node)[1] and weight[0] > 1


def _module_name(entry: Any) -> str:
    name = entry[0] if isinstance(entry, tuple) else str(entry)
    # torch.export prefixes names with the local variable that held the model.
    return str(name).removeprefix("L['self'].").removeprefix("L['self']")


def is_numeric(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point or complex numbers; others may be indices or masks."""
    return tensor.is_floating_point() or tensor.is_complex()


def _has_numbers(tensor: Tensor) -> bool:
    return not tensor.is_meta and type(tensor) in (Tensor, torch.nn.Parameter)


def _aliases(node: Node) -> tuple[Node | None, bool]:
    """Return the argument that a node's result shares memory with, and whether the node writes into it."""
    if node.op != "call_function":
        return None, False
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        first = node.args[0] if node.args else None
        if not isinstance(first, Node) or op_of(node).name != "getitem":
            return None, False
        # An output of a split is a view. Each output of any other op (a norm and its statistics) has its own memory.
        return (first if op_of(first).kind in ("view", "layer") else None), False
    base: Node | None = None
    for i, spec in enumerate(schema.arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(spec.name)
        if spec.alias_info is not None and isinstance(given, Node):
            if spec.alias_info.is_write:
                return given, True
            if any(r.alias_info is not None for r in schema.returns) and not _converts(node, given):
                base = base or given
    return base, False


def _converts(node: Node, given: Node) -> bool:
    """Whether a `to` changes the dtype or device, and so makes a copy."""
    before, after = given.meta.get("val"), node.meta.get("val")
    if op_of(node).name != "to" or not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return (before.dtype, before.device) != (after.dtype, after.device)
