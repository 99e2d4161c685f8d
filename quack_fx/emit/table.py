"""USER: a layout as the body of a Python generator, short however many layers and heads it has.

In: a layout and the shapes of its parameters. Out: the lines that yield, for every head, the products of weight rows
that make its logits, and the features that the rest of the emitted file needs to understand them.

Sites that differ only in the numbers within their names become one loop over these numbers, heads whose rows follow a
linear rule become one loop over heads, and what follows no rule is written out.
"""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import NamedTuple

from quack_fx.emit.source import INDENT, WIDTH, bracketed, linear, loop, quoted, slice_of
from quack_fx.errors import EmitError, LayoutError
from quack_fx.layout import AttentionSite, QKLayout, Range, Ranges, WeightBlock

_KINDS = {
    "mha": "multi-head attention",
    "gqa": "grouped-query attention",
    "mqa": "multi-query attention",
    "mla": "multi-head latent attention",
    "other": "attention",
}
_COMMENTS = {frozenset({"uq", "uk", "dkv"}): "  # content", frozenset({"qr", "kr"}): "  # position"}
_LAYERS = "ijmn"
_RESERVED = {"at", "g", "h", "Weight", "Block", *_LAYERS, *keyword.kwlist, *dir(builtins)}


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


class _Weight(NamedTuple):
    """What one line of the table says of a weight."""

    name: str
    shape: tuple[int, ...]
    axis: int
    bias: str | None


class _Block(NamedTuple):
    """One block of a site: its weight by number, and for every *query* head the rows that the head reads."""

    weight: int
    role: str
    heads: tuple[Ranges, ...]


@dataclass(frozen=True)
class _Site:
    """A site with the numbers in its names taken out; sites that are equal then share a loop."""

    title: str
    weights: tuple[_Weight, ...]
    blocks: tuple[_Block, ...]
    terms: tuple[tuple[int, ...], ...]
    head_map: tuple[int, ...]


def write_table(layout: QKLayout, shapes: Mapping[str, Sequence[int]]) -> Table:
    """The table of pairs of a layout.

    Arguments:
        layout: Where the pairs are. Sites with QK norm do not count: their logits do not depend on the norms.
        shapes: Shape of every parameter that the layout names.

    Returns:
        Its source.

    Raises:
        LayoutError: A parameter is missing, or rows, axis or bias do not fit its shape.
        EmitError: There is no pair, or rows are shared in a way that one learning rate a row cannot express.
    """
    groups: dict[_Site, list[tuple[int, ...]]] = {}
    used: dict[str, tuple[_Weight, set[Ranges]]] = {}
    for site in layout.sites:
        if not site.terms or site.qk_norm:
            continue
        weights, blocks, terms = _read(site, shapes)
        for block in blocks:
            weight = weights[block.weight]
            known, rows = used.setdefault(weight.name, (weight, set()))
            if known != weight:
                raise EmitError(
                    f"{weight.name!r} is used along two axes or with two biases, which no emitted file can do"
                )
            rows.update(filter(None, block.heads))
        numbers: list[int] = []
        nameless = tuple(
            weight._replace(name=_template(weight.name, numbers), bias=weight.bias and _template(weight.bias, numbers))
            for weight in weights
        )
        plan = _Site(_title(site), nameless, tuple(blocks), terms, site.head_map)
        groups.setdefault(plan, []).append(tuple(numbers))
    if not groups:
        raise EmitError(_why_empty(layout))

    lines: list[str] = []
    for plan, rows_of_numbers in groups.items():
        lines += [""] * bool(lines) + _entry(plan, sorted(set(rows_of_numbers)))
    lengths = {len(term) for plan in groups for term in plan.terms}
    return Table(tuple(lines), _features(used, lengths), max(lengths) > 2, 2 in lengths)


