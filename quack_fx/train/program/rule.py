"""Writes the rule as expressions that read like the paper's algorithms: `uq=1 / (n.dq * n.uk * n.dkv)`.

In: a `Kind` and a name for each of its blocks. Out: for each block, an expression of its factor,

    factor(block) = min over the terms that contain it of  1 / product of the norms of the other blocks of that term

The norms (n.q and so on) are tensors [instances, heads], or [instances, 1] for a block that all heads share.
"""

from __future__ import annotations

from collections.abc import Sequence

from quack_fx.layout.pattern import map_pattern
from quack_fx.train.program.kinds import Kind, Term
from quack_fx.train.program.text import INDENT, Tables, as_ranges, bracketed


def factor_lines(kind: Kind, names: Sequence[str], tables: Tables) -> list[str]:
    """The factor of every block of a kind, as indented keyword arguments of a call.

    A factor is 1 / a product of norms, or the minimum over the terms that contain the block.

    Arguments:
        kind: The kind.
        names: A name for each of its blocks.
        tables: Stores long lists as constants of the program.
    """
    products: list[list[str]] = [[] for _ in kind.blocks]
    for term in kind.terms:
        for place, (block, _) in enumerate(term.factors):
            products[block].append(_others(kind, names, term, place, tables))
    lines = []
    for name, own in zip(names, products, strict=True):
        inverse = [f"1 / {product}" for product in dict.fromkeys(own)]
        if len(inverse) == 1:
            lines.append(f"{INDENT * 2}{name}={inverse[0]},")
        else:
            smallest = "torch.minimum" if len(inverse) == 2 else "smallest"
            lines += bracketed(2, f"{name}={smallest}(", inverse, "),")
    return lines


def _others(kind: Kind, names: Sequence[str], term: Term, place: int, tables: Tables) -> str:
    """The product of a term's other norms, bracketed; the largest one for a head that several query heads read."""
    heads = len(term.factors[0][1])
    own, target = term.factors[place]
    size = len(kind.blocks[own].heads)
    others = [factor for i, factor in enumerate(term.factors) if i != place]
    # Whether query heads read different norms.
    wide = any(len(kind.blocks[b].heads) > 1 or len(column) == 1 for b, column in others)
    # Sorted by block, so that equal products have equal text.
    parts = [_read(f"n.{names[b]}", len(kind.blocks[b].heads), column, tables) for b, column in sorted(others)]
    product = f"({' * '.join(parts)})" if len(parts) > 1 else parts[0]
    if wide and target == tuple(range(size)):
        return product
    if not wide and set(target) == set(range(size)):  # the product is the same for every head
        return product if size == 1 else f"{product}.expand(-1, {size})"
    if not wide:
        return f"largest({product}.expand(-1, {heads}), {tables.text(as_ranges(target))}, {size})"
    if size == 1:
        return f"{product}.amax(-1, keepdim=True)"
    pattern, groups = map_pattern(target, size), heads // size
    if pattern == "blocks":
        return f"{product}.unflatten(-1, ({size}, {groups})).amax(-1)"
    if pattern == "cycle" and groups * size == heads:
        return f"{product}.unflatten(-1, ({groups}, {size})).amax(-2)"
    return f"largest({product}, {tables.text(as_ranges(target))}, {size})"


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
