"""What a proof on a small copy of a model implies for the model itself.

In: the layout of a model, and layout and proof of a smaller model of the same architecture. Out: a report about the
first. A proof carries over between sites of one form: they differ only in sizes and layer indices, and agree in the
parameters of each role, the arrangement of rows, terms, head maps, norms and biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from quack_fx.layout import AttentionSite, Norm, QKLayout
from quack_fx.layout.pattern import map_pattern, split_name
from quack_fx.prove.report import NotProved, SiteProof, VerifyReport

Form = tuple[Any, ...]


def carried_over(layout: QKLayout, small: QKLayout, proof: VerifyReport) -> VerifyReport:
    """The report about a model that follows from the proof of a small copy, whose layout is `small`.

    A site is proved if the copy has sites of its form and all of them are proved.
    """
    reasons = {entry.name: entry.reason for entry in proof.not_proved}
    proofs = {entry.name: entry for entry in proof.proved}
    forms: dict[Form, list[AttentionSite]] = {}
    for site in small.sites:
        forms.setdefault(form(site), []).append(site)
    proved: list[SiteProof] = []
    open_sites: list[NotProved] = []
    for site in layout.sites:
        models = forms.get(form(site), [])
        if not models:
            open_sites.append(NotProved(site.name, "the small copy has no attention of this form"))
        elif why := [reasons[m.name] for m in models if m.name in reasons]:
            open_sites.append(NotProved(site.name, f"on the small copy: {why[0]}"))
        else:
            one = proofs[models[0].name]
            proved.append(SiteProof(site.name, site.query_heads, one.attentions, one.checks))
    return VerifyReport(tuple(proved), tuple(open_sites))


def form(site: AttentionSite) -> Form:
    """A site without its sizes and layer indices; equal for sites of one form."""
    return (
        _pattern(site.name),
        site.cross,
        _map_form(site),
        tuple(
            (side, _pattern(b.param), b.role, b.axis, _pattern(b.bias), _arrangement(b.heads))
            for side, b in site.blocks()
        ),
        _order(site),
        frozenset((term.query, term.key) for term in site.terms),
        frozenset(_norm_form(norm, site) for norm in site.qk_norm),
        frozenset(_norm_form(norm, site) for norm in site.latent_norm),
    )


def _pattern(name: str | None) -> str | None:
    """A name without the indices of layers and experts."""
    return None if name is None else "#".join(split_name(name)[0])


def _map_form(site: AttentionSite) -> str:
    pattern = map_pattern(site.head_map, site.key_heads)
    if pattern == "own":
        return "each its own"
    if site.key_heads in (1, site.query_heads):
        return "one for all" if site.key_heads == 1 else "permuted"
    return {"blocks": "in blocks", "cycle": "in turn"}.get(pattern or "", "other")


def _arrangement(heads: Sequence[tuple[tuple[int, int], ...]]) -> str:
    """How the rows of the heads are arranged in the parameter."""
    used = [ranges for ranges in heads if ranges]
    some = "" if len(used) == len(heads) else "some heads, "
    if len(set(used)) <= 1:
        return some + "the same for all"
    if any(len(ranges) > 1 for ranges in used):
        return some + "in pieces"
    gaps = {later[0][0] - earlier[0][1] for earlier, later in pairwise(used)}
    return some + ("back to back" if gaps == {0} else "apart" if len(gaps) == 1 else "uneven")


def _order(site: AttentionSite) -> tuple[int, ...]:
    """Indices of the blocks, sorted by parameter and first row."""
    blocks = [block for _, block in site.blocks()]
    starts = [min((r[0] for ranges in b.heads for r in ranges), default=0) for b in blocks]
    return tuple(sorted(range(len(blocks)), key=lambda i: (_pattern(blocks[i].param), starts[i], i)))


def _norm_form(norm: Norm, site: AttentionSite) -> Form:
    widths = {
        site.head_dim: "a head",
        site.query_heads * site.head_dim: "all query heads",
        site.key_heads * site.head_dim: "all key heads",
    }
    own = widths.get(norm.width, "other")
    if norm.side == "key" and own == "all query heads" and site.query_heads == site.key_heads:
        own = "all key heads"
    return norm.side, norm.kind, own, _pattern(norm.module), _pattern(norm.weight)
