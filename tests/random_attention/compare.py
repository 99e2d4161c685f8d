"""What was found against what is true.

In: an `Expected` and a `QKLayout`. Out: the differences, each as a sort ("rows", "missing", "refused:<code>") and a
sentence; none where all is right.

Heads are compared as what they multiply: for each query head the set of its terms, each a set of (side, parameter,
axis, rows, bias, role). Their numbers do not count, nor does the order of blocks. Sites with one head each that a loop
over heads makes are taken together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from quack_fx.layout import AttentionSite, Norm, QKLayout, WeightBlock

from .truth import Expected, Truth

Factor = tuple[str, str, object, object, object]
Head = frozenset[tuple[tuple[Factor, ...], tuple[Factor, ...]]]


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it should be."""

    sort: str
    text: str


def differences(expected: Expected, found: QKLayout, shapes: dict[str, tuple[int, ...]]) -> list[Difference]:
    """All differences.

    Arguments:
        expected: The truth.
        found: The layout to judge.
        shapes: Shape of every parameter: rows that are all of it are the same along any axis.
    """
    left = list(found.sites)
    loops = {truth.name for truth in expected.sites if truth.loops}
    if loops:
        left = [s for s in left if not {s.name, None} & loops] + _merged([s for s in left if {s.name, None} & loops])
    result: list[Difference] = []
    for truth in expected.sites:
        queries = {link.param for kind in truth.query for head in kind for place in head for p in place for link in p}
        near = sorted(left, key=lambda s: len(queries & {b.param for b in s.query}), reverse=True)
        near = [s for s in near if queries & {b.param for b in s.query}]
        if not near:
            own = [s for s in found.skipped if not any(s.name.startswith(skip) for skip in expected.skips)]
            here = [s for s in own if truth.name is None or s.name == truth.name] or own
            sort = f"refused:{here[0].code}" if here else "missing"
            if not here or not truth.may_refuse:
                result.append(Difference(sort, f"{truth.name!r}: {here[0].reason if here else 'no site'}"))
            continue
        results = [(_compare(truth, s, shapes), s) for s in near]
        best = min(results, key=lambda r: len(r[0]))
        left.remove(best[1])
        result.extend(best[0])
    result.extend(Difference("false site", f"{s.name!r}: {[b.param for _, b in s.blocks()]}") for s in left)
    if not result:
        result.extend(
            Difference(f"false skip:{s.code}", f"{s.name!r}: {s.reason}")
            for s in found.skipped
            if not any(s.name.startswith(skip) for skip in expected.skips)
            and not any(t.may_refuse for t in expected.sites)
            and not (s.code == "additive-attention" and any("pooling" in t.unchecked for t in expected.sites))
        )
    return result


def _merged(sites: list[AttentionSite]) -> list[AttentionSite]:
    """Sites of one module whose heads are apart, as one site."""
    merged: dict[str, AttentionSite] = {}
    for site in sites:
        known = merged.get(site.name)
        if known is None:
            merged[site.name] = site
            continue
        nq, nk = known.query_heads, known.key_heads
        merged[site.name] = replace(
            known,
            query_heads=nq + site.query_heads,
            key_heads=nk + site.key_heads,
            head_map=known.head_map + tuple(nk + k for k in site.head_map),
            query=_padded(known.query, 0, site.query_heads) + _padded(site.query, nq, 0),
            key=_padded(known.key, 0, site.key_heads) + _padded(site.key, nk, 0),
            terms=known.terms
            + tuple(
                replace(
                    t,
                    query=tuple(i + len(known.query) for i in t.query),
                    key=tuple(i + len(known.key) for i in t.key),
                )
                for t in site.terms
            ),
        )
    return list(merged.values())


def _padded(blocks: tuple[WeightBlock, ...], before: int, after: int) -> tuple[WeightBlock, ...]:
    return tuple(replace(b, heads=((),) * before + b.heads + ((),) * after) for b in blocks)


