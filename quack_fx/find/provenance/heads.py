"""From labeled operands to heads: which feature vectors are multiplied in the logits, and which form one head.

In: the `Logits` of one attention and a `Tracer`. Out: a `Heads`: the feature vectors of every query head, the key
vectors that it reads, the norms and the scale.

At every (batch, token, head), an operand has a *vector* of labels along the head dimension. Distinct query vectors are
heads, whichever axis they vary on. The softmax's input shows which key vectors a query vector is multiplied with, and
the order of the heads: the ids of both vectors are carried there through the ops in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from torch.fx import Node

from quack_fx.find.attention import Logits, NotOneAttention, Product, Refused, fused_scale
from quack_fx.find.provenance.flow import Flow, NormTag
from quack_fx.find.provenance.pairing import Meeting, meeting_of, summed
from quack_fx.find.provenance.projections import Projection
from quack_fx.find.provenance.trace import Tracer
from quack_fx.find.provenance.vectors import Row, Vector, Vectors, operand_planes
from quack_fx.graph.dataflow import Dataflow
from quack_fx.graph.walk import walk


@dataclass(frozen=True)
class Heads:
    """Heads of one attention.

    Attributes:
        query: Vectors of each query head: one, or one per stream of tokens in joint attention.
        key: Vectors of each key head.
        head_map: Key head of each query head.
        head_dim: Width of the vectors.
        projection: A projection that produces each row of the vectors.
        norms: Norms on the query side and on the key side.
        scale: Factor on the product; None if it is not a constant.
        operands: Query operands and key operands of the products.
        channels: Whether the logits compare channels over tokens. A head is then the set of channels that one softmax
            compares.
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


def find_heads(tracer: Tracer, logits: Logits) -> Heads:
    """Find the heads of one attention.

    Raises:
        Refused: A side holds data whose weight rows are unknown, or no weight at all.
        NotOneAttention: What looked like a loop over heads is several attentions.
    """
    if logits.parts:
        return _side_by_side([find_heads(tracer, part) for part in logits.parts])
    df = tracer.df
    flows = tracer.trace([n for p in logits.products for n in (p.left, p.right)])
    reader = Vectors(tracer)
    met: list[Meeting] = []
    norms: tuple[list[NormTag], list[NormTag]] = ([], [])
    operands: tuple[list[Node], list[Node]] = ([], [])
    scales: set[float | None] = set()
    for product in logits.products:
        left, right = operand_planes(df, product, flows)
        meeting = meeting_of(tracer, logits, product, reader.ids(left), reader.ids(right))
        met.append(meeting)
        query, key = (product.right, product.left) if meeting.swapped else (product.left, product.right)
        for side, operand in enumerate((query, key)):
            operands[side].append(operand)
            features = tracer.labels.features(
                flows[operand].label
            )  # the tensor may also hold other normalized features
            norms[side].extend(n for n in flows[operand].norms if n.features & features and n not in norms[side])
        scales.add(_product_scale(df, product, flows, meeting.scale))
    vectors = reader.vectors
    pairs = dict.fromkeys(pair for meeting in met for pair in meeting.pairs)
    _check(tracer, vectors, pairs, flows, operands)
    _check_streams(tracer, reader, pairs)
    channels = _compares_channels(vectors, pairs, logits.products[-1].node)
    if channels:
        pairs = _of_channels(reader, list(pairs), logits.products[-1].node)
    width = len(vectors[next(iter(pairs))[0]])
    if len({frozenset(q for q, _ in meeting.pairs) for meeting in met}) > 1:
        pairs, width = summed(met, reader) or (pairs, width)
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


