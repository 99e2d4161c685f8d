"""A layout as rich renderables for a terminal.

In: a layout and its facts. Out: the overview (the model, a table with one row per group of equal layers, what was
skipped, what never ran), the tree of one attention, and the tree of an explanation. Colours carry no meaning of their
own, so plain text says as much.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from quack_fx.layout import SIDES, AttentionSite, QKLayout, Side
from quack_fx.layout.fit import qk_count
from quack_fx.layout.walk import Explanation
from quack_fx.report import groups as g
from quack_fx.report.facts import Facts, Proof, count_text

DIM, HEAD = "dim", "bold"
_COLOUR: dict[Side, str] = {"query": "cyan", "key": "magenta"}
_BY_DEPTH = (HEAD, "bold cyan", DIM, "")
"""Of an explanation: the attention, a part of it, a line of Python, a node of the graph."""


@dataclass(frozen=True)
class Overview:
    """Everything that was found, one row per group of equal layers, as a rich renderable.

    The form of its table depends on the width that it is given.
    """

    layout: QKLayout
    facts: Facts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from (header(self.layout, self.facts), Text())
        if self.layout.sites:
            table = pair_table(self.layout, self.facts.proof, narrow=False)
            wide = Measurement.get(console, options.update(max_width=10_000), table).maximum
            yield table if wide <= options.max_width else pair_table(self.layout, self.facts.proof, narrow=True)
            yield Padding(notes(self.layout), (0, 0, 1, 0))
        if self.facts.proof is not None and self.facts.proof.open:
            yield _listing("Not proved", self.facts.proof.open.items())
        if self.layout.skipped:
            yield _listing("Skipped", ((s.name, f"{s.reason} [{s.code}]") for s in self.layout.skipped))
        if self.layout.untouched:
            title = "Never ran: the example inputs did not reach these parameters, so nothing is known about them"
            yield _listing(title, ((name, "") for name in self.layout.untouched))


def facts_grid(heading: str, title: str) -> Table:
    """The head of a report, of dim headings and what is said about them; it begins with a title."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=DIM, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(heading, Text(title, HEAD))
    return grid


def wide_table(leading: int = 0) -> Table:
    """The main table of a report, without edges."""
    return Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, leading=leading)


def header(layout: QKLayout, facts: Facts) -> RenderableType:
    """The model, how it was built, and counts."""
    grid = facts_grid("model", facts.title)
    if facts.how:
        grid.add_row("", Text(facts.how))
    for about, text in facts.notes:
        grid.add_row(about, Text(text))
    if facts.graph:
        grid.add_row("graph", Text(facts.graph + (f", {facts.seconds:.1f} s" if facts.seconds else "")))
    groups = g.group_sites(layout.sites)
    found = f"{len(layout.sites)} attention{'s' * (len(layout.sites) != 1)}"
    found += f" in {len(groups)} groups of equal layers" if 1 < len(groups) < len(layout.sites) else ""
    found += ", all equal" if len(groups) == 1 < len(layout.sites) else ""
    found += f"; {len(layout.skipped)} skipped" if layout.skipped else ""
    if layout.sites and facts.shapes:
        own, total = qk_count(layout, facts.shapes), facts.parameters
        found += f"; {count_text(own)} of {count_text(total)} parameters are query/key rows ({own / max(total, 1):.1%})"
    grid.add_row("found", Text(found))
    if facts.proof is not None:
        grid.add_row("proof", Text(facts.proof.summary([site.name for site in layout.sites])))
    return grid


def pair_table(layout: QKLayout, proof: Proof | None, narrow: bool) -> Table:
    """The table with one row per group; a narrow one has the weights below the name."""
    table = wide_table(leading=1)
    if proof is not None:
        table.add_column("Proof", no_wrap=True)
    table.add_column("Attention" + (", weights and rows of a head" if narrow else ""), overflow="fold")
    table.add_column("Heads", no_wrap=True)
    table.add_column("Dim", justify="right", no_wrap=True)
    if not narrow:
        table.add_column("Weights and rows of a head", overflow="fold")
    if normed := any(site.qk_norm for site in layout.sites):
        table.add_column("QK norm", overflow="fold")
    table.add_column("Scale", overflow="fold")
    for group in g.group_sites(layout.sites):
        site = group.first
        name = Text(group.name, HEAD)
        if group.remarks:
            name.append("  " + ", ".join(group.remarks), "not bold " + DIM)
        weights = _weights(site)
        first: list[RenderableType] = [proof.text([s.name for s in group.sites])] if proof is not None else []
        first += [Group(name, Padding(weights, (0, 0, 0, 2)))] if narrow else [name]
        rest: list[RenderableType] = [] if narrow else [weights]
        rest += [g.norms_text(site.qk_norm)] if normed else []
        table.add_row(*first, g.kind_text(site), str(site.head_dim), *rest, g.scale_text(site))
    return table


