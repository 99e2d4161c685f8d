"""One try of one entry, in its own process: inspect, convert, then verify the layout.

In: an entry and the flags of the try. Out: a row, plain data, which is reported again after each part of the work. The
output of the process goes to a file.

The command line is run as a user would (`quack_fx.cli.app.main`). Two things differ from three separate commands:
convert and the verification use the layout that inspect found instead of finding it again; and the environment that
the file needed stays open until the process ends.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.sweeping.processes import Ended, Tell, run_apart
from benchmarks.wilding.entries import Entry

SECONDS = 180
"""Time limit for each part of the work."""
BYTES = 14 << 30
TOO_LARGE = "too large"
"""Reason for not proving a model: its copy or its forward does not fit in memory."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Try:
    """An entry with the flags of a try, the folder of repositories, and the file for the printed output."""

    entry: Entry
    flags: tuple[str, ...]
    repos: Path
    output: Path

    def key(self) -> tuple[str, tuple[str, ...]]:
        """The unique key of a try."""
        return self.entry.key, self.flags


def attempt_all(tries: Iterable[Try], jobs: int) -> Iterator[Row]:
    """Rows of tries, as they finish."""
    for name in ("torch", "torch._dynamo", "quack_fx.find", "quack_fx.targets", "quack_fx.report", "quack_fx.prove"):
        importlib.import_module(name)  # import once in the parent, for all processes
    for name in ("quack_fx.train.convert", "quack_fx.cli.app", "quack_fx.cli.proof"):
        importlib.import_module(name)
    # The alarm of each part comes first; this limit is for a process that ignores it.
    for ended in run_apart(_attempt, tries, jobs, 3 * SECONDS + 30, BYTES):
        yield _final(ended)


def empty(one: Try) -> Row:
    """The initial row of a try."""
    row: Row = {"key": one.entry.key, "flags": list(one.flags), "part": "inspect", "code": None, "line": ""}
    row |= {"traceback": "", "model": "", "how": "", "sites": None, "skipped": [], "assumed": "", "missing": ""}
    row |= {"rows_checked": 0, "rows_wrong": [], "converted": False, "convert_line": "", "proved": None, "open": ""}
    return row | {"wrong": "", "stopped": "", "seconds": 0.0}


# ---- inside the process ----------------------------------------------------------------------------------------------


def _attempt(one: Try, tell: Tell) -> None:
    """Inspect, convert, prove; report the row after each."""
    _alone(one)
    import torch

    torch.set_num_threads(1)
    row = empty(one)
    tell(row)
    app: Any = importlib.import_module("quack_fx.cli.app")
    app.open_command = contextlib.nullcontext  # keep the environment of the file open for the next parts
    inspect: Any = importlib.import_module("quack_fx.cli.inspect")
    findings: list[Any] = []
    find = inspect.find

    def kept(*args: Any, **kwargs: Any) -> Any:
        findings.append(find(*args, **kwargs))
        return findings[-1]

    inspect.find = kept
    signal.alarm(SECONDS)
    row["code"] = _run(app.main, ["inspect", *one.entry.words(one.flags)])
    signal.alarm(0)
    _flush()
    text = one.output.read_text("utf-8", "replace")
    row |= {"line": _told(text, one), "traceback": _traceback(text), "part": ""}
    if not findings:
        return tell(row)
    finding = findings[-1]
    notes = dict(finding.facts.notes)
    row |= {"model": type(finding.target.model).__name__, "how": f"{finding.facts.title}; {finding.facts.how}"}
    row |= {"sites": len(finding.layout.sites), "skipped": [entry.code for entry in finding.layout.skipped]}
    row |= {"assumed": notes.get("assumed", ""), "missing": notes.get("missing", "")}
    checked, wrong = compare_rows(one.entry, finding.layout, finding.facts.shapes)
    row |= {"rows_checked": checked, "rows_wrong": wrong}
    if not finding.layout.sites:
        return tell(row)
    tell(row | {"part": "convert"})
    signal.alarm(SECONDS)
    row |= _convert(app, finding, one, bool(row["assumed"])) | {"part": "proof"}
    tell(row)
    signal.alarm(SECONDS)
    row |= _proof(finding) | {"part": ""}
    signal.alarm(0)
    _flush()
    row["traceback"] = _traceback(one.output.read_text("utf-8", "replace"))
    tell(row)


