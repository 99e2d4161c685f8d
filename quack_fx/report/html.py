"""A layout as one self-contained HTML page.

In: a layout and facts about how it was found. Out: the page as a string: totals, the table of groups, and for each
group its pair graph, the rows of every head, head map, norms and QuacK's factors; then what was skipped and what never
ran. The page loads nothing and follows the reader's light or dark mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from quack_fx.layout import AttentionSite, Norm, QKLayout, Side, WeightBlock
from quack_fx.layout.fit import qk_count
from quack_fx.report import groups as g
from quack_fx.report.facts import Facts, Proof, count_text
from quack_fx.report.graph import svg
from quack_fx.report.style import document, sums

_STYLE = """
svg.graph { width: 100%; height: auto; display: block; }
.graph .edge { fill: none; stroke: var(--soft); stroke-width: 1.4; opacity: .7; }
.graph rect { fill: var(--card); stroke: var(--soft); stroke-width: 1.2; }
.graph text { fill: var(--ink); font-size: 11px; text-anchor: middle; }
.graph text.head { font-weight: 700; font-size: 12px; }
.graph .block.query rect { fill: var(--query-bg); stroke: var(--query); }
.graph .block.key rect { fill: var(--key-bg); stroke: var(--key); }
.graph .norm rect { stroke: var(--mark); stroke-dasharray: 4 3; }
.graph .logits rect { stroke: var(--ink); stroke-width: 2; }
.rows { display: grid; grid-template-columns: minmax(120px, auto) 1fr; gap: 6px 14px; align-items: center; }
.rows svg { width: 100%; height: 20px; border: 1px solid var(--line); border-radius: 4px; display: block; }
.rows .query { fill: var(--query); }
.rows .key { fill: var(--key); }
.rows .odd { opacity: .55; }
"""


def page(layout: QKLayout, facts: Facts) -> str:
    """The whole page."""
    groups = g.group_sites(layout.sites)
    about = (facts.how, *(f"{what}: {text}" for what, text in facts.notes), facts.graph)
    body = [
        f"<h1>{escape(facts.title)}</h1>",
        *(f'<p class="soft">{escape(text)}</p>' for text in about if text),
        _sums(layout, facts, len(groups)),
    ]
    if groups:
        body += [
            "<h2>Query/key pairs, one row per group of equal layers</h2>",
            _table(groups, facts.proof),
            '<p class="soft">h counts query heads, g key heads where they are fewer; rows a:b end before b.</p>',
        ]
        if normed := sum(bool(site.qk_norm) for site in layout.sites):
            body.append(
                f'<p class="soft">{normed} of {len(layout.sites)} have a QK norm; QuacK leaves them alone until it is '
                "removed (<code>quack_fx.strip_qk_norm</code>).</p>"
            )
        body += ["<h2>Each group</h2>", *(_details(group, facts, group is groups[0]) for group in groups)]
    else:
        body.append("<h2>No attention was found</h2>")
    if facts.proof is not None:
        body.append(_by_reason("Not proved", facts.proof.open.items()))
    body.append(_by_reason("Skipped", ((entry.name, f"{entry.reason} [{entry.code}]") for entry in layout.skipped)))
    body.append(_untouched(layout))
    return document(f"{facts.title}: query/key pairs", body, _STYLE)


def _sums(layout: QKLayout, facts: Facts, groups: int) -> str:
    cards = [(str(len(layout.sites)), f"attentions in {groups} group{'s' * (groups != 1)}")]
    cards.append((f"{sum(site.query_heads for site in layout.sites):,}", "query heads"))
    if facts.shapes:
        own = qk_count(layout, facts.shapes)
        share = f"query/key weights of {count_text(facts.parameters)} ({own / max(facts.parameters, 1):.1%})"
        cards.append((count_text(own), share))
    cards.append((str(len(layout.skipped)), "skipped, with reasons"))
    cards.append((f"{len(layout.untouched):,}", "parameters that never ran"))
    if facts.proof is not None:
        proved = facts.proof.proved([site.name for site in layout.sites])
        cards.append((str(proved), f"proved by gradients on {facts.proof.where}"))
    if facts.seconds:
        cards.append((f"{facts.seconds:.1f} s", "from the model to this"))
    return sums(cards)


def _table(groups: Sequence[g.Group], proof: Proof | None) -> str:
    rows = []
    for group in groups:
        site = group.first
        remarks = ", ".join(group.remarks)
        tick = "" if proof is None else f"<td>{escape(proof.text([s.name for s in group.sites]))}</td>"
        weights = "<br>".join(
            f"<span class={side}>{label}</span> {escape(param)} {escape(rows)}"
            for side, label, param, rows in g.weights(site)
        )
        rows.append(
            f"<tr>{tick}<td><code>{escape(group.name)}</code> <span class=soft>{escape(remarks)}</span></td>"
            f"<td>{escape(g.kind_text(site))}</td><td class=num>{site.head_dim}</td><td class=mono>{weights}</td>"
            f"<td>{escape(g.norms_text(site.qk_norm))}</td><td class=num>{escape(g.scale_text(site))}</td></tr>"
        )
    head = "<tr>" + "<th>Proof" * (proof is not None)
    head += "<th>Attention<th>Heads<th>Dim<th>Weights and rows of a head<th>QK norm<th>Scale</tr>"
    return f'<div class="wide frame"><table>{head}{"".join(rows)}</table></div>'


def _details(group: g.Group, facts: Facts, is_open: bool) -> str:
    site = group.first
    remarks = ", ".join([g.kind_text(site), f"head dim {site.head_dim}", *group.remarks])
    rules = "".join(
        f"<tr><td class=mono>{escape(n)}<td class=mono>{escape(rule)}</tr>" for n, rule in g.rule_texts(site)
    )
    quack = f'<div class="wide frame"><table>{rules}</table></div>'
    if site.qk_norm:
        quack = "<p>Left alone: behind a QK norm the logits do not depend on the norms of these weights.</p>"
    norms = "".join(_norm(what, norm) for what, norms in g.norms(site) for norm in norms)
    parts = [
        f"<details{' open' if is_open else ''}><summary>{escape(group.name)}",
        f"<small>{escape(remarks)}</small></summary>",
        f'<div class="wide">{svg(site)}</div>',
        f"<h3>Rows of every head, in {escape(site.name or 'the root')}</h3>{_row_maps(site, facts)}",
        f"<p class=soft>{escape(g.map_text(site))}</p>",
        f"<h3>Norms</h3><ul>{norms}</ul>" if norms else "",
        f"<h3>QuacK: learning-rate factors, each relative to its value at the start</h3>{quack}",
        "</details>",
    ]
    return "\n".join(part for part in parts if part)


def _norm(what: str, norm: Norm) -> str:
    place = f"<code>{escape(norm.module)}</code>" if norm.module else "written inline"
    gain = f", gain <code>{escape(norm.weight)}</code>" if norm.weight else ""
    return f"<li>{norm.side} side, {what}: {norm.kind} over {norm.width}, {place}{gain}"


def _row_maps(site: AttentionSite, facts: Facts) -> str:
    """A bar for each parameter that shows the rows of each head."""
    params: dict[tuple[str, int], list[tuple[Side, WeightBlock]]] = {}
    for side, block in site.blocks():
        params.setdefault((block.param, block.axis), []).append((side, block))
    strips = []
    for (param, axis), blocks in params.items():
        used = max(b for _, block in blocks for head in block.heads for _, b in head)
        shape = facts.shapes.get(param, ())
        total = max(shape[axis] if axis < len(shape) else used, used)
        bars = "".join(_bars(side, block) for side, block in blocks)
        size = f" <span class=soft>{' x '.join(map(str, shape))}</span>" if shape else ""
        strips.append(
            f"<div><code>{escape(g.local_name(param, site.name))}</code>{size}</div>"
            f'<svg viewBox="0 0 {total} 10" preserveAspectRatio="none">{bars}</svg>'
        )
    return f'<div class="rows">{"".join(strips)}</div>'


def _bars(side: Side, block: WeightBlock) -> str:
    if not g.per_head(block) or sum(map(len, block.heads)) > 2000:
        return "".join(_bar(side, a, b, "", f"{block.role}, rows {a}:{b}") for a, b in g.total_rows(block))
    return "".join(
        _bar(side, a, b, " odd" if i % 2 else "", f"{block.role} of head {i}: rows {a}:{b}")
        for i, head in enumerate(block.heads)
        for a, b in head
    )


def _bar(side: Side, a: int, b: int, odd: str, text: str) -> str:
    return f'<rect class="{side}{odd}" x="{a}" y="0" width="{b - a}" height="10"><title>{escape(text)}</title></rect>'


def _by_reason(title: str, entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(f"<li>{escape(reason)}<ul>{_names(names)}</ul>" for reason, names in g.by_reason(entries))
    return f"<h2>{title}</h2><ul>{items}</ul>" if items else ""


def _untouched(layout: QKLayout) -> str:
    if not layout.untouched:
        return ""
    remark = "The example inputs did not reach these parameters, so nothing is known about them."
    return f"<h2>Never ran</h2><p class=soft>{remark}</p><ul>{_names(g.group_names(layout.untouched))}</ul>"


def _names(groups: Iterable[tuple[str, list[str]]]) -> str:
    return "".join(
        f"<li><code>{escape(pattern)}</code>"
        + (f" <span class=soft>x{len(members)}</span>" if len(members) > 1 else "")
        for pattern, members in groups
    )
