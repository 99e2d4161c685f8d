"""The logits on a tape, and the projections upstream of their operands.

In: a `Tape`. Out: its softmaxes; for each, the products of queries and keys that make its logits; for each operand of
these, a tree of `Factor`s: the projections (products with a weight) that a backward walk from the logits meets.

A backward walk ends at products, softmaxes and embeddings; the tree continues from the inputs of each projection.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

from quack_fx.graph.walk import walk
from quack_fx.prove.opaque import is_opaque
from quack_fx.prove.ops import (
    Product,
    Softmax,
    base_name,
    is_linear,
    keeps_numbers,
    makes_rotation,
    product_of,
    softmax_of,
    statistics,
    weighs_by_groups,
)
from quack_fx.prove.tape import Op, Tape, Value


@dataclass(eq=False, repr=False)
class Factor:
    """A projection upstream of an operand.

    Attributes:
        product: The product with a weight.
        result: The product with its bias added.
        weights: The factors of the product that only parameters reach.
        sources: The other factors.
        params: Names of the parameters upstream of `weights`.
        biases: Names of the parameters that are added to the product before any op but reshapes.
        linear: Whether no nonlinearity lies between it and the next factor towards the logits; True for the nearest.
        sole: Whether nothing is added to it in between, and only this attention uses it.
        norms: Norms in between.
        outer: The next factors upstream.
    """

    product: Product
    result: Value
    weights: tuple[Value, ...]
    sources: tuple[Value, ...]
    params: frozenset[str]
    biases: frozenset[str]
    linear: bool = True
    sole: bool = True
    norms: frozenset[Op] = frozenset()
    outer: list[Factor] = field(default_factory=list)


@dataclass(repr=False)
class _BackwardWalk:
    """The products and softmaxes where a backward walk ended, and the ops it passed."""

    products: list[Product] = field(default_factory=list)
    softmaxes: list[Op] = field(default_factory=list)
    passed: list[Op] = field(default_factory=list)
    joined: bool = False
    linear: bool = True


def _may_have(product: Product, heads: int) -> bool:
    """Whether a logit product can have this many heads."""
    shape = product.op.out.tensor.shape
    return heads in shape or heads <= max(shape[0], math.sqrt(shape.numel()))


class Graph:
    """A tape with its products, softmaxes and statistics."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._readers: dict[Op, list[Op]] = defaultdict(list)
        for op in tape.ops:
            for source in op.reads:
                self._readers[source].append(op)
        self.softmaxes = [
            s for op in tape.ops if (s := softmax_of(op, self._readers)) is not None and self._is_read(op)
        ]
        self._softmax_ops = {s.op for s in self.softmaxes}
        self._products = {p.op: p for op in tape.ops if (p := product_of(op)) is not None and self._multiplies(p)}
        self._walks: dict[tuple[Value, Op], _BackwardWalk] = {}
        self.barriers: frozenset[Op] = frozenset()
        """Ops at which a backward walk ends by default."""
        for op in [op for op, product in self._products.items() if self._pools(product)]:
            del self._products[op]
        self._walks.clear()
        self.barriers = frozenset(
            op
            for op in tape.ops
            if op.data and (op in self._products or op in self._softmax_ops or op.name == "embedding")
        )

    @cached_property
    def statistics(self) -> frozenset[Op]:
        """Norms, and reductions of features whose result scales or shifts the same features."""
        return statistics(self.tape, self._readers)

    # -- logits --------------------------------------------------------------------------------------------------------

    def logit_products(self, softmax: Softmax) -> list[Product]:
        """The products whose sum, scaled and masked, is a softmax's input, including those whose heads get mixed."""
        products = (product for back in self._walks_behind(softmax) for product in back.products)
        return [product for product in dict.fromkeys(products) if self._mixed(product) is None]

    def mixing(self, softmax: Softmax) -> list[Product]:
        """The products with a weight that mix the heads of the logits before a softmax."""
        return [p for p in self._walk_back(softmax.logits, softmax.op).products if self._mixed(p) is not None]

    def between(self, softmax: Softmax) -> Iterator[Op]:
        """Ops between the logit products and the softmax, last one first, also those before heads are mixed."""
        for back in self._walks_behind(softmax):
            yield from sorted(back.passed, key=lambda op: -op.index)

    def _walks_behind(self, softmax: Softmax) -> Iterator[_BackwardWalk]:
        """The backward walks from a softmax, and from the logits before each mixing of heads."""

        def mixed(read: tuple[Value, Op]) -> Iterator[tuple[Value, Op]]:
            products = self._walk_back(*read).products
            return ((source, p.reader) for p in products if (source := self._mixed(p)) is not None)

        return (self._walk_back(*read) for read in walk([(softmax.logits, softmax.op)], mixed))

    def is_attention(self, softmax: Softmax) -> bool:
        """Whether a softmax of a product of two projections multiplies values: data, or projected parameters."""
        weighs = any(map(self._has_values, self._weighs.get(softmax, ())))
        return weighs and any(map(self._of_two_sides, self.logit_products(softmax)))

    def weighs(self, softmax: Softmax) -> bool:
        """Whether any values are multiplied by a softmax's result."""
        return bool(self._weighs.get(softmax))

    def attention_ops(self, softmaxes: Iterable[Softmax]) -> frozenset[Op]:
        """The logit products and value products of some softmaxes."""
        return frozenset(p.op for s in softmaxes for p in (*self.logit_products(s), *self._weighs.get(s, ())))

    def params_behind(self, softmax: Softmax) -> set[str]:
        """Names of the parameters in the projections nearest to a softmax's logits."""
        return {
            name
            for product in self.logit_products(softmax)
            for operand in product.factors
            for nearest in self._walk_back(operand, product.reader).products
            for name in self._factor(nearest).params
        }

    def opaque_ops(self, params: Set[str]) -> list[Op]:
        """Ops of unknown meaning that read results of projections with some parameters."""
        found = []
        for op in self.tape.ops:
            if op.data and is_opaque(op.func):
                behind = (p for v in op.inputs for p in self._walk_back(v, op).products)
                if any(self._factor(p).params & params for p in behind):
                    found.append(op)
        return found

    def values_behind(self, softmax: Softmax) -> Set[Op]:
        """The projections upstream of the values of a softmax, at any depth."""
        weighed = [
            (value, product.reader)
            for product in self._weighs.get(softmax, ())
            for value in product.factors
            if softmax.op not in self._behind_weights(value, product.reader)
        ]

        def before(product: Product) -> list[Product]:
            sources = self._factor(product).sources
            return [p for source in sources for p in self._walk_back(source, product.reader).products]

        nearest = (p for read in weighed for p in self._walk_back(*read).products)
        return {product.op for product in walk(nearest, before)}

    def features(self, factor: Factor) -> int | None:
        """Number of features that a projection makes; None unless it contracts one axis of one weight."""
        product = factor.product
        if product.axes is None or len(factor.weights) != 1:
            return None
        axis = product.axes[product.factors.index(factor.weights[0])]
        return factor.weights[0].tensor.numel() // factor.weights[0].tensor.shape[axis]

    def _of_two_sides(self, product: Product) -> bool:
        """Whether a product multiplies data with data, or with a projection of parameters alone."""
        data = [self.tape.is_data(v, product.reader) for v in product.factors]
        if all(data) or not any(data):
            return all(data)
        other = product.factors[data.index(False)]
        return bool(self._walk_back(other, product.reader).products)

    def _pools(self, product: Product) -> bool:
        """Whether a weighted sum is pooling: its weights are a softmax, but not of a product of queries and keys."""
        if product.op is product.reader:
            return False
        for value in product.factors:
            back = self._walk_back(value, product.reader)
            if back.softmaxes and not back.products:
                weights = [s for s in self.softmaxes if s.op in back.softmaxes]
                return not any(self._of_two_sides(p) for s in weights for p in self.logit_products(s))
        return False

    def _is_read(self, op: Op) -> bool:
        """Whether an op's results are used by more than reshapes, or returned by the model."""
        if any(v in self.tape.results for v in op.outputs):
            return True
        return any(not keeps_numbers(reader) or self._is_read(reader) for reader in self._readers[op])

    def _mixed(self, product: Product) -> Value | None:
        """The logits whose heads a product with a weight mixes; None if it mixes none."""
        sources = [v for v in product.factors if self.tape.is_data(v, product.reader)]
        weights = [v for v in product.factors if self.tape.is_weight(v, product.reader)]
        if len(sources) != 1 or len(weights) != 1 or sources[0].tensor.numel() != product.op.out.tensor.numel():
            return None
        back = self._walk_back(sources[0], product.reader)
        normed = any(op in self.statistics and op.name != "amax" for op in back.passed)
        if back.softmaxes or back.joined or normed:  # a layer of its own, whose input is not logits
            return None
        heads = max(weights[0].tensor.shape)
        mixed = [p for p in back.products if _may_have(p, heads)]
        return sources[0] if any(map(self._of_two_sides, mixed)) else None

    @cached_property
    def _weighs(self) -> dict[Softmax, list[Product]]:
        """For each softmax, the products of its result with values."""
        by_op = {s.op: s for s in self.softmaxes}
        weighs: dict[Softmax, list[Product]] = defaultdict(list)
        for product in self._products.values():
            if any(self.tape.is_data(v, product.reader) for v in product.factors):
                for value in product.factors:
                    for op in self._behind_weights(value, product.reader):
                        weighs[by_op[op]].append(product)
        for softmax in self.softmaxes:
            if softmax.groups is not None:
                weighs[softmax] += weighs_by_groups(softmax, self._readers)
        gated = {s: [p for p in products if self._is_gated(p, s, weighs)] for s, products in weighs.items()}
        return {s: [p for p in products if p not in gated[s]] for s, products in weighs.items()}

    def _is_gated(self, product: Product, softmax: Softmax, weighs: Mapping[Softmax, Sequence[Product]]) -> bool:
        """Whether a softmax gates features (of keys that it selects), which another attention then reads."""
        weights = [v for v in product.factors if softmax.op in self._walk_back(v, product.reader).softmaxes]
        if not weights or any(v.tensor.numel() <= math.prod(softmax.shape) for v in weights):
            return False
        weighed = any(product in products for s, products in weighs.items() if s is not softmax)
        later = (s for s in self.softmaxes if s.op.index > product.op.index)
        return weighed or any(product in self.logit_products(s) for s in later)

    def _has_values(self, product: Product) -> bool:
        """Whether no factor of a product is a bare weight; a layer that reads attention maps has one."""
        return all(
            self.tape.is_data(v, product.reader) or bool(self._walk_back(v, product.reader).products)
            for v in product.factors
        )

    def _behind_weights(self, value: Value, reader: Op) -> Set[Op]:
        """Softmaxes upstream of a factor, also through a product that mixes their heads."""
        back = self._walk_back(value, reader)
        found = set(back.softmaxes)
        for product in back.products:
            data = [v for v in product.factors if self.tape.is_data(v, product.reader)]
            if len(data) == 1 and data[0].tensor.numel() == product.op.out.tensor.numel():
                found |= set(self._walk_back(data[0], product.reader).softmaxes)
        return found

    # -- chains --------------------------------------------------------------------------------------------------------

    def factors(self, operand: Value, reader: Op, attention: Set[Op]) -> list[Factor]:
        """The tree of projections upstream of an operand; `attention` are the `attention_ops` of its attention."""
        return self._factors(operand, reader, attention, {}, nearest=True)

    def _factors(
        self, value: Value, reader: Op, attention: Set[Op], known: dict[tuple[int, int], list[Factor]], *, nearest: bool
    ) -> list[Factor]:
        # Many paths lead to a residual stream, so the factors of a value are computed once.
        key = (id(value), id(reader))
        if not nearest and key in known:
            return known[key]
        back = self._walk_back(value, reader)
        found = []
        for product in back.products:
            factor = self._factor(product)
            if not factor.weights:
                continue
            factor.linear = nearest or back.linear
            factor.sole = len(back.products) == 1 and not back.joined and self._private(product.op, attention)
            factor.norms = frozenset(op for op in back.passed if op in self.statistics)
            for source in factor.sources:
                factor.outer += self._factors(source, product.reader, attention, known, nearest=False)
            found.append(factor)
        if not nearest:
            known[key] = found
        return found

    def _factor(self, product: Product) -> Factor:
        """A product as a factor, without its neighbours."""
        weights = [v for v in product.factors if self.tape.is_weight(v, product.reader)]
        if len(weights) == 2:
            # The input depends on parameters alone, too (learned queries). The weight is the factor that no product
            # makes; if that is both or neither, the claim decides.
            plain = [v for v in weights if not self._walk_back(v, product.reader).products]
            weights = plain if len(plain) == 1 else weights
        sources = tuple(v for v in product.factors if v not in weights)
        params = frozenset(name for v in weights for name in self._params(v, product.reader))
        biases, result = self._biases(product)
        return Factor(product, result, tuple(weights), sources, params, biases)

    def is_computed(self, factor: Factor) -> bool:
        """Whether every weight of a factor is computed from parameters by more than reshapes, casts and scaling."""
        return all(
            any(not keeps_numbers(op) and not self._scales(op) for op in self._weight_ops(v, factor.product.reader))
            for v in factor.weights
        )

    def _scales(self, op: Op) -> bool:
        """Whether an op multiplies or divides by exactly one weight."""
        return base_name(op) in ("mul", "div") and sum(self.tape.is_weight(v, op) for v in op.inputs) == 1

    def _weight_ops(self, value: Value, reader: Op) -> Iterator[Op]:
        """The ops on parameters upstream of a value."""
        made = (op for op in self.tape.behind(value, reader) if op.weight)
        return walk(made, lambda op: (source for source in op.reads if source.weight))

    def _biases(self, product: Product) -> tuple[frozenset[str], Value]:
        """Parameters added to a product before any op but reshapes, and the sum."""
        found = set(self._params(product.added, product.op)) if product.added is not None else set()
        result = product.op.out
        todo = [product.op]
        while todo:
            for reader in self._readers[todo.pop()]:
                if base_name(reader) in ("add", "sub"):
                    weights = [v for v in reader.inputs if self.tape.is_weight(v, reader)]
                    others = [v for v in weights if not self._multiplied(v, reader)]
                    found |= {name for v in others for name in self._params(v, reader)}
                    result = reader.out if others else result
                elif keeps_numbers(reader):
                    todo.append(reader)
        return frozenset(found), result

    def _multiplied(self, value: Value, reader: Op) -> bool:
        """Whether a product, even with constants, lies upstream of a value that only parameters reach."""
        behind = walk(self.tape.behind(value, reader), lambda op: op.reads if op.weight else ())
        return any(product_of(op) is not None for op in behind)

    def _params(self, value: Value, reader: Op) -> Set[str]:
        """Names of the parameters upstream of a value that only parameters reach."""
        inputs = (v for op in self._weight_ops(value, reader) for v in op.inputs)
        return {v.param for v in (value, *inputs) if v.param is not None}

    def _private(self, start: Op, attention: Set[Op]) -> bool:
        """Whether every path from an op's result leads into this attention."""

        def after(op: Op) -> Iterator[Op]:
            return (r for r in self._readers[op] if (r.data or r.weight) and r not in attention)

        for count, op in enumerate(walk([start], after), 1):
            if count > 200 or any(v in self.tape.results for v in op.outputs):  # so long a path has left the attention
                return False
        return True

    # -- backward walk -------------------------------------------------------------------------------------------------

    def _walk_back(self, value: Value, reader: Op) -> _BackwardWalk:
        """Walk from a value back to the nearest products of factors that inputs or parameters reach."""
        known = self._walks.get((value, reader))
        if known is not None:
            return known
        back = self._walks[value, reader] = _BackwardWalk()
        seen: set[Op] = set()
        todo = list(self.tape.behind(value, reader))
        while todo:
            op = todo.pop()
            if op in seen or not (op.data or op.weight):
                continue
            seen.add(op)
            if op in self._products:
                back.products.append(self._products[op])
                continue
            if op in self._softmax_ops:
                back.softmaxes.append(op)
                back.linear = False
                continue
            if op in self.barriers:
                back.joined = True
                continue
            if makes_rotation(op) or op.name == "logsumexp":
                continue  # angles, learned or not, and logsumexp of logits hold no features
            back.linear &= is_linear(op) or product_of(op) is not None  # a product with constants is linear
            back.passed.append(op)
            back.joined |= any(v.is_input and v.is_numeric for v in op.inputs)
            todo += [s for v in op.inputs if v.is_numeric and v.tensor.numel() for s in self.tape.behind(v, op)]
        back.products.sort(key=lambda p: p.op.index)
        return back

    def _multiplies(self, product: Product) -> bool:
        """Whether both factors depend on inputs or parameters, or one is a weight that projects a table of constants.

        A backward walk passes any other product with constants like a reshape.
        """
        known = [
            self.tape.is_data(v, product.reader) or self.tape.is_weight(v, product.reader) for v in product.factors
        ]
        if all(known) or not any(known):
            return all(known)
        weight, table = (product.factors[known.index(k)] for k in (True, False))
        plain = self.tape.is_weight(weight, product.reader) and len(self._params(weight, product.reader)) == 1
        return plain and product.axes is not None and bool(table.tensor.any())
