"""A recorded run as one self-contained HTML page.

In: a run that was read, and its name. Out: the page as a string: totals, curves, the heads that grew most,
learning-rate scales over time, and a table of every head. Each picture comes with a table of its numbers. Long runs are
thinned, so that the page stays below 2 MB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from quack_fx.report.run import chart, heatmap
from quack_fx.report.run.read import LOGIT, NORM, PRODUCT, SCALE, Run, RunFile, Sample
from quack_fx.report.run.series import Curves, Growth, curves, extent, growth, number, remarks, site_name, spread
from quack_fx.report.style import document, sums

MOST_ROWS, MOST_GROWN = 40, 12
_STYLE = (
    chart.STYLE
    + """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 14px;
  align-items: start; }
figure { margin: 0; padding: 12px 16px 4px; } figure + figure.heat { margin-top: 14px; }
figcaption { font-weight: 600; margin-bottom: 6px; } figcaption small { font-weight: 400; color: var(--soft); }
figure details, .heads details { border: 0; border-top: 1px solid var(--line); border-radius: 0; margin: 8px 0 0;
  padding: 0; }
figure summary, .heads summary { font-weight: 400; color: var(--soft); font-size: 13px; padding: 8px 0; }
td[colspan] { text-align: center !important; }
figure td, figure th, .heads td, .heads th { padding: 3px 10px; font-size: 12.5px; text-align: right; }
figure.heat :is(th, td):first-child, .heads th:first-child { text-align: left; }
th.num { text-align: right; }
td { font-variant-numeric: tabular-nums; }
.heads { padding: 0 16px 8px; } .heads details:first-child { border-top: 0; margin-top: 0; }
.scroll { overflow: auto; max-height: 320px; }
.curve { white-space: nowrap; margin-left: 12px; font-weight: 400; color: var(--soft); font-size: 13px; }
.curve svg.chart { display: inline-block; width: 26px; height: 8px; vertical-align: middle; }
svg.legend { width: 220px; height: 14px; vertical-align: middle; border: 1px solid var(--line); }
.broken { color: var(--mark); }
@media print { details > * { display: block; } }
"""
)


def page(file: RunFile) -> str:
    """The whole page of a run."""
    run, name = file.run, file.path.name
    pictures, maps, grown = curves(run), heatmap.heat_maps(run), growth(run, MOST_GROWN)
    body = [
        f"<h1>{escape(name)}</h1>",
        *(f'<p class="soft">{escape(text)}</p>' for text in remarks(file)),
        sums(_cards(run)),
        "<h2>Curves</h2>" if pictures else "",
        '<div class="charts">' + "".join(map(_figure, pictures)) + "</div>" if pictures else "",
        _grown(grown) if grown else "",
        _heat_maps(maps),
        _every_head(run),
    ]
    return document(f"{name}: training run", body, _STYLE)


def _cards(run: Run) -> list[tuple[str, str]]:
    last = run.records[-1]
    cards = [(f"{last.step:,}", "last step")]
    own = {name: value for record in run.records for name, value in record.own.items()}
    cards += [(number(value), name) for name, value in list(own.items())[:4]]
    for key, text in ((f"{LOGIT}/max", "largest logit"), (f"{PRODUCT}/max", "largest norm product")):
        if key in last.attention:
            cards.append((number(last.attention[key]), text))
    low, high = last.attention.get(f"{SCALE}/min"), last.attention.get(f"{SCALE}/max")
    if low is not None and high is not None:
        cards.append((extent([low, high]), "learning-rate scales"))
    heads = [len(values) for (_, metric), values in run.last.heads.items() if metric == PRODUCT] if run.last else []
    if heads:
        cards.append((f"{sum(heads):,}", f"query heads in {len(heads)} attentions"))
    return cards


def _figure(picture: Curves) -> str:
    names = list(picture.lines)
    keys = "".join(_key(i, name) for i, name in enumerate(names)) if len(names) > 1 else ""
    about = f"<br><small>{escape(picture.about)}</small>" if picture.about else ""
    shown = spread(list(picture.by_step.items()), MOST_ROWS)
    rows = [[f"{step:,}", *(number(values.get(name)) for name in names)] for step, values in shown]
    some = f", {len(rows)} of {len(picture.by_step):,} steps" if len(rows) < len(picture.by_step) else ""
    return (
        f'<figure class="frame"><figcaption>{escape(picture.title)}{keys}{about}</figcaption>{chart.chart(picture)}'
        f"<details><summary>Numbers{some}</summary>{_table(['step', *names], rows)}</details></figure>"
    )


def _key(i: int, name: str) -> str:
    """A sample of a curve, and its name."""
    return (
        f'<span class="curve"><svg class="chart" viewBox="0 0 26 8" aria-hidden="true">'
        f'<polyline class="c{i % 3}" points="0,4 26,4"/></svg> {escape(name)}</span>'
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls, also by keyboard; its cells are HTML-safe numbers, its head is any text."""
    titles = "".join(f'<th scope="col">{escape(title)}' for title in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f'<div class="scroll" tabindex="0"><table><tr>{titles}{lines}</table></div>'


def _grown(grown: Sequence[Growth]) -> str:
    has_logit = any(g.logit is not None for g in grown)
    rows = "".join(
        f"<tr><td><code>{escape(site_name(g.site))}</code><td class=num>{g.head}<td class=num>{number(g.first)}"
        f"<td class=num>{number(g.now)}<td class=num>{number(g.ratio)}"
        f"{f'<td class=num>{number(g.logit)}' if has_logit else ''}<td>{chart.sparkline(g.way)}"
        for g in grown
    )
    numbers = ["Head", "At first", "Now", "Times", *(["Largest logit"] if has_logit else [])]
    head = "".join(f'<th scope="col" class=num>{title}' for title in numbers)
    first = grown[0].way[0][0]
    return (
        "<h2>Heads that grew most</h2>"
        f'<p class="soft">By the norm product: how many times that of step {first:,}, where this record begins.</p>'
        f'<div class="wide frame" tabindex="0"><table>'
        f'<tr><th scope="col">Attention{head}<th scope="col">Over time{rows}</table></div>'
    )


def _heat_maps(maps: Sequence[heatmap.HeatMap]) -> str:
    if not maps:
        return ""
    most = heatmap.reach(maps)
    figures = "".join(
        f'<figure class="frame heat"><figcaption>{escape(heat.block)} <small>one row a head of '
        f"{len(heat.sites)} attention{'s' * (len(heat.sites) != 1)}, steps from left to right</small></figcaption>"
        f'<div class="wide" tabindex="0">{heatmap.picture(heat, most)}</div>'
        f"<details><summary>Numbers</summary>{_heat_table(heat)}</details></figure>"
        for heat in maps
    )
    return (
        "<h2>Learning-rate scales over time</h2>"
        f'<p class="soft">What QuacK multiplies the learning rate of each head\'s rows with.</p>'
        f"{heatmap.legend(most)}{figures}"
    )


def _heat_table(heat: heatmap.HeatMap) -> str:
    """Smallest and largest scale of each attention at a few steps; another table has every head at the last step."""
    at = spread(range(len(heat.steps)), 5)
    rows = [[escape(site_name(site)), *(extent(scales[i]) for i in at)] for site, scales in heat.sites]
    return _table(["attention", *(f"step {heat.steps[i]:,}" for i in at)], rows)


def _every_head(run: Run) -> str:
    """For every attention, a table with a row for each metric and a column for each head."""
    if run.last is None:
        return ""
    first = run.samples[0]
    sites: dict[str, list[str]] = {}
    for site, metric in run.last.heads:
        sites.setdefault(site, []).append(metric)
    parts = [_heads_of(site, metrics, first, run.last) for site, metrics in sites.items()]
    return f'<h2>Every head at step {run.last.step:,}</h2><div class="heads frame">{"".join(parts)}</div>'


def _heads_of(site: str, metrics: Sequence[str], first: Sample, last: Sample) -> str:
    count = max(len(last.heads[site, metric]) for metric in metrics)
    rows = []
    for metric in metrics:
        if metric == PRODUCT and (site, metric) in first.heads and first is not last:
            rows.append(_head_row(f"{_in_words(metric)}, step {first.step:,}", first.heads[site, metric], count))
        rows.append(_head_row(_in_words(metric), last.heads[site, metric], count))
    head = '<th scope="col">head' + "".join(f'<th scope="col">{i}' for i in range(count))
    return (
        f"<details><summary><code>{escape(site_name(site))}</code></summary>"
        f'<div class="scroll" tabindex="0"><table><tr>{head}{"".join(rows)}</table></div></details>'
    )


def _head_row(title: str, values: Sequence[float], count: int) -> str:
    """One metric; the cell of a key head spans the query heads that read it."""
    span = f" colspan={count // len(values)}" if count % len(values) == 0 and len(values) < count else ""
    cells = "".join(f"<td{span}>{number(value)}" for value in values)
    return f'<tr><th scope="row">{escape(title)}{cells}'


def _in_words(metric: str) -> str:
    block, _, kind = metric.rpartition("/")
    plain = {PRODUCT: "norm product", LOGIT: "largest logit", NORM: "norm", SCALE: "learning-rate scale"}
    return f"{block} {plain.get(kind, kind)}".strip()