def _why_empty(layout: QKLayout) -> str:
    """Why a layout gives nothing to write."""
    if layout.sites:
        return (
            f"all {len(layout.sites)} attentions keep their QK norm, so their logits do not depend on the norms of the "
            "weights; remove it with strip_qk_norm first"
        )
    reasons = "; ".join(f"{skipped.name!r}: {skipped.reason}" for skipped in layout.skipped[:3])
    return f"no query/key pairs to write a training step for{f' ({reasons})' if reasons else ''}"


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
) -> tuple[list[_Weight], list[_Block], tuple[tuple[int, ...], ...]]:
    """The weights and blocks of a site, checked against the shapes, and the terms as blocks by number.

    A reader follows the data: queries before keys, and on each side what acts first comes first.
    """
    queries = dict.fromkeys(b for term in site.terms for b in reversed(term.query))
    keys = dict.fromkeys(b for term in site.terms for b in reversed(term.key))
    weights: dict[_Weight, int] = {}
    blocks = []
    for block in (site.query[b] for b in queries):
        number = weights.setdefault(_fit(site, block, shapes), len(weights))
        blocks.append(_Block(number, block.role, tuple(map(_merge, block.heads))))
    for block in (site.key[b] for b in keys):
        number = weights.setdefault(_fit(site, block, shapes), len(weights))
        blocks.append(_Block(number, block.role, tuple(_merge(block.heads[k]) for k in site.head_map)))
    query_number = {b: n for n, b in enumerate(queries)}
    key_number = {b: n for n, b in enumerate(keys, start=len(queries))}
    terms = tuple((*(query_number[b] for b in t.query), *(key_number[b] for b in t.key)) for t in site.terms)
    return list(weights), blocks, terms


def _fit(site: AttentionSite, block: WeightBlock, shapes: Mapping[str, Sequence[int]]) -> _Weight:
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
    return _Weight(block.param, shape, block.axis, block.bias)


