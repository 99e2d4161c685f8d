"""Vectors of features: what an operand of a logit product holds along the head dimension.

In: labels of an operand. Out: an id for each distinct vector, and the rows behind every id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.find.attention import Product
from quack_fx.find.provenance.flow import Flow
from quack_fx.find.provenance.labels import UNKNOWN, compact
from quack_fx.find.provenance.projections import Projection
from quack_fx.find.provenance.trace import Tracer
from quack_fx.find.provenance.views import run_view
from quack_fx.graph.dataflow import Dataflow

Row = tuple[str, tuple[int, ...]]
"""One feature: parameter, and coordinates along the projection's axes."""
Vector = tuple[frozenset[Row], ...]
"""Features at each index of the head dimension."""
_LARGEST_TENSOR = 1 << 22
"""Largest tensor, in elements, in which the tokens of projections are compared."""


class Vectors:
    """Registry of distinct vectors; the id of a vector is its index in `vectors`."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._numbers: dict[Vector, int] = {}
        self._rows: dict[int, frozenset[Row]] = {}
        self.vectors: list[Vector] = []
        self.projection: dict[Row, Projection] = {}

    def ids(self, label: Tensor) -> Tensor:
        """Id of the vector along the last axis, at each index of the other axes."""
        width = label.shape[-1]
        small = compact(label[..., :1]) if label.stride(-1) == 0 and width > 1 else compact(label)
        lines, where = torch.unique(small.reshape(-1, small.shape[-1]), dim=0, return_inverse=True)
        numbers = torch.tensor([self._number(line, width) for line in lines.tolist()], dtype=torch.int64)
        return numbers[where].view(small.shape[:-1]).expand(label.shape[:-1])

    def joined(self, numbers: Sequence[int]) -> int:
        """Id of the concatenation of several vectors."""
        return self._known(tuple(rows for n in numbers for rows in self.vectors[n]))

    def channels(self, numbers: Sequence[int]) -> int:
        """Id of the vector made of the single feature of each of several channel vectors."""
        return self._known(tuple(self.vectors[n][0] for n in numbers))

    def data(self, number: int) -> frozenset[Node]:
        """Data that the projections behind a vector read."""
        of = self._tracer.df.group
        return frozenset(of[self.projection[row].x] for rows in self.vectors[number] for row in rows)

    def parameters(self, number: int) -> frozenset[str]:
        """Parameters behind a vector."""
        return frozenset(name for rows in self.vectors[number] for name, _ in rows)

    def tokens(self, number: int) -> tuple[Node, frozenset[int]] | None:
        """Tensor whose lines are the tokens that a vector is projected from, and the numbers of these lines.

        None if the projections read several tensors, or something other than whole lines of one.
        """
        read = {_lines_of(self._tracer, self.projection[row]) for rows in self.vectors[number] for row in rows}
        return read.pop() if len(read) == 1 else None

    def _number(self, line: list[int], width: int) -> int:
        vector = tuple(self._row(x) for x in line)
        return self._known(vector * width if len(vector) == 1 else vector)

    def _known(self, vector: Vector) -> int:
        if vector not in self._numbers:
            self._numbers[vector] = len(self.vectors)
            self.vectors.append(vector)
        return self._numbers[vector]

    def _row(self, label: int) -> frozenset[Row]:
        if label not in self._rows:
            rows = set()
            for feature in self._tracer.labels.members(label):
                if feature == UNKNOWN:
                    rows.add(("", ()))
                    continue
                projection, i = self._tracer.projections.by_feature(feature)
                row = (projection.names[i], tuple(projection.rows[i].tolist()))
                self.projection.setdefault(row, projection)
                rows.add(row)
            self._rows[label] = frozenset(rows)
        return self._rows[label]


def operand_planes(df: Dataflow, product: Product, flows: dict[Node, Flow]) -> tuple[Tensor, Tensor]:
    """Labels of both operands as [*shape of the product's result, head dimension]."""
    left, right = flows[product.left].label, flows[product.right].label
    if product.form == "fused-tokens-first":
        left, right = left.transpose(-3, -2), right.transpose(-3, -2)
    if product.form in ("fused", "fused-tokens-first"):
        if left.shape[-3] != right.shape[-3]:  # GQA inside the op: each key head serves a block of query heads
            right = right.repeat_interleave(left.shape[-3] // right.shape[-3], dim=-3)
        right = right.transpose(-1, -2)
    elif product.form == "bilinear":
        shape, source = df.shape(product.node.args[0]), product.node  # type: ignore[arg-type]
        dims = source.args[1] if isinstance(source.args[1], list | tuple) else [source.args[1]]
        axes = [int(d) % len(shape) for d in dims]  # type: ignore[arg-type]
        keep = len(df.shape(source)) == len(shape)

        def gathered(label: Tensor) -> Tensor:
            label = label.expand(shape)
            rest = [d for d in range(len(shape)) if d not in axes]
            label = label.permute(*rest, *axes).flatten(len(rest))
            return label.reshape(*df.shape(source), -1) if keep else label

        return gathered(left), gathered(right)
    if left.dim() == 1:
        left = left.unsqueeze(0)
    if right.dim() == 1:
        right = right.unsqueeze(-1)
    right = right.transpose(-1, -2)
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    product_shape = (*batch, left.shape[-2], right.shape[-2], left.shape[-1])
    return left.unsqueeze(-2).expand(product_shape), right.unsqueeze(-3).expand(product_shape)


def _lines_of(tracer: Tracer, projection: Projection) -> tuple[Node, frozenset[int]] | None:
    """Tensor of which a projection reads some lines along the last axis, and the numbers of these lines.

    None if it reads anything but whole lines.
    """
    df, views, node = tracer.df, list[Node](), projection.x
    while df.op[node].kind in ("view", "getitem") and len(node.all_input_nodes) == 1:
        views.append(node)
        node = df.open(node.all_input_nodes[0])
    tracer.basis.inside |= {node, *views}
    shape = df.shape(node)
    if not shape or not 0 < shape.numel() <= _LARGEST_TENSOR:
        return None
    plane = torch.arange(shape.numel()).view(shape)
    planes: dict[Node, Any] = {node: plane}
    for view in reversed(views):
        if df.op[view].kind == "getitem":
            planes[view] = planes[view.args[0]][view.args[1]]  # type: ignore[index]
        else:
            planes[view] = run_view(df, view, planes.__getitem__, -1)
    lines = planes[projection.x].movedim(projection.x_axis, -1)
    whole = lines[..., :1] + torch.arange(shape[-1])
    if lines.shape[-1] != shape[-1] or bool((lines[..., 0] % shape[-1]).any()) or not torch.equal(lines, whole):
        return None
    return node, frozenset((lines[..., 0] // shape[-1]).flatten().tolist())
