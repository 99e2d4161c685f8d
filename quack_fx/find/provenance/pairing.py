"""Find which query vectors are multiplied with which key vectors.

In: a product, with an id for each vector of both operands. Out: a `Meeting`: the pairs, their positions in the
softmax's input, and which operand holds the keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product as product_of

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.find.attention import Logits, Product, Refused
from quack_fx.find.grouped import Groups, is_gathered_by
from quack_fx.find.provenance.labels import NOTHING, compact, reshape, shrink
from quack_fx.find.provenance.trace import Tracer
from quack_fx.find.provenance.vectors import Vectors
from quack_fx.graph.dataflow import Dataflow


@dataclass(frozen=True)
class Meeting:
    """The pairs of vectors of one product, as found in the softmax's input.

    Attributes:
        pairs: Pairs (query vector, key vector), in the order of their first position.
        plane: For each element of the softmax's input, the label of its set of pairs; 0 for none.
        sets: The pairs of each label.
        scale: Factor between the product and the softmax; None if it is not a constant.
        swapped: Whether the left operand holds the keys.
    """

    pairs: list[tuple[int, int]]
    plane: Tensor
    sets: dict[int, list[tuple[int, int]]]
    scale: float | None
    swapped: bool


def meeting_of(tracer: Tracer, logits: Logits, product: Product, left: Tensor, right: Tensor) -> Meeting:
    """Find the pairs of vectors that a product multiplies, in the softmax's input.

    Raises:
        Refused: An operand is empty, the products cannot be followed to the softmax, it is ambiguous which side holds
            the keys, or logits of several heads are added before the softmax.
    """
    if not left.numel() or not right.numel():
        raise Refused("one-key", "no query or no key is left on these inputs", product.node)
    count = int(compact(right).max()) + 1
    # Codes are constant along most axes (batch, tokens): shrinking them keeps large images cheap.
    codes = shrink((compact(left) * count + compact(right)).expand(torch.broadcast_shapes(left.shape, right.shape)))
    if logits.end is product.node and product.form.startswith("fused"):
        sets = {code + 1: [(code // count, code % count)] for code in in_order(codes)}
        return Meeting([pair for pairs in sets.values() for pair in pairs], codes + 1, sets, 1.0, False)
    # Codes are carried as labels, so an element that is the sum of two logits (a shift, a fold) keeps both.
    first = tracer.labels.new_features(int(codes.max()) + 1)
    shape = tracer.df.shape(product.node)
    carried = tracer.carry(product.node, reshape((compact(codes) + first).expand(codes.shape), shape), logits.path)
    end = carried.get(logits.end)
    lost = Refused("lost-logits", f"the products cannot be followed to the softmax in {logits.end.name}", logits.end)
    if end is None or end.empty:
        raise lost
    if logits.groups is not None:
        swapped = _is_gathered_swapped(tracer.df, logits.groups, product)
    else:
        swapped = _is_swapped(tracer, logits, product, shape)
    sets = {}
    for label in in_order(end.label):
        if label == NOTHING:
            continue
        found = [feature - first for feature in sorted(tracer.labels.members(label))]
        if any(code < 0 for code in found):
            raise lost
        both = [(code // count, code % count) for code in found]
        sets[label] = [(b, a) for a, b in both] if swapped else both
        if len({q for q, _ in sets[label]}) > 1 and len({k for _, k in sets[label]}) > 1:
            raise Refused("mixed-heads", "logits of several heads are added up before the softmax", logits.end)
    pairs = list(dict.fromkeys(pair for known in sets.values() for pair in known))
    return Meeting(pairs, end.label, sets, end.scale, swapped)


def _is_swapped(tracer: Tracer, logits: Logits, product: Product, shape: Sequence[int]) -> bool:
    """Whether the left operand of a product holds the keys: only its vectors vary along the softmax's axis."""
    varies = [
        _varies(tracer, product.node, logits, _numbered(product, shape, side)) if len(shape) > 1 else side == 1
        for side in (0, 1)
    ]
    return varies[0] and not varies[1]


