"""DOOR: `quack-fx inspect TARGET`: every query/key pair of a model, what was skipped and why, what never ran.

In: a target. Out: on stdout a table with one row per group of equal layers and the tree of one pair, or the layout as
JSON; with --html also a page. Exit status 1 where there is no attention.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    BuildOption,
    DebugOption,
    ForceOption,
    InputsOption,
    TargetArgument,
    check_output,
    find,
    note,
    show,
    write_whole,
)


def inspect(
    target: TargetArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the layout as JSON and nothing else.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with the pair graphs.")
    ] = None,
    pair: Annotated[
        str | None,
        typer.Option("--pair", metavar="NAME", help="Show this attention alone, in full; the end of its name will do."),
    ] = None,
    build: BuildOption = None,
    inputs: InputsOption = None,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> int:
    """Show every query/key pair of a model, with the weight rows of each head."""
    if html is not None:
        check_output(html, force)
    finding = find(target, build, inputs)
    from quack_fx import report
    from quack_fx.layout import QKLayout

    layout, facts = finding.layout, finding.facts
    site = report.find_site(layout, pair) if pair is not None else None
    if as_json:
        typer.echo(json.dumps((layout if site is None else QKLayout((site,))).to_dict()))
    elif site is not None:
        show(report.pair(site, facts))
    else:
        show(report.overview(layout, facts), *(report.pair(s, facts) for s in layout.sites[:1]))
    if html is not None:
        write_whole(html, report.html(layout, facts))
        note(f"wrote {html}")
    if not layout.sites:
        note(f"no attention found in {facts.title}")
        return 1
    return 0