def _weights(site: AttentionSite) -> Table:
    """Role, parameter and rows of each block, in columns."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_column(overflow="fold")
    for side, label, param, rows in g.weights(site):
        grid.add_row(Text(label, _COLOUR[side]), Text(param), Text(rows))
    return grid


def notes(layout: QKLayout) -> Text:
    """How to read the rows, and which attentions QuacK does not scale."""
    key_heads = ", g key heads" if any(g.key_letter(s) == "g" for s in layout.sites) else ""
    lines = [f"h counts query heads{key_heads}; rows a:b end before b"]
    if normed := sum(bool(s.qk_norm) for s in layout.sites):
        whose = (
            "all attentions have" if normed == len(layout.sites) else f"{normed} of {len(layout.sites)} attentions have"
        )
        one = "the attention has" if normed == len(layout.sites) == 1 else whose
        lines.append(f"{one} a QK norm; QuacK leaves them alone until it is removed (quack_fx.strip_qk_norm)")
    return Text("\n".join(lines), DIM)


def _listing(title: str, entries: Iterable[tuple[str, str]]) -> RenderableType:
    """Names grouped by remark, with similar names as one pattern."""
    tree = Tree(Text(title, HEAD), guide_style=DIM)
    for remark, patterns in g.by_reason(entries):
        branch = tree.add(Text(remark)) if remark else tree
        for pattern, members in patterns[:40]:
            text = Text(pattern)
            if len(members) > 1:
                text.append(f"  x{len(members)}", DIM)
            branch.add(text)
        if len(patterns) > 40:
            branch.add(Text(f"and {sum(len(m) for _, m in patterns[40:])} more (--json lists all)", DIM))
    return Padding(tree, (0, 0, 1, 0))


def pair(site: AttentionSite, facts: Facts) -> RenderableType:
    """One attention as a tree: weights with their rows, norms, head map, logit and QuacK's learning-rate factors."""
    title = Text(site.name or "(root)", HEAD)
    remarks = [g.kind_text(site), f"head dim {site.head_dim}", *g.Group(site.name, (site,)).remarks]
    title.append("  " + ", ".join(remarks), "not bold")
    tree = Tree(title, guide_style=DIM)
    if facts.proof is not None:
        reason = facts.proof.open.get(site.name)
        told = f"✓ by gradients on {facts.proof.where}" if reason is None else f"- {reason}"
        tree.add(Text.assemble(("proof   ", DIM), told))
    for side in SIDES:
        _side(tree, site, side, facts)
    tree.add(Text.assemble(("heads   ", DIM), g.map_text(site)))
    names = g.labels(site)
    sums = []
    for chain in g.chains(site):
        parts = [Text(" ".join(names[id(b)] for b in blocks), _COLOUR[side]) for side, blocks in chain.items()]
        sums.append(Text.assemble("(", parts[0], " x)·(", parts[1], " y)"))
    source = "y: another sequence" if site.cross else "y = x"
    scale = g.scale_text(site)
    factor = "" if scale == "1" else f" * {scale}" if site.logit_scale is not None else " * a learned scale, or none"
    logit = Text(" + ").join(sums)
    whole = Text.assemble("(", logit, ")") if len(sums) > 1 and factor else logit
    tree.add(Text.assemble(("logit   ", DIM), whole, factor, (f"   {source}", DIM)))
    remark = "learning-rate factors, each relative to its value at the start"
    if site.qk_norm:
        remark = "left alone: behind a QK norm the logits do not depend on the norms of these weights"
    rules = tree.add(Text.assemble(("QuacK   ", DIM), remark))
    if not site.qk_norm:
        width = max(len(name) for name, _ in g.rule_texts(site)) if site.terms else 0
        for name, rule in g.rule_texts(site):
            rules.add(Text(f"{name:<{width}}  {rule}"))
    return tree


def _side(tree: Tree, site: AttentionSite, side: Side, facts: Facts) -> None:
    colour, names = _COLOUR[side], g.labels(site)
    blocks = [block for of, block in site.blocks() if of == side]
    branch = tree.add(Text(side, f"bold {colour}"))
    width = max((len(names[id(b)]) for b in blocks), default=0)
    for block in blocks:
        shape = facts.shapes.get(block.param)
        line = Text(f"{names[id(block)]:<{width}}  ", colour)
        line.append(block.param, "default")
        line.append(f"  {list(shape)}" if shape else "", DIM)
        node = branch.add(line)
        unit = "rows" if block.axis == 0 else f"entries along axis {block.axis}"
        used = ", ".join(f"{a}:{b}" for a, b in g.total_rows(block)[:4])
        used += ", …" if len(g.total_rows(block)) > 4 else ""
        node.add(Text.assemble((f"{unit} ", DIM), g.block_rows(site, side, block), (f"   in all {used}", DIM)))
        if block.bias:
            node.add(Text.assemble(("bias ", DIM), block.bias, ("  same entries", DIM)))
    for title, norms in g.norms(site):
        for norm in norms:
            if norm.side == side:
                place = norm.module or "written inline"
                gain = f", gain {norm.weight}" if norm.weight else ", no gain"
                branch.add(Text.assemble((f"{title} ", DIM), f"{norm.kind} over {norm.width}: {place}", (gain, DIM)))


def explanation(one: Explanation) -> RenderableType:
    """How an attention was traced, as a tree."""
    lines = list(one.outline())
    branches = [Tree(Text(lines[0][1], _BY_DEPTH[0]), guide_style=DIM)]
    for depth, line in lines[1:]:
        del branches[depth:]
        branches.append(branches[-1].add(Text(line, _BY_DEPTH[depth])))
    return branches[0]
