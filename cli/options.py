"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="model.py, model.py:NAME, package.module:NAME, a Hugging Face config.json or its folder, timm:NAME, "
        "litgpt:NAME, torchtitan:MODEL/FLAVOR, model.pt2 (torch.export), or model.pt (a pickled module: reading it "
        "runs code).",
        show_default=False,
    ),
]
RecordArgument = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="The JSON lines that quack_fx.RunLog writes.", show_default=False),
]
BuildOption = Annotated[
    str | None,
    typer.Option("--build", metavar="EXPR", help="Python expression that makes the model, in the target's namespace."),
]
InputsOption = Annotated[
    str | None,
    typer.Option(
        "--inputs",
        metavar="EXPR",
        help="Python expression for forward's arguments: a tuple, a dict, a pair of both, or the one argument.",
    ),
]
LayoutOption = Annotated[
    Path | None,
    typer.Option(
        "--layout", metavar="FILE", help="Take the pairs from this JSON (inspect --json) instead of finding them."
    ),
]
TableOption = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the table as Markdown, too.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the log on stderr.")]
