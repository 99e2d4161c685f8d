"""Run view ops on planes: views, slices, permutations, concatenations, gathers.

In: a node that only rearranges elements and, for each tensor it reads, a *plane*: an int64 tensor of the same shape
(labels, coordinates of a weight, indices into a logit tensor). Out: the plane of its result, computed by the same op,
so no arrangement of heads needs special code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from quack_fx.find.provenance.labels import constant_along, reshape
from quack_fx.graph.dataflow import Dataflow, is_numeric

_SAME = frozenset(
    "clone contiguous alias detach lift_fresh lift_fresh_copy _to_copy to resolve_conj resolve_neg".split()
)
_RESHAPE = frozenset(
    "view _unsafe_view reshape _reshape_alias view_copy flatten unflatten view_as reshape_as squeeze unsqueeze".split()
)
_GATHER = frozenset("index gather index_select take_along_dim repeat_interleave".split())
PUTS = frozenset("index_put _index_put_impl index_copy scatter masked_scatter".split())
"""Ops that write values at indices."""
_DROPPED = ("dtype", "device", "memory_format", "layout", "pin_memory", "non_blocking")

Plane = Callable[[Node], Tensor]


def run_view(df: Dataflow, node: Node, plane: Plane, unknown: int, alias: bool = False) -> Any:
    """Compute the plane, or list of planes, of the result of a view op.

    Arguments:
        df: The graph's dataflow.
        node: Node of kind "view".
        plane: Returns the plane of a tensor that the node reads.
        unknown: Value for elements whose source depends on data (a gather by computed indices).
        alias: Return a true view of the argument's plane, because a later op writes through it.
    """
    name, source = df.op[node].name, node.args[0]
    if alias and name not in ("copy_", "copy", "to"):
        return _run_or_unknown(df, node, plane, unknown)
    if name in _SAME and isinstance(source, Node):
        return plane(source)
    # A view that changes the dtype may change the number of elements, and is then no reshape.
    if name in _RESHAPE and isinstance(source, Node) and df.shape(node).numel() == df.shape(source).numel():
        return reshape(plane(source), df.shape(node))
    if name == "as_strided" and isinstance(source, Node):
        return _as_strided(df, node, plane(source))
    if name in ("copy_", "copy"):
        target = node.args[1]
        return plane(target).expand(df.shape(node)) if isinstance(target, Node) else None
    if name in _GATHER and isinstance(source, Node):
        return _gather(df, node, plane, unknown)
    if name in PUTS and not runs_at_known_indices(df, node):
        return torch.full((1,), unknown, dtype=torch.int64).expand(df.shape(node))
    if name in ("constant_pad_nd", "pad"):
        return torch.constant_pad_nd(plane(source), list(node.args[1]), 0)  # type: ignore[arg-type]
    return _run_or_unknown(df, node, plane, unknown)


def indices_written(df: Dataflow, node: Node) -> list[Node]:
    """Indices, or masks, of an op in `PUTS`."""
    given: Any = node.args[2 if df.op[node].name in ("index_copy", "scatter") else 1]
    return [i for i in (given if isinstance(given, list | tuple) else [given]) if isinstance(i, Node)]


def runs_at_known_indices(df: Dataflow, node: Node) -> bool:
    """Whether all indices of an op in `PUTS` are constants."""
    return all(df.constant(i) is not None for i in indices_written(df, node))


def _run_or_unknown(df: Dataflow, node: Node, plane: Plane, unknown: int) -> Any:
    """Run a view op; if it fails, because its sizes are made-up values (tokens of each expert), nothing is known."""
    try:
        return _run(df, node, plane)
    except RuntimeError:
        return tree_map_only(Tensor, lambda x: torch.full(x.shape, unknown, dtype=torch.int64), df.value(node))


def _run(df: Dataflow, node: Node, plane: Plane) -> Any:
    def convert(argument: Node) -> Any:
        value = df.value(argument)
        if isinstance(value, Tensor) and not is_numeric(value):
            numbers = df.constant(argument)
            if numbers is not None and argument is not node.args[0]:
                return numbers
        return plane(argument)

    args, kwargs = map_arg((node.args, dict(node.kwargs)), convert)
    return node.target(*args, **{k: v for k, v in kwargs.items() if k not in _DROPPED})  # type: ignore[operator]


def _as_strided(df: Dataflow, node: Node, plane: Tensor) -> Tensor:
    value = df.value(node.args[0])  # type: ignore[arg-type]
    laid_out = torch.empty_strided(value.shape, value.stride(), dtype=plane.dtype).copy_(plane)
    window: list[Any] = [*node.args[1:], None]
    size, stride, offset = window[:3]
    offset = value.storage_offset() if offset is None else offset
    return laid_out.as_strided(size, stride, offset - value.storage_offset())


def _gather(df: Dataflow, node: Node, plane: Plane, unknown: int) -> Tensor:
    """Run a gather. For computed indices, the result is known only if the plane is constant along their axes."""
    source: Node = node.args[0]  # type: ignore[assignment]
    given = [n for n in node.all_input_nodes if n is not source]
    if all(df.constant(n) is not None for n in given):
        moved: Tensor = _run(df, node, plane)
        return moved
    label = plane(source)
    if df.op[node].name == "index":
        index: Any = node.args[1]
        axes = [d for d, i in enumerate(index) if i is not None and df.constant(i) is None]
    else:
        axes = [int(node.args[1])] if len(node.args) > 1 and isinstance(node.args[1], int) else []
    if not axes or not all(constant_along(label, d) for d in axes):
        return torch.full((1,), unknown, dtype=torch.int64).expand(df.shape(node))

    def zeros(argument: Node) -> Any:
        if argument is source:
            return label
        known = df.constant(argument) if df.op[node].name == "index" else None
        return torch.zeros(df.shape(argument), dtype=torch.int64) if known is None else known

    args, kwargs = map_arg((node.args, dict(node.kwargs)), zeros)
    result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    if result.shape != df.shape(node):
        return torch.full((1,), unknown, dtype=torch.int64).expand(df.shape(node))
    return result
