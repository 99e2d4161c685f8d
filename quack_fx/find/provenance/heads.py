"""From labelled operands to heads: which vectors of features meet in the logits, and which of them are one head.

In: the `Logits` of one attention and a `Tracer`. Out: a `Heads`: for every query head the feature vectors that it uses,
the key vectors that it reads, the norms and the scale.

Along the head dimension every (batch, token, head) of an operand has a *vector* of labels. Distinct query vectors are
heads, whatever axis they lie on. Which key vectors a query vector meets, and in which order heads stand, is read off
the softmax's input: the numbers of the two vectors are carried there through the ops in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from itertools import product as product_of

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.find.attention import Logits, Product, fused_scale
from quack_fx.find.grouped import Groups, is_gathered_by
from quack_fx.find.provenance.flow import Flow, NormTag
from quack_fx.find.provenance.labels import NOTHING, UNKNOWN, compact, reshape, shrink
from quack_fx.find.provenance.projections import Projection
from quack_fx.find.provenance.trace import Tracer
from quack_fx.graph.dataflow import Dataflow

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
        channels: Whether the logits compare channels over tokens: a head is all channels that a softmax compares.
    """

    query: tuple[tuple[Vector, ...], ...]
    key: tuple[tuple[Vector, ...], ...]
    head_map: tuple[int, ...]
    head_dim: int
    projection: dict[Row, Projection]
    norms: tuple[tuple[NormTag, ...], tuple[NormTag, ...]]
    scale: float | None
    operands: tuple[tuple[Node, ...], tuple[Node, ...]]
    channels: bool = False


class NotOneAttention(Exception):
    """The turns of a loop are no heads of one attention: some are alike (a loop over pieces of the sequence)."""


def find_heads(tracer: Tracer, logits: Logits) -> Heads:
    """Heads of one attention.

    Raises:
        Refused: A side holds data whose weight rows are not known, or no weight at all.
        NotOneAttention: What was taken for a loop over heads is none.
    """
    if logits.parts:
        return _side_by_side([find_heads(tracer, part) for part in logits.parts])
    df = tracer.df
    flows = tracer.trace([n for p in logits.products for n in (p.left, p.right)])
    reader = _Vectors(tracer)
    met: list[_Meeting] = []
    norms: tuple[list[NormTag], list[NormTag]] = ([], [])
    operands: tuple[list[Node], list[Node]] = ([], [])
    scales: set[float | None] = set()
    for product in logits.products:
        left, right = _operand_planes(df, product, flows)
        meeting = _met(tracer, logits, product, reader.ids(left), reader.ids(right))
        met.append(meeting)
        query, key = (product.right, product.left) if meeting.swapped else (product.left, product.right)
        for side, operand in enumerate((query, key)):
            operands[side].append(operand)
            features = tracer.labels.features(flows[operand].label)  # norms of others passed the same tensor, perhaps
            norms[side].extend(n for n in flows[operand].norms if n.features & features and n not in norms[side])
        scales.add(_product_scale(df, product, flows, meeting.scale))
    vectors = reader.vectors
    pairs = dict.fromkeys(pair for meeting in met for pair in meeting.pairs)
    _check(vectors, pairs, lambda side: tracer.where_unknown(flows, operands[side]))
    _check_streams(tracer, reader, pairs)
    channels = _compares_channels(vectors, pairs)
    if channels:
        pairs = _of_channels(reader, list(pairs))
    width = len(vectors[next(iter(pairs))[0]])
    if len({frozenset(q for q, _ in meeting.pairs) for meeting in met}) > 1:
        pairs, width = _summed(met, reader) or (pairs, width)
    pairs = {(q, k): None for q, k in pairs if any(vectors[q]) and any(vectors[k])}
    query_heads, key_sets = _group(reader, list(pairs))
    key_heads = list(dict.fromkeys(key_sets))
    return Heads(
        query=tuple(tuple(vectors[q] for q in head) for head in query_heads),
        key=tuple(tuple(vectors[k] for k in head) for head in key_heads),
        head_map=tuple(key_heads.index(keys) for keys in key_sets),
        head_dim=width,
        projection=reader.projection,
        norms=(tuple(norms[0]), tuple(norms[1])),
        scale=scales.pop() if len(scales) == 1 else None,
        operands=(tuple(operands[0]), tuple(operands[1])),
        channels=channels,
    )