def _merge(ranges: Ranges) -> Ranges:
    """The same rows in ascending order, neighbours joined."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def _features(used: Mapping[str, tuple[_Weight, set[Ranges]]], lengths: set[int]) -> frozenset[str]:
    """What the table makes use of.

    Raises:
        EmitError: Two blocks that are not the same share rows.
    """
    features = set()
    if len(lengths) > 1:
        features.add("gaps")
    for weight, blocks in used.values():
        if weight.axis:
            features.add("axis")
        if weight.bias is not None:
            features.add("bias")
        if any(len(ranges) > 1 for ranges in blocks):
            features.add("pieces")
        end = 0
        for start, stop in sorted(piece for ranges in blocks for piece in ranges):
            if start < end:
                raise EmitError(f"row {start} of {weight.name!r} is in two blocks, so it has no one learning rate")
            if start > end:
                features.add("gaps")
            end = stop
        if end < weight.shape[weight.axis]:
            features.add("gaps")
    return frozenset(features)


_NUMBER = re.compile(r"(?<!\d)(?:0|[1-9]\d*)(?!\d)")


def _template(name: str, numbers: list[int]) -> str:
    """A name for `str.format` in which every number is a field; the numbers are appended to `numbers`."""

    def take(match: re.Match[str]) -> str:
        numbers.append(int(match[0]))
        return f"{{{len(numbers) - 1}}}"

    # Twice the braces: one pair less after str.format, and then the f-string in the emitted file takes the other.
    return _NUMBER.sub(take, name.replace("{", "{{{{").replace("}", "}}}}"))


# ---- one entry: loops over layers, weights, loops over heads ---------------------------------------------------------


_Row = tuple[int, ...]
"""The numbers that fill the fields in the names of one site."""


def _entry(site: _Site, numbers: list[_Row]) -> list[str]:
    """The lines for all sites that share a plan.

    Arguments:
        site: The plan.
        numbers: The rows of numbers of these sites, in ascending order.
    """
    count = f"{len(numbers)} x " if len(numbers) > 1 else ""
    lines = [f"{INDENT}# {count}{site.title}"]
    for part in _parts(numbers):
        fields, headers = _layer_loops(part)
        lines += headers
        depth = 1 + sum(header.endswith(":") for header in headers)
        names = _weight_names(site)
        lines += _weight_lines(depth, site, names, fields)
        lines += _head_lines(depth, site, names)
    return lines


def _parts(rows: list[_Row]) -> list[list[_Row]]:
    """Split rows of numbers into few parts that nested loops can run through; one part if it would take many.

    A part has one number, or one difference of two numbers, in common: layers that read the keys of layer 19, layers
    that read those of the layer below.
    """
    left, parts = rows, []
    while left:
        best = max(filter(_is_grid, _candidates(left)), key=len)
        parts.append(best)
        left = [row for row in left if row not in set(best)]
    return sorted(parts) if len(parts) <= max(2, len(rows) // 4) else [rows]


def _candidates(rows: list[_Row]) -> Iterator[list[_Row]]:
    """Subsets of the rows that may be grids; one of them is."""
    yield rows
    yield rows[:1]
    columns = range(len(rows[0]))
    for a in columns:
        same_rest: dict[tuple[_Row, ...], list[_Row]] = {}
        for value in sorted({row[a] for row in rows}):
            same = [row for row in rows if row[a] == value]
            yield same
            same_rest.setdefault(tuple(row[:a] + row[a + 1 :] for row in same), []).extend(same)
        yield from same_rest.values()
    for a, b in combinations(columns, 2):
        for difference in {row[b] - row[a] for row in rows}:
            yield [row for row in rows if row[b] - row[a] == difference]


def _is_grid(rows: list[_Row]) -> bool:
    """Whether the rows are all combinations of the values in their independent columns."""
    independent, _ = _independent(rows)
    return prod(len({row[column] for row in rows}) for column in independent) == len(rows)


def _independent(rows: list[_Row]) -> tuple[list[int], dict[int, tuple[int | None, int]]]:
    """Columns that vary by themselves, and each column as (independent column or None, plus a constant)."""
    independent: list[int] = []
    meaning: dict[int, tuple[int | None, int]] = {}
    for column in range(len(rows[0])):
        offsets = {row[column] for row in rows}
        if len(offsets) == 1:
            meaning[column] = (None, offsets.pop())
            continue
        for other in independent:
            offsets = {row[column] - row[other] for row in rows}
            if len(offsets) == 1:
                meaning[column] = (other, offsets.pop())
                break
        else:
            independent.append(column)
            meaning[column] = (column, 0)
    return independent, meaning


def _layer_loops(rows: list[_Row]) -> tuple[list[str], list[str]]:
    """Text for every field of the names, and the `for` lines around the entry, one level of indentation each."""
    independent, meaning = _independent(rows)
    letters = {column: _LAYERS[n] if n < len(_LAYERS) else f"i{n}" for n, column in enumerate(independent)}
    fields = []
    for column in range(len(rows[0])):
        base, constant = meaning[column]
        fields.append(str(constant) if base is None else f"{{{linear({letters[base]: 1}, constant)}}}")
    if _is_grid(rows):
        lines = []
        for depth, column in enumerate(independent, start=1):
            lines += loop(depth, letters[column], sorted({row[column] for row in rows}))
        return fields, lines
    tuples = [str(tuple(row[column] for column in independent)) for row in rows]
    return fields, bracketed(1, f"for {', '.join(letters.values())} in [", tuples, "]:")


def _weight_names(site: _Site) -> list[str]:
    """A variable for every weight, after the module that holds it."""
    taken = set(_RESERVED)
    names: list[str] = []
    for weight in site.weights:
        parts = [part for part in re.sub(r"\{+\d*\}+", "", weight.name).split(".") if part.strip("_")]
        if len(parts) > 1 and parts[-1] == "weight":
            parts.pop()
        parts = [re.sub(r"\W+", "_", part) for part in parts] or ["weight"]
        name = parts.pop().removesuffix("_weight").strip("_") or "weight"
        while (name in taken or not name.isidentifier()) and parts:
            name = f"{parts.pop()}_{name}"
        if name in taken or not name.isidentifier():
            name = f"w_{name}" if f"w_{name}".isidentifier() else "weight"
        unique, n = name, 2
        while unique in taken:
            unique, n = f"{name}_{n}", n + 1
        taken.add(unique)
        names.append(unique)
    return names


def _weight_lines(depth: int, site: _Site, names: list[str], fields: list[str]) -> list[str]:
    """`at = ...` and one assignment for every weight."""
    texts = [(weight.name.format(*fields), weight.bias and weight.bias.format(*fields)) for weight in site.weights]
    everything = [name for pair in texts for name in pair if name]
    prefix = _common_prefix(everything)
    lines = []
    if len(everything) > 1 and (len(prefix) > 12 or "{" in prefix):
        lines.append(f"{INDENT * depth}at = {_string(prefix)}")
    else:
        prefix = ""
    for variable, weight, (name, bias) in zip(names, site.weights, texts, strict=True):
        arguments = [_string(name, prefix), f"({', '.join(map(str, weight.shape))}{',' * (len(weight.shape) == 1)})"]
        if weight.axis:
            arguments.append(f"axis={weight.axis}")
        if bias:
            arguments.append(f"bias={_string(bias, prefix)}")
        lines += bracketed(depth, f"{variable} = Weight(", arguments, ")")
    return lines


def _common_prefix(names: Sequence[str]) -> str:
    """The module path that all names start with."""
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _string(text: str, prefix: str = "") -> str:
    """A name as a string literal, by way of `at` where it starts with the prefix."""
    if prefix:
        return quoted("{at}" + text.removeprefix(prefix), fields=True)
    fields = re.search(r"(?<!\{)(?:\{\{)*\{(?!\{)", text) is not None
    return quoted(text if fields else text.replace("{{", "{").replace("}}", "}"), fields)


# ---- heads -----------------------------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """Where a block's pieces lie for each of several heads: start and stop of every piece as expressions."""

    pieces: tuple[tuple[str, str], ...]
    uses_head: bool
    uses_group: bool

    def __str__(self) -> str:
        return ", ".join(slice_of(*piece) for piece in self.pieces)


