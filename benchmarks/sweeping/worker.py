"""Evaluates one candidate of the sweep.

In: a `Candidate`. Out: its row, plain data: what was found, proved and refused, what failed and who is at fault. The
row is reported again after each part of the work; if the process is killed, the last report shows the results so far
and the part in which it stopped.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks.sweeping.candidate import Candidate, CannotBeRunError
from benchmarks.sweeping.count import attentions, first_names
from benchmarks.sweeping.processes import Ended, Tell, run_apart
from quack_fx.errors import CaptureError, VerifyError
from quack_fx.find import find
from quack_fx.layout import QKLayout
from quack_fx.prove import CannotRun, verify_qk_pairs

SECONDS = 60
BYTES = 4 << 30

Row = dict[str, Any]


def judge_all(candidates: Iterable[Candidate], jobs: int) -> Iterator[Row]:
    """Rows of candidates, as they finish; each is evaluated in its own process."""
    _warm_up()
    for ended in run_apart(judge, candidates, jobs, SECONDS, BYTES):
        yield _final(ended)


def _warm_up() -> None:
    """Import what every process needs, once in the parent.

    Nothing is proved here: after a backward pass, a process must not fork another one that runs one.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("transformers.modeling_utils")
    x = torch.zeros(1, 2, 4)
    find(torch.nn.MultiheadAttention(4, 2), (x, x, x))


def judge(candidate: Candidate, tell: Tell) -> None:
    """Build, find, count and prove; report the row after each."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row = _row(candidate)
    tell(row)
    try:
        model, args, kwargs = candidate.build()
    except (CannotBeRunError, ImportError) as error:
        return tell(row | {"status": "does not run here", "error": _text(error)})
    except BaseException as error:
        return tell(row | {"status": "not built", "error": _text(error)})
    row |= {"part": "find", "parameters": len(dict(model.named_parameters()))}
    tell(row)
    try:
        layout = find(model, args, kwargs).layout
    except CaptureError as error:
        return tell(row | {"status": "capture failed", "error": _text(error)})
    except BaseException as error:
        return tell(row | {"status": "finder crashed", "error": _text(error)})
    row |= _found(layout) | {"part": "count"}
    tell(row)
    try:
        ran = attentions(model, args, kwargs)
        row |= {"ran": sum(ran.values()), "silent": silent(layout, ran, first_names(model))}
    except BaseException as error:
        row["not_counted"] = _text(error)
    row["part"] = "verify"
    tell(row)
    if layout.sites:
        row |= _proof(model, layout, args, kwargs)
    else:
        row["status"] = "refused" if layout.skipped else "no attention"
    tell(row | {"part": ""})


def silent(layout: QKLayout, ran: Counter[str], names: dict[str, str]) -> list[str]:
    """Modules in which more attentions ran than the layout lists as sites or skipped.

    A site's module need not be the one in which its softmax ran: one may be inside the other, or they may be different
    modules with the same weights.

    Arguments:
        layout: Sites and skipped attentions.
        ran: Number of attentions that ran, by module.
        names: One name for all modules with the same weights.

    Returns:
        The modules, once for each attention that is missing.
    """
    left, executed = Counter[str](), Counter[str]()
    for name, count in ran.items():
        executed[names[name]] += count
    for site in layout.sites:
        name = names.get(site.name, site.name)
        turns = executed[name] // site.calls if executed[name] % site.calls == 0 else 1
        # A loop over heads is one site, with a softmax for each head or each group of heads.
        left[name] += site.calls * (turns if turns > 1 and site.query_heads % turns == 0 else 1)
    refused = {names.get(entry.name, entry.name) for entry in layout.skipped}
    missing = executed - left
    left -= executed
    result: list[str] = []
    for name, count in missing.items():
        # The product and the softmax may be separate modules inside the attention module.
        # Or logits are passed to a sibling module, which computes its own attention weights from them.
        near = [other for other in left if _around(name, other) or f"{name}.".startswith(f"{_parent(other)}.")]
        for other in near:
            taken = min(count, left[other])
            left[other] -= taken
            count -= taken
        if count and not any(name == other or _around(name, other) for other in refused):
            result += [name] * count
    return result


def _around(name: str, other: str) -> bool:
    """Whether one of two modules is inside the other."""
    return name.startswith(f"{other}.") or other.startswith(f"{name}.") or not name or not other


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _found(layout: QKLayout) -> Row:
    return {
        "sites": [site.name for site in layout.sites],
        "calls": sum(site.calls for site in layout.sites),
        "skipped": [entry.to_dict() for entry in layout.skipped],
        "untouched": len(layout.untouched),
        "qk_norm": sum(bool(site.qk_norm) for site in layout.sites),
    }


def _proof(model: torch.nn.Module, layout: QKLayout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Row:
    try:
        report = verify_qk_pairs(model, layout, *args, **kwargs)
    except CannotRun as error:
        return {"status": "not proved", "error": _text(error)}
    except VerifyError as error:
        return {"status": "refuted", "error": _text(error)}
    except BaseException as error:
        return {"status": "verify crashed", "error": _text(error)}
    return {
        "proved": len(report.proved),
        "open": [[entry.name, entry.reason] for entry in report.not_proved],
        "status": "proved" if report.complete else "not proved",
    }


def _row(candidate: Candidate) -> Row:
    row: Row = {"package": candidate.package, "family": candidate.family, "name": candidate.name}
    row |= {"status": "", "error": "", "not_counted": "", "part": "build"}
    row |= {"parameters": 0, "untouched": 0}
    return row | {"sites": [], "calls": 0, "proved": 0, "open": [], "skipped": [], "ran": None, "silent": []}


def _final(ended: Ended[Candidate]) -> Row:
    row = ended.told or _row(ended.item)
    if not row["status"]:
        row |= {"status": "timeout" if "stopped" in ended.reason else "died", "error": f"{row['part']}: {ended.reason}"}
    return row | {"seconds": round(ended.seconds, 1)}


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