def _side_by_side(turns: list[Heads]) -> Heads:
    """Heads of the turns of a loop as those of one attention."""
    query = tuple(head for turn in turns for head in turn.query)
    if len(set(query)) != len(query) or len({turn.head_dim for turn in turns}) > 1 or any(t.channels for t in turns):
        raise NotOneAttention
    if any(_rows(one.query) & _rows(other.key) for one, other in permutations(turns, 2)):
        raise NotOneAttention  # what asks in one turn is asked in another: two attentions, there and back
    key = tuple(dict.fromkeys(head for turn in turns for head in turn.key))
    scales = {turn.scale for turn in turns}
    return Heads(
        query=query,
        key=key,
        head_map=tuple(key.index(turn.key[k]) for turn in turns for k in turn.head_map),
        head_dim=turns[0].head_dim,
        projection={row: projection for turn in turns for row, projection in turn.projection.items()},
        norms=(_all_norms(turns, 0), _all_norms(turns, 1)),
        scale=scales.pop() if len(scales) == 1 else None,
        operands=(
            tuple(node for turn in turns for node in turn.operands[0]),
            tuple(node for turn in turns for node in turn.operands[1]),
        ),
    )


def _rows(heads: tuple[tuple[Vector, ...], ...]) -> frozenset[Row]:
    """All rows of some heads."""
    return frozenset(row for vectors in heads for vector in vectors for rows in vector for row in rows)


def _all_norms(turns: list[Heads], side: int) -> tuple[NormTag, ...]:
    return tuple(dict.fromkeys(norm for turn in turns for norm in turn.norms[side]))


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

    def joined(self, numbers: Sequence[int]) -> int:
        """Number of several vectors laid side by side."""
        return self._known(tuple(rows for n in numbers for rows in self.vectors[n]))

    def channels(self, numbers: Sequence[int]) -> int:
        """Number of several vectors, each one feature throughout, as one vector of those features."""
        return self._known(tuple(self.vectors[n][0] for n in numbers))

    def data(self, number: int) -> frozenset[Node]:
        """What the projections behind a vector read."""
        of = self._tracer.df.group
        return frozenset(of[self.projection[row].x] for rows in self.vectors[number] for row in rows)

    def parameters(self, number: int) -> frozenset[str]:
        """Parameters behind a vector."""
        return frozenset(name for rows in self.vectors[number] for name, _ in rows)

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


def _operand_planes(df: Dataflow, product: Product, flows: dict[Node, Flow]) -> tuple[Tensor, Tensor]:
    """Labels of both operands as [*shape of the product's logits, head dimension]."""
    left, right = flows[product.left].label, flows[product.right].label
    if product.form == "fused-tokens-first":
        left, right = left.transpose(-3, -2), right.transpose(-3, -2)
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


@dataclass(frozen=True)
class _Meeting:
    """How the vectors of one product meet in the softmax's input.

    Attributes:
        pairs: Query vector and key vector, in the order in which they first stand there.
        plane: For each place of the softmax's input, a number for the set of pairs there; 0 for none.
        sets: The pairs behind each number.
        scale: Factor between the product and the softmax.
        swapped: Whether the left operand is the keys.
    """

    pairs: list[tuple[int, int]]
    plane: Tensor
    sets: dict[int, list[tuple[int, int]]]
    scale: float | None
    swapped: bool


