"""`quack-fx watch FILE`: a training run in the terminal while it is recorded.

In: a file that `quack_fx.RunLog` writes, or will write. Out: the summary of `quack-fx report`, redrawn as the file
grows, until Ctrl-C. The training process is not involved.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from quack_fx.errors import RunError

from .options import DebugOption, RecordArgument


def watch(
    file: RecordArgument,
    every: Annotated[
        float, typer.Option("--every", min=0.1, max=3600, metavar="SECONDS", help="Time between two looks at the file.")
    ] = 1.0,
    debug: DebugOption = False,
) -> int:
    """Follow a training run in the terminal while it is recorded; Ctrl-C ends the view, not the training.

    The file need not exist yet.
    """
    console = Console()
    if not console.is_terminal:
        raise RunError(f"watch draws on a terminal, and stdout is none; use quack-fx report {file}")
    from quack_fx.report import run

    record = run.RunFile(file)
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            record.update()
            live.update(run.summary(record, live=True), refresh=True)
            time.sleep(every)
    return 0
