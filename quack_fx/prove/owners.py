"""Which softmaxes of a run belong to a site.

In: a layout and the graph of a run. Out: the softmaxes of each site; `VerifyError` for an attention without a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from quack_fx.errors import VerifyError
from quack_fx.layout import AttentionSite, QKLayout
from quack_fx.prove.graph import Graph
from quack_fx.prove.ops import Softmax


def softmaxes_of(layout: QKLayout, graph: Graph) -> dict[AttentionSite, list[Softmax]]:
    """The softmaxes on which each site's claims are checked.

    A softmax belongs to the site that names its innermost running module. If the layout has several sites of that name,
    it belongs to those with both sides of a term upstream. If no site names a running module (tied layers), or a site's
    module never ran through hooks, it belongs to the sites that claim a parameter upstream of its logits.
    """
    names = {site.name for site in layout.sites}
    found: dict[AttentionSite, list[Softmax]] = {site: [] for site in layout.sites}
    for softmax in graph.softmaxes:
        if not graph.logit_products(softmax):
            continue
        inside = next((name for name in reversed(softmax.modules) if name in names), None)
        behind = graph.params_behind(softmax)
        for site in layout.sites:
            claims = {block.param for _, block in site.blocks()} & behind
            if site.name == inside:
                alone = sum(s.name == site.name for s in layout.sites) == 1
                if (claims or graph.is_attention(softmax)) if alone else _has_a_term_of(site, behind):
                    found[site].append(softmax)
            elif claims and (inside is None or site.name not in graph.tape.ran):
                found[site].append(softmax)
    # A second softmax over the same logits whose output multiplies no values only selects tokens. If a softmax depends
    # on no input (learned tokens only), its values depend on none either, and `weighs` does not see them.
    return {
        site: [s for s in of_site if graph.weighs(s) or not s.op.data] or of_site for site, of_site in found.items()
    }


def _has_a_term_of(site: AttentionSite, params: Set[str]) -> bool:
    """Whether both sides of a term have one of these parameters nearest to the logits."""
    return any(site.query[t.query[0]].param in params and site.key[t.key[0]].param in params for t in site.terms)


def check_complete(layout: QKLayout, graph: Graph, claims: Mapping[AttentionSite, Sequence[Softmax]]) -> None:
    """Refuse a layout in which an attention of the model is neither a site nor skipped."""
    known = {softmax for softmaxes in claims.values() for softmax in softmaxes}
    for softmax in graph.softmaxes:
        if softmax not in known and not is_told_of(layout, softmax) and graph.is_attention(softmax):
            where = softmax.modules[-1] if softmax.modules else ""
            raise VerifyError(
                f"an attention runs in module {where!r}, but the layout has no site for it and skips none"
            )


def is_told_of(layout: QKLayout, softmax: Softmax) -> bool:
    """Whether the layout lists as skipped this softmax's module, the module around it, or a sibling."""
    skipped = {entry.name for entry in layout.skipped}
    parents = {name.rpartition(".")[0] for name in skipped} - {""}
    return not (skipped | parents).isdisjoint(softmax.modules[-2:])
