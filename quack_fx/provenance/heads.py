"""From labelled operands to heads: which vectors of features meet in the logits, and which of them are one head.

In: the `Logits` of one attention and a `Tracer`. Out: a `Heads`: for every query head the feature vectors that it uses,
the key vectors that it reads, the norms and the scale.

Along the head dimension every (batch, token, head) of an operand has a *vector* of labels. Distinct query vectors are
heads, whatever axis they lie on. Which key vectors a query vector meets, and in which order heads stand, is read off
the softmax's input: the numbers of the two vectors are carried there through the ops in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.attention import Logits, Product
from quack_fx.dataflow import Dataflow
from quack_fx.provenance.labels import UNKNOWN, compact, shrink
from quack_fx.provenance.projections import Projection
from quack_fx.provenance.trace import Flow, NormTag, Tracer

Row = tuple[str, tuple[int, ...]]
"""One feature: parameter, and coordinates along the projection's axes."""
Vector = tuple[frozenset[Row], ...]
"""Features at each place of the head dimension."""


class Refused(Exception):
    """An attention whose rows cannot be told: a code and a sentence."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True)
class Heads:
    """Heads of one attention.

    Attributes:
        query: For each query head, its vectors: one, or one per kind of token in joint attention.
        key: For each key head, its vectors.
        head_map: Key head of each query head.
        head_dim: Width of the vectors.
        projection: A projection that each row of the vectors came from.
        norms: Norms on the query side and on the key side.
        scale: Factor on the product, None where it is not a plain number.
        operands: Query operands and key operands of the products.
    """

    query: tuple[tuple[Vector, ...], ...]
    key: tuple[tuple[Vector, ...], ...]
    head_map: tuple[int, ...]
    head_dim: int
    projection: dict[Row, Projection]
    norms: tuple[tuple[NormTag, ...], tuple[NormTag, ...]]
    scale: float | None
    operands: tuple[tuple[Node, ...], tuple[Node, ...]]


def find_heads(tracer: Tracer, logits: Logits) -> Heads:
    """Heads of one attention.

    Raises:
        Refused: A side holds data whose weight rows are not known, or no weight at all.
    """
    df = tracer.df
    flows = tracer.trace([n for p in logits.products for n in (p.left, p.right)])
    reader = _Vectors(tracer)
    pairs: dict[tuple[int, int], None] = {}
    norms: tuple[list[NormTag], list[NormTag]] = ([], [])
    operands: tuple[list[Node], list[Node]] = ([], [])
    scales: set[float | None] = set()
    for product in logits.products:
        left, right = _operand_planes(df, product, flows)
        left_ids, right_ids = reader.ids(left), reader.ids(right)
        found, scale, swapped = _met(tracer, logits, product, left_ids, right_ids)
        pairs.update(dict.fromkeys((b, a) for a, b in found) if swapped else dict.fromkeys(found))
        query, key = (product.right, product.left) if swapped else (product.left, product.right)
        for side, operand in enumerate((query, key)):
            operands[side].append(operand)
            norms[side].extend(n for n in flows[operand].norms if n not in norms[side])
        scales.add(_product_scale(df, product, flows, scale))
    vectors = reader.vectors
    _check(vectors, pairs)
    pairs = {(q, k): None for q, k in pairs if any(vectors[q]) and any(vectors[k])}
    query_heads, key_sets = _group(vectors, list(pairs))
    key_heads = list(dict.fromkeys(key_sets))
    return Heads(
        query=tuple(tuple(vectors[q] for q in head) for head in query_heads),
        key=tuple(tuple(vectors[k] for k in head) for head in key_heads),
        head_map=tuple(key_heads.index(keys) for keys in key_sets),
        head_dim=len(vectors[query_heads[0][0]]),
        projection=reader.projection,
        norms=(tuple(norms[0]), tuple(norms[1])),
        scale=scales.pop() if len(scales) == 1 else None,
        operands=(tuple(operands[0]), tuple(operands[1])),
    )


# ---- vectors ---------------------------------------------------------------------------------------------------------


class _Vectors:
    """Numbers for the distinct vectors of labels."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._numbers: dict[Vector, int] = {}
        self._rows: dict[int, frozenset[Row]] = {}
        self.vectors: list[Vector] = []
        self.projection: dict[Row, Projection] = {}

    def ids(self, label: Tensor) -> Tensor:
        """Number of the vector along the last axis, for each place of the others."""
        width = label.shape[-1]
        small = compact(label[..., :1]) if label.stride(-1) == 0 and width > 1 else compact(label)
        lines, where = torch.unique(small.reshape(-1, small.shape[-1]), dim=0, return_inverse=True)
        numbers = torch.tensor([self._number(line, width) for line in lines.tolist()], dtype=torch.int64)
        return numbers[where].view(small.shape[:-1]).expand(label.shape[:-1])

    def _number(self, line: list[int], width: int) -> int:
        vector = tuple(self._row(x) for x in line)
        vector = vector * width if len(vector) == 1 else vector
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


