"""`quack-fx inspect TARGET`: every query/key pair of a model, what was skipped and why, what never ran.

In: a target. Out: on stdout, a table with one row per group of equal layers and the tree of one pair, or the layout as
JSON; with --html also a page; with --verify a tick or a dash for each attention; with --explain only how one attention
was traced, or why it was skipped. Exit status 1 if there is no attention, or one could not be proved.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quack_fx.errors import TargetError

from .common import Finding, check_output, find, note, note_notes, progress, show, write_whole
from .options import BuildOption, DebugOption, ForceOption, InputsOption, TargetArgument
from .proof import prove

if TYPE_CHECKING:
    from quack_fx.report import Proof


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
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="NAME",
            help="Show how this attention was understood, or where that ended if it was skipped: where its logits are "
            "made, the nodes from there back to the weights, and what each holds. The end of its name will do.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Prove by gradients what was found; a tick for each attention.")
    ] = False,
    build: BuildOption = None,
    inputs: InputsOption = None,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> int:
    """Show every query/key pair of a model, with the weight rows of each head."""
    if explain is not None and (pair is not None or html is not None or verify):
        raise TargetError("--explain stands alone, or with --json; leave out --pair, --html and --verify")
    check_output(html, force)
    finding = find(target, build, inputs)
    if explain is not None:
        return _explain(finding, explain, as_json)
    from quack_fx import report
    from quack_fx.layout import QKLayout

    layout, facts = finding.layout, finding.facts
    if verify and layout.sites:
        facts = replace(facts, proof=_proof(finding))
    site = report.find_site(layout, pair) if pair is not None else None
    if as_json:
        note_notes(finding)
        typer.echo(json.dumps((layout if site is None else QKLayout((site,))).to_dict()))
    elif site is not None:
        show(report.pair(site, facts))
    else:
        show(report.overview(layout, facts), *(report.pair(s, facts) for s in layout.sites[:1]))
    if html is not None:
        write_whole(html, report.html(layout, facts))
    if not layout.sites:
        note(f"no attention found in {facts.title}")
        return 1
    if facts.proof is not None and facts.proof.open:
        note(facts.proof.summary([s.name for s in layout.sites]))
        return 1
    return 0


def _explain(finding: Finding, name: str, as_json: bool) -> int:
    """Show how the attentions of one module were traced."""
    from quack_fx import report
    from quack_fx.find import explain

    layout, target = finding.layout, finding.target
    names = [site.name for site in layout.sites] + [entry.name for entry in layout.skipped]
    full = report.find_name(names, name)
    with progress() as say:
        found = explain(target.model, target.args, target.kwargs, full, say)
    if as_json:
        note_notes(finding)
        typer.echo(json.dumps([one.to_dict() for one in found]))
    else:
        show(*map(report.explanation, found))
    return 0


def _proof(finding: Finding) -> Proof:
    """The proof of a finding; if the model cannot run, every attention is undecided."""
    from quack_fx.prove import CannotRun
    from quack_fx.report import Proof

    with progress() as say:
        try:
            report, where = prove(finding, say)
        except CannotRun as error:
            return Proof("a copy with random weights", {site.name: str(error) for site in finding.layout.sites})
    return Proof(where, {entry.name: entry.reason for entry in report.not_proved})
