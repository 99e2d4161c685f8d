"""`quack-fx convert TARGET -o FILE`: a training step that applies QuacK, as one Python file.

In: a target. Out: the file, which needs only torch, or its text on stdout. Exit status 1 if there is no attention.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import check_output, find, note, nothing_to, write_whole
from .options import BuildOption, DebugOption, ForceOption, InputsOption, LayoutOption, TargetArgument

if TYPE_CHECKING:
    from quack_fx.qk_norm.strip.modules import Plan


def _positive(text: str | float) -> float:
    """A positive, finite number."""
    with suppress(ValueError):
        if math.isfinite(number := float(text)) and number > 0:
            return number
    raise typer.BadParameter(f"{text} is not a positive number")


class OptimizerChoice(StrEnum):
    """The optimizer whose update the file contains."""

    ADAMW = "adamw"
    ADAM = "adam"
    SGD = "sgd"
    MUON = "muon"
    LION = "lion"


class QKNorm(StrEnum):
    """What happens to QK norms."""

    STRIP = "strip"
    KEEP = "keep"


def _about(plan: Plan) -> Iterator[str]:
    """Notes on the norms that are removed, and on those that stay."""
    if plan.stand_ins:
        sites = {site for _, sites in plan.norms.values() for site in sites}
        yield (
            f"the file takes the QK norms out of {len(sites)} attentions ({len(plan.stand_ins)} modules); "
            "--qk-norm keep leaves them"
        )
    for text, count in Counter(re.sub(r"^'.*?': ", "", told) for told in plan.notes).items():
        yield f"{text} ({count} attentions)" if count > 1 else text
    for reason, count in Counter(re.sub(r"'.*?'", "...", left.reason) for left in plan.left).items():
        yield f"{count} attentions keep their QK norms, without QuacK: {reason}"


def convert(
    target: TargetArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Python file to write; by default its text goes to stdout."
        ),
    ] = None,
    optimizer: Annotated[
        OptimizerChoice,
        typer.Option(
            "--optimizer", help="Whose update the file carries; muon has AdamW beside it, for what is no matrix."
        ),
    ] = OptimizerChoice.ADAMW,
    tau: Annotated[
        float,
        typer.Option(
            "--tau",
            metavar="NUMBER",
            parser=_positive,
            help="Learning rate of query/key rows relative to the rest, at the start.",
        ),
    ] = 1.0,
    qk_norm: Annotated[
        QKNorm,
        typer.Option(
            "--qk-norm",
            help="strip: the file takes QK norms out of the model, and QuacK takes their place. "
            "keep: attentions with a QK norm are left alone.",
        ),
    ] = QKNorm.STRIP,
    assume: Annotated[
        bool, typer.Option("--assume", help="Write the file even where sizes of the model had to be assumed.")
    ] = False,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="For weights that FSDP2 or tensor parallelism shard.")
    ] = False,
    master_weights: Annotated[
        bool, typer.Option("--master-weights", help="Update parameters in half precision as fp32 copies of them.")
    ] = False,
    layout: LayoutOption = None,
    build: BuildOption = None,
    inputs: InputsOption = None,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> int:
    """Write a training step with QuacK as one Python file that needs torch alone."""
    check_output(output, force)
    finding = find(target, build, inputs, layout)
    if not assume:
        finding.target.check_sizes("--assume")
    if nothing_to("convert", finding):
        return 1
    from quack_fx.train.convert import prepare

    step = prepare(finding.target.model, finding.layout, qk_norm.value)
    if step.plan is not None:
        for text in _about(step.plan):
            note(text)
    source = step.source(finding.facts.title, optimizer.value, tau=tau, sharded=sharded, master_weights=master_weights)
    if output is None:
        typer.echo(source, nl=False)
    else:
        write_whole(output, source)
    return 0
