"""Finds and proves the query/key pairs of every model class of the installed packages, and counts what was missed.

    python -m benchmarks.sweep                          all of them; rows go to .sweep/rows.jsonl
    python -m benchmarks.sweep --package timm --only swin
    python -m benchmarks.sweep --resume                 only classes without a row
    python -m benchmarks.sweep --resume --again "timeout|not built"
    python -m benchmarks.sweep --resume --only nothing --markdown docs/sweep.md    the table of the existing rows

A row is one JSON object a line: package, family, name, status, error, sites, calls, proved, open (not proved, with
reasons), skipped (with codes and reasons), ran (attentions that ran, counted without the finder), silent (modules with
attentions that the layout does not speak of), seconds.

Exit status 1 if a layout was refuted, an attention was missed without a word, or quack-fx crashed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SOURCES = {
    "transformers": "benchmarks.sweeping.transformers_models",
    "timm": "benchmarks.sweeping.timm_models",
    "diffusers": "benchmarks.sweeping.diffusers_models",
    "others": "benchmarks.sweeping.other_models",
}
BAD = ("refuted", "finder crashed", "verify crashed", "capture failed", "died")


def main() -> int:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", choices=SOURCES, help="one source only")
    parser.add_argument("--only", default="", help="regular expression that family/name must contain")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default: 2)")
    parser.add_argument("--json", type=Path, default=Path(".sweep/rows.jsonl"), help="where the rows go")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--again", default="", metavar="STATUS", help="with --resume: not the rows of this status")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    todo, rows = _divided(list(candidates(options.only, options.package)), _read(options.json), options)
    options.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows += _run(todo, options)
    if options.markdown:
        from benchmarks.sweeping.table import markdown
        from benchmarks.sweeping.worker import BYTES, SECONDS

        options.markdown.parent.mkdir(exist_ok=True)
        options.markdown.write_text(markdown(rows, f"{SECONDS} s and {BYTES >> 30} GiB at most"))
    bad = [row for row in rows if row["status"] in BAD or row["silent"]]
    for row in bad:
        what = row["error"] or f"silent about {row['silent']}"
        Console().print(f"[red]{row['status']}[/] {row['package']} {row['name']}: {what}", highlight=False)
    return 1 if bad else 0


def candidates(only: str, package: str | None = None) -> Iterator[Any]:
    """The models of one source, or of all, whose family/name matches a regular expression."""
    for name, module in SOURCES.items():
        if package in (None, name):
            for candidate in importlib.import_module(module).candidates():
                if re.search(only, f"{candidate.family}/{candidate.name}"):
                    yield candidate


def _run(todo: list[Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.sweeping.worker import judge_all

    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description:40}"), MofNCompleteColumn(), TimeRemainingColumn())
    # No refresh thread, because a process with threads must not fork.
    with options.json.open("a") as out, Progress(*columns, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(todo))
        for row in judge_all(todo, options.jobs):
            rows.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
            progress.update(task, advance=1, description=f"{row['name'][:26]} {row['status']}", refresh=True)
    return rows


def _divided(
    asked_for: list[Any], rows: list[dict[str, Any]], options: argparse.Namespace
) -> tuple[list[Any], list[dict[str, Any]]]:
    """The candidates to judge, and the existing rows to keep, including those of models that were not selected."""
    if not (options.resume or options.only or options.package):
        return asked_for, []
    good = {key_of(row) for row in rows if not (options.again and re.search(options.again, row["status"]))}
    todo = {(c.package, c.family, c.name): c for c in asked_for}
    if options.resume:
        todo = {key: candidate for key, candidate in todo.items() if key not in good}
    return list(todo.values()), [row for row in rows if key_of(row) not in todo]


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    """The unique key of a row."""
    return row["package"], row["family"], row["name"]


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
