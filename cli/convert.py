"""DOOR: `quack-fx convert TARGET -o FILE`: a training step that applies QuacK, as one Python file.

In: a target. Out: the file, which needs torch alone, or its text on stdout. Exit status 1 where there is no attention.
"""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    BuildOption,
    DebugOption,
    ForceOption,
    InputsOption,
    LayoutOption,
    TargetArgument,
    check_output,
    find,
    note,
    write_whole,
)


def _positive(text: str | float) -> float:
    """A positive, finite number."""
    with suppress(ValueError):
        if math.isfinite(number := float(text)) and number > 0:
            return number
    raise typer.BadParameter(f"{text} is not a positive number")


def convert(
    target: TargetArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Python file to write; by default its text goes to stdout."
        ),
    ] = None,
    tau: Annotated[
        float,
        typer.Option(
            "--tau",
            metavar="NUMBER",
            parser=_positive,
            help="Learning rate of query/key rows relative to the rest, at the start.",
        ),
    ] = 1.0,
    layout: LayoutOption = None,
    build: BuildOption = None,
    inputs: InputsOption = None,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> int:
    """Write a training step with QuacK as one Python file that needs torch alone."""
    if output is not None:
        check_output(output, force)
    finding = find(target, build, inputs, layout)
    if not finding.layout.sites:
        note(f"no attention found in {finding.facts.title}: nothing to convert")
        return 1
    from quack_fx.emit import emit

    # A given layout may call a tied parameter by any of its names.
    shapes = {name: tuple(p.shape) for name, p in finding.target.model.named_parameters(remove_duplicate=False)}
    source = emit(finding.layout, shapes, title=finding.facts.title, tau=tau)
    if output is None:
        typer.echo(source, nl=False)
    else:
        write_whole(output, source)
        note(f"wrote {output}")
    return 0
