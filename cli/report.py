"""`quack-fx report FILE`: a summary of a recorded training run.

In: a file that `quack_fx.RunLog` wrote, of a run that ended or is still going on. Out: on stdout, a summary; with
--html also a page with curves and every head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quack_fx.errors import RunError

from .common import check_output, show, write_whole
from .options import DebugOption, ForceOption, RecordArgument


def report(
    file: RecordArgument,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write a page with curves and every head.")
    ] = None,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> int:
    """Show a recorded training run: its curves, learning-rate scales, and the heads that grew most."""
    if html is not None and html.exists() and file.exists() and html.samefile(file):
        raise RunError(f"--html {str(html)!r} is the record itself; give the page a file of its own")
    check_output(html, force)
    from quack_fx.report import run

    record = run.read(file)
    show(run.summary(record))
    if html is not None:
        write_whole(html, run.html(record))
    return 0
