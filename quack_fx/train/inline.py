"""Inserts QuacK into the traced graph of a training step or optimizer step, for any optimizer.

In: an ATen graph that updates weights (from make_fx, AOTAutograd or a graph trainer), and the model's layout. Out: a
graph with the same inputs and outputs, in which the new value of each query or key weight becomes, row by row,

    W <- lerp(W_old, W_new, s),    s = tau * factor / initial factor

`StepBackend` does this for `torch.compile(optimizer.step)`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from quack_fx.errors import InlineError, first_line
from quack_fx.layout import QKLayout
from quack_fx.train.hooks import check_tau
from quack_fx.train.program.scaling import NormName, scaling_of

if TYPE_CHECKING:
    from quack_fx.train.program.parts.quack import QuacK as Scaling

_aten = torch.ops.aten
_ONWARD = {"add", "sub", "mul", "div", "addcdiv", "addcmul", "lerp", "where", "clone"}
"""Ops (and their `_foreach_` variants) that return an updated version of their first argument (`where`: second)."""


def inline_quack(
    graph_module: fx.GraphModule,
    layout: QKLayout,
    model: nn.Module,
    inputs: Sequence[Any] = (),
    *,
    weights: Mapping[str, str | int] | None = None,
    tau: float = 1.0,
    norm: NormName = "frobenius",
) -> fx.GraphModule:
    """Inline QuacK's scaling into a traced step.

    Arguments:
        graph_module: The graph of a step that changes weights in place or returns their new values. It is not modified.
        layout: The layout of the model.
        model: The model with its initial weights, from which the initial factors are computed.
        inputs: The inputs that the graph was traced with, in the order of its placeholders. The model's weights are
            recognised among them and among the graph's attributes; other inputs may be fake tensors.
        weights: The placeholder of each weight, by name or index, if the inputs are not the weights themselves.
        tau: Learning rate of queries and keys at the start of training, relative to that of the other weights; stored
            in the buffer "quack_tau" of the graph.
        norm: "frobenius"; "spectral" cannot be traced.

    Returns:
        A new graph with the same inputs and outputs.

    Raises:
        InlineError: A weight with query or key rows, or its new value, cannot be identified in the graph.
        LayoutError: The layout does not fit the model.

    Example:
        >>> graph = make_fx(step)(params, grads, state)  # step returns new params and new state
        >>> graph = inline_quack(graph, layout, model, [*params, *grads, *state])
    """
    check_tau(tau)
    if norm != "frobenius":
        raise InlineError(f"norm={norm!r} cannot be part of a graph; use 'frobenius'")
    scaling = scaling_of(model, layout, torch.tensor(tau, dtype=torch.float64), norm)
    return _inlined(graph_module, scaling, model, inputs, weights or {})


class StepBackend:
    """A backend for `torch.compile(optimizer.step, backend=StepBackend(model, layout))`.

    Create it while the model has its initial weights. To resume training, also save and load its `state_dict()`.

    Arguments:
        model: The model.
        layout: Its layout.
        tau: Learning rate of queries and keys at the start of training, relative to that of the other weights.
        backend: The backend that compiles the graph with the scaling inside.

    Example:
        >>> step = torch.compile(optimizer.step, backend=StepBackend(model, layout))
    """

    def __init__(self, model: nn.Module, layout: QKLayout, tau: float = 1.0, backend: str = "inductor") -> None:
        check_tau(tau)
        self._model, self._backend = model, backend
        self._tau = torch.tensor(tau, dtype=torch.float64)
        self._scaling = scaling_of(model, layout, self._tau, "frobenius")

    def __call__(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph from Dynamo; the scaling is inserted if the graph has query or key weights."""
        held = {id(tensor) for tensor in (*inputs, *_attributes(graph_module).values())}
        if any(id(weight) in held for weight in self._scaling.home):
            graph_module = _inlined(graph_module, self._scaling, self._model, inputs, {}, hold_others=True)
        compiled: Callable[..., Any] = torch._dynamo.lookup_backend(self._backend)(graph_module, list(inputs))
        return compiled

    def state_dict(self) -> dict[str, Any]:
        """The initial factors, and `tau`."""
        return {"first": [table.clone() for table in self._scaling.saved], "tau": self._tau.clone()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the initial factors and `tau` of an earlier run."""
        for table, saved in zip(self._scaling.saved, state_dict["first"], strict=True):
            table.copy_(saved)
        self._tau.copy_(state_dict["tau"])


# ---- the graph -------------------------------------------------------------------------------------------------------


def _inlined(
    graph_module: fx.GraphModule,
    scaling: Scaling,
    model: nn.Module,
    inputs: Sequence[Any],
    chosen: Mapping[str, str | int],
    hold_others: bool = False,
) -> fx.GraphModule:
    """The graph with the scaling inserted; with `hold_others`, weights that are no inputs become its attributes."""
    names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
    held = _attributes(graph_module)
    known = {id(tensor) for tensor in (*held.values(), *inputs)}
    if hold_others:
        others = [weight for weight in scaling.home if id(weight) not in known]
        held |= {f"quack_weight_{i}": weight for i, weight in enumerate(others)}
    functional = _functional(graph_module, held, _inputs(graph_module, inputs))
    graph, root = functional.graph, nn.Module()
    for target, tensor in _attributes(functional).items():
        _register(root, target, tensor)
    nodes = graph.find_nodes(op="placeholder")
    placeholders = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]
    own = dict(zip(placeholders, nodes[len(held) :], strict=False))
    old = _weights_of(scaling, names, chosen, dict(zip(map(id, [*held.values(), *inputs]), nodes, strict=False)), own)
    new = {weight: _new_value(node, names[weight]) for weight, node in old.items() if id(weight) in known or chosen}
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        scales = _write_scales(graph, root, scaling, old)
    for weight, value in new.items():
        if value is not None:
            _blend(graph, old[weight], value, scales[weight], weight.dtype)
    for node, (target, tensor) in zip(nodes, held.items(), strict=False):
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(_register(root, target.replace(".", "_"), tensor)))
        graph.erase_node(node)
    graph.set_codegen(graph_module.graph._codegen)
    return fx.GraphModule(root, graph)


def _attributes(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """The tensor attributes that a graph reads, by name."""
    found = {}
    for target in dict.fromkeys(str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")):
        value = operator.attrgetter(target)(graph_module)
        if isinstance(value, Tensor):
            found[target] = value
    return found


def _inputs(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """A value for each placeholder: the given inputs, or the values in the graph's metadata."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if inputs:
        if len(inputs) != len(placeholders):
            raise InlineError(
                f"{len(inputs)} inputs were given for a graph with {len(placeholders)}; give one for each"
            )
        return list(inputs)
    found = [node.meta.get("val", node.meta.get("example_value")) for node in placeholders]
    if unknown := [node.name for node, value in zip(placeholders, found, strict=True) if value is None]:
        raise InlineError(f"the graph has no metadata of its input {unknown[0]!r}; pass inputs=")
    return found


class _Lifted(fx.Interpreter):
    """Interprets a graph with some of its attributes replaced."""

    def __init__(self, graph_module: fx.GraphModule, held: Mapping[str, Any]) -> None:
        super().__init__(graph_module)
        self._held = held

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The replacement of an attribute, or the attribute itself."""
        return self._held[target] if target in self._held else super().get_attr(target, args, kwargs)


def _functional(graph_module: fx.GraphModule, held: Mapping[str, Tensor], inputs: Sequence[Any]) -> fx.GraphModule:
    """The functionalized graph: in-place writes only at the end, one per input; attributes become inputs."""

    def run(*values: Any) -> Any:
        lifted = dict(zip(held, values, strict=False))
        return _Lifted(graph_module, lifted).run(*values[len(held) :], enable_io_processing=False)

    try:
        # A new mode, because Dynamo's would replace sizes by symbols.
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            values = [
                torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) if isinstance(v, Tensor) else v
                for v in (*held.values(), *inputs)
            ]
            return make_fx(torch.func.functionalize(run))(*values)
    except Exception as error:
        raise InlineError(f"the graph cannot be functionalized: {first_line(error)}") from error


def _weights_of(
    scaling: Scaling,
    names: Mapping[Tensor, str],
    chosen: Mapping[str, str | int],
    known: Mapping[int, fx.Node],
    own: Mapping[str, fx.Node],
) -> dict[Tensor, fx.Node]:
    """The node of each weight with query or key rows: of the chosen placeholder, or the known one of the tensor."""
    places: dict[str | int, fx.Node] = {key: own[name] for i, name in enumerate(own) for key in (i, name)}
    if strange := [key for key in chosen.values() if key not in places]:
        raise InlineError(f"weights= names the placeholder {strange[0]!r}; the graph has {', '.join([*own][:4])}, …")
    found = {w: places[chosen[names[w]]] if names[w] in chosen else known.get(id(w)) for w in scaling.home}
    if unseen := [names[weight] for weight, node in found.items() if node is None]:
        raise InlineError(
            f"{len(unseen)} weights with query or key rows, such as {unseen[0]!r}, are not among the inputs of the "
            "graph and what it holds; pass the weights themselves in inputs=, or their placeholders in weights="
        )
    return {weight: node for weight, node in found.items() if node is not None}


def _new_value(weight: fx.Node, name: str) -> fx.Node | None:
    """The node of a weight's new value; None if the graph does not use the weight."""
    written = [user.args[1] for user in weight.users if user.target is _aten.copy_.default and user.args[0] is weight]
    if written:
        value = written[-1]
        assert isinstance(value, fx.Node)
        return value
    reached, moved = [weight], dict[fx.Node, None]()
    while reached:
        for node in _onward(reached.pop()):
            if node not in moved:
                moved[node] = None
                reached.append(node)
    leaving = [node for node in moved if any(user.op == "output" for user in node.users)]
    if len(leaving) > 1:
        raise InlineError(
            f"{len(leaving)} outputs of the graph may be the new value of {name!r}; let the step write into its weights"
        )
    if not leaving and weight.users:
        raise InlineError(f"the new value of {name!r} cannot be identified among the outputs of the graph")
    return leaving[0] if leaving else None


def _onward(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that hold a weight's value after one more update op."""
    for user in node.users:
        op, _, _ = str(user.target).removeprefix("aten.").removeprefix("_foreach_").partition(".")
        if user.op != "call_function" or op not in _ONWARD or not user.args:
            continue
        first = user.args[1] if op == "where" else user.args[0]
        if first is node and _updates(op, user):
            yield user
        elif isinstance(first, (list, tuple)) and node in first:
            place = list(first).index(node)
            yield from (g for g in user.users if g.target is operator.getitem and g.args[1] == place)


def _updates(op: str, user: fx.Node) -> bool:
    """Whether an op is part of a weight update; mul and div are if their other argument is a single number."""
    other = user.args[1] if op in ("mul", "div") else None
    value = other.meta.get("val") if isinstance(other, fx.Node) else None
    return not isinstance(value, Tensor) or value.numel() == 1


def _write_scales(
    graph: fx.Graph, root: nn.Module, scaling: Scaling, old: Mapping[Tensor, fx.Node]
) -> dict[Tensor, fx.Node]:
    """Add nodes that compute the scales from the weights before the step; constants are registered on `root`."""
    weights = list(old)

    def scales_of(*tensors: Tensor) -> list[Tensor]:
        of = dict(zip(weights, tensors, strict=True))
        traced = copy.copy(scaling)
        traced.stacks = [{n: ([of[w] for w in own], axis) for n, (own, axis) in s.items()} for s in scaling.stacks]
        scales = traced.scales()
        return [scales[tensor] for tensor in tensors]

    traced = make_fx(scales_of)(*(weight.detach() for weight in weights))
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), old.values(), strict=True))
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            tensor = getattr(traced, str(node.target))
            name = "quack_tau" if tensor is scaling.tau else f"quack{node.target}"
            copies[node] = graph.get_attr(_register(root, name, tensor))
        elif node.op == "call_function":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    results: Any = traced.graph.output_node().args[0]
    return {weight: copies[node] for weight, node in zip(weights, results, strict=True)}


def _blend(graph: fx.Graph, old: fx.Node, new: fx.Node, scale: fx.Node, dtype: torch.dtype) -> None:
    """Replace the new value by old + scale (new - old), at least in float32 and rounded once."""
    exact = torch.promote_types(dtype, torch.float32)
    users, after = list(new.users), new.next
    with graph.inserting_before(after):
        ends: list[fx.Node] = [old, new]
        if exact != dtype:
            ends = [graph.call_function(_aten._to_copy.default, (end,), {"dtype": exact}) for end in ends]
        scaled = graph.call_function(_aten.lerp.Tensor, (*ends, scale))
        if exact != dtype:
            scaled = graph.call_function(_aten._to_copy.default, (scaled,), {"dtype": dtype})
    for user in users:
        user.replace_input_with(new, scaled)


def _register(root: nn.Module, name: str, tensor: Tensor) -> str:
    """Register a tensor as a detached buffer that shares its memory; returns the name."""
    root.register_buffer(name, tensor.detach())
    return name
