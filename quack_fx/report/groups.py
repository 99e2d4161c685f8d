"""The short texts of all reports: equal layers as one group, rows of heads as a formula.

In: sites and names of a layout. Out: `Group`s with names such as "model.layers.{0..125}.self_attn", and rows such as
"128h:128h+128": head h has the rows from 128 h up to, but not including, 128 h + 128.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from quack_fx.layout import AttentionSite, Norm, Ranges, Side, WeightBlock, merged, renamed
from quack_fx.layout.pattern import joined_name, map_pattern, row_pattern, split_name

Indices = tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Group:
    """Sites that are equal except for the numbers in their names, which the common name has in braces."""

    name: str
    sites: tuple[AttentionSite, ...]

    @property
    def first(self) -> AttentionSite:
        """The first site, which reports show."""
        return self.sites[0]

    @property
    def remarks(self) -> list[str]:
        """Remarks, if they apply: the number of sites, cross-attention, several calls."""
        several = [f"x{len(self.sites)}"] if len(self.sites) > 1 else []
        return several + ["cross"] * self.first.cross + [f"{self.first.calls} calls"] * (self.first.calls > 1)


def group_sites(sites: Sequence[AttentionSite]) -> list[Group]:
    """Groups of equal sites, in the order of their first site."""
    alike: dict[Any, list[AttentionSite]] = {}
    for site in sites:
        alike.setdefault(_relative(site), []).append(site)
    groups = []
    for members in alike.values():
        # Two attentions of one module share a name.
        named: dict[str, list[AttentionSite]] = {}
        for site in members:
            named.setdefault(site.name, []).append(site)
        for pattern, names in group_names(named):
            groups.append(Group(pattern, tuple(site for name in names for site in named[name])))
    order = {id(site): i for i, site in enumerate(sites)}
    return sorted(groups, key=lambda g: order[id(g.first)])


def group_names(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Group names that differ only in numbers, as one pattern if the numbers form a full grid.

    Example:
        >>> group_names(["h.0.q", "h.1.q", "h.2.q", "head"])
        [('h.{0..2}.q', ['h.0.q', 'h.1.q', 'h.2.q']), ('head', ['head'])]
    """
    alike: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name in dict.fromkeys(names):
        texts, numbers = split_name(name)
        alike.setdefault(texts, []).append(numbers)
    result = []
    for texts, indices in alike.items():
        for grid in _grids(indices):
            members = [i for i in indices if all(n in allowed for n, allowed in zip(i, grid, strict=True))]
            pattern = joined_name(texts, map(_braces, grid))
            result.append((pattern or "(root)", [joined_name(texts, i) for i in members]))
    return result


