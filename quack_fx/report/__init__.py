"""Layout -> what a person reads: rich text for a terminal, a self-contained HTML page.

In: a `QKLayout` and `Facts` about how it was found. Out: `overview` and `pair` (rich renderables), `html` (a string).
The JSON is the layout's own (`QKLayout.to_dict`). No torch is imported, so a saved layout can be shown anywhere.

    facts.py      what is known besides the layout, and sums
    groups.py     equal layers as one group; rows, scales, norms, head maps and factors in words
    terminal.py   the table of groups, the lists, the tree of one pair
    walk.py       the tree of how one attention was understood
    graph.py      the pair graph, and its drawing
    html.py       the page
    style.py      the frame and the look of all pages
    run/          a training run that was recorded, by the same ways
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from rich.console import RenderableType

from quack_fx.errors import LayoutError
from quack_fx.layout import AttentionSite, QKLayout
from quack_fx.report.facts import Facts, Proof
from quack_fx.report.html import page
from quack_fx.report.terminal import Overview, pair_tree
from quack_fx.report.walk import explanation

__all__ = ["Facts", "Proof", "explanation", "find_name", "find_site", "html", "overview", "pair"]


def overview(layout: QKLayout, facts: Facts) -> RenderableType:
    """Everything that was found, one row per group of equal layers; for `rich.console.Console.print`."""
    return Overview(layout, facts)


def pair(site: AttentionSite, facts: Facts) -> RenderableType:
    """One attention as a tree; for `rich.console.Console.print`."""
    return pair_tree(site, facts)


def html(layout: QKLayout, facts: Facts) -> str:
    """The page, complete."""
    return page(layout, facts)


def find_site(layout: QKLayout, name: str) -> AttentionSite:
    """The site called `name`, or the only one whose name ends with it.

    Raises:
        LayoutError: No site is called so, or several are.
    """
    found = find_name([site.name for site in layout.sites], name)
    return next(site for site in layout.sites if site.name == found)


def find_name(names: Sequence[str], wanted: str) -> str:
    """The name that is `wanted`, or the only one that ends with it.

    Arguments:
        names: Names of attentions; a name may be there more than once.
        wanted: What the user typed.

    Raises:
        LayoutError: No name is, or several are.
    """
    found = [wanted] if wanted in names else sorted({name for name in names if name.endswith("." + wanted)})
    if len(found) == 1:
        return found[0]
    if found:
        raise LayoutError(
            f"{wanted!r} ends the names of {len(found)} attentions; give one in full, such as {found[0]!r}"
        )
    close = difflib.get_close_matches(wanted, names, 1, cutoff=0.3) or names[:1]
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise LayoutError(f"no attention is called {wanted!r}{hint}")
