"""Whether QuacK helps: small language models trained with it, with its rivals and with nothing.

    python -m benchmarks.stability run                      the grid, 2 hours and a half on 2 cores; it resumes
    python -m benchmarks.stability run --minutes 9          a piece of it; the same command goes on
    python -m benchmarks.stability run --long               long runs at two points of the grid
    python -m benchmarks.stability report                   docs/stability.md and its pictures
    python -m benchmarks.stability run --preset gpu-125m --jobs 1 --minutes 9 --text FILE

The presets for GPUs have not been run on one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.stability.grid import PRESETS
from benchmarks.stability.pool import run_all
from benchmarks.stability.records import Records
from benchmarks.stability.text import of_file, standard_library

ROOT = Path(__file__).parents[2]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status is 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the runs that the file of results has not")
    run.add_argument("--preset", choices=PRESETS, default="cpu", help="sizes and grid")
    run.add_argument("--long", action="store_true", help="the long runs instead of the grid")
    run.add_argument("--jobs", type=_positive, default=2, help="processes, of one thread each on a CPU")
    run.add_argument("--minutes", type=_minutes, help="stop after so many; the same command goes on")
    run.add_argument("--text", type=Path, help="a file to train on, instead of Python's standard library")
    report = commands.add_parser("report", help="write tables and pictures of the results")
    report.add_argument(
        "--docs", type=Path, default=ROOT / "docs", help="folder of stability.md and pictures/stability"
    )
    for command in (run, report):
        command.add_argument("--results", type=Path, help="file of results; benchmarks/results/stability_PRESET.jsonl")
    options = parser.parse_args(argv)
    if options.command == "report":
        from benchmarks.stability.report import write_report  # imports matplotlib, which runs do not need

        write_report(Records.read(options.results or _results("cpu")), options.docs)
        return 0
    setup = PRESETS[options.preset]
    if setup.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--preset {options.preset} needs a GPU, and torch sees none; choose --preset cpu")
    text = standard_library() if options.text is None else of_file(options.text, setup.positions)
    records = Records.open(options.results or _results(options.preset), options.preset, setup, text)
    return 1 if run_all(list(setup.runs(options.long)), records, setup, text, options.jobs, options.minutes) else 0


def _results(preset: str) -> Path:
    return ROOT / "benchmarks" / "results" / f"stability_{preset.replace('-', '_')}.jsonl"


def _positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of processes; give 1 or more")
    return number


def _minutes(word: str) -> float:
    minutes = float(word)
    if not minutes >= 0:
        raise argparse.ArgumentTypeError(f"{word!r} is no time; give minutes, 0 or more")
    return minutes


if __name__ == "__main__":
    sys.exit(main())
