"""USER: a layout as the body of a Python generator, short however many layers and heads it has.

In: a layout and the shapes of its parameters. Out: the lines that yield, for every head, the products of weight rows
that make its logits, and the features that the rest of the emitted file needs to understand them.

Sites that differ only in the numbers within their names become one loop over these numbers, heads whose rows follow a
linear rule become one loop over heads, and what follows no rule is written out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from quack_fx.emit.entry import Plan, PlanBlock, PlanWeight, write_entry
from quack_fx.emit.layers import Row
from quack_fx.errors import EmitError, LayoutError
from quack_fx.layout import AttentionSite, QKLayout, WeightBlock, merged
from quack_fx.train.program.kinds import why_empty
from quack_fx.train.program.names import name_template

_KINDS = {
    "mha": "multi-head attention",
    "gqa": "grouped-query attention",
    "mqa": "multi-query attention",
    "mla": "multi-head latent attention",
    "other": "attention",
}


@dataclass(frozen=True)
class Table:
    """The table of pairs as source.

    Attributes:
        lines: Body of the generator function, indented once.
        features: What the runtime has to know, see `template.py`.
        latent: Whether some products have more than two factors, as in Algorithm 2 of the paper.
        plain: Whether some products have two, as in Algorithm 1.
    """

    lines: tuple[str, ...]
    features: frozenset[str]
    latent: bool
    plain: bool


def write_table(layout: QKLayout, shapes: Mapping[str, Sequence[int]]) -> Table:
    """The table of pairs of a layout.

    Arguments:
        layout: Where the pairs are. Sites with QK norm do not count: their logits do not depend on the norms.
        shapes: Shape of every parameter that the layout names.

    Returns:
        Its source.

    Raises:
        LayoutError: A parameter is missing, or rows, axis or bias do not fit its shape, or it has two axes.
        EmitError: There is no pair.
    """
    groups: dict[Plan, list[Row]] = {}
    features: set[str] = set()
    for site in layout.sites:
        if not site.terms or site.qk_norm:
            continue
        weights, blocks, terms = _read(site, shapes)
        features.update(_features(weights, blocks))
        numbers: list[int] = []
        nameless = tuple(
            weight._replace(
                name=name_template(weight.name, numbers), bias=weight.bias and name_template(weight.bias, numbers)
            )
            for weight in weights
        )
        plan = Plan(_title(site), nameless, tuple(blocks), terms, site.head_map)
        groups.setdefault(plan, []).append(tuple(numbers))
    if not groups:
        raise EmitError(why_empty(layout))

    lines: list[str] = []
    for plan, rows_of_numbers in groups.items():
        lines += [""] * bool(lines) + write_entry(plan, sorted(set(rows_of_numbers)))
    lengths = {len(term) for plan in groups for term in plan.terms}
    return Table(tuple(lines), frozenset(features), max(lengths) > 2, 2 in lengths)


def _title(site: AttentionSite) -> str:
    """A few words on a site, for the comment above its entry."""
    heads = f"{site.query_heads} head{'s' if site.query_heads > 1 else ''}"
    if site.key_heads != site.query_heads:
        heads = f"{site.query_heads} query heads on {site.key_heads} key head{'s' if site.key_heads > 1 else ''}"
    kind = _KINDS[site.kind]
    return f"{kind.replace('attention', 'cross attention') if site.cross else kind}, {heads}"


# ---- a site against the shapes ---------------------------------------------------------------------------------------


def _read(
    site: AttentionSite, shapes: Mapping[str, Sequence[int]]
) -> tuple[list[PlanWeight], list[PlanBlock], tuple[tuple[int, ...], ...]]:
    """The weights and blocks of a site, checked against the shapes, and the terms as blocks by number.

    A reader follows the data: queries before keys, and on each side what acts first comes first.
    """
    queries = dict.fromkeys(b for term in site.terms for b in reversed(term.query))
    keys = dict.fromkeys(b for term in site.terms for b in reversed(term.key))
    weights: dict[PlanWeight, int] = {}
    blocks = []
    for block in (site.query[b] for b in queries):
        number = weights.setdefault(_fit(site, block, shapes), len(weights))
        blocks.append(PlanBlock(number, block.role, tuple(map(merged, block.heads))))
    for block in (site.key[b] for b in keys):
        number = weights.setdefault(_fit(site, block, shapes), len(weights))
        blocks.append(PlanBlock(number, block.role, tuple(merged(block.heads[k]) for k in site.head_map)))
    query_number = {b: n for n, b in enumerate(queries)}
    key_number = {b: n for n, b in enumerate(keys, start=len(queries))}
    terms = tuple((*(query_number[b] for b in t.query), *(key_number[b] for b in t.key)) for t in site.terms)
    return list(weights), blocks, terms


def _fit(site: AttentionSite, block: WeightBlock, shapes: Mapping[str, Sequence[int]]) -> PlanWeight:
    """The weight of a block, which must fit it.

    Raises:
        LayoutError: It does not.
    """
    where = f"site {site.name!r}: block of {block.param!r}"
    if block.param not in shapes:
        raise LayoutError(f"{where}: the model has no such parameter; find the pairs of this very model")
    shape = tuple(shapes[block.param])
    if block.axis >= len(shape):
        raise LayoutError(f"{where} has axis {block.axis}, but the shape is {list(shape)}")
    rows = shape[block.axis]
    last = max((stop for ranges in block.heads for _, stop in ranges), default=0)
    if last > rows:
        raise LayoutError(f"{where} goes up to row {last}, but axis {block.axis} of {list(shape)} has {rows}")
    if block.bias is not None and tuple(shapes.get(block.bias, ())) != (rows,):
        found = f"has shape {list(shapes[block.bias])}" if block.bias in shapes else "does not exist"
        raise LayoutError(f"{where}: its bias {block.bias!r} {found}; need [{rows}]")
    return PlanWeight(block.param, shape, block.axis, block.bias)


def _features(weights: Iterable[PlanWeight], blocks: Iterable[PlanBlock]) -> Iterator[str]:
    """What the table makes use of."""
    for weight in weights:
        if weight.axis:
            yield "axis"
        if weight.bias is not None:
            yield "bias"
    if any(len(ranges) > 1 for block in blocks for ranges in block.heads):
        yield "pieces"