def _alone(one: Try) -> None:
    """Make this process like a user's: working directory, arguments, output, no modules of this package."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    file = os.open(one.output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, number in ((null, 0), (file, 1), (file, 2)):
        os.dup2(source, number)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    ours = str(Path(__file__).resolve().parent.parent.parent)
    sys.path[:] = [str(Path(sys.executable).parent), *(p for p in sys.path if p and Path(p).resolve() != Path(ours))]
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]
    sys.argv = ["quack-fx", "inspect", *one.entry.words(one.flags)]
    os.chdir(one.entry.folder(one.repos))


def _run(main: Any, words: list[str]) -> int:
    try:
        return int(main(words))
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()


def _convert(app: Any, finding: Any, one: Try, assumed: bool) -> Row:
    command: Any = importlib.import_module("quack_fx.cli.convert")
    command.find = lambda *args, **kwargs: finding
    _flush()
    start = one.output.stat().st_size
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "train.py")
        words = ["convert", *one.entry.words(one.flags), "-o", str(file), *(["--assume"] if assumed else [])]
        if _run(app.main, words) == 0:
            try:
                compile(file.read_text("utf-8"), str(file), "exec")
                return {"converted": True}
            except SyntaxError:
                traceback.print_exc()
    _flush()
    return {"convert_line": _told(one.output.read_bytes()[start:].decode("utf-8", "replace"), one)}


def _proof(finding: Any) -> Row:
    from quack_fx.cli.proof import prove
    from quack_fx.errors import VerifyError
    from quack_fx.prove import CannotRun, TooLarge

    try:
        report, where = prove(finding, lambda text: None)
    except TooLarge:
        return {"open": TOO_LARGE}
    except CannotRun as error:
        return {"open": TOO_LARGE if "allocate memory" in str(error) else f"cannot run: {_one_line(str(error))}"}
    except VerifyError as error:
        return {"wrong": _one_line(str(error))}
    except MemoryError:
        return {"open": TOO_LARGE}
    except BaseException:
        traceback.print_exc()
        return {"open": "the proof crashed"}
    reasons = "; ".join(sorted({_one_line(entry.reason) for entry in report.not_proved}))
    return {"proved": len(report.proved), "proved_on": where, "open": reasons}


def compare_rows(entry: Entry, layout: Any, shapes: Any) -> tuple[int, list[str]]:
    """Compare a layout with the rows that a person wrote down.

    Returns:
        The number of sites with rows in the list, and the names of those that differ.
    """
    checked, wrong = 0, []
    for site in layout.sites:
        for pattern, sides in entry.rows.items():
            if not re.search(pattern, site.name):
                continue
            checked += 1
            if not all(_same(site, side, *told, shapes) for side, told in sides.items()):
                wrong.append(site.name)
    return checked, wrong


def _same(site: Any, side: str, end: str, rows: str, shapes: Any) -> bool:
    """Whether one side has exactly one block next to the logits, and it is the one that was written down."""
    outer = {getattr(term, side)[0] for term in site.terms}
    if len(outer) != 1:
        return False
    block = getattr(site, side)[outer.pop()]
    if not block.param.endswith(end):
        return False
    names = {"d": site.head_dim, "n": shapes[block.param][block.axis]}
    for h, ranges in enumerate(block.heads):
        start, stop = (eval(part, {"__builtins__": {}}, {"h": h, **names}) for part in rows.split(":"))
        if ranges != ((start, stop),):
            return False
    return True


# ---- text ------------------------------------------------------------------------------------------------------------


def _told(text: str, one: Try) -> str:
    """The last error line that quack-fx printed, without paths of this machine."""
    lines = [line for line in text.splitlines() if line.startswith("quack-fx: ")]
    return _one_line(lines[-1].removeprefix("quack-fx: ") if lines else "", one)


def _one_line(text: str, one: Try | None = None) -> str:
    if one is not None:
        folder = str(one.entry.folder(one.repos))
        text = text.replace(f"{folder.rstrip('/')}/", "").replace(folder.rstrip("/"), "the repository")
    return " ".join(text.split())[:1500]


def _traceback(text: str) -> str:
    """The last two locations of the last printed traceback, and its error; "" if there is none."""
    at = text.rfind("Traceback (most recent call last)")
    if at < 0:
        return ""
    lines = text[at:].splitlines()
    places = re.findall(r'^ +File "([^"]*)", line (\d+)', text[at:], re.MULTILINE)
    short = [f"{'/'.join(Path(file).parts[-3:])}:{line}" for file, line in places[-2:]]
    error = next((line for line in lines[1:] if line[:1].strip()), "")
    return _one_line(f"{', '.join(short)}: {error}")


def _final(ended: Ended[Try]) -> Row:
    row = ended.told or empty(ended.item)
    if ended.reason:
        alarm = ended.reason.endswith("SIGALRM")
        stopped = f"stopped after {SECONDS} s" if alarm else ended.reason
        row["stopped"] = f"{row['part'] or 'end'}: {stopped}"
        with contextlib.suppress(OSError):
            row["traceback"] = row["traceback"] or _traceback(ended.item.output.read_text("utf-8", "replace"))
    return row | {"seconds": round(ended.seconds, 1)}