def _side_by_side(iterations: list[Heads]) -> Heads:
    """Combine the iterations of a Python loop over heads into one attention."""
    query = tuple(head for one in iterations for head in one.query)
    widths = {one.head_dim for one in iterations}
    if len(set(query)) != len(query) or len(widths) > 1 or any(one.channels for one in iterations):
        raise NotOneAttention
    if any(_rows(one.query) & _rows(other.key) for one, other in permutations(iterations, 2)):
        raise NotOneAttention  # queries of one iteration are keys of another: cross-attention in both directions
    key = tuple(dict.fromkeys(head for one in iterations for head in one.key))
    scales = {one.scale for one in iterations}
    return Heads(
        query=query,
        key=key,
        head_map=tuple(key.index(one.key[k]) for one in iterations for k in one.head_map),
        head_dim=iterations[0].head_dim,
        projection={row: projection for one in iterations for row, projection in one.projection.items()},
        norms=(_all_norms(iterations, 0), _all_norms(iterations, 1)),
        scale=scales.pop() if len(scales) == 1 else None,
        operands=(
            tuple(node for one in iterations for node in one.operands[0]),
            tuple(node for one in iterations for node in one.operands[1]),
        ),
    )


def _rows(heads: tuple[tuple[Vector, ...], ...]) -> frozenset[Row]:
    return frozenset(row for vectors in heads for vector in vectors for rows in vector for row in rows)


def _all_norms(iterations: list[Heads], side: int) -> tuple[NormTag, ...]:
    return tuple(dict.fromkeys(norm for one in iterations for norm in one.norms[side]))


def _compares_channels(vectors: list[Vector], pairs: dict[tuple[int, int], None], product: Node) -> bool:
    """Whether each vector is a single feature over all tokens, so that the logits compare channels.

    Raises:
        Refused: This holds for only some of the vectors.
    """
    channels = [
        {v for v in side if len(vectors[v]) > 1 and len(set(vectors[v])) == 1 and len(vectors[v][0]) == 1}
        for side in map(set, zip(*pairs, strict=True))
    ]
    if all(len(side) <= 1 for side in channels):
        return False
    if len(set().union(*channels)) == len({v for pair in pairs for v in pair}):
        return True
    text = "its logits compare channels of one side with something else of the other"
    raise Refused("channel-attention", text, product)


def _of_channels(reader: Vectors, pairs: list[tuple[int, int]], product: Node) -> dict[tuple[int, int], None]:
    """Pair up heads of channel attention: the channels that are compared with each other form the vectors of one head.

    Raises:
        Refused: A channel is compared with only some of the channels of its head.
    """
    keys: dict[int, list[int]] = {}
    queries: dict[tuple[int, ...], list[int]] = {}
    for q, k in pairs:
        keys.setdefault(q, []).append(k)
    for q, met in keys.items():
        queries.setdefault(tuple(sorted(met)), []).append(q)
    if sum(map(len, queries)) != len({k for _, k in pairs}):
        text = "its logits compare channels over tokens, and no set of channels is a head"
        raise Refused("channel-attention", text, product)
    return {(reader.channels(head), reader.channels(met)): None for met, head in queries.items()}


def _product_scale(df: Dataflow, product: Product, flows: dict[Node, Flow], after: float | None) -> float | None:
    factors = [flows[product.left].scale, flows[product.right].scale, after]
    node = product.node
    if product.form.startswith("fused"):
        factors.append(fused_scale(df, product))
    alpha = node.kwargs.get("alpha", 1.0)
    factors.append(float(alpha) if isinstance(alpha, int | float) else None)
    numbers = [factor for factor in factors if factor is not None]
    return math.prod(numbers) if len(numbers) == len(factors) else None


def _check(
    tracer: Tracer,
    vectors: list[Vector],
    pairs: dict[tuple[int, int], None],
    flows: dict[Node, Flow],
    operands: tuple[list[Node], list[Node]],
) -> None:
    """Refuse sides whose rows are unknown or that have none."""
    for side, name in enumerate(("query", "key")):
        used = {pair[side] for pair in pairs}
        if any(("", ()) in rows for v in used for rows in vectors[v]):
            lost = tracer.where_unknown(flows, operands[side])
            raise Refused(
                f"unknown-{name}",
                f"its {name} side holds data that is not, or not only, the output of projections"
                f"{'' if lost is None else _about_loss(tracer.df, lost)}",
                operands[side][0] if lost is None else lost,
            )
        if not any(rows for v in used for rows in vectors[v]):
            text = f"its {name} side is a parameter or a constant, not a projection"
            raise Refused(f"learned-{name}", text, operands[side][0])