def _head_lines(depth: int, site: _Site, names: list[str]) -> list[str]:
    """The loops over heads, one for each set of heads that has the same terms."""
    lines = []
    patterns: dict[tuple[int, ...], list[int]] = {}
    for head in range(len(site.head_map)):
        terms = tuple(t for t, term in enumerate(site.terms) if all(site.blocks[b].heads[head] for b in term))
        patterns.setdefault(terms, []).append(head)
    for terms, heads in patterns.items():
        if terms:
            lines += _head_loop(depth, site, names, [site.terms[t] for t in terms], heads)
    return lines


def _head_loop(depth: int, site: _Site, names: list[str], terms: list[tuple[int, ...]], heads: list[int]) -> list[str]:
    """The products of some heads that have the same terms."""
    used = sorted({b for term in terms for b in term})
    group, groups = _key_head(heads, [site.head_map[h] for h in heads])
    rules = {b: _rule([site.blocks[b].heads[h] for h in heads], heads, groups) for b in used}
    if any(rule is None for rule in rules.values()):
        # No rule: every head by itself, its rows as plain numbers.
        return [line for head in heads for line in _head_loop(depth, site, names, terms, [head])]
    known = {b: rule for b, rule in rules.items() if rule is not None}
    slices = {b: f"{names[site.blocks[b].weight]}[{rule}]" for b, rule in known.items()}
    varies = any(rule.uses_head or rule.uses_group for rule in known.values())
    inner = depth + varies

    lines = []
    if varies:
        lines += loop(depth, "h", heads)
    if any(rule.uses_group for rule in known.values()):
        lines.append(f"{INDENT * inner}g = {group}  # the key head that query head h reads")
    inline = f"{INDENT * inner}yield {', '.join(slices[b] for b in terms[0])}"
    if len(terms) == 1 and len(terms[0]) == 2 and len(inline) <= WIDTH:
        return [*lines, inline]
    variables = _block_names(site, used, names)
    fixed = [b for b in used if not (known[b].uses_head or known[b].uses_group)]
    before = [f"{INDENT * depth}{variables[b]} = {slices[b]}" for b in fixed]
    lines = [*before, *lines]
    lines += [f"{INDENT * inner}{variables[b]} = {slices[b]}" for b in used if b not in fixed]
    for term in terms:
        comment = _COMMENTS.get(frozenset(site.blocks[b].role for b in term) - {"dq"}, "")
        lines.append(f"{INDENT * inner}yield {', '.join(variables[b] for b in term)}{comment}")
    return lines


