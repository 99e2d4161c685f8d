"""Record a forward as a `GraphModule` that computes, trains, exports and compiles.

In: a model with real weights, and the arguments of one forward call. Out: a `GraphModule` with the model's calling
convention and results, which shares its parameters and buffers.

The forward is recorded on real values with gradients enabled; a `detach` follows each result computed under `no_grad`.
Then graph and model run side by side on the example inputs. Outputs must be bitwise equal, and gradients equal up to
summation order; otherwise the capture fails (for example on a custom `autograd.Function`, whose backward is not in the
graph).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo  # pack arguments and results as torch.export does
from torch.utils._pytree import tree_flatten, tree_map_only

from quack_fx.errors import CaptureError
from quack_fx.graph.capture.isolate import isolated
from quack_fx.graph.capture.memory import storage_of
from quack_fx.graph.capture.recorder import Recorder
from quack_fx.graph.forward.jagged import JaggedWrittenOut

_DECIDES = frozenset({"_local_scalar_dense", "is_nonzero", "equal"})
"""Ops by which a forward reads values. A decision based on them is baked into the graph."""

_ROUNDING = 1e-5
"""Largest allowed gradient difference, relative to the largest entry: terms may be summed in another order."""


class _WithGradients(Recorder):
    """Recorder that also tracks which nodes have gradients, and records where they stop."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "real")
        self.most = None
        self.parameter_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._trained = {storage_of(p) for p in model.parameters() if p.requires_grad}
        self._computed, self._differentiable = set[Node](), set[Node]()

    def _contexts(self) -> list[AbstractContextManager[Any]]:
        return [JaggedWrittenOut()]  # devices stay as they are: the graph runs where the model does

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, torch._ops.OpOverload):
            raise CaptureError(
                f"the higher-order op {func} cannot be a node of an executable graph; use another attention"
            )
        kwargs = kwargs or {}
        leaves = tree_flatten((args, kwargs))[0]
        if any(isinstance(leaf, torch.Generator) for leaf in leaves):
            raise CaptureError("an op draws from a random generator of its own, which no graph can hold")
        if any(isinstance(leaf, torch.ScriptObject) for leaf in leaves) and any(map(torch.is_tensor, leaves)):
            raise CaptureError(f"{func} takes an object of a TorchScript class, which no graph can hold")
        nodes = [self.node(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if result is NotImplemented:
            return result
        name = func.name().split("::")[-1].split(".")[0]
        trained, computed = any(map(self._has_gradient, nodes)), any(map(self._is_computed, nodes))
        if computed and name in _DECIDES:
            raise CaptureError(
                f"its forward looks at computed numbers ({name}) to decide what to do; no one graph does"
            )
        for made in tree_flatten(result)[0]:
            if isinstance(made, Tensor) and computed:
                if trained and made.is_floating_point():
                    self._follow(func, made)
                self._computed.add(self.node(made))
        return result

    def _is_computed(self, node: Node) -> bool:
        """Whether a node is or depends on a parameter."""
        return node in self._computed or (node.op == "get_attr" and str(node.target) in self.parameter_names)

    def _has_gradient(self, node: Node) -> bool:
        if node.op == "get_attr":
            return storage_of(self.attributes[str(node.target)]) in self._trained
        return node in self._differentiable

    def _follow(self, func: Any, made: Tensor) -> None:
        node = self.node(made)
        if torch.is_grad_enabled() and func is not torch.ops.aten.detach.default:
            self._differentiable.add(node)
        elif func._schema.is_mutable:
            raise CaptureError(f"{func} writes into a tensor that is trained while gradients are off")
        elif func is not torch.ops.aten.detach.default:
            cut = self.graph.call_function(torch.ops.aten.detach.default, (node,))
            cut.meta = dict(node.meta)
            self._remember(made, cut)


def runnable(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> GraphModule:
    """Record a forward as a graph that runs, and check it against the model.

    Returns:
        The graph. Non-tensor arguments are baked in, and so are decisions that the forward made from the values of a
        tensor argument (a mask that is all ones, for example).

    Raises:
        CaptureError: The graph cannot do what the model does. The message says why.
    """
    name = type(model).__name__
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise CaptureError(
            f"an executable capture needs numbers, and weights of {name} are on the meta device, or sharded"
        )
    recorder = _WithGradients(model)
    with isolated(model), torch.enable_grad():
        given, given_by_name = recorder.inputs(args, kwargs)
        with recorder:
            output = model(*given, **given_by_name)
    names = [*list(inspect.signature(model.forward).parameters)[: len(args)], *kwargs]
    if len(names) < len(args) + len(kwargs):
        names = [*(f"arg_{i}" for i in range(len(args))), *kwargs]  # the forward takes *args
    strided = [isinstance(x, Tensor) and not x.is_contiguous() for x in tree_flatten((tuple(args), dict(kwargs)))[0]]
    graph_module = _packed(recorder, names, (given, given_by_name), output, strided)
    graph_module.train(model.training)
    _check(model, graph_module, args, kwargs)
    return graph_module


def _packed(recorder: Recorder, names: list[str], given: Any, output: Any, strided: Sequence[bool]) -> GraphModule:
    """Give the recorded graph the model's calling convention.

    The recording saw contiguous copies of its inputs, so the graph makes those in `strided` contiguous.
    """
    graph = recorder.graph
    leaves, in_spec = tree_flatten(given)
    recorded = {id(leaf): recorder.node(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
    old = [node for node in graph.nodes if node.op == "placeholder"]
    inputs: dict[Node, Node] = {}
    to_copy: list[tuple[Node, Node]] = []
    with graph.inserting_before(next(iter(graph.nodes))):
        for i, leaf in enumerate(leaves):  # every leaf is a placeholder, including numbers and None
            made = graph.placeholder(f"leaf_{i}")
            made.meta["val"] = leaf
            node = recorded.pop(id(leaf), None)
            if node is not None and node.op == "placeholder":
                made.meta = dict(node.meta)
                inputs[node] = made
                if strided[i]:
                    to_copy.append((node, made))
        for node, made in to_copy:
            inputs[node] = graph.call_function(
                torch.ops.aten.clone.default, (made,), {"memory_format": torch.contiguous_format}
            )
            inputs[node].meta = dict(made.meta)
    for node in old:
        if node in inputs:
            node.replace_all_uses_with(inputs[node])
        graph.erase_node(node)
    results, out_spec = tree_flatten(output)
    for result in results:
        if not isinstance(result, Tensor | int | float | bool | str | type(None)):
            raise CaptureError(
                f"the forward returns a {type(result).__name__}, which no graph can hold; "
                "pass arguments that leave it out (use_cache=False, for example)"
            )
    graph.output([recorder.node(r) if isinstance(r, Tensor) else r for r in results])
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(names, in_spec, out_spec)))
    return GraphModule(recorder.attributes, graph, class_name="Captured")


def _check(model: nn.Module, graph_module: GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Compare outputs and gradients of model and graph on the example inputs."""
    buffers = {b: b.clone() for b in model.buffers()}
    results: list[tuple[list[Tensor], list[Tensor | None]]] = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one in (model, graph_module):
        with isolated(model), torch.enable_grad():
            copies = tree_map_only(Tensor, lambda t: t.detach().clone(), (tuple(args), dict(kwargs)))
            torch.manual_seed(0)
            made = [t for t in tree_flatten(one(*copies[0], **copies[1]))[0] if isinstance(t, Tensor)]
        differentiable = [t for t in made if t.requires_grad]
        total = torch.stack([_weighed(t) for t in differentiable]).sum() if differentiable else None
        gradients = (
            torch.autograd.grad(total, parameters, allow_unused=True) if total is not None and parameters else ()
        )
        results.append(([t.detach() for t in made], list(gradients)))
        for buffer, before in buffers.items():
            if not buffer.is_leaf:
                buffer.detach_()  # the forward wrote a tensor with a grad_fn into it
            with torch.no_grad():
                buffer.copy_(before)
    (outputs, theirs), (own_outputs, ours) = results
    if len(outputs) != len(own_outputs) or not all(map(_same, outputs, own_outputs)):
        raise CaptureError("the captured graph does not compute what the model computes on the example inputs")
    if len(theirs) != len(ours) or not all(_same(a, b, _ROUNDING) for a, b in zip(theirs, ours, strict=True)):
        raise CaptureError(
            "the captured graph does not have the model's gradients: its forward runs code with a backward of its own "
            "(a custom autograd.Function), or stops gradients in a way that the graph does not show"
        )


def _weighed(x: Tensor) -> Tensor:
    """Sum of the elements, each with a different weight."""
    x = x.double() if not x.is_complex() else torch.view_as_real(x).double()
    return (x * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).view(x.shape)).sum().cpu()


def _same(a: Tensor | None, b: Tensor | None, rounding: float = 0.0) -> bool:
    if a is None or b is None:
        return (a is None or not a.any()) and (b is None or not b.any())
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    return torch.equal(a, b) or bool(rounding and (a - b).abs().max() <= rounding * a.abs().max())
