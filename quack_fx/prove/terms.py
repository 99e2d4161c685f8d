"""Checks the terms of a site against the evidence: which blocks are multiplied with which.

In: the evidence about a site. Out: the number of terms confirmed; `VerifyError` for the first wrong one.

A term is a chain of blocks on the query side times one on the key side. The order of a chain is checked on the
projections upstream of the operands. Seeds on single features of an operand show which chains reach them; a query chain
and a key chain that reach the same feature are multiplied there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from quack_fx.layout import SIDES, Side, WeightBlock
from quack_fx.prove.evidence import Evidence, Part, indices
from quack_fx.prove.graph import Factor

_Term = tuple[tuple[int, ...], tuple[int, ...]]
_Names = tuple[str, ...]


def check_terms(evidence: Evidence) -> int:
    """Check that blocks meet in head dimensions exactly as the terms say, for one head of each pattern of blocks.

    Returns:
        Number of terms.

    Raises:
        VerifyError: A term is missing, does not occur, or multiplies other blocks.
    """
    site = evidence.site
    twice = [t for t, n in Counter((frozenset(t.query), frozenset(t.key)) for t in site.terms).items() if n > 1]
    if twice:
        raise evidence.error(
            f"the term {_spell(evidence, (tuple(twice[0][0]), tuple(twice[0][1])))} stands there twice"
        )
    for side in SIDES:
        _check_order(evidence, side)
    met: set[_Term] = set()
    seen = set()
    for head in range(site.query_heads):
        index: dict[Side, int] = {"query": head, "key": site.head_map[head]}
        pattern = tuple(bool(b.heads[index[side]]) for side in SIDES for b in evidence.blocks[side])
        if pattern in seen:
            continue
        seen.add(pattern)
        for part in evidence.parts:
            for reached in _meetings(evidence, part, range(part.operand["query"].width), index):
                met |= _terms_at(evidence, reached["query"], reached["key"])
    for term in site.terms:
        if (term.query, term.key) not in met:
            raise evidence.error(
                f"the term {_spell(evidence, (term.query, term.key))} stands in no head dimension of its logits"
            )
    return len(site.terms)


def _check_order(evidence: Evidence, side: Side) -> None:
    """Check that the claimed chains are the paths through the projections upstream of the operands."""
    blocks = evidence.blocks[side]
    claimed = {tuple(sorted(blocks[i].param for i in getattr(term, side))) for term in evidence.site.terms}
    found: set[_Names] = set()
    for part in evidence.parts:
        for path in _paths(part.factors[side], part.followed[side]):
            if any(len(f.params & evidence.claimed[side]) > 1 for f in path):
                return  # the weights are multiplied with each other first: only the features show the terms
            found.add(tuple(sorted(name for f in path for name in f.params & evidence.claimed[side])))
    for chain in sorted(claimed ^ found):
        what = "no term has it" if chain in found else "no operand of its logits comes out of it"
        raise evidence.error(f"{side} side: the chain {' x '.join(chain) or 'of no block'}: {what}")


def _paths(factors: Sequence[Factor], followed: Sequence[Factor]) -> Iterator[tuple[Factor, ...]]:
    """Chains of claimed projections, starting at the logits."""
    for factor in factors:
        if factor in followed:
            outer = list(_paths(factor.outer, followed))
            for path in outer or [()]:
                yield (factor, *path)


def _meetings(
    evidence: Evidence, part: Part, features: range, index: Mapping[Side, int]
) -> Iterator[dict[Side, frozenset[int]]]:
    """Sets of blocks that meet in a contracted feature; the set of any other feature is a subset of one of them."""
    first = {side: _blocks_at(evidence, part, side, features[:1], index[side]) for side in SIDES}
    whole = {side: _blocks_at(evidence, part, side, features, index[side]) for side in SIDES}
    if whole == first or len(features) == 1:
        yield first
    else:
        middle = len(features) // 2
        yield from _meetings(evidence, part, features[:middle], index)
        yield from _meetings(evidence, part, features[middle:], index)


def _blocks_at(evidence: Evidence, part: Part, side: Side, features: range, index: int) -> frozenset[int]:
    """Blocks of one head that reach any of some contracted features of an operand."""
    rows = evidence.rows_behind(part, side, features)
    blocks: Sequence[WeightBlock] = evidence.blocks[side]
    return frozenset(i for i, b in enumerate(blocks) if rows.get(b.param, frozenset()) & indices(b.heads[index]))


def _terms_at(evidence: Evidence, query: frozenset[int], key: frozenset[int]) -> set[_Term]:
    """The claimed terms that meet in a feature; checks that they pair every query chain there with every key chain."""
    terms = evidence.site.terms
    met = {(t.query, t.key) for t in terms if query.issuperset(t.query) and key.issuperset(t.key)}
    chains = {q for q, _ in met}, {k for _, k in met}
    complete = {(q, k) for q in chains[0] for k in chains[1]} == met
    covered = frozenset(i for q in chains[0] for i in q) == query and frozenset(i for k in chains[1] for i in k) == key
    if (query or key) and not (complete and covered):
        raise evidence.error(
            f"{_spell(evidence, (tuple(sorted(query)), tuple(sorted(key))))} meet in one head dimension, "
            "which no set of its terms says"
        )
    return met


def _spell(evidence: Evidence, term: _Term) -> str:
    return " x ".join(evidence.blocks[side][i].param for side, part in zip(SIDES, term, strict=True) for i in part)