def _is_gathered_swapped(df: Dataflow, groups: Groups, product: Product) -> bool:
    """Whether the right operand of a product holds the queries: only it is gathered with the index of the groups.

    Raises:
        Refused: Both or neither of the operands are.
    """
    left, right = (is_gathered_by(df, operand, groups) for operand in (product.left, product.right))
    if left == right:
        raise Refused(
            "lost-logits",
            "its softmax runs over groups, and it cannot be told which side belongs to a group",
            product.node,
        )
    return right


def _numbered(product: Product, shape: Sequence[int], side: int) -> Tensor:
    """Number the vectors of one operand, in a tensor of the shape of the product's result."""
    if product.form == "matmul":
        summed = len(shape) - (1 if side == 0 else 2)
        sizes = [1 if d == summed else n for d, n in enumerate(shape)]
    else:
        operand = product.left if side == 0 else product.right
        value = operand.meta["val"]
        sizes = [n if d < value.dim() and value.shape[d] == n else 1 for d, n in enumerate(shape)]
    return torch.arange(math.prod(sizes)).view(sizes).expand(list(shape))


def _varies(tracer: Tracer, node: Node, logits: Logits, plane: Tensor) -> bool:
    """Whether the numbered vectors of one operand vary along the softmax's axis."""
    first = tracer.labels.new_features(int(plane.max()) + 1)
    end = tracer.carry(node, (compact(plane) + first).expand(plane.shape), logits.path)[logits.end].label
    if end.stride(logits.axis) == 0 or end.shape[logits.axis] == 1:
        return False
    lines = compact(end).movedim(logits.axis, -1).reshape(-1, end.shape[logits.axis])
    inside = lines != 0
    low = torch.where(inside, lines, torch.iinfo(torch.int64).max).amin(-1)
    high = torch.where(inside, lines, -1).amax(-1)
    return bool(((high != low) & inside.any(-1)).float().mean() > 0.5)


def summed(met: list[Meeting], reader: Vectors) -> tuple[dict[tuple[int, int], None], int] | None:
    """Combine products that are added up: the vectors of the summands are concatenated to one longer vector.

    Returns:
        The pairs of concatenated vectors and the width of a head; None if no two products are added in one element.
    """
    planes = torch.broadcast_tensors(*(compact(meeting.plane) for meeting in met))
    columns, where = torch.unique(torch.stack(planes).flatten(1), dim=1, return_inverse=True)
    added: dict[frozenset[tuple[int, int, int]], None] = {}
    for column in columns.t()[in_order(where)].tolist():
        present = [[(i, q, k) for q, k in met[i].sets[label]] for i, label in enumerate(column) if label != NOTHING]
        added.update(dict.fromkeys(frozenset(parts) for parts in product_of(*present)))
    # An element that lacks one of the products (the edge of a shift) belongs to the same head as the complete ones.
    whole = [parts for parts in added if parts and not any(parts < other for other in added)]
    if all(len(parts) == 1 for parts in whole):
        return None
    pairs: dict[tuple[int, int], None] = {}
    for parts in whole:
        ordered = sorted(parts)
        pairs[reader.joined([q for _, q, _ in ordered]), reader.joined([k for _, _, k in ordered])] = None
    return pairs, max(_width(parts, reader) for parts in whole)


def _width(parts: frozenset[tuple[int, int, int]], reader: Vectors) -> int:
    """Total width of the products, without those that share a vector with an earlier one."""
    width, seen = 0, (set[int](), set[int]())
    for _, q, k in sorted(parts):
        if q not in seen[0] and k not in seen[1]:
            width += len(reader.vectors[q])
        seen[0].add(q)
        seen[1].add(k)
    return width


def in_order(plane: Tensor) -> list[int]:
    """Distinct values of a tensor, in the order of their first position."""
    flat = compact(plane).flatten()
    values, where = torch.unique(flat, return_inverse=True)
    first = torch.full((len(values),), len(flat)).scatter_reduce_(0, where, torch.arange(len(flat)), "amin")
    return [int(values[i]) for i in first.argsort().tolist()]
