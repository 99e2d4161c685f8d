"""Writes the rule as expressions that read like the paper's algorithms: `uq=1 / (n.dq * n.uk * n.dkv)`.

In: a `Kind` and a name for each of its blocks. Out: for each block, an expression of its factor,

    factor(block) = min over the terms that contain it of  1 / product of the norms of the other blocks of that term

The norms (n.q and so on) are tensors [instances, heads], or [instances, 1] for a block that all heads share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quack_fx.layout.pattern import map_pattern
from quack_fx.train.program.kinds import Kind, Term
from quack_fx.train.program.text import INDENT, Tables, as_ranges, bracketed


@dataclass(frozen=True)
class Factor:
    """The factor of one block.

    Attributes:
        block: Name of the block.
        ways: For each term of the block, the product of the other blocks' norms; the factor is 1 / the largest product.
    """

    block: str
    ways: tuple[str, ...]

    def lines(self, depth: int) -> list[str]:
        """The factor as an indented keyword argument: 1 / the product, or the minimum over several."""
        inverse = [f"1 / {way}" if _binds(way) else f"1 / ({way})" for way in self.ways]
        if len(inverse) == 1:
            return [f"{INDENT * depth}{self.block}={inverse[0]},"]
        smallest = "torch.minimum" if len(inverse) == 2 else "smallest"
        return bracketed(depth, f"{self.block}={smallest}(", inverse, "),")


def factors_of(kind: Kind, names: Sequence[str], tables: Tables) -> list[Factor]:
    """The factor of every block of a kind.

    Arguments:
        kind: The kind.
        names: A name for each of its blocks.
        tables: Stores long lists as constants of the program.
    """
    found: list[list[str]] = [[] for _ in kind.blocks]
    for term in kind.terms:
        for place, (block, _) in enumerate(term.factors):
            found[block].append(_others(kind, names, term, place, tables))
    return [Factor(name, tuple(dict.fromkeys(ways))) for name, ways in zip(names, found, strict=True)]


def _binds(text: str) -> bool:
    """Whether an expression binds tighter than division: a name with optional calls and indices."""
    depth = 0
    for c in text:
        depth += (c in "([") - (c in ")]")
        if depth == 0 and c in " ":
            return False
    return True


def _others(kind: Kind, names: Sequence[str], term: Term, place: int, tables: Tables) -> str:
    """The product of a term's other norms; for a head that several query heads read, the largest product."""
    heads = len(term.factors[0][1])
    own, target = term.factors[place]
    size = len(kind.blocks[own].heads)
    others = [factor for i, factor in enumerate(term.factors) if i != place]
    wide = any(_spreads(len(kind.blocks[b].heads), column) for b, column in others)
    # Sorted by block, so that equal products have equal text.
    parts = [_read(f"n.{names[b]}", len(kind.blocks[b].heads), column, tables) for b, column in sorted(others)]
    product = " * ".join(parts)
    if target == tuple(range(size)):
        return (
            product
            if wide or size == 1
            else f"({product}).expand(-1, {size})"
            if len(parts) > 1
            else (f"{product}.expand(-1, {size})")
        )
    whole = f"({product})" if len(parts) > 1 else product
    if not wide:  # the product is the same for every head
        covered = set(target) == set(range(size))
        return (
            (product if size == 1 else f"{whole}.expand(-1, {size})")
            if covered
            else (f"largest({whole}.expand(-1, {heads}), {tables.text(as_ranges(target))}, {size})")
        )
    if size == 1:
        return f"{whole}.amax(-1, keepdim=True)"
    pattern, groups = map_pattern(target, size), heads // size
    if pattern == "blocks":
        return f"{whole}.unflatten(-1, ({size}, {groups})).amax(-1)"
    if pattern == "cycle" and groups * size == heads:
        return f"{whole}.unflatten(-1, ({groups}, {size})).amax(-2)"
    return f"largest({whole}, {tables.text(as_ranges(target))}, {size})"


def _spreads(size: int, column: tuple[int, ...]) -> bool:
    """Whether query heads read different norms of a block."""
    return size > 1 or len(column) == 1


def _read(norms: str, size: int, column: tuple[int, ...], tables: Tables) -> str:
    """An expression for the norms of a block, one for each query head."""
    heads = len(column)
    if column == tuple(range(size)) or size == 1:
        return norms
    pattern, groups = map_pattern(column, size), heads // size
    if pattern == "blocks":
        return f"{norms}.repeat_interleave({groups}, -1)"
    if pattern == "cycle" and groups * size == heads:
        return f"{norms}.repeat(1, {groups})"
    if column == tuple(range(column[0], column[0] + heads)):
        return f"{norms}[:, {column[0]}:{column[-1] + 1}]"
    return f"{norms}[:, {tables.text(as_ranges(column))}]"
