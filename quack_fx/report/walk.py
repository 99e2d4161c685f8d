"""The tree of `--explain` for a terminal.

In: an `Explanation`. Out: a rich renderable with the lines of its outline; dumped files have the same lines.
"""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text
from rich.tree import Tree

from quack_fx.layout.walk import Explanation

_STYLES = ("bold", "bold cyan", "dim", "")
"""By depth: the attention, a part of its explanation, a line of Python, a node of the graph."""


def explanation(one: Explanation) -> RenderableType:
    """The explanation as a tree; for `rich.console.Console.print`."""
    lines = list(one.outline())
    branches = [Tree(Text(lines[0][1], _STYLES[0]), guide_style="dim")]
    for depth, line in lines[1:]:
        del branches[depth:]
        branches.append(branches[-1].add(Text(line, _STYLES[depth])))
    return branches[0]
