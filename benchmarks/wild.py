"""Runs the first command, `quack-fx inspect FILE` without flags, on unmodified files of public repositories.

    python -m benchmarks.wild --repos FOLDER                    all entries; rows go to .wild/rows.jsonl
    python -m benchmarks.wild --repos FOLDER --only nanoGPT     those whose repository and file match
    python -m benchmarks.wild --repos FOLDER --resume           only the tries that have no row yet
    python -m benchmarks.wild --repos FOLDER --resume --only nothing --markdown docs/wild.md    the table of the rows

In: a folder with checkouts named owner+name, and the list of files in benchmarks/wild.json (`wilding/entries.py`
describes an entry). Out: one JSON object per line for each attempt (`wilding/attempt.py`), its output in .wild/outputs,
and the page.

If the first command fails on a file, it is tried again with each flag that the list has for the file, then with two.

Exit status 1 if a row was wrong or anything printed a traceback.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.wilding.attempt import BYTES, SECONDS, Try, attempt_all
from benchmarks.wilding.entries import Entry, read
from benchmarks.wilding.results import Key, Row, next_try, outcome, result
from benchmarks.wilding.table import markdown


def main(argv: list[str] | None = None) -> int:
    """Run the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repos", type=Path, required=True, help="folder of checkouts, each named owner+name")
    parser.add_argument("--list", type=Path, default=Path(__file__).with_name("wild.json"), help="the entries")
    parser.add_argument("--only", default="", help="regular expression that owner/name:file must contain")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default: 2)")
    parser.add_argument("--json", type=Path, default=Path(".wild/rows.jsonl"), help="where the rows go")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args(argv)
    entries = read(options.list)
    chosen = list(_there([e for e in entries if re.search(options.only, e.key)], options.repos.resolve()))
    rows = _kept(options.json) if options.resume or options.only else {}
    if not options.resume:
        again = {entry.key for entry in chosen}
        rows = {key: row for key, row in rows.items() if key[0] not in again}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    _run(chosen, rows, options)
    results = [came for entry in entries if (came := result(entry, rows)) is not None]
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        limits = f"{SECONDS} s for each part and {BYTES >> 30} GiB of addresses at most"
        options.markdown.write_text(markdown(results, len(entries) - len(results), limits))
    for came in results:
        for what in (*came.wrong, *came.tracebacks):
            print(f"!!! {came.entry.key}: {what}")
    print(f"{sum(r.works and not r.flags for r in results)} of {len(results)} work with no flag, ", end="")
    print(f"{sum(r.works and bool(r.flags) for r in results)} with flags")
    return 1 if any(r.wrong or r.tracebacks for r in results) else 0


def _run(entries: list[Entry], rows: dict[Key, Row], options: argparse.Namespace) -> None:
    """Run the remaining tries in rounds, because an entry's next try depends on the outcome of its last one."""
    outputs = options.json.parent.resolve() / "outputs"
    outputs.mkdir(exist_ok=True)
    known = {entry.key: entry for entry in entries}
    while todo := [
        Try(entry, flags, options.repos.resolve(), outputs / _file_name(entry, flags))
        for entry in entries
        if (flags := next_try(entry, rows)) is not None
    ]:
        with options.json.open("a") as out:
            for row in attempt_all(todo, options.jobs):
                rows[row["key"], tuple(row["flags"])] = row
                out.write(json.dumps(row) + "\n")
                out.flush()
                typed = " ".join(row["flags"]) or "no flag"
                print(f"{row['seconds']:6.1f} s  {row['key']}  {typed}: {outcome(known[row['key']], row)}", flush=True)


def _there(entries: list[Entry], repos: Path) -> Iterator[Entry]:
    """The entries whose file is in the folder; reports the others, and checkouts at a different commit."""
    for entry in entries:
        top = repos / entry.repo.replace("/", "+")
        if not (top / entry.file).is_file():
            print(f"left out, not in {repos.name}: {entry.key}", file=sys.stderr)
            continue
        if entry.commit and (top / ".git").exists():
            command = ["git", "-C", str(top), "rev-parse", "HEAD"]
            head = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            if head and head != entry.commit:
                print(f"{entry.repo} is at {head[:9]}, the list at {entry.commit[:9]}", file=sys.stderr)
        yield entry


def _file_name(entry: Entry, flags: tuple[str, ...]) -> str:
    return re.sub(r"[^\w.+-]", "_", f"{entry.key.replace('/', '+')}-{'-'.join(flags) or 'first'}") + ".txt"


def _kept(path: Path) -> dict[Key, Row]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["key"], tuple(row["flags"])): row for row in rows}


if __name__ == "__main__":
    sys.exit(main())
