"""The results over public repositories as a Markdown page.

In: results. Out: totals, the environment, a line for each entry, the output of first commands that fail.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.wilding.attempt import TOO_LARGE
from benchmarks.wilding.results import WORKS, Result, outcome

_HEAD = """# Public repositories as they are

Written by `make wild`. For each file, what a first command does: `quack-fx inspect FILE`, typed in a checkout of its
repository (or in the folder that its own code is run from) with no flag, in a process of its own
({limits}).
Where that does not work, once more with one flag, `:NAME`, `--build` or `--inputs`, then with two; a file of which
the command took another model than the one that is meant does not count as working. What works is proved by gradients
(`--verify`) and converted, with `--assume` where sizes were assumed. Repositories, commits, flags and what a person
read in each file are in `benchmarks/wild.json`.

*Missed* are attentions that were neither found nor refused with a reason; they are counted where the number in the
model is known for certain. *Refused* counts whatever is refused with a reason; not all of that is attention.

The files on the list were looked at while the command was made to work on them, so the sums say more of the list than
of the next repository; `docs/targets.md` says what others came to.
"""

DOMAINS = ("language", "vision", "audio", "time series", "recommender", "biology", "rl")

_PACKAGES = """transformers diffusers x-transformers einops timm torchvision torchaudio numpy scipy pandas scikit-learn
matplotlib tiktoken tokenizers sentencepiece safetensors omegaconf ml-collections tensorboard lightning triton
flash-attn xformers fairscale deepspeed apex mmcv reformer-pytorch gym biopython""".split()
"""Packages that the repositories import besides torch."""


def markdown(results: Iterable[Result], absent: int, limits: str) -> str:
    """The page.

    Arguments:
        results: Results of the entries.
        absent: Number of further entries on the list.
        limits: The limits of each process, in words.

    Returns:
        Markdown.
    """
    place = {domain: at for at, domain in enumerate(DOMAINS)}
    ordered = sorted(results, key=lambda r: (place.get(r.entry.domain, len(place)), r.entry.key.lower()))
    parts = [_HEAD.format(limits=limits), _environment(), _sums(ordered, absent), _domains(ordered), _refusals(ordered)]
    parts += [_alarms(ordered), _entries(ordered), _failures(ordered)]
    return "\n".join(part for part in parts if part)


# ---- sums ------------------------------------------------------------------------------------------------------------


def _environment() -> str:
    there, missing = [f"torch {importlib.metadata.version('torch')}"], []
    for name in _PACKAGES:
        try:
            there.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return f"Python {platform.python_version()}, {', '.join(there)}. Not installed: {', '.join(missing)}.\n"


def _sums(results: Sequence[Result], absent: int) -> str:
    words = Counter(r.word for r in results)
    known = [r for r in results if r.expected is not None]
    working = [r for r in results if r.works]
    found, proved = sum(r.found for r in working), sum(r.proved for r in working)
    lines: list[list[object]] = [
        ["entries", f"{len(results)}" + (f" ({absent} more on the list were not run)" if absent else "")],
        ["work with no flag", words[WORKS]],
        ["work with one flag", words["works with one flag"]],
        ["work with two flags", words["works with two flags"]],
        ["do not work", len(results) - len(working)],
        ["found", f"{found} attentions in {len(working)} files"],
        ["proved", f"{proved}, {_unproved(working)}"],
        ["missed", f"{sum(r.missed for r in known)} of {sum(r.expected or 0 for r in known)} in {len(known)} files"],
        ["found, none by hand", sum(r.surplus for r in known)],
        ["rows compared with those read by hand", f"of {sum(r.best['rows_checked'] for r in working)} attentions"],
        ["**wrong rows**", f"**{sum(len(r.wrong) for r in results)}**"],
        ["**tracebacks**", f"**{sum(len(r.tracebacks) for r in results)}**"],
        ["converted", f"{sum(r.best['converted'] for r in working)} of {sum(bool(r.found) for r in working)} files"],
        ["sizes assumed", f"{sum(bool(r.best['assumed']) for r in working)} files"],
        ["packages stood in for", f"{sum(bool(r.best['missing']) for r in working)} files"],
    ]
    return "## Sums\n\n" + _table(["", ""], lines)


def _unproved(results: Sequence[Result]) -> str:
    large = sum(r.found for r in results if r.best["open"] == TOO_LARGE)
    rest = sum(r.found - r.proved for r in results) - large
    return f"{large} in models too large to copy, {rest} open for another reason"


def _domains(results: Sequence[Result]) -> str:
    lines = []
    for domain in dict.fromkeys(r.entry.domain for r in results):
        some = [r for r in results if r.entry.domain == domain]
        words = Counter(r.word for r in some)
        flagged = [words["works with one flag"], words["works with two flags"]]
        lines.append([_named(domain), len(some), words[WORKS], *flagged, sum(not r.works for r in some)])
    heads = ["domain", "entries", "no flag", "one flag", "two flags", "does not work"]
    return "## Domains\n\n" + _table(heads, lines)


def _refusals(results: Sequence[Result]) -> str:
    first = Counter(outcome(r.entry, r.first) for r in results if outcome(r.entry, r.first) != WORKS)
    still = Counter(outcome(r.entry, r.first) for r in results if not r.works)
    if not first:
        return ""
    lines = [[word, count, still[word]] for word, count in first.most_common()]
    heads = ["first command", "entries", "of these with no flag that helps"]
    return "## Why first commands fail\n\n" + _table(heads, lines)


# ---- entries ---------------------------------------------------------------------------------------------------------


def _alarms(results: Sequence[Result]) -> str:
    lines: list[list[object]] = []
    for r in results:
        lines += [[_code(r.entry.key), "**WRONG**", text] for text in r.wrong]
        lines += [[_code(r.entry.key), "**TRACEBACK**", text] for text in r.tracebacks]
        if r.missed or r.surplus:
            lines.append([_code(r.entry.key), "count", f"{r.expected} by hand, {r.found} found, {r.refused} refused"])
    return "## To look at\n\n" + _table(["entry", "what", ""], lines) if lines else ""


def _entries(results: Sequence[Result]) -> str:
    lines = []
    for r in results:
        counts, proved, converted = "", "", ""
        if r.works:
            counts = f"{r.found} / {r.refused} / {r.missed if r.expected is not None else '?'}"
            proved = f"{r.proved} of {r.found}" if r.found else ""
            converted = "" if not r.found else "yes" if r.best["converted"] else "no"
        flags = " ".join(":NAME" if flag == "name" else f"--{flag}" for flag in r.flags) if r.works else "-"
        first = outcome(r.entry, r.first)
        seconds = f"{sum(row['seconds'] for row in r.tries):.0f}"
        cells = [_named(r.entry.domain), _code(r.entry.key), first, flags, counts, proved, converted]
        lines.append([*cells, _note(r), seconds])
    heads = "domain|file|first command|flags|found / refused / missed|proved|converted|note|seconds of all tries"
    return "## Entries\n\n" + _table(heads.split("|"), lines)


def _note(r: Result) -> str:
    parts = [r.entry.note]
    if r.works:
        codes = Counter(r.best["skipped"])
        parts.append("refused: " + ", ".join(f"{n} {code}" for code, n in codes.items()) if codes else "")
        parts.append(f"assumed {_short(r.best['assumed'])}" if r.best["assumed"] else "")
        parts.append(f"stand-ins: {r.best['missing'].split(' cannot')[0]}" if r.best["missing"] else "")
        parts.append(f"not proved: {_short(r.best['open'])}" if r.best["open"] else "")
        parts.append(f"not converted: {_short(r.best['convert_line'])}" if r.best["convert_line"] else "")
        parts.append(f"stopped in {r.best['stopped']}" if r.best["stopped"] else "")
    return "; ".join(part for part in parts if part)


def _failures(results: Sequence[Result]) -> str:
    lines = []
    for r in results:
        if (word := outcome(r.entry, r.first)) == WORKS:
            continue
        told = r.first["line"] or r.first["stopped"] or r.first["traceback"]
        if word == "takes another model":
            told = f"shows {r.first['how']}"
        helps = " ".join(r.flags) if r.works else "nothing tried" if len(r.tries) == 1 else "nothing that was tried"
        lines.append([_code(r.entry.key), told, helps])
    if not lines:
        return ""
    return "## What first commands that fail print\n\n" + _table(["file", "line", "what helps"], lines, 500)


# ---- text ------------------------------------------------------------------------------------------------------------


def _named(domain: str) -> str:
    return "RL" if domain == "rl" else domain


def _code(text: str) -> str:
    return f"`{text}`"


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _table(heads: Sequence[str], lines: Iterable[Sequence[object]], width: int = 400) -> str:
    cells = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in line] for line in lines]
    cells = [[cell if len(cell) <= width else f"{cell[: width - 3]}..." for cell in line] for line in cells]
    return "".join("| " + " | ".join(row) + " |\n" for row in [heads, ["---"] * len(heads), *cells])