def _about_loss(df: Dataflow, lost: Node) -> str:
    """Text that says where the features of a side were lost: op, shape and module."""
    what = df.describe(lost)
    if df.op[lost].kind in ("contraction", "convolution") and any(map(df.is_weight, lost.all_input_nodes)):
        return f": the weight of {what} is computed from parameters, and none of its rows is one of theirs"
    return f": they are lost at {what}"


def _check_streams(tracer: Tracer, reader: Vectors, pairs: dict[tuple[int, int], None]) -> None:
    """Refuse a side that is the residual stream itself: a sum over layers is not a projection of this attention."""
    for side, name in enumerate(("query", "key")):
        used = {pair[side] for pair in pairs}
        sums = {rows for number in used for rows in reader.vectors[number] if len(rows) > 1}
        added = {frozenset(id(reader.projection[row]) for row in rows): rows for rows in sums}
        for rows in added.values():
            projections = [reader.projection[row] for row in rows]
            if _read_each_other(tracer, projections):
                raise Refused(
                    f"residual-{name}",
                    f"its {name} side is, for some tokens at least, the sum of layers that read each other (a residual "
                    "stream), not the output of a projection of its own",
                    max((p.node for p in projections), key=tracer.df.index.__getitem__),
                )


def _read_each_other(tracer: Tracer, projections: Sequence[Projection]) -> bool:
    """Whether one projection depends on the output of another."""
    df = tracer.df
    products = {p.node for p in projections}
    first = min(df.index[node] for node in products)
    seen: set[Node] = set()
    start = [p.x for p in projections if df.index[p.x] >= first] if len(products) > 1 else []
    for node in walk(start, lambda node: (n for n in df.reads(node) if df.index[n] >= first)):
        if node in products:
            return True
        seen.add(node)
    tracer.basis.inside |= seen
    return False


def _group(reader: Vectors, pairs: list[tuple[int, int]]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the query heads, as query vectors, and the key vectors that each reads.

    Query vectors with the same rows are one head. In joint attention (streams of text and image tokens, each with its
    own projections), the first vectors of all streams are the first head, and so on. Streams differ in the data that
    their projections read, or else in their parameters; and either the keys come in streams too, or the projections
    read other tokens (those of heads, if stored one by one, read the same).
    """
    reads: dict[int, list[int]] = {}
    for q, k in pairs:
        reads.setdefault(q, []).append(k)
    # Tokens of one head may differ in treatment (no rotation for a class token), but have the same rows.
    heads: dict[frozenset[Row], list[int]] = {}
    for q in reads:
        heads.setdefault(frozenset().union(*reader.vectors[q]), []).append(q)
    alone = [tuple(head) for head in heads.values()]
    keys = {head: tuple(dict.fromkeys(k for q in head for k in reads[q])) for head in alone}
    for stream_of in (reader.data, reader.parameters):
        streams: dict[object, list[tuple[int, ...]]] = {}
        for head in alone:
            streams.setdefault(stream_of(head[0]), []).append(head)
        if len(streams) > 1 and len({len(stream) for stream in streams.values()}) == 1:
            joint = list(zip(*streams.values(), strict=True))
            same = all(len({frozenset(keys[head]) for head in parts}) == 1 for parts in joint)
            of_keys_too = all(len({stream_of(k) for k in keys[parts[0]]}) > 1 for parts in joint)
            if same and (of_keys_too or _read_other_tokens(reader, list(streams.values()))):
                found = [tuple(q for head in parts for q in head) for parts in joint]
                return found, [tuple(sorted(keys[parts[0]])) for parts in joint]
    return alone, [tuple(sorted(keys[head])) for head in alone]


def _read_other_tokens(reader: Vectors, streams: list[list[tuple[int, ...]]]) -> bool:
    """Whether the projections of each stream read other tokens of one tensor than those of the other streams."""
    read = [{reader.tokens(q) for head in stream for q in head} for stream in streams]
    alike = [next(iter(one)) for one in read if len(one) == 1]
    tokens = [one for one in alike if one is not None]
    if len(tokens) < len(streams) or len({node for node, _ in tokens}) > 1:
        return False
    return sum(len(lines) for _, lines in tokens) == len(frozenset().union(*(lines for _, lines in tokens)))