def _operand_planes(df: Dataflow, product: Product, flows: dict[Node, Flow]) -> tuple[Tensor, Tensor]:
    """Labels of both operands as [*shape of the product's logits, head dimension]."""
    left, right = flows[product.left].label, flows[product.right].label
    if product.form == "fused-tokens-first":
        left, right = left.transpose(1, 2), right.transpose(1, 2)
    if product.form in ("fused", "fused-tokens-first"):
        if left.shape[-3] != right.shape[-3]:  # grouped heads inside the op: each key head serves a block of queries
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


# ---- who meets whom --------------------------------------------------------------------------------------------------


def _met(
    tracer: Tracer, logits: Logits, product: Product, left: Tensor, right: Tensor
) -> tuple[list[tuple[int, int]], float | None, bool]:
    """Pairs of (left, right) vectors that meet, as they stand in the softmax's input; its scale; if left is the key."""
    count = int(right.max()) + 1
    codes = shrink(left * count + right)
    if logits.end is product.node and product.form.startswith("fused"):
        return [(c // count, c % count) for c in _in_order(codes)], 1.0, False
    # Codes travel as labels of their own, so that two that fall on one place (a shift, a fold) are both kept.
    first = tracer.labels.new_features(int(codes.max()) + 1)
    shape = tracer.df.shape(product.node)
    carried = tracer.carry(product.node, (codes + first).reshape(shape), logits.path)
    end = carried.get(logits.end)
    if end is None or end.empty:
        raise Refused("lost-logits", f"the products cannot be followed to the softmax in {logits.end.name}")
    labels = [f - first for x in _in_order(end.label) for f in sorted(tracer.labels.members(x))]
    if any(code < 0 for code in labels):
        raise Refused("lost-logits", f"the products cannot be followed to the softmax in {logits.end.name}")
    met = [(c // count, c % count) for c in dict.fromkeys(labels)]
    varies = [
        _varies(tracer, product.node, logits, _places(product, shape, side)) if len(shape) > 1 else side == 1
        for side in (0, 1)
    ]
    return met, end.scale, varies[0] and not varies[1]


def _places(product: Product, shape: Sequence[int], side: int) -> Tensor:
    """A plane that numbers the vectors of one operand as they lie in the product's result."""
    if product.form == "matmul":
        summed = len(shape) - (1 if side == 0 else 2)
        sizes = [1 if d == summed else n for d, n in enumerate(shape)]
    else:
        operand = product.left if side == 0 else product.right
        value = operand.meta["val"]
        sizes = [n if d < value.dim() and value.shape[d] == n else 1 for d, n in enumerate(shape)]
    return torch.arange(math.prod(sizes)).view(sizes).expand(list(shape))


def _varies(tracer: Tracer, node: Node, logits: Logits, plane: Tensor) -> bool:
    """Whether the vectors of one operand change along the softmax's axis."""
    first = tracer.labels.new_features(int(plane.max()) + 1)
    end = tracer.carry(node, plane + first, logits.path)[logits.end].label
    if end.stride(logits.axis) == 0 or end.shape[logits.axis] == 1:
        return False
    lines = compact(end).movedim(logits.axis, -1).reshape(-1, end.shape[logits.axis])
    inside = lines != 0
    low = torch.where(inside, lines, torch.iinfo(torch.int64).max).amin(-1)
    high = torch.where(inside, lines, -1).amax(-1)
    return bool(((high != low) & inside.any(-1)).float().mean() > 0.5)


def _in_order(plane: Tensor) -> list[int]:
    """Distinct values in the order in which they first stand in the tensor; 0 and negative ones are padding."""
    flat = compact(plane).flatten()
    values, where = torch.unique(flat, return_inverse=True)
    places = torch.full((len(values),), len(flat)).scatter_reduce_(0, where, torch.arange(len(flat)), "amin")
    return [int(values[i]) for i in places.argsort().tolist()]


def _product_scale(df: Dataflow, product: Product, flows: dict[Node, Flow], after: float | None) -> float | None:
    factors = [flows[product.left].scale, flows[product.right].scale, after]
    node = product.node
    if product.form.startswith("fused"):
        given = node.kwargs.get("scale")
        factors.append(float(given) if isinstance(given, int | float) else df.shape(product.left)[-1] ** -0.5)
    alpha = node.kwargs.get("alpha", 1.0)
    factors.append(float(alpha) if isinstance(alpha, int | float) else None)
    result = 1.0
    for factor in factors:
        if factor is None:
            return None
        result *= factor
    return result


# ---- heads -----------------------------------------------------------------------------------------------------------


def _check(vectors: list[Vector], pairs: dict[tuple[int, int], None]) -> None:
    """Refuse what cannot be told."""
    for side, name in enumerate(("query", "key")):
        used = {pair[side] for pair in pairs}
        if any(("", ()) in rows for v in used for rows in vectors[v]):
            raise Refused(
                f"unknown-{name}", f"its {name} side holds data that is not, or not only, the output of projections"
            )
        if not any(rows for v in used for rows in vectors[v]):
            raise Refused(f"learned-{name}", f"its {name} side is a parameter or a constant, not a projection")
        flat = [v for v in used if len(vectors[v]) > 1 and len(set(vectors[v])) == 1 and len(vectors[v][0]) == 1]
        if len(flat) > 1 and len({vectors[v][0] for v in flat}) > 1:
            raise Refused(
                "channel-attention",
                "its logits compare channels over all tokens: no head reads a set of rows of its own",
            )


def _group(vectors: list[Vector], pairs: list[tuple[int, int]]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Query heads, and the key vectors that each reads.

    Query vectors from one set of parameters are heads of their own. Where they come from several (joint attention: text
    and image tokens, each with projections of their own) and read the same keys of several kinds, the first vector of
    each kind is the first head, and so on.
    """
    reads: dict[int, list[int]] = {}
    for q, k in pairs:
        reads.setdefault(q, []).append(k)
    keys = {q: tuple(sorted(set(ks), key=ks.index)) for q, ks in reads.items()}
    kinds: dict[frozenset[str], list[int]] = {}
    for q in reads:
        kinds.setdefault(_parameters(vectors[q]), []).append(q)
    groups = list(kinds.values())
    joint = len(groups) > 1 and len({len(g) for g in groups}) == 1
    if joint:
        heads = list(zip(*groups, strict=True))
        joint = all(len({frozenset(keys[q]) for q in head}) == 1 for head in heads)
        joint &= all(len({_parameters(vectors[k]) for k in keys[head[0]]}) > 1 for head in heads)
    if not joint:
        heads = [(q,) for q in reads]
    return heads, [tuple(sorted(keys[head[0]])) for head in heads]


def _parameters(vector: Vector) -> frozenset[str]:
    return frozenset(name for rows in vector for name, _ in rows)