def by_reason(entries: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """Group (name, reason) pairs by reason; each comes with its names as from `group_names`."""
    reasons: dict[str, list[str]] = {}
    for name, reason in entries:
        reasons.setdefault(reason, []).append(name)
    return ((reason, group_names(names)) for reason, names in reasons.items())


def _grids(indices: Sequence[tuple[int, ...]]) -> list[Indices]:
    """Index tuples merged into few full grids, along one axis at a time, the last one first."""
    grids: list[Indices] = [tuple(frozenset((n,)) for n in i) for i in indices]
    for axis in reversed(range(len(indices[0]))):
        merged: dict[tuple[Any, ...], frozenset[int]] = {}
        for grid in grids:
            rest = grid[:axis] + grid[axis + 1 :]
            merged[rest] = merged.get(rest, frozenset()) | grid[axis]
        grids = [(*rest[:axis], values, *rest[axis:]) for rest, values in merged.items()]
    return grids


def _braces(values: frozenset[int]) -> str:
    """Numbers in shell notation: 3, {0..125}, {0..10..2}, {0..2,7}."""
    numbers = sorted(values)
    if len(numbers) == 1:
        return str(numbers[0])
    steps = {b - a for a, b in pairwise(numbers)}
    if len(steps) == 1 and len(numbers) > 2:
        step = steps.pop()
        return f"{{{numbers[0]}..{numbers[-1]}}}" if step == 1 else f"{{{numbers[0]}..{numbers[-1]}..{step}}}"
    runs = merged((n, n + 1) for n in numbers)
    return "{" + ",".join(str(a) if b == a + 1 else f"{a}..{b - 1}" for a, b in runs) + "}"


def _relative(site: AttentionSite) -> AttentionSite:
    """A site with names relative to its own, so that equal layers become equal."""
    relative = renamed(site, lambda name: local_name(name, site.name))
    return replace(relative, name="".join(split_name(site.name)[0]))


def local_name(name: str, site: str) -> str:
    """A name relative to a site: without the site's prefix, or with layer numbers relative to the site's.

    Example:
        >>> local_name("layers.3.attn.q.weight", "layers.3.attn"), local_name("layers.2.kv.weight", "layers.3.attn")
        ('q.weight', 'layers.{i-1}.kv.weight')
    """
    if site and name.startswith(site + "."):
        return name[len(site) + 1 :]
    parts, own = name.split("."), site.split(".")
    for i, (part, ours) in enumerate(zip(list(parts), own, strict=False)):
        if part.isdecimal() and ours.isdecimal():
            distance = int(part) - int(ours)
            parts[i] = "{i}" if not distance else f"{{i{distance:+d}}}"
            if distance:
                break
        elif part != ours:
            break
    return ".".join(parts)


# ---- rows ------------------------------------------------------------------------------------------------------------


def rows_text(heads: Sequence[Ranges], letter: str = "h") -> str:
    """Rows of all heads as one formula in the head index.

    Example:
        >>> rows_text([((0, 64),), ((64, 128),), ((128, 192),)])
        '64h:64h+64'
        >>> rows_text([((0, 512),), ((0, 512),)])
        '0:512, every head'
    """
    used = [i for i, ranges in enumerate(heads) if ranges]
    if not used:
        return "none"
    if len(used) < len(heads):
        only = f"head {used[0]} only" if len(used) == 1 else f"heads {_braces(frozenset(used)).strip('{}')} only"
        if len({heads[i] for i in used}) == 1:
            return f"{_slices(heads[used[0]])}, {only}"
        return f"{rows_text([heads[i] for i in used], 'i')} for the i-th of {only.removesuffix(' only')}"
    if len(set(heads)) == 1:
        return _slices(heads[0]) + (", every head" if len(heads) > 1 else "")
    pattern = row_pattern(heads)
    if pattern is None:
        shown = "; ".join(_slices(ranges) for ranges in heads[:3])
        return shown + (f"; … ({len(heads)} heads)" if len(heads) > 3 else "")
    *outer, (size, step) = pattern.loops
    factor = f"{_times(step)}{letter}"
    if outer:
        within = f" + {_times(step)}({letter}%{size})" if step else ""
        factor = f"{_times(outer[0][1])}({letter}//{size}){within}"
    ranges = _collapse(tuple((pattern.first + a, pattern.first + b) for a, b in pattern.ranges))
    return ", ".join(f"{factor}{_plus(a)}:{factor}{_plus(b)}{step}" for a, b, step in ranges)


def _times(n: int) -> str:
    return f"{n}" if n != 1 else ""


def _plus(n: int) -> str:
    return f"+{n}" if n else ""


def _slices(ranges: Ranges) -> str:
    return ", ".join(f"{a}:{b}{step}" for a, b, step in _collapse(ranges))


def _collapse(ranges: Ranges) -> list[tuple[int, int, str]]:
    """Ranges as slices; equally spaced single rows (interleaved heads) become one slice with a step."""
    widths = {b - a for a, b in ranges}
    steps = {b[0] - a[0] for a, b in pairwise(ranges)}
    if len(ranges) > 2 and widths == {1} and len(steps) == 1 and (step := steps.pop()) > 0:
        return [(ranges[0][0], ranges[-1][0] + 1, f":{step}")]
    return [(a, b, "") for a, b in ranges]


def total_rows(block: WeightBlock) -> Ranges:
    """The rows of all heads of a block as disjoint ranges in order."""
    return merged(r for ranges in block.heads for r in ranges)


# ---- other properties of a site --------------------------------------------------------------------------------------


def kind_text(site: AttentionSite) -> str:
    """ "GQA 128/8": kind, query heads and, if their number differs, key heads."""
    kind = "Attention" if site.kind == "other" else site.kind.upper()
    heads = str(site.query_heads)
    return f"{kind} {heads}" if site.query_heads == site.key_heads else f"{kind} {heads}/{site.key_heads}"


def scale_text(site: AttentionSite) -> str:
    """ "1/√128" if the scale has this form, else the number."""
    scale = site.logit_scale
    if scale is None:
        return "not a number"
    if scale > 0 and abs(scale**-2 - round(scale**-2)) < 1e-5 and 1 < round(scale**-2) < 1e6:
        return f"1/√{round(scale**-2)}"
    return f"{scale:.4g}"


def norms(site: AttentionSite) -> tuple[tuple[str, tuple[Norm, ...]], ...]:
    """The norms of a site by what they are called."""
    return ("QK norm", site.qk_norm), ("latent norm", site.latent_norm)


def norms_text(norms: Sequence[Norm]) -> str:
    """ "rms 128 (q, k)": kind, width and sides."""
    sides: dict[tuple[str, int], list[str]] = {}
    for norm in norms:
        sides.setdefault((norm.kind, norm.width), []).append(norm.side[0])
    return "; ".join(f"{kind} {width} ({', '.join(dict.fromkeys(s))})" for (kind, width), s in sides.items()) or "none"


def map_text(site: AttentionSite) -> str:
    """Which key head each query head reads, as a formula if there is one."""
    n, k, heads = site.query_heads, site.key_heads, site.head_map
    pattern = map_pattern(heads, k)
    if pattern == "own":
        return "query head h reads key head h"
    if k == 1:
        return "all query heads read the one key head"
    if pattern is not None:
        return f"query head h reads key head h{f'//{n // k}' if pattern == 'blocks' else f'%{k}'}"
    return "query heads read key heads " + ", ".join(map(str, heads[:12])) + (", …" if n > 12 else "")


def chains(site: AttentionSite) -> list[dict[Side, list[WeightBlock]]]:
    """The blocks of each term of a site, by side, from the logits outwards."""
    return [{"query": [site.query[i] for i in t.query], "key": [site.key[i] for i in t.key]} for t in site.terms]


def key_letter(site: AttentionSite) -> str:
    """Letter for the index of a key head: h if it equals that of the query head, else g."""
    return "h" if site.head_map == tuple(range(site.key_heads)) else "g"


def block_rows(site: AttentionSite, side: Side, block: WeightBlock) -> str:
    """Rows of all heads of a block of a site, as text."""
    return rows_text(block.heads, "h" if side == "query" else key_letter(site))


def weights(site: AttentionSite) -> Iterator[tuple[Side, str, str, str]]:
    """Side, label, parameter and rows of each block of a site, as tables show them."""
    names = labels(site)
    for side, block in site.blocks():
        rows = block_rows(site, side, block) + ("" if block.axis == 0 else f" (axis {block.axis})")
        yield side, names[id(block)], local_name(block.param, site.name), rows


def labels(site: AttentionSite) -> dict[int, str]:
    """A short name for each block, by `id`: its role, numbered if several blocks have it."""
    blocks = [b for _, b in site.blocks()]
    seen: dict[str, int] = {}
    names = {}
    for block in blocks:
        role = "w" if block.role == "other" else block.role
        seen[role] = seen.get(role, 0) + 1
        names[id(block)] = f"{role}{seen[role]}" if sum(b.role == block.role for b in blocks) > 1 else role
    return names


def per_head(block: WeightBlock) -> bool:
    """Whether the rows of a block depend on the head; True if there is one head."""
    return len(set(block.heads)) > 1 or len(block.heads) == 1


def rule_texts(site: AttentionSite) -> list[tuple[str, str]]:
    """The learning-rate factor of each block: the minimum, over its terms, of 1 / (product of the other norms).

    Returns:
        Pairs of a block's label and its factor, such as ("uq_h", "1 / (‖dq‖ ‖uk_h‖ ‖dkv‖)").
    """
    names = labels(site)
    letters = {
        id(b): ("h" if side == "query" else key_letter(site)) if per_head(b) else "" for side, b in site.blocks()
    }
    shown = {i: f"{name}_{letters[i]}" if letters[i] else name for i, name in names.items()}
    rules = []
    for _, block in site.blocks():
        options = []
        for chain in chains(site):
            product = [*chain["query"], *chain["key"]]
            if (mine := next((i for i, b in enumerate(product) if b is block), None)) is not None:
                others = [b for i, b in enumerate(product) if i != mine]
                # a block that several query heads share follows the largest of them
                largest = "max_h " if letters[id(block)] != "h" and any(letters[id(b)] == "h" for b in others) else ""
                options.append((largest, " ".join(f"‖{shown[id(b)]}‖" for b in others), len(others)))
        texts = [f"1 / {m}{t}" if n == 1 else f"1 / {m}({t})" for m, t, n in dict.fromkeys(options)]
        if texts:
            rules.append((shown[id(block)], texts[0] if len(texts) == 1 else f"min({', '.join(texts)})"))
    return rules