def _met(tracer: Tracer, logits: Logits, product: Product, left: Tensor, right: Tensor) -> _Meeting:
    """Pairs of vectors that meet, as they stand in the softmax's input."""
    if not left.numel() or not right.numel():
        raise Refused("one-key", "no query or no key is left on these inputs")
    count = int(compact(right).max()) + 1
    # Most axes (samples, tokens) are one and the same throughout: on large pictures only a fraction is worth a number.
    codes = shrink((compact(left) * count + compact(right)).expand(torch.broadcast_shapes(left.shape, right.shape)))
    if logits.end is product.node and product.form.startswith("fused"):
        sets = {code + 1: [(code // count, code % count)] for code in _in_order(codes)}
        return _Meeting([pair for pairs in sets.values() for pair in pairs], codes + 1, sets, 1.0, False)
    # Codes travel as labels of their own, so that two that fall on one place (a shift, a fold) are both kept.
    first = tracer.labels.new_features(int(codes.max()) + 1)
    shape = tracer.df.shape(product.node)
    carried = tracer.carry(product.node, reshape((compact(codes) + first).expand(codes.shape), shape), logits.path)
    end = carried.get(logits.end)
    lost = Refused("lost-logits", f"the products cannot be followed to the softmax in {logits.end.name}")
    if end is None or end.empty:
        raise lost
    if logits.groups is not None:
        swapped = _is_gathered_swapped(tracer.df, logits.groups, product)
    else:
        swapped = _is_swapped(tracer, logits, product, shape)
    sets = {}
    for label in _in_order(end.label):
        if label == NOTHING:
            continue
        found = [feature - first for feature in sorted(tracer.labels.members(label))]
        if any(code < 0 for code in found):
            raise lost
        both = [(code // count, code % count) for code in found]
        sets[label] = [(b, a) for a, b in both] if swapped else both
        if len({q for q, _ in sets[label]}) > 1 and len({k for _, k in sets[label]}) > 1:
            raise Refused("mixed-heads", "logits of several heads are added up before the softmax")
    pairs = list(dict.fromkeys(pair for known in sets.values() for pair in known))
    return _Meeting(pairs, end.label, sets, end.scale, swapped)


def _is_swapped(tracer: Tracer, logits: Logits, product: Product, shape: Sequence[int]) -> bool:
    """Whether the left operand of a product holds the keys: whether it alone changes along the softmax's axis."""
    varies = [
        _varies(tracer, product.node, logits, _places(product, shape, side)) if len(shape) > 1 else side == 1
        for side in (0, 1)
    ]
    return varies[0] and not varies[1]


def _is_gathered_swapped(df: Dataflow, groups: Groups, product: Product) -> bool:
    """Whether the right operand of a product holds the queries: whether it alone is gathered as the groups are.

    Raises:
        Refused: Both are, or neither.
    """
    left, right = (is_gathered_by(df, operand, groups) for operand in (product.left, product.right))
    if left == right:
        raise Refused(
            "lost-logits", "its softmax runs over groups, and it cannot be told which side belongs to a group"
        )
    return right


def _compares_channels(vectors: list[Vector], pairs: dict[tuple[int, int], None]) -> bool:
    """Whether the vectors are one feature each, over tokens: the logits compare channels.

    Raises:
        Refused: Those of one side are, those of the other are not.
    """
    channels = [
        {v for v in side if len(vectors[v]) > 1 and len(set(vectors[v])) == 1 and len(vectors[v][0]) == 1}
        for side in map(set, zip(*pairs, strict=True))
    ]
    if all(len(side) <= 1 for side in channels):
        return False
    if len(set().union(*channels)) == len({v for pair in pairs for v in pair}):
        return True
    raise Refused("channel-attention", "its logits compare channels of one side with something else of the other")


def _of_channels(reader: _Vectors, pairs: list[tuple[int, int]]) -> dict[tuple[int, int], None]:
    """The channels that meet each other laid side by side, as the vectors of heads (attention over channels).

    Raises:
        Refused: Channels meet some but not all others of their head.
    """
    keys: dict[int, list[int]] = {}
    queries: dict[tuple[int, ...], list[int]] = {}
    for q, k in pairs:
        keys.setdefault(q, []).append(k)
    for q, met in keys.items():
        queries.setdefault(tuple(sorted(met)), []).append(q)
    if sum(map(len, queries)) != len({k for _, k in pairs}):
        raise Refused("channel-attention", "its logits compare channels over tokens, and no set of channels is a head")
    return {(reader.channels(head), reader.channels(met)): None for met, head in queries.items()}


def _summed(met: list[_Meeting], reader: _Vectors) -> tuple[dict[tuple[int, int], None], int] | None:
    """Pairs of the vectors of products that are added up, laid side by side as if they were one longer vector.

    Returns:
        The pairs and the width of a head; None where no two of the products fall on one place.
    """
    planes = torch.broadcast_tensors(*(compact(meeting.plane) for meeting in met))
    columns, where = torch.unique(torch.stack(planes).flatten(1), dim=1, return_inverse=True)
    places: dict[frozenset[tuple[int, int, int]], None] = {}
    for column in columns.t()[_in_order(where)].tolist():
        present = [[(i, q, k) for q, k in met[i].sets[label]] for i, label in enumerate(column) if label != NOTHING]
        places.update(dict.fromkeys(frozenset(parts) for parts in product_of(*present)))
    # Where a product is missing (the edge of a shift) the others stand for the same head as elsewhere.
    whole = [parts for parts in places if parts and not any(parts < other for other in places)]
    if all(len(parts) == 1 for parts in whole):
        return None
    pairs: dict[tuple[int, int], None] = {}
    for parts in whole:
        ordered = sorted(parts)
        pairs[reader.joined([q for _, q, _ in ordered]), reader.joined([k for _, _, k in ordered])] = None
    return pairs, max(_width(parts, reader) for parts in whole)


def _width(parts: frozenset[tuple[int, int, int]], reader: _Vectors) -> int:
    """Width of the products that share no vector with an earlier one."""
    width, seen = 0, (set[int](), set[int]())
    for _, q, k in sorted(parts):
        if q not in seen[0] and k not in seen[1]:
            width += len(reader.vectors[q])
        seen[0].add(q)
        seen[1].add(k)
    return width


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
    end = tracer.carry(node, (compact(plane) + first).expand(plane.shape), logits.path)[logits.end].label
    if end.stride(logits.axis) == 0 or end.shape[logits.axis] == 1:
        return False
    lines = compact(end).movedim(logits.axis, -1).reshape(-1, end.shape[logits.axis])
    inside = lines != 0
    low = torch.where(inside, lines, torch.iinfo(torch.int64).max).amin(-1)
    high = torch.where(inside, lines, -1).amax(-1)
    return bool(((high != low) & inside.any(-1)).float().mean() > 0.5)


def _in_order(plane: Tensor) -> list[int]:
    """Distinct values in the order in which they first stand in the tensor."""
    flat = compact(plane).flatten()
    values, where = torch.unique(flat, return_inverse=True)
    places = torch.full((len(values),), len(flat)).scatter_reduce_(0, where, torch.arange(len(flat)), "amin")
    return [int(values[i]) for i in places.argsort().tolist()]


def _product_scale(df: Dataflow, product: Product, flows: dict[Node, Flow], after: float | None) -> float | None:
    factors = [flows[product.left].scale, flows[product.right].scale, after]
    node = product.node
    if product.form.startswith("fused"):
        factors.append(fused_scale(df, product))
    alpha = node.kwargs.get("alpha", 1.0)
    factors.append(float(alpha) if isinstance(alpha, int | float) else None)
    result = 1.0
    for factor in factors:
        if factor is None:
            return None
        result *= factor
    return result


# ---- heads -----------------------------------------------------------------------------------------------------------


def _check(vectors: list[Vector], pairs: dict[tuple[int, int], None], end: Callable[[int], str]) -> None:
    """Refuse what cannot be told; `end` says where on a side understanding ended."""
    for side, name in enumerate(("query", "key")):
        used = {pair[side] for pair in pairs}
        if any(("", ()) in rows for v in used for rows in vectors[v]):
            raise Refused(
                f"unknown-{name}",
                f"its {name} side holds data that is not, or not only, the output of projections{end(side)}",
            )
        if not any(rows for v in used for rows in vectors[v]):
            raise Refused(f"learned-{name}", f"its {name} side is a parameter or a constant, not a projection")


def _check_streams(tracer: Tracer, reader: _Vectors, pairs: dict[tuple[int, int], None]) -> None:
    """Refuse a side that is the residual stream itself: what layers add up is no projection of this attention."""
    for side, name in enumerate(("query", "key")):
        used = {pair[side] for pair in pairs}
        sums = {rows for number in used for rows in reader.vectors[number] if len(rows) > 1}
        added = {frozenset(id(reader.projection[row]) for row in rows): rows for rows in sums}
        for rows in added.values():
            if _read_each_other(tracer, [reader.projection[row] for row in rows]):
                raise Refused(
                    f"residual-{name}",
                    f"its {name} side is, for some tokens at least, the sum of layers that read each other (a residual "
                    "stream), not the output of a projection of its own",
                )


def _read_each_other(tracer: Tracer, projections: Sequence[Projection]) -> bool:
    """Whether one projection is made of another one's output."""
    df = tracer.df
    products = {p.node for p in projections}
    first = min(df.index[node] for node in products)
    seen: set[Node] = set()
    todo = [p.x for p in projections] if len(products) > 1 else []
    while todo:
        node = todo.pop()
        if node in seen or df.index[node] < first:
            continue
        if node in products:
            return True
        seen.add(node)
        todo.extend(df.reads(node))
    tracer.basis.inside |= seen
    return False


def _group(reader: _Vectors, pairs: list[tuple[int, int]]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Query heads, and the key vectors that each reads.

    Each query vector is a head of its own, but for joint attention (text and image tokens, each with projections of
    their own): there the first vectors of the streams are the first head, and so on. Streams are told apart by the data
    that their projections read, or else by their parameters.
    """
    reads: dict[int, list[int]] = {}
    for q, k in pairs:
        reads.setdefault(q, []).append(k)
    # Tokens of one head may be treated in different ways (no rotation for a class token): the rows are the same.
    heads: dict[frozenset[Row], list[int]] = {}
    for q in reads:
        heads.setdefault(frozenset().union(*reader.vectors[q]), []).append(q)
    alone = [tuple(head) for head in heads.values()]
    keys = {head: tuple(dict.fromkeys(k for q in head for k in reads[q])) for head in alone}
    for kind_of in (reader.data, reader.parameters):
        streams: dict[object, list[tuple[int, ...]]] = {}
        for head in alone:
            streams.setdefault(kind_of(head[0]), []).append(head)
        if len(streams) > 1 and len({len(stream) for stream in streams.values()}) == 1:
            joint = list(zip(*streams.values(), strict=True))
            same = all(len({frozenset(keys[head]) for head in parts}) == 1 for parts in joint)
            if same and all(len({kind_of(k) for k in keys[parts[0]]}) > 1 for parts in joint):
                found = [tuple(q for head in parts for q in head) for parts in joint]
                return found, [tuple(sorted(keys[parts[0]])) for parts in joint]
    return alone, [tuple(sorted(keys[head])) for head in alone]
