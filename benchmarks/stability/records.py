"""Results on disk: a file of JSON lines; incomplete lines are dropped.

The first line has the settings that all runs of the file share; runs with other settings are refused. Each further line
is one run.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.stability.grid import Run, Setup
from benchmarks.stability.text import Text
from benchmarks.stability.train import Curves, Result


@dataclass(frozen=True)
class Record:
    """One run and its result."""

    run: Run
    result: Result


@dataclass(frozen=True)
class Records:
    """A file of results.

    Attributes:
        path: The file.
        common: The settings that all its runs share.
    """

    path: Path
    common: dict[str, Any]

    @classmethod
    def open(cls, path: Path, preset: str, setup: Setup, text: Text) -> Records:
        """Open a file for writing; create it if there is none.

        Raises:
            SystemExit: It has runs with other settings, or is not a file of results.
        """
        # Round trip through JSON, which turns tuples into lists, for the comparison.
        common = json.loads(json.dumps({
            "preset": preset,
            "setup": asdict(setup),
            "text": text.digest,
            "torch": torch.__version__.partition("+")[0],
            "python": platform.python_version(),
        }))  # fmt: skip
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(common) + "\n")
        there = cls.read(path)
        different = [key for key in common if there.common.get(key) != common[key]]
        if different:
            raise SystemExit(
                f"--results {str(path)!r} has runs with another {' and '.join(different)}; give another file "
                "(make experiment RESULTS=mine.jsonl)"
            )
        there._drop_part()
        return there

    @classmethod
    def read(cls, path: Path) -> Records:
        """Open a file for reading.

        Raises:
            SystemExit: It does not exist, or is not a file of results.
        """
        try:
            with path.open() as file:
                common = json.loads(file.readline())
            return cls(path, common | {"preset": common["preset"]})
        except OSError as error:
            raise SystemExit(f"results {str(path)!r} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"{str(path)!r} is no file of results; `run` writes one") from None

    def __iter__(self) -> Iterator[Record]:
        """The runs; an incomplete last line is ignored."""
        for line in self.path.read_bytes().splitlines(keepends=True)[1:]:
            if line.endswith(b"\n"):
                d = json.loads(line)
                yield Record(Run.from_dict(d["run"]), _result(d["result"]))

    def add(self, record: Record) -> None:
        """Append a run."""
        d = {"run": record.run.to_dict(), "result": asdict(record.result)}
        d["result"] |= {"loss": _json(record.result.loss), "largest": _json(record.result.largest)}
        with self.path.open("ab") as file:
            file.write((json.dumps(d, separators=(",", ":"), allow_nan=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def checkpoint(self, run: Run) -> Path:
        """Path of the checkpoint of an interrupted run."""
        return self.path.with_suffix(".checkpoints") / f"{run.key}.pt"

    def _drop_part(self) -> None:
        """Remove an incomplete last line, left by a process that was killed while writing."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)


def _json(number: float) -> float | None:
    """A rounded number for JSON; None if it is not finite."""
    return round(number, 5) if math.isfinite(number) else None


def _result(d: dict[str, Any]) -> Result:
    numbers = {key: math.nan if d[key] is None else d[key] for key in ("loss", "largest")}
    return Result(**{**d, **numbers, "curves": Curves(**d["curves"]), "seconds": d["seconds"]})
