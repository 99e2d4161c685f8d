"""One candidate, judged: in a forked process with limits on time and memory.

In: a `Candidate`. Out: a row, plain data: what was found, what was proved, what was refused, what went wrong and whose
fault it is.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import time
from typing import Any

import torch

from benchmarks.sweeping.candidate import Candidate
from benchmarks.sweeping.count import attentions
from quack_fx.errors import CaptureError, VerifyError
from quack_fx.find import find
from quack_fx.verify import CannotRun, verify_qk_pairs

SECONDS = 60
BYTES = 24 << 30
"""Address space, most of which libraries reserve and never touch."""

Row = dict[str, Any]


def judge_apart(candidate: Candidate) -> Row:
    """Row of a candidate, from a process of its own."""
    read, write = os.pipe()
    start = time.time()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            row = judge(candidate)
        with os.fdopen(write, "w") as pipe:
            json.dump(row, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    row = json.loads(text) if text else _row(candidate, "timeout", f"stopped after {SECONDS} s or killed")
    return row | {"seconds": round(time.time() - start, 1)}


def judge(candidate: Candidate) -> Row:
    """Build, find, prove and count."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        model, args, kwargs = candidate.build()
    except BaseException as error:
        return _row(candidate, "not built", _text(error))
    try:
        layout = find(model, args, kwargs).layout
    except CaptureError as error:
        return _row(candidate, "capture failed", _text(error))
    except BaseException as error:
        return _row(candidate, "finder crashed", _text(error))
    row = _row(candidate, "no attention", "")
    row["sites"] = [site.name for site in layout.sites]
    row["calls"] = sum(site.calls for site in layout.sites)
    row["skipped"] = [entry.to_dict() for entry in layout.skipped]
    row["qk_norm"] = sum(bool(site.qk_norm) for site in layout.sites)
    if layout.skipped:
        row["status"] = "refused"
    if layout.sites:
        try:
            report = verify_qk_pairs(model, layout, *args, **kwargs)
            row["proved"] = len(report.proved)
            row["open"] = [[entry.name, entry.reason] for entry in report.not_proved]
            row["status"] = "proved" if report.complete else "not proved"
        except CannotRun as error:
            row |= {"status": "not proved", "error": _text(error)}
        except VerifyError as error:
            row |= {"status": "refuted", "error": _text(error)}
        except BaseException as error:
            row |= {"status": "verify crashed", "error": _text(error)}
    try:
        ran = attentions(model, args, kwargs)
    except BaseException as error:
        return row | {"error": row["error"] or f"not counted: {_text(error)}"}
    told = {site.name for site in layout.sites} | {entry.name for entry in layout.skipped}
    silent = [name for name in ran if name not in told and not any(_around(name, other) for other in told)]
    return row | {"ran": sum(ran.values()), "silent": silent}


def _around(name: str, other: str) -> bool:
    """Whether one of two modules is inside the other."""
    return name.startswith(f"{other}.") or other.startswith(f"{name}.") or not name or not other


def _row(candidate: Candidate, status: str, error: str) -> Row:
    row: Row = {"package": candidate.package, "family": candidate.family, "name": candidate.name}
    return row | {"status": status, "error": error, "sites": [], "calls": 0, "proved": 0, "open": [], "skipped": []}


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
