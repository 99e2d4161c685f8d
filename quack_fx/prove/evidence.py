"""What gradients show about one site on one softmax.

In: a site of the layout, and a softmax that ran in it. Out: `Evidence`: the logit products and their operands, the
projections upstream of these, and the rows of each parameter that a seed (a gradient put on an operand) reaches. Raises
`VerifyError` if weights other than the claimed ones are upstream of the logits, `CannotTell` if that is unclear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from quack_fx.errors import VerifyError
from quack_fx.graph.walk import walk
from quack_fx.layout import SIDES, AttentionSite, Ranges, Side, WeightBlock
from quack_fx.prove.graph import Factor, Graph
from quack_fx.prove.heads import Operand, Upper
from quack_fx.prove.ops import Product, Softmax
from quack_fx.prove.replay import Replay, Target
from quack_fx.prove.tape import Op, Value

Rows = frozenset[int]

_ELEMENTS_TRIED = 4
"""Number of elements of a product that are tried to find out what it sums over."""


class CannotTell(Exception):
    """Gradients neither prove nor refute the claim; the message says why."""


class NothingWeighed(CannotTell):
    """The output of this call does not depend on its logits."""


@dataclass(eq=False, repr=False)
class Part:
    """One logit product of a site.

    Attributes:
        product: The product.
        operand: Its operand on each side.
        around: The projections upstream of each operand, including those of other heads whose features share a norm.
        factors: Those of `around` that are claimed or that the operand depends on.
        followed: The projections of the claimed chains, at any depth.
        lower: For each side, the slice that computes the operand, with constant norm statistics.
    """

    product: Product
    operand: dict[Side, Operand]
    around: dict[Side, list[Factor]]
    factors: dict[Side, list[Factor]]
    followed: dict[Side, list[Factor]]
    lower: dict[Side, Replay]


class Evidence:
    """Seeds on the operands of one softmax's logits, and the rows they reach.

    `attention` are the logit and value products of all softmaxes of the site.

    Raises:
        VerifyError: Weights other than the claimed ones are upstream of the logits.
        CannotTell: The weights upstream of the logits cannot be determined.
    """

    def __init__(
        self, graph: Graph, site: AttentionSite, softmax: Softmax, attention: Set[Op], generator: torch.Generator
    ) -> None:
        self.graph, self.site, self.softmax = graph, site, softmax
        self._attention, self.generator = attention, generator
        self.blocks: dict[Side, tuple[WeightBlock, ...]] = {"query": site.query, "key": site.key}
        self.claimed: dict[Side, frozenset[str]] = {
            side: frozenset(b.param for b in blocks) for side, blocks in self.blocks.items()
        }
        self._axes = self._checked_axes()
        self.parts = self._find_parts()
        self.added: dict[Side, dict[str, frozenset[str]]] = {side: self._added_biases(side) for side in SIDES}
        """For each claimed parameter the parameters that are added to its product."""
        self.unnamed: dict[Side, frozenset[str]] = {side: self._unnamed_biases(side) for side in SIDES}
        """Biases of the claimed products that no block names."""
        for side in SIDES:
            self._check_chains(side)
            for part in self.parts:
                part.lower[side] = self._slice(part, side)
        self.reading = softmax.logits, torch.zeros([1] * len(softmax.shape), dtype=torch.long)
        """A tensor of logits and the head of each; a single head until the heads are found."""
        self.channels = False
        """Whether the logits compare channels over tokens; known once the heads are found."""

    def error(self, what: str) -> VerifyError:
        """An error about this site."""
        return VerifyError(f"site {self.site.name!r}: {what}")

    # -- seeds -------------------------------------------------------------------------------------------------------

    def noise(self, operand: Operand) -> Tensor:
        """Random numbers in an operand's shape: a seed under which the gradients of different rows do not cancel."""
        value = operand.value.tensor
        return torch.randn(value.shape, generator=self.generator).to(value)

    def rows_of_head(self, cut: Value, labels: Tensor, head: int) -> dict[Side, dict[str, Rows]]:
        """Rows that make a head's queries and keys, by side and parameter; `labels` has the head of each logit."""
        gradients: dict[Side, dict[str, Tensor]] = {side: {} for side in SIDES}
        for part in self.parts:
            operands = [part.operand[side] for side in SIDES]
            for side, positions in zip(SIDES, self.upper.positions(cut, labels, head, operands), strict=True):
                self._send(part, side, self.noise(part.operand[side]) * positions, gradients[side])
        return {side: self._rows(gradients[side], side) for side in SIDES}

    def rows_behind(self, part: Part, side: Side, features: range) -> dict[str, Rows]:
        """Rows of each parameter that make some of the contracted features of an operand."""
        operand = part.operand[side]
        seed = torch.zeros_like(operand.value.tensor)
        seed.narrow(operand.axis, features.start, len(features)).fill_(1.0)
        gradients: dict[str, Tensor] = {}
        self._send(part, side, seed * self.noise(operand), gradients)
        return self._rows(gradients, side)

    def _send(self, part: Part, side: Side, seed: Tensor, gradients: dict[str, Tensor]) -> None:
        """Propagate a seed on an operand to the parameters, and add the absolute gradients to `gradients`."""
        for name, gradient in part.lower[side].gradients(part.operand[side].value, seed).items():
            gradients[name] = gradients[name] + gradient.abs() if name in gradients else gradient.abs()

    def _rows(self, gradients: Mapping[str, Tensor], side: Side) -> dict[str, Rows]:
        """Rows with a gradient, of the parameters and biases that the site names or should name."""
        biases = {b.bias for _, b in self.site.blocks() if b.bias is not None}
        rows = {}
        for name in (self._axes.keys() | biases | self.unnamed[side]) & gradients.keys():
            size = self.by_row(name, gradients[name])
            if not torch.isfinite(size).all():
                raise CannotTell("its numbers overflow on random weights")
            rows[name] = frozenset(size.nonzero().flatten().tolist())
        return {name: r for name, r in rows.items() if r}

    def by_row(self, name: str, gradient: Tensor) -> Tensor:
        """Size of a parameter's gradient in each row."""
        return gradient.movedim(self._axes.get(name, 0), 0).flatten(1).abs().sum(1) if gradient.ndim > 1 else gradient

    # -- what lies before the logits ---------------------------------------------------------------------------------

    def _checked_axes(self) -> dict[str, int]:
        """For each claimed parameter, the axis that counts output features."""
        axes: dict[str, int] = {}
        for _, block in self.site.blocks():
            if block.axis != axes.setdefault(block.param, block.axis):
                raise self.error(f"{block.param!r} counts features along axis {axes[block.param]} and {block.axis}")
        return axes

    def _find_parts(self) -> list[Part]:
        """The logit products of queries with keys, without those with a position table or a bias."""
        everything = self.claimed["query"] | self.claimed["key"]
        behind: dict[Value, list[Factor]] = {}
        products = []
        for product in self.graph.logit_products(self.softmax):
            for v in product.factors:
                behind[v] = self.graph.factors(v, product.reader, self._attention)
            ours = [any(f.params & everything for f in behind[v]) for v in product.factors]
            if all(ours) or all(self.graph.tape.is_data(v, product.reader) for v in product.factors):
                products.append((product, all(ours)))
        if not products:
            raise self.error("no product of queries and keys stands before the softmax that runs there")
        # Next to a product of claimed weights, one with unclaimed weights is a relative position bias.
        products = [p for p in products if p[1]] or products
        self.upper = Upper(self.graph, self.softmax, [p for p, _ in products], self.generator)
        parts = []
        for product, _ in products:
            operand = self.upper.operands(product)
            if operand is None and not self.upper.shifts_only(product):
                raise CannotTell("it cannot be told which operand of its logits holds the keys; try longer inputs")
            if operand is not None:
                factors = {side: behind[operand[side].value] for side in SIDES}
                parts.append(Part(product, operand, factors, {}, {}, {}))
        if not parts:
            raise NothingWeighed("all keys of a query have the same logits there, as those of a whole masked tile have")
        return parts

    def _check_chains(self, side: Side) -> None:
        """Check that the chains upstream of the logits consist of exactly the claimed weights."""
        if not any(part.around[side] for part in self.parts):
            raise CannotTell(f"its {side} side comes out of no product with a weight")
        for part in self.parts:
            part.factors[side] = [
                f for f in part.around[side] if self._is_claimed(f, side) or self._reaches(part, side, f)
            ]
            part.followed[side] = list(self._met(part.factors[side], side))
        met = {name for part in self.parts for factor in part.followed[side] for name in factor.params}
        if missing := sorted(self.claimed[side] - met):
            raise self.error(f"{missing[0]!r} is claimed on the {side} side, but no logit of this attention reads it")

    def _is_claimed(self, factor: Factor, side: Side) -> bool:
        return bool(factor.params & self.claimed[side])

    def _reaches(self, part: Part, side: Side, factor: Factor) -> bool:
        """Whether an operand depends on a projection at all; the path to it may carry only other tokens."""
        operand = part.operand[side]
        slice_ = Replay(
            self.graph.tape,
            [(operand.value, operand.reader)],
            stops=self.graph.barriers,
            leaves={factor.result: factor.result.tensor.detach()},
            statistics=self.graph.statistics,  # constant, or every head's weights would pass a norm over all heads
            through_detach=True,
        )
        arrived = slice_.gradients_at(operand.value, self.noise(operand), [factor.result])
        return any(bool(gradient.any()) for gradient in arrived.values())

    def _met(self, factors: Sequence[Factor], side: Side, *, nearest: bool = True) -> Iterator[Factor]:
        """Projections of the claimed chains in a tree, from the logits upstream.

        An unclaimed projection ends the walk, and refutes the claim if it is nearest to the logits or a link of a
        chain.
        """
        for factor in factors:
            if self._is_claimed(factor, side):
                if not factor.linear:
                    raise CannotTell(f"a nonlinear function follows {min(factor.params & self.claimed[side])!r}")
                yield factor
                yield from self._met(factor.outer, side, nearest=False)
            elif self._keeps_features(factor, side):
                yield factor
                yield from self._met(factor.outer, side, nearest=nearest)
            elif nearest or self._is_link(factor):
                other: Side = "key" if side == "query" else "query"
                crossed = factor.params & self.claimed[other]
                names = ", ".join(map(repr, sorted(crossed or factor.params)))
                what = f"claimed on the {other} side" if crossed else "which no block claims"
                raise self.error(f"its {side} side comes out of {names}, {what}")

    def _is_link(self, factor: Factor) -> bool:
        """Whether an unclaimed projection upstream of a claimed one belongs to the chain.

        It does not if its result is added to something or used outside this attention, a nonlinearity follows it, it
        runs outside the site's module, or its weight is computed (a rotation made of parameters), so that no row makes
        a feature. A layer before the attention does not belong either.
        """
        inside = self.site.name in factor.product.op.modules
        if not (factor.linear and factor.sole and inside) or self.graph.is_computed(factor):
            return False
        return not self._is_layer_before(factor)

    def _is_layer_before(self, factor: Factor) -> bool:
        """Whether a projection feeds queries, keys and values alike, and has no fewer features than the queries.

        MLA's key-value latent feeds no queries, and a latent that feeds all three is narrower than the queries.
        """
        features = self.graph.features(factor)
        queries = max(len(set().union(*map(indices, block.heads))) for block in self.site.query)
        if features is None or features < queries:
            return False
        return factor.product.op in self._behind_all

    @cached_property
    def _behind_all(self) -> Set[Op]:
        """Projections upstream of queries, keys and values alike."""
        behind = ({f.product.op for part in self.parts for f in all_factors(part.around[side])} for side in SIDES)
        return set.intersection(*behind, set(self.graph.values_behind(self.softmax)))

    def _keeps_features(self, factor: Factor, side: Side) -> bool:
        """Whether a projection sums claimed features over tokens: each of its elements depends on one claimed row."""
        if not factor.outer or not all(self._is_claimed(f, side) and f.linear for f in factor.outer):
            return False
        slice_ = Replay(
            self.graph.tape,
            [(factor.result, None)],
            cuts={v for f in factor.outer for v in f.sources},
            stops=self.graph.barriers - {f.product.op for f in (factor, *factor.outer)},
            statistics=self.graph.statistics,
            through_detach=True,
        )
        claimed = self.claimed[side] & {name for f in factor.outer for name in f.params}
        size = factor.result.tensor.numel()
        for position in torch.randint(size, (_ELEMENTS_TRIED,), generator=self.generator).tolist():
            seed = torch.zeros(size).index_fill(0, torch.tensor([position]), 1.0).view(factor.result.tensor.shape)
            arrived = slice_.gradients(factor.result, seed.to(factor.result.tensor))
            if sum(int((self.by_row(n, g) > 0).sum()) for n, g in arrived.items() if n in claimed) != 1:
                return False
        return True

    def _added_biases(self, side: Side) -> dict[str, frozenset[str]]:
        added = dict.fromkeys(self.claimed[side], frozenset[str]())
        for factor in (f for part in self.parts for f in all_factors(part.around[side])):
            for name in factor.params & added.keys():
                added[name] |= factor.biases
        return added

    def _unnamed_biases(self, side: Side) -> frozenset[str]:
        """Biases of claimed projections, with one entry per row, whose block names no bias."""
        params, found = self.graph.tape.params, set()
        for block in self.blocks[side]:
            added, rows = self.added[side][block.param], params[block.param].shape[block.axis]
            if block.bias not in added:  # a block names one bias: there may be more
                found |= {b for b in added if params[b].shape == (rows,)}
        return frozenset(found - {b.bias for b in self.blocks[side]})

    def from_results(self, part: Part, side: Side, length: float) -> tuple[Replay, Replay]:
        """The slices from the results of the nearest projections to an operand, with live and with constant statistics.

        The results are random numbers such that a head's vectors have about this length, and biases are smaller.
        """
        # At 0.02, the epsilon of a norm is still negligible, whatever its width.
        size = max(length / math.sqrt(self.site.head_dim), 0.02)
        tensors = {f.result: f.result.tensor for f in part.around[side]}
        noise = {v: size * torch.randn(t.shape, generator=self.generator) for v, t in tensors.items()}
        results = {v: torch.empty_like(t).copy_(noise[v]) for v, t in tensors.items()}  # with the same strides
        live, fixed = (self._slice(part, side, results, live=on, biases=min(1.0, 0.1 * size)) for on in (True, False))
        return live, fixed

    def _slice(
        self,
        part: Part,
        side: Side,
        leaves: Mapping[Value, Tensor] | None = None,
        *,
        live: bool = False,
        biases: float = 1.0,
    ) -> Replay:
        """The slice that computes an operand from the inputs of its outermost claimed projections."""
        operand = part.operand[side]
        target = (operand.value, operand.reader)
        replay = partial(slice_from, self.graph, part.followed[side], target, leaves=leaves, live=live, biases=biases)
        usual = replay()
        if usual.opaque:
            raise CannotTell(f"its {side} side passes the op {usual.opaque[0].func}, which has no gradient")
        return usual if usual[operand.value].requires_grad else replay(through_detach=True)


def slice_from(graph: Graph, factors: Sequence[Factor], target: Target, **options: Any) -> Replay:
    """The slice that computes a value from the inputs of the outermost of some projections."""
    return Replay(
        graph.tape,
        [target],
        cuts={v for f in factors if not any(o in factors for o in f.outer) for v in f.sources},
        stops=graph.barriers - {f.product.op for f in factors},
        statistics=graph.statistics,
        **options,
    )


def all_factors(factors: Sequence[Factor]) -> list[Factor]:
    """Some factors and all upstream of them, each once: a deep model has many paths to the same one."""
    return list(walk(factors, lambda factor: factor.outer))


def indices(ranges: Ranges) -> Rows:
    """The rows of some ranges."""
    return frozenset(i for start, stop in ranges for i in range(start, stop))
