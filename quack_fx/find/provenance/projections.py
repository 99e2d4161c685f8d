"""Projections: products of data with a weight, and the weight row behind each output feature.

In: a node (matmul, linear, convolution) with a weight among its operands. Out: a `Projection`: the parameter and row of
each output feature. They follow from the view ops between the parameter and the product (transpose, slice, cat,
reshape), so Linear, Conv1D, fused and three-dimensional weights need no special code.

For each axis of the parameter, a *plane* of coordinates goes through the same view ops as the weight. Coordinates that
vary along the contracted axis are summed over; the others identify the output feature.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.find.provenance.labels import Labels, compact, constant_along
from quack_fx.find.provenance.views import run_view
from quack_fx.graph.dataflow import Dataflow, factors_of, is_numeric


@dataclass
class Projection:
    """One product with a weight.

    Attributes:
        node: The product.
        x: Its data operand.
        x_axis: Axis of `x` that the product sums over.
        first: Label of its first feature; feature i has the label `first + i`.
        names: Parameter of each feature.
        axes: Axes of the parameter that index its output features (mostly one axis); the others are summed over.
        rows: Coordinates of each feature along `axes`, int64 [features, len(axes)].
        gathered: For each axis of the parameter that is summed over in parts (in absorbed MLA, separately over the rows
            of each head), a map from a coordinate in `rows` to all coordinates in its sum.
        biases: Bias parameter of each feature; None if there is none or its entries are not indexed like the rows.
    """

    node: Node
    x: Node
    x_axis: int
    first: int
    names: list[str]
    axes: tuple[int, ...]
    rows: Tensor
    gathered: dict[int, dict[int, tuple[int, ...]]] = field(default_factory=dict)
    biases: list[str | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class _Coordinates:
    """Planes of a view of a weight: the index into `names`, and one coordinate per axis of the parameter."""

    names: tuple[str, ...]
    which: Tensor
    along: tuple[Tensor, ...]

    def planes(self) -> tuple[Tensor, ...]:
        return (self.which, *self.along)


class Projections:
    """All projections of one graph, computed on first use."""

    def __init__(self, df: Dataflow, labels: Labels) -> None:
        self._df = df
        self._labels = labels
        self._of: dict[Node, tuple[Projection, Tensor] | None] = {}
        self._firsts: list[int] = []
        self._in_order: list[Projection] = []
        self._weights: dict[Node, _Coordinates | None] = {}

    def by_feature(self, feature: int) -> tuple[Projection, int]:
        """Projection of a feature label, and the feature's index in it."""
        projection = self._in_order[bisect_right(self._firsts, feature) - 1]
        return projection, feature - projection.first

    def of(self, node: Node) -> tuple[Projection, Tensor] | None:
        """Projection of a node, with the labels of its result; None if its rows cannot be determined."""
        if node not in self._of:
            self._of[node] = self._make(node)
        return self._of[node]

    def operands(self, node: Node) -> tuple[Node, Node, bool, Node | None] | None:
        """Split a product with a weight into data, weight, whether the weight is on the left, and the added bias."""
        df = self._df
        sides = factors_of(df, node)
        if sides is None:
            return None
        left, right, bias = sides
        if df.is_weight(left) and df.is_weight(right):
            if self._spread(right) and not self._spread(left):
                return right, left, True, bias
            if df.op[node].name == "bmm" and not self._spread(left):
                return None  # learned queries times a weight: ambiguous which is which
        if df.is_weight(right) and (left in df.activation or not df.is_weight(left) or df.op[node].name != "mv"):
            return left, right, False, bias
        if df.is_weight(left):
            return right, left, True, bias
        return None

    def _spread(self, weight: Node) -> bool:
        """Whether a parameter was expanded over the batch: learned queries, which count as data."""
        while weight not in self._df.weights and weight.all_input_nodes:
            if self._df.op[weight].name in ("expand", "repeat", "expand_as"):
                return True
            weight = weight.all_input_nodes[0]
        return False

    def _make(self, node: Node) -> tuple[Projection, Tensor] | None:
        df = self._df
        shape = df.shape(node)
        operands = self.operands(node)
        if operands is None:
            return None
        x, weight, on_left, bias = operands
        coordinates = self._coordinates(weight)
        if coordinates is None or bool((compact(coordinates.which) < 0).any()):
            return None
        planes = coordinates.planes()
        if df.op[node].kind == "convolution":
            transposed = _is_transposed(node)
            out_axis = 1 if transposed else 0
            if transposed and _groups(node) != 1:
                return None
            summed = [d for d in range(planes[0].dim()) if d != out_axis]
            x_axis = 1
        else:
            if df.op[node].name == "linear":
                planes = tuple(p.t() if p.dim() == 2 else p.unsqueeze(-1) for p in planes)
            if planes[0].dim() == 1:
                planes = tuple(p.unsqueeze(0 if on_left else -1) for p in planes)
            out_axis = planes[0].dim() - (2 if on_left else 1)
            summed = [planes[0].dim() - (1 if on_left else 2)]
            x_axis = (-2 if len(df.shape(x)) > 1 else -1) if on_left else -1
        axes, gathered = [], dict[int, dict[int, tuple[int, ...]]]()
        for axis, plane in enumerate(planes[1:]):
            if all(constant_along(plane, d) for d in summed):
                axes.append(axis)
            elif not all(constant_along(plane, d) for d in range(plane.dim()) if d not in summed):
                parts = _parts_along(plane, summed)
                if parts is None:
                    return None
                axes.append(axis)
                gathered[axis] = parts
        if not all(constant_along(planes[0], d) for d in summed):
            return None
        axes = [axis for axis in axes if not self._is_thin(coordinates, axis)] or axes[:1]
        kept = [_first_along(planes[0], summed)] + [_first_along(planes[1 + a], summed) for a in axes]
        together = torch.stack(torch.broadcast_tensors(*(compact(p) for p in kept)))
        distinct, where = torch.unique(together.flatten(1), dim=1, return_inverse=True)
        first = self._labels.new_features(distinct.shape[1])
        label = (where + first).view(together.shape[1:]).expand(kept[0].shape)
        if df.op[node].kind == "convolution":
            label = label.reshape(1, -1, *[1] * (len(shape) - 2))
        elif len(shape) < label.dim():
            label = label.squeeze(-1 if on_left else -2)
        label = label.expand(shape)
        projection = Projection(
            node=node,
            x=x,
            x_axis=x_axis,
            first=first,
            names=[coordinates.names[i] for i in distinct[0].tolist()],
            axes=tuple(axes),
            rows=distinct[1:].t().contiguous(),
            gathered=gathered,
            biases=[None] * distinct.shape[1],
        )
        self._firsts.append(first)
        self._in_order.append(projection)
        if bias is not None and df.is_weight(bias):
            self.add_bias(label.movedim(1, -1) if df.op[node].kind == "convolution" else label, bias)
        return projection, label

    def _is_thin(self, coordinates: _Coordinates, axis: int) -> bool:
        """Whether an axis of the parameters has size 1, such as the kernel axes of a 1x1 convolution."""
        shapes = self._df.weight_shapes
        return len(coordinates.along) > 1 and all(shapes[name][axis] == 1 for name in coordinates.names)

    def add_bias(self, label: Tensor, bias: Node) -> None:
        """Record a bias that is added to labeled features, if its entries are indexed like the rows."""
        coordinates = self._coordinates(bias)
        if coordinates is None or len(coordinates.along) != 1:
            return
        try:
            pairs = torch.broadcast_tensors(*(compact(p) for p in (label, coordinates.which, coordinates.along[0])))
        except RuntimeError:
            return
        added = torch.unique(torch.stack(pairs).flatten(1), dim=1).t().tolist()
        entries = Counter(feature for feature, _, _ in added)  # a feature with an entry per token has no bias
        for feature, which, entry in added:
            if len(self._labels.members(feature)) != 1 or feature < 2 or which < 0 or entries[feature] > 1:
                continue
            projection, i = self.by_feature(feature)
            if projection.rows.shape[1] == 1 and int(projection.rows[i, 0]) == entry:
                projection.biases[i] = coordinates.names[which]

    def pairs(self, projection: Projection, made: Tensor, given: Tensor) -> list[tuple[int, int]]:
        """Pair each feature of a projection with the features of its data that are summed into it.

        Arguments:
            projection: The projection.
            made: Labels of its result.
            given: Labels of its data.

        Returns:
            Pairs of a feature of the projection and a label of the set of data features.
        """
        if self._df.op[projection.node].kind == "convolution":
            groups = _groups(projection.node)
            read = given.unflatten(1, (groups, -1))
            read = self._labels.union_along(read, list(range(2, read.dim()))).flatten(2)[:, :, :1]
            made = made.unflatten(1, (groups, -1)).flatten(2)
        else:
            axis = projection.x_axis % given.dim() if given.dim() else 0
            read = self._labels.union_along(given, [axis])
            if made.dim() < read.dim():
                made = made.unsqueeze(axis)
        together = torch.stack(torch.broadcast_tensors(compact(made), compact(read))).flatten(1)
        return [(int(a), int(b)) for a, b in torch.unique(together, dim=1).t().tolist()]

    # ---- view ops on a weight ------------------------------------------------------------------------------------

    def weight_names(self, node: Node) -> tuple[str, ...]:
        """Parameters that a weight node is a view or copy of; empty if it is computed from them otherwise."""
        coordinates = self._coordinates(node)
        return coordinates.names if coordinates is not None else ()

    def _coordinates(self, node: Node) -> _Coordinates | None:
        if node not in self._weights:
            self._weights[node] = self._trace_weight(node)
        return self._weights[node]

    def _trace_weight(self, node: Node) -> _Coordinates | None:
        df = self._df
        if node in df.weights:
            shape = df.shape(node)
            along = tuple(
                torch.arange(n).view([-1 if d == axis else 1 for d in range(len(shape))]).expand(shape)
                for axis, n in enumerate(shape)
            )
            return _Coordinates((df.weights[node],), torch.zeros(1, dtype=torch.int64).expand(shape), along)
        if df.group[node] in df.writes:
            return self._blanked(node)
        inputs = [n for n in node.all_input_nodes if df.is_weight(n)]
        kind, name = df.op[node].kind, df.op[node].name
        if kind == "elementwise" and name in ("mul", "div", "neg") and len(inputs) == 1:
            # A weight times constants (equalized learning rates, a pruning mask) keeps its rows.
            only = self._coordinates(inputs[0])
            numbers = all(df.is_constant(n) for n in node.all_input_nodes if n is not inputs[0])
            return only if numbers and df.shape(inputs[0]) == df.shape(node) else None
        if kind not in ("view", "getitem") or not inputs:
            return None
        if kind == "getitem":
            return self._part(node)
        if any(df.constant(n) is None for n in node.all_input_nodes if n not in inputs and not is_numeric(df.value(n))):
            return None  # taken at indices that are computed
        sources = [self._coordinates(n) for n in inputs]
        if any(s is None for s in sources):
            return None
        names = tuple(dict.fromkeys(name for s in sources if s is not None for name in s.names))
        ranks = {len(s.along) for s in sources if s is not None}
        if len(ranks) != 1:
            return None
        planes = [self._moved(node, names, i) for i in range(1 + ranks.pop())]
        if any(not isinstance(p, Tensor) for p in planes):
            return None
        return _Coordinates(names, planes[0], tuple(planes[1:]))

    def _blanked(self, node: Node) -> _Coordinates | None:
        """Trace a copy of a weight. Its overwritten entries have no row (a bias with zeros for the keys)."""
        df, value = self._df, self._df.value(node)
        writes = df.writes[df.group[node]]
        if df.group[node] is not node or df.op[node].name != "clone" or not value.is_contiguous():
            return None
        source = self._coordinates(node.args[0])  # type: ignore[arg-type]
        if source is None or any(df.op[write].name not in ("zero", "fill") for write in writes):
            return None
        which = source.which.clone(memory_format=torch.contiguous_format)
        for write in writes:
            window = df.value(write)
            which.as_strided(window.shape, window.stride(), window.storage_offset()).fill_(-1)
        return _Coordinates(source.names, which, source.along)

    def _moved(self, node: Node, names: tuple[str, ...], i: int) -> Tensor:
        def plane(n: Node) -> Tensor:
            own = self._coordinates(n)
            if own is None:
                return torch.full((1,), -1, dtype=torch.int64).expand(self._df.shape(n))
            if i > 0:
                return own.along[i - 1]
            table = torch.tensor([names.index(name) for name in own.names])
            return table[compact(own.which)].expand(own.which.shape)

        result: Tensor = run_view(self._df, node, plane, unknown=-1)
        return result

    def _part(self, node: Node) -> _Coordinates | None:
        """Trace one piece of a split or unbound weight."""
        whole: Node = node.args[0]  # type: ignore[assignment]
        inputs = [n for n in whole.all_input_nodes if self._df.is_weight(n)]
        source = self._coordinates(inputs[0]) if len(inputs) == 1 and self._df.op[whole].kind == "view" else None
        if source is None:
            return None
        i: int = node.args[1]  # type: ignore[assignment]
        pieces = [self._moved(whole, source.names, k)[i] for k in range(1 + len(source.along))]
        return _Coordinates(source.names, pieces[0], tuple(pieces[1:]))


def _is_transposed(node: Node) -> bool:
    return "transpose" in str(node.target) or (len(node.args) > 6 and bool(node.args[6]))


def _groups(node: Node) -> int:
    groups = node.args[8] if len(node.args) > 8 else 1
    return groups if isinstance(groups, int) else 1


def _parts_along(plane: Tensor, summed: list[int]) -> dict[int, tuple[int, ...]] | None:
    """Map the first coordinate of each sum to all coordinates in it; None if a coordinate is in several sums."""
    if len(summed) != 1:
        return None
    parts = torch.unique(compact(plane).movedim(summed[0], -1).flatten(0, -2), dim=0)
    if torch.unique(parts).numel() != parts.numel():
        return None
    return {part[0]: tuple(part) for part in parts.tolist()}


def _first_along(plane: Tensor, dims: list[int]) -> Tensor:
    for d in dims:
        plane = plane.narrow(d, 0, 1)
    return plane