def _block_names(site: _Site, used: list[int], weight_names: list[str]) -> dict[int, str]:
    """A variable for every block: its role, or its weight where the role says nothing."""
    names: dict[int, str] = {}
    for b in used:
        block = site.blocks[b]
        name = block.role if block.role != "other" else weight_names[block.weight]
        if name in weight_names:
            name = f"{name}_rows"
        unique, n = name, 2
        while unique in names.values() or unique in weight_names:
            unique, n = f"{name}{n}", n + 1
        names[b] = unique
    return names


def _key_head(heads: list[int], keys: list[int]) -> tuple[str, list[int]]:
    """The key heads of some query heads as an expression in `h`, and as numbers."""
    if len(set(keys)) == 1:
        return str(keys[0]), keys
    ratio = next((n for n in range(1, len(heads) + 1) if all(k == h // n for h, k in zip(heads, keys, strict=True))), 0)
    if ratio:
        return f"h // {ratio}", keys
    modulus = max(keys) + 1
    if all(k == h % modulus for h, k in zip(heads, keys, strict=True)):
        return f"h % {modulus}", keys
    table = dict(zip(heads, keys, strict=True))
    return (f"{tuple(keys)}[h]" if heads == list(range(len(heads))) else f"{table}[h]"), keys


def _rule(ranges: list[Ranges], heads: list[int], groups: list[int]) -> _Rule | None:
    """The rows of every head as expressions in `h` and `g`, or None where they follow no linear rule."""
    if len({tuple(stop - start for start, stop in pieces) for pieces in ranges}) > 1:
        return None
    pieces, by_head, by_group = [], False, False
    for p, (start, stop) in enumerate(ranges[0]):
        fit = _fit_line([pieces_of_head[p][0] for pieces_of_head in ranges], heads, groups)
        if fit is None:
            return None
        h, g, constant = fit
        terms = {"h": h, "g": g}
        pieces.append((linear(terms, constant), linear(terms, constant + stop - start)))
        by_head, by_group = by_head or h != 0, by_group or g != 0
    return _Rule(tuple(pieces), by_head, by_group)


def _fit_line(values: list[int], heads: list[int], groups: list[int]) -> tuple[int, int, int] | None:
    """Integers (a, b, c) with values = a * heads + b * groups + c, the simplest there are, or None."""
    if len(set(values)) == 1:
        return 0, 0, values[0]
    for a in (_slope(values, heads), 0, _slope_within(values, heads, groups)):
        if a is None:
            continue
        rest = [value - a * head for value, head in zip(values, heads, strict=True)]
        b = 0 if len(set(rest)) == 1 else _slope(rest, groups)
        if b is None:
            continue
        rest = [value - b * group for value, group in zip(rest, groups, strict=True)]
        if len(set(rest)) == 1:
            return a, b, rest[0]
    return None


def _slope(values: Sequence[int], at: Sequence[int]) -> int | None:
    """Slope between the first point and the next one elsewhere, if it is whole."""
    for value, x in zip(values, at, strict=True):
        if x != at[0]:
            slope, remainder = divmod(value - values[0], x - at[0])
            return None if remainder else slope
    return None


def _slope_within(values: Sequence[int], heads: Sequence[int], groups: Sequence[int]) -> int | None:
    """Slope along the heads of the first group."""
    first = [(value, head) for value, head, group in zip(values, heads, groups, strict=True) if group == groups[0]]
    return _slope(*zip(*first, strict=True)) if len(first) > 1 else None