def _compare(truth: Truth, found: AttentionSite, shapes: dict[str, tuple[int, ...]]) -> list[Difference]:
    result: list[Difference] = []
    where = f"{truth.name!r}: "
    site = truth.site()
    skip = truth.unchecked | (frozenset({"kind", "key heads", "calls"}) if truth.loops else frozenset())
    for level in ("rows", "roles", "biases"):
        if level in skip:
            continue
        want = _heads(site, shapes, level)
        have = _heads(found, shapes, level)
        if want != have:
            sort = _blame(want, have) if level == "rows" else level
            missing, extra = list((want - have).elements()), list((have - want).elements())
            text = f"{len(missing)} of {len(site.head_map)} heads; wanted {_spell(missing[:1])}; "
            result.append(Difference(sort, f"{where}{text}found {_spell(extra[:1])}"))
            break
    if not result and "key heads" not in skip and _sharing(site, shapes) != _sharing(found, shapes):
        result.append(Difference("head map", f"{where}{found.head_map}, not {truth.head_map}"))
    fields: list[tuple[str, object, object]] = [
        ("cross", truth.cross, found.cross),
        ("calls", truth.calls, found.calls),
        ("head dim", site.head_dim, found.head_dim),
        ("norms", _norms(truth.norms), _norms(found.qk_norm)),
        ("latent norms", _norms(truth.latent_norms), _norms(found.latent_norm)),
    ]
    if truth.kind is not None:
        fields.append(("kind", truth.kind, found.kind))
    if truth.name is not None:
        fields.append(("name", truth.name, found.name))
    if truth.scale is not None and found.logit_scale is not None:
        fields.append(("scale", f"{truth.scale:.5g}", f"{found.logit_scale:.5g}"))
    for name, want_value, have_value in fields:
        if name not in skip and want_value != have_value:
            result.append(Difference(name, f"{where}{name} is {have_value!r}, not {want_value!r}"))
    return result


def _heads(site: AttentionSite, shapes: dict[str, tuple[int, ...]], level: str) -> Counter[Head]:
    """Terms of every head, as values that can be compared."""
    heads: Counter[Head] = Counter()
    for h in range(site.query_heads):
        terms = set()
        for term in site.terms:
            sides = []
            for numbers, blocks, own in ((term.query, site.query, h), (term.key, site.key, site.head_map[h])):
                sides.append(tuple(sorted((_factor(blocks[i], own, shapes, level) for i in numbers), key=repr)))
            if all(f[3] for side in sides for f in side):
                terms.add((sides[0], sides[1]))
        heads[frozenset(terms)] += 1
    return heads


def _factor(block: WeightBlock, head: int, shapes: dict[str, tuple[int, ...]], level: str) -> Factor:
    rows = frozenset(i for start, stop in block.heads[head] for i in range(start, stop))
    whole = bool(rows) and len(rows) == shapes[block.param][block.axis]
    role = block.role if level == "roles" else None
    bias = block.bias if level == "biases" else None
    spelled = "all" if whole else tuple(sorted(rows))
    return (block.param, "" if whole else str(block.axis), role, spelled, bias)  # type: ignore[return-value]


def _blame(want: Counter[Head], have: Counter[Head]) -> str:
    """Whether rows are wrong, or a parameter is missing or too many."""

    def names(heads: Counter[Head]) -> set[tuple[int, str]]:
        return {(i, f[0]) for head in heads for term in head for i, side in enumerate(term) for f in side}

    lost, more = names(want) - names(have), names(have) - names(want)
    if lost:
        return "lost parameter"
    if more:
        return "extra parameter"
    same_rows = Counter({_flat(h): n for h, n in want.items()}) == Counter({_flat(h): n for h, n in have.items()})
    return "terms" if same_rows else "rows"


def _flat(head: Head) -> frozenset[tuple[int, Factor]]:
    return frozenset((i, f) for term in head for i, side in enumerate(term) for f in side)


def _sharing(site: AttentionSite, shapes: dict[str, tuple[int, ...]]) -> object:
    """Which query heads share a key head."""
    groups: dict[int, list[str]] = {}
    for h, k in enumerate(site.head_map):
        own = sorted({repr(_factor(b, h, shapes, "rows")) for b in site.query if b.heads[h]})
        groups.setdefault(k, []).append(repr(own))
    return sorted(tuple(sorted(g)) for g in groups.values())


def _norms(norms: tuple[Norm, ...]) -> list[tuple[str, str, object]]:
    # The statistics of a batch norm run over tokens too: what its width is, is a matter of taste.
    return sorted({(n.side, n.kind, 0 if n.kind == "batch" else n.width) for n in norms})


def _spell(heads: list[Head]) -> str:
    return " + ".join(
        " x ".join(
            " ".join(
                f"{f[0]}{list(f[3]) if f[3] != 'all' else ''}{f[2] or ''}{'+' + str(f[4]) if f[4] else ''}"
                for f in side
            )
            for side in term
        )  # type: ignore[call-overload]
        for head in heads
        for term in sorted(head, key=repr)
    )
