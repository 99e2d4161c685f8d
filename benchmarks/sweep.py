"""Every model class of the installed packages: find its query/key pairs, prove them, count what was missed.

    python -m benchmarks.sweep                          all of them; rows go to .sweep/rows.jsonl
    python -m benchmarks.sweep --package timm --only swin
    python -m benchmarks.sweep --resume                 only those that have no row yet
    python -m benchmarks.sweep --markdown docs/sweep.md write the table from the rows

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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SOURCES = {
    "transformers": "benchmarks.sweeping.transformers_models",
    "timm": "benchmarks.sweeping.timm_models",
    "others": "benchmarks.sweeping.other_models",
}
BAD = ("refuted", "finder crashed", "verify crashed")


def main() -> int:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", choices=SOURCES, help="one source only")
    parser.add_argument("--only", default="", help="regular expression that family/name must contain")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default: 2)")
    parser.add_argument("--json", type=Path, default=Path(".sweep/rows.jsonl"), help="where the rows go")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    rows = _read(options.json) if options.resume and options.json.exists() else []
    done = {(row["package"], row["family"], row["name"]) for row in rows}
    todo = [c for c in _candidates(options) if (c.package, c.family, c.name) not in done]
    rows += _run(todo, options, "a" if options.resume else "w")
    if options.markdown:
        from benchmarks.sweeping.table import markdown

        options.markdown.parent.mkdir(exist_ok=True)
        options.markdown.write_text(markdown(rows))
    bad = [row for row in rows if row["status"] in BAD or row.get("silent")]
    for row in bad:
        what = row["error"] or f"silent about {row['silent']}"
        Console().print(f"[red]{row['status']}[/] {row['package']} {row['name']}: {what}", highlight=False)
    return 1 if bad else 0


def _candidates(options: argparse.Namespace) -> Iterator[Any]:
    for name, module in SOURCES.items():
        if options.package in (None, name):
            for candidate in importlib.import_module(module).candidates():
                if re.search(options.only, f"{candidate.family}/{candidate.name}"):
                    yield candidate


def _run(todo: list[Any], options: argparse.Namespace, mode: str) -> list[dict[str, Any]]:
    from benchmarks.sweeping.worker import judge_apart

    rows: list[dict[str, Any]] = []
    columns = (TextColumn("{task.description:40}"), MofNCompleteColumn(), TimeRemainingColumn())
    # Threads only wait for their processes.
    with options.json.open(mode) as out, Progress(*columns) as progress, ThreadPoolExecutor(options.jobs) as pool:
        task = progress.add_task("", total=len(todo))
        for future in as_completed([pool.submit(judge_apart, candidate) for candidate in todo]):
            row = future.result()
            rows.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
            progress.update(task, advance=1, description=f"{row['name'][:26]} {row['status']}")
    return rows


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
