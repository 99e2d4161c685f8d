"""USER: the lines of the table for all sites of one kind: loops over layers, their weights, loops over heads.

In: a `Plan`, which is a site with the numbers taken out of its names, and those numbers for every such site. Out: lines
of a generator that yields the products of rows.
"""

from __future__ import annotations

import builtins
import keyword
import re
from dataclasses import dataclass
from typing import NamedTuple

from quack_fx.emit.heads import key_head, rule_of
from quack_fx.emit.layers import VARIABLES, Row, loops, parts
from quack_fx.emit.source import loop
from quack_fx.layout import Ranges
from quack_fx.train.program.names import common_prefix, variable_names
from quack_fx.train.program.text import INDENT, WIDTH, bracketed, quoted

_COMMENTS = {frozenset({"uq", "uk", "dkv"}): "  # content", frozenset({"qr", "kr"}): "  # position"}
_RESERVED = {"at", "g", "h", "Weight", "Block", *VARIABLES, *keyword.kwlist, *dir(builtins)}


class PlanWeight(NamedTuple):
    """What one line of the table says of a weight."""

    name: str
    shape: tuple[int, ...]
    axis: int
    bias: str | None


class PlanBlock(NamedTuple):
    """One block of a site: its weight by number, and for every *query* head the rows that the head reads."""

    weight: int
    role: str
    heads: tuple[Ranges, ...]


@dataclass(frozen=True)
class Plan:
    """A site with the numbers in its names taken out; sites that are equal then share a loop."""

    title: str
    weights: tuple[PlanWeight, ...]
    blocks: tuple[PlanBlock, ...]
    terms: tuple[tuple[int, ...], ...]
    head_map: tuple[int, ...]


def write_entry(site: Plan, numbers: list[Row]) -> list[str]:
    """The lines for all sites that share a plan.

    Arguments:
        site: The plan.
        numbers: The rows of numbers of these sites, in ascending order.
    """
    count = f"{len(numbers)} x " if len(numbers) > 1 else ""
    lines = [f"{INDENT}# {count}{site.title}"]
    for part in parts(numbers):
        fields, headers = loops(part)
        lines += headers
        depth = 1 + sum(header.endswith(":") for header in headers)
        names = variable_names([weight.name.format(*fields) for weight in site.weights], _RESERVED)
        lines += _weight_lines(depth, site, names, fields)
        lines += _head_lines(depth, site, names)
    return lines


def _weight_lines(depth: int, site: Plan, names: list[str], fields: list[str]) -> list[str]:
    """`at = ...` and one assignment for every weight."""
    texts = [(weight.name.format(*fields), weight.bias and weight.bias.format(*fields)) for weight in site.weights]
    everything = [name for pair in texts for name in pair if name]
    prefix = common_prefix(everything)
    lines = []
    if len(everything) > 1 and (len(prefix) > 12 or "{" in prefix):
        lines.append(f"{INDENT * depth}at = {name_literal(prefix)}")
    else:
        prefix = ""
    for variable, weight, (name, bias) in zip(names, site.weights, texts, strict=True):
        arguments = [
            name_literal(name, prefix),
            f"({', '.join(map(str, weight.shape))}{',' * (len(weight.shape) == 1)})",
        ]
        if weight.axis:
            arguments.append(f"axis={weight.axis}")
        if bias:
            arguments.append(f"bias={name_literal(bias, prefix)}")
        lines += bracketed(depth, f"{variable} = Weight(", arguments, ")")
    return lines


def name_literal(text: str, prefix: str = "") -> str:
    """A name as a string literal, by way of `at` where it starts with the prefix."""
    if prefix:
        return quoted("{at}" + text.removeprefix(prefix), fields=True)
    fields = re.search(r"(?<!\{)(?:\{\{)*\{(?!\{)", text) is not None
    return quoted(text if fields else text.replace("{{", "{").replace("}}", "}"), fields)


def _head_lines(depth: int, site: Plan, names: list[str]) -> list[str]:
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


def _head_loop(depth: int, site: Plan, names: list[str], terms: list[tuple[int, ...]], heads: list[int]) -> list[str]:
    """The products of some heads that have the same terms."""
    used = sorted({b for term in terms for b in term})
    group, groups = key_head(heads, [site.head_map[h] for h in heads])
    rules = {b: rule_of([site.blocks[b].heads[h] for h in heads], heads, groups) for b in used}
    if any(rule is None for rule in rules.values()):
        # No rule: every head by itself, its rows as plain numbers.
        return [line for head in heads for line in _head_loop(depth, site, names, terms, [head])]
    known = {b: rule for b, rule in rules.items() if rule is not None}
    weights = {b: names[site.blocks[b].weight] for b in used}
    varies = any(rule.varies for rule in known.values())
    inner = depth + varies

    lines = loop(depth, "h", heads) if varies else []
    if any(rule.uses_group for rule in known.values()):
        lines.append(f"{INDENT * inner}g = {group}  # the key head that query head h reads")
    slices = {b: f"{weights[b]}[{', '.join(rule.pieces)}]" for b, rule in known.items()}
    inline = f"{INDENT * inner}yield {', '.join(slices[b] for b in terms[0])}"
    if len(terms) == 1 and len(terms[0]) == 2 and len(inline) <= WIDTH:
        return [*lines, inline]

    variables = _block_names(site, used, names)
    before: list[str] = []
    for b in used:
        level, target = (inner, lines) if known[b].varies else (depth, before)
        target += bracketed(level, f"{variables[b]} = {weights[b]}[", known[b].pieces, "]")
    lines = [*before, *lines]
    for term in terms:
        comment = _COMMENTS.get(frozenset(site.blocks[b].role for b in term) - {"dq"}, "")
        lines.append(f"{INDENT * inner}yield {', '.join(variables[b] for b in term)}{comment}")
    return lines


def _block_names(site: Plan, used: list[int], weight_names: list[str]) -> dict[int, str]:
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
