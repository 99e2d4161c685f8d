"""Reports about a layout: rich text for a terminal, a self-contained HTML page.

In: a `QKLayout` and `Facts` about how it was found. Out: `overview` and `pair` (rich renderables), `html` (a string).
The JSON form is the layout's own (`QKLayout.to_dict`). Imports no torch, so a saved layout can be shown anywhere.

    facts.py      the model, its inputs and its graph; counts of weights
    groups.py     equal layers as one group; rows, scales, norms, head maps and learning-rate factors as text
    terminal.py   the table of groups, lists of what was skipped, the trees of one attention and of `--explain`
    graph.py      the pair graph and its drawing
    html.py       the page
    style.py      what all pages share
    run/          the same for a recorded training run
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from quack_fx.errors import LayoutError
from quack_fx.layout import AttentionSite, QKLayout
from quack_fx.report.facts import Facts, Proof
from quack_fx.report.html import page as html
from quack_fx.report.terminal import Overview as overview
from quack_fx.report.terminal import explanation, pair

__all__ = ["Facts", "Proof", "explanation", "find_name", "find_site", "html", "overview", "pair"]


def find_site(layout: QKLayout, name: str) -> AttentionSite:
    """The site with this name, or the only one whose name ends with it.

    Raises:
        LayoutError: There is no such site, or more than one.
    """
    found = find_name([site.name for site in layout.sites], name)
    return next(site for site in layout.sites if site.name == found)


def find_name(names: Sequence[str], wanted: str) -> str:
    """The name that is equal to `wanted`, or the only one that ends with it; names may repeat.

    Raises:
        LayoutError: There is no such name, or more than one.
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
