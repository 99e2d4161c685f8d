"""The pair graph of one attention, as a networkx graph and as inline SVG.

In: a site. Out: `pair_graph`, which leads from the inputs through weights and norms to the products and their sum, the
logits; `svg`, the same drawn in columns. Colours are in the style sheet of the page.
"""

from __future__ import annotations

from html import escape
from itertools import pairwise

import networkx as nx

from quack_fx.layout import AttentionSite, Norm, Side
from quack_fx.report import groups as g

_GAP_X, _GAP_Y, _PAD = 46, 14, 10
_CHAR, _LINE = 6.7, 16


def pair_graph(site: AttentionSite) -> nx.DiGraph:
    """The graph from the inputs to the logits.

    Returns:
        Graph whose nodes have `kind` ("input", "block", "norm", "product" or "logits"), `side` ("query", "key" or "")
        and `lines`, the text to show. Edges follow the computation.
    """
    graph, names = nx.DiGraph(), g.labels(site)
    inputs: dict[Side, str] = {"query": "x", "key": "y" if site.cross else "x"}
    for side, name in inputs.items():
        what = f"{name}: {side} tokens" if site.cross else "x: tokens"
        graph.add_node(name, kind="input", side=side if site.cross else "", lines=(what,))
    for side, block in site.blocks():
        rows = f"{'rows' if block.axis == 0 else f'axis {block.axis},'} {g.block_rows(site, side, block)}"
        lines = (names[id(block)], g.local_name(block.param, site.name), rows)
        graph.add_node(names[id(block)], kind="block", side=side, lines=lines)
    sums = "logits" if len(site.terms) < 2 else "sum = logits"
    scale = () if site.logit_scale == 1 else (f"times {g.scale_text(site)}",)
    graph.add_node("logits", kind="logits", side="", lines=(sums, *scale))
    for i, chain in enumerate(g.chains(site)):
        product = f"product {i}"
        graph.add_node(product, kind="product", side="", lines=("q · k",))
        graph.add_edge(product, "logits")
        for side, blocks in chain.items():
            way = [inputs[side], *(names[id(b)] for b in reversed(blocks))]
            for a, b in pairwise(way):
                _join(graph, a, b, [n for n in site.latent_norm if n.side == side] if a != way[0] else [])
            _join(graph, way[-1], product, [n for n in site.qk_norm if n.side == side])
    return graph


def _join(graph: nx.DiGraph, a: str, b: str, norms: list[Norm]) -> None:
    """Add an edge from a to b, through a norm if there is one."""
    if not norms:
        graph.add_edge(a, b)
        return
    name = f"norm of {a}"
    what = " and ".join(dict.fromkeys(f"{n.kind} norm over {n.width}" for n in norms))
    graph.add_node(name, kind="norm", side=norms[0].side, lines=(what,))
    graph.add_edges_from(((a, name), (name, b)))


def svg(site: AttentionSite) -> str:
    """The pair graph as an SVG element, in columns from left to right."""
    graph = pair_graph(site)
    graph.remove_nodes_from([n for n in list(graph) if not nx.has_path(graph, n, "logits")])
    level = {n: i for i, layer in enumerate(nx.topological_generations(graph)) for n in layer}
    way: dict[tuple[str, str], list[str]] = {}
    for a, b in list(graph.edges):
        # An edge across several columns passes a point in each, so that it does not cross boxes.
        stops = {f"{a} > {b} @ {i}": i for i in range(level[a] + 1, level[b])}
        graph.add_nodes_from(stops, kind="stop", side=graph.nodes[a]["side"], lines=())
        level |= stops
        way[a, b] = [a, *stops, b]
    size = {n: _size(d["lines"]) for n, d in graph.nodes(data=True)}
    place: dict[str, tuple[float, float]] = {}
    from_top = sorted(graph, key=lambda n: ("query", "", "key").index(graph.nodes[n]["side"]))
    columns = [[n for n in from_top if level[n] == i] for i in range(max(level.values()) + 1)]
    heights = [sum(size[n][1] + _GAP_Y for n in column) - _GAP_Y for column in columns]
    x, height = float(_PAD), max(heights)
    for column, tall in zip(columns, heights, strict=True):
        width = max(size[n][0] for n in column)
        y = _PAD + (height - tall) / 2
        for n in column:
            if graph.nodes[n]["kind"] == "stop":
                size[n] = (width, size[n][1])
            place[n] = (x + (width - size[n][0]) / 2, y)
            y += size[n][1] + _GAP_Y
        x += width + _GAP_X
    drawn = [_curve([_ends(place[n], size[n]) for n in nodes]) for nodes in way.values()]
    drawn += [_box(place[n], size[n], d) for n, d in graph.nodes(data=True) if d["kind"] != "stop"]
    w, h = x - _GAP_X + _PAD, height + 2 * _PAD
    label = escape(f"Pair graph of {site.name or 'the root'}")
    head = (
        f'<svg class="graph" viewBox="0 0 {w:.0f} {h:.0f}" style="max-width:{w:.0f}px" role="img" aria-label="{label}">'
    )
    return "\n".join([head, *drawn, "</svg>"])


def _size(lines: tuple[str, ...]) -> tuple[float, float]:
    if not lines:
        return 1.0, 8.0
    return max(len(line) for line in lines) * _CHAR + 20, len(lines) * _LINE + 14


def _ends(place: tuple[float, float], size: tuple[float, float]) -> tuple[float, float, float]:
    """Left end, right end and vertical middle of a box."""
    return place[0], place[0] + size[0], place[1] + size[1] / 2


def _curve(boxes: list[tuple[float, float, float]]) -> str:
    """A smooth line from the right side of the first box to the left side of the last."""
    path = f"M{boxes[0][1]:.1f} {boxes[0][2]:.1f}"
    for (_, x0, y0), (x1, x2, y1) in pairwise(boxes):
        middle = (x0 + x1) / 2
        path += f" C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f} H{x2:.1f}"
    return f'<path class="edge" d="{path[: path.rindex(" H")]}"/>'


def _box(place: tuple[float, float], size: tuple[float, float], node: dict[str, object]) -> str:
    (x, y), (w, h), lines = place, size, node["lines"]
    assert isinstance(lines, tuple)
    radius = 6 if node["kind"] == "block" else h / 2
    box = f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{min(radius, 18):.0f}"/>'
    bold = ' class="head"'
    texts = "".join(
        f'<text x="{x + w / 2:.1f}" y="{y + 19 + i * _LINE:.1f}"{bold if i == 0 else ""}>{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    return f'<g class="{node["kind"]} {node["side"]}">{box}{texts}</g>'
