"""The claim of a site against what the gradients say.

In: a site of the layout and the softmaxes that ran in it. Out: the number of checks that held; `VerifyError` for the
first that did not; `CannotTell` where the gradients cannot decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from quack_fx.errors import VerifyError
from quack_fx.layout import AttentionSite, Ranges, Side, WeightBlock
from quack_fx.verify.chains import Chains, Factor
from quack_fx.verify.heads import Operand, head_labels, head_seed, operands, orthogonal
from quack_fx.verify.watch import Product, Softmax

COUPLED = 1e-3
"""Below this part of the largest gradient a row counts as untouched, where a norm leaves rounding behind."""

NORMED = 1e-2
"""Below this part of the whole, what an operand owes to the size of its weights is a norm's epsilon."""

SIDES: tuple[Side, Side] = ("query", "key")
Rows = frozenset[int]


class CannotTell(Exception):
    """The gradients neither prove nor refute the claim; the message says why."""


@dataclass
class _Part:
    """One logit product of a site with its two operands and the factors behind them."""

    product: Product
    operand: dict[Side, Operand]
    factors: dict[Side, list[Factor]]


class SiteCheck:
    """Check one site on one softmax.

    Arguments:
        model: The model that ran.
        chains: The graph of the run.
        site: The claim.
        softmax: The attention to hold it against.
        attention: Nodes of the products of all attentions of the site.
        generator: Source of the random seeds.
    """

    def __init__(
        self,
        model: nn.Module,
        chains: Chains,
        site: AttentionSite,
        softmax: Softmax,
        attention: Set[Node | None],
        generator: torch.Generator,
    ) -> None:
        self.model, self.chains, self.site, self.softmax = model, chains, site, softmax
        self.attention, self.generator = attention, generator
        self.blocks: dict[Side, tuple[WeightBlock, ...]] = {"query": site.query, "key": site.key}
        self.axes = {block.param: block.axis for _, block in site.blocks()}
        self.biases = {block.bias: block.param for _, block in site.blocks() if block.bias is not None}
        self.checks = 0

    def run(self) -> int:
        """Hold the claim against the gradients.

        Returns:
            Number of comparisons of one parameter on one side of one head.

        Raises:
            VerifyError: The claim is wrong.
            CannotTell: It can be neither proved nor refuted.
        """
        self._check_coupling()
        parts = self._parts()
        self._check_chains(parts)
        found = self._find_heads(parts)
        for head in range(self.site.query_heads):
            for side in SIDES:
                self._check_head(head, side, found[head][side])
        for side in SIDES:
            self._check_norm(parts, side)
        self._check_terms(parts)
        return self.checks

    # -- what stands behind the logits -------------------------------------------------------------------------------

    def _check_coupling(self) -> None:
        """A norm that also takes the mean ties heads together in a way that no seed avoids."""
        for norm in self.site.qk_norm:
            if norm.kind not in ("rms", "l2", "batch") and norm.width > self.site.head_dim:
                raise CannotTell(
                    f"its {norm.side} {norm.kind} norm over {norm.width} features ties all heads together, "
                    "so no gradient belongs to one head"
                )

    def _parts(self) -> list[_Part]:
        """The logit products of content with content; those with a table of positions or a bias are left out."""
        parts = []
        claimed = set(self.axes)
        for product in self.chains.logit_products(self.softmax):
            sides = operands(product, self.softmax) if product.node is not None else None
            behind = {i: self.chains.factors(product.edges[i], self.attention) for i in product.factors}
            reached = [{n for f in factors for n in f.params} & claimed for factors in behind.values()]
            if not all(product.data) and not all(reached):
                continue
            if sides is None:
                raise CannotTell("it cannot be told which operand of its logits holds the keys; try longer inputs")
            operand = dict(zip(SIDES, sides, strict=True))
            parts.append(_Part(product, operand, {side: behind[operand[side].position] for side in SIDES}))
        if not parts:
            raise CannotTell("no product of queries and keys stands before its softmax, or heads are mixed in between")
        return parts

    def _check_chains(self, parts: list[_Part]) -> None:
        """Every weight product met on the way is claimed, and every claimed weight is met."""
        for side in SIDES:
            claimed = {block.param for block in self.blocks[side]}
            met: set[str] = set()
            for factor in self._met([f for part in parts for f in part.factors[side]], side):
                met |= factor.params & claimed
                biases = {block.bias for block in self.blocks[side] if block.param in factor.params}
                if forgotten := sorted(factor.biases - biases):
                    raise self._error(
                        f"{side} side: {forgotten[0]!r} is added to a claimed product, but no block names it"
                    )
            if not met and not any(part.factors[side] for part in parts):
                raise CannotTell(f"its {side} side comes out of no product with a weight")
            if missing := sorted(claimed - met):
                raise self._error(
                    f"{missing[0]!r} is claimed on the {side} side, but no logit of this attention reads it"
                )

    def _met(self, factors: list[Factor], side: Side, *, nearest: bool = True) -> Iterator[Factor]:
        """Claimed factors of a tree, from the logits outwards, as far as the claim goes.

        A factor that is not claimed ends the way if it is not a link of the chain: if other sources are added to it, a
        nonlinear function follows it or it runs outside the site's module. If it is one, the claim has forgotten it.
        """
        claimed = {block.param for block in self.blocks[side]}
        for factor in factors:
            if factor.params & claimed:
                if not factor.linear:
                    raise CannotTell(f"a nonlinear function follows {min(factor.params & claimed)!r}")
                yield factor
                yield from self._met(factor.outer, side, nearest=False)
            elif nearest or (factor.linear and factor.sole and self.site.name in factor.product.modules):
                other: Side = "key" if side == "query" else "query"
                crossed = factor.params & {block.param for block in self.blocks[other]}
                names = ", ".join(map(repr, sorted(crossed or factor.params)))
                what = f"claimed on the {other} side" if crossed else "which no block claims"
                raise self._error(f"its {side} side comes out of {names}, {what}")

    # -- head by head ------------------------------------------------------------------------------------------------

    def _find_heads(self, parts: list[_Part]) -> list[dict[Side, dict[str, Rows]]]:
        """Rows that receive a gradient, by head and side, under the reading of the shape that tells heads apart."""
        best: list[dict[Side, dict[str, Rows]]] = []
        most = 0
        split = False
        for labels in head_labels(self.softmax, self.site.query_heads):
            found = [
                {side: self._rows_of_head(parts, labels, head, side) for side in SIDES}
                for head in range(self.site.query_heads)
            ]
            distinct = len({tuple(tuple(sorted(rows[side].items())) for side in SIDES) for rows in found})
            if distinct > most:
                split = not self._is_finest(parts, labels, found[0])
                best, most = (best, most) if split else (found, distinct)
            if most == self.site.query_heads:
                break
        shape = "x".join(map(str, self.softmax.shape))
        if split and not best:
            raise self._error(f"its {shape} logits fall into more than the {self.site.query_heads} heads claimed")
        if most <= 1 < self.site.query_heads:
            raise CannotTell(f"no axis of its {shape} logits tells {self.site.query_heads} heads apart")
        return best

    def _is_finest(self, parts: list[_Part], labels: Tensor, first: Mapping[Side, Mapping[str, Rows]]) -> bool:
        """Whether no further axis splits the rows of head 0, as it would if two heads were taken for one."""
        shape = self.softmax.shape
        for axis in range(len(shape)):
            if axis == self.softmax.dim or shape[axis] == 1:
                continue
            outside = torch.ones(shape[axis], dtype=torch.bool)
            outside[0] = False
            slice_labels = labels.masked_fill(outside.view([-1 if a == axis else 1 for a in range(len(shape))]), -1)
            for side in SIDES:
                rows = self._rows_of_head(parts, slice_labels, 0, side)
                if any(first[side].get(name) != part for name, part in rows.items()):
                    return False
        return True

    def _rows_of_head(self, parts: list[_Part], labels: Tensor, head: int, side: Side) -> dict[str, Rows]:
        gradients: dict[str, Tensor] = {}
        for part in parts:
            operand = part.operand[side]
            noise = self._noise(operand)
            seed = head_seed(self.softmax, part.product, operand, labels, head, noise)
            self._send(part, side, seed, gradients)
        return self._rows(gradients)

    def _send(self, part: _Part, side: Side, seed: Tensor, gradients: dict[str, Tensor]) -> None:
        """Send a seed on an operand to the parameters, and add what arrives to `gradients`."""
        edge = part.operand[side].edge
        if edge is None:
            return
        arrived = self.chains.gradients(edge, part.factors[side], seed)
        separate = [b for b, p in self.biases.items() if b not in arrived and p in arrived]
        if separate:
            arrived |= self.chains.added_biases(edge, seed, separate, self.model)
        for name, gradient in arrived.items():
            gradients[name] = gradients[name] + gradient.abs() if name in gradients else gradient.abs()

    def _rows(self, gradients: Mapping[str, Tensor]) -> dict[str, Rows]:
        """Rows of the claimed parameters and biases whose gradient is not zero."""
        rows = {}
        for name in (*self.axes, *self.biases):
            if name not in gradients:
                continue
            gradient = gradients[name]
            axis = self.axes.get(name, 0)
            size = gradient.movedim(axis, 0).flatten(1).sum(1) if gradient.ndim > 1 else gradient
            if not torch.isfinite(size).all():
                raise CannotTell("its numbers overflow on random weights")
            floor = COUPLED * size.max() if self.site.qk_norm else 0.0
            rows[name] = frozenset((size > floor).nonzero().flatten().tolist())
        return {name: r for name, r in rows.items() if r}

    def _check_head(self, head: int, side: Side, found: Mapping[str, Rows]) -> None:
        index = head if side == "query" else self.site.head_map[head]
        claimed: dict[str, Rows] = {}
        for block in self.blocks[side]:
            for name in (block.param, block.bias):
                if name is not None and block.heads[index]:
                    claimed[name] = claimed.get(name, frozenset()) | _indices(block.heads[index])
        for name in sorted(claimed.keys() | found.keys()):
            self.checks += 1
            want, have = claimed.get(name, frozenset()), found.get(name, frozenset())
            if want != have:
                raise self._error(
                    f"head {head}, {side} side: {name!r} receives a gradient in {_spell(have)}, "
                    f"the layout claims {_spell(want)}"
                )

    def _check_norm(self, parts: list[_Part], side: Side) -> None:
        """Logits are blind to the size of the weights exactly where a QK norm is claimed."""
        kinds = {norm.kind for norm in self.site.qk_norm if norm.side == side}
        if kinds & {"batch", "other"}:
            return
        response = whole = 0.0
        for part in parts:
            operand = part.operand[side]
            if operand.edge is not None:
                whole += float(operand.value.square().sum())
                response += float(self.chains.size_response(operand.edge, part.factors[side], operand.value))
        blind = abs(response) < NORMED * whole
        self.checks += 1
        if blind and not kinds:
            raise self._error(f"its {side} side passes a norm, so its logits do not depend on the size of the weights")
        if kinds and not blind:
            raise CannotTell(f"its {side} norm leaves a part of the logits that depends on the size of the weights")

    # -- terms -------------------------------------------------------------------------------------------------------

    def _check_terms(self, parts: list[_Part]) -> None:
        """Blocks meet in head dimensions exactly as the terms say; asked for one head of each pattern of blocks."""
        site = self.site
        if all(len(blocks) == 1 for blocks in self.blocks.values()):
            if [(t.query, t.key) for t in site.terms] != [((0,), (0,))]:
                raise self._error("its only term is the product of its query block and its key block")
            return
        if any(norm.kind not in ("rms", "l2", "batch") for norm in site.qk_norm):
            raise CannotTell("its QK norm takes the mean of a head's features, so its terms cannot be told apart")
        met: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        seen = set()
        for head in range(site.query_heads):
            key_head = site.head_map[head]
            pattern = tuple(bool(b.heads[head]) for b in site.query) + tuple(bool(b.heads[key_head]) for b in site.key)
            if pattern in seen:
                continue
            seen.add(pattern)
            for part in parts:
                depth = part.operand["query"].value.shape[part.operand["query"].axis]
                for reached in self._meetings(part, range(depth), {"query": head, "key": key_head}):
                    met |= self._terms_at(reached["query"], reached["key"])
        for term in site.terms:
            self.checks += 1
            if (term.query, term.key) not in met:
                names = [site.query[i].param for i in term.query] + [site.key[i].param for i in term.key]
                raise self._error(f"the term {' x '.join(names)} stands in no head dimension of its logits")

    def _meetings(
        self, part: _Part, features: range, index: Mapping[Side, int]
    ) -> Iterator[dict[Side, frozenset[int]]]:
        """Sets of blocks that meet in one contracted feature; every such set is one of these or lies inside one."""
        # Through a norm two features at a time, so that a seed on them can spare its statistic.
        width = 2 if self.site.qk_norm else 1
        first = {side: self._blocks_at(part, side, features[:width], index[side]) for side in SIDES}
        whole = {side: self._blocks_at(part, side, features, index[side]) for side in SIDES}
        if whole == first or len(features) <= width:
            yield first
        else:
            middle = len(features) // 2 // width * width or width
            yield from self._meetings(part, features[:middle], index)
            yield from self._meetings(part, features[middle:], index)

    def _blocks_at(self, part: _Part, side: Side, features: range, index: int) -> frozenset[int]:
        """Blocks of one head that reach some contracted features of an operand."""
        operand = part.operand[side]
        here = torch.zeros_like(operand.value)
        here.narrow(operand.axis, features.start, len(features)).fill_(1.0)
        seed = self._noise(operand) * here
        if self.site.qk_norm:
            seed = orthogonal(seed, operand.value * here, operand.axis)
        gradients: dict[str, Tensor] = {}
        self._send(part, side, seed, gradients)
        rows = self._rows(gradients)
        return frozenset(
            i
            for i, block in enumerate(self.blocks[side])
            if rows.get(block.param, frozenset()) & _indices(block.heads[index])
        )

    def _terms_at(self, query: frozenset[int], key: frozenset[int]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        """The claimed terms that meet in a feature; they must be all products of the chains that do."""
        met = {(t.query, t.key) for t in self.site.terms if query.issuperset(t.query) and key.issuperset(t.key)}
        chains = {q for q, _ in met}, {k for _, k in met}
        complete = {(q, k) for q in chains[0] for k in chains[1]} == met
        covered = (
            frozenset(i for q in chains[0] for i in q) == query and frozenset(i for k in chains[1] for i in k) == key
        )
        if (query or key) and not (complete and covered):
            names = [self.site.query[i].param for i in sorted(query)] + [self.site.key[i].param for i in sorted(key)]
            raise self._error(f"{', '.join(names)} meet in one head dimension, which no set of its terms says")
        return met

    # -- small things ------------------------------------------------------------------------------------------------

    def _noise(self, operand: Operand) -> Tensor:
        noise = torch.randn(operand.value.shape, generator=self.generator, dtype=torch.float32)
        return noise.to(operand.value)

    def _error(self, what: str) -> VerifyError:
        return VerifyError(f"site {self.site.name!r}: {what}")


def _indices(ranges: Ranges) -> Rows:
    return frozenset(i for start, stop in ranges for i in range(start, stop))


def _spell(rows: Rows) -> str:
    """Rows as ranges: 'rows 0-15, 32-47'."""
    if not rows:
        return "no row"
    ordered = sorted(rows)
    starts = [r for r in ordered if r - 1 not in rows]
    stops = [r for r in ordered if r + 1 not in rows]
    return "rows " + ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, stops, strict=True))
