"""The rows of a sweep as a Markdown page.

In: rows. Out: totals, refusals with reasons, models that did not run, and a line for each family of models.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]

_DISTRIBUTIONS = {"open-clip": "open_clip_torch"}
"""Distribution names of packages, if they differ from the package name."""

_HEAD = """# Sweep over the models of other packages

Written by `make sweep`. Each model is built small, with every kind of layer that its configuration has, and run on
random inputs in a process of its own ({limits}).
The attentions that run are counted by watching the forward itself, without the finder: calls of fused attention, and
softmaxes of products of computed tensors that weigh others. Each site's rows are proved by gradients
(`verify_qk_pairs`). Models that could not be built or counted are in no sum of attentions; parts of a model that its
inputs did not reach are told of with its family.

Models of transformers are all classes that its AutoModel mappings name. One of timm stands for all entry points that
differ in numbers alone.
"""

_STATUSES = {
    "proved": "every site is proved",
    "not proved": "no claim is wrong, but some cannot be decided",
    "refuted": "a claim is wrong",
    "refused": "all that looks like attention is refused with a reason",
    "no attention": "nothing looks like attention",
    "timeout": "stopped at the limit of time or memory",
    "capture failed": "the forward cannot be recorded",
    "finder crashed": "an error of quack-fx",
    "verify crashed": "an error of quack-fx",
    "died": "the process died",
    "not built": "the sweep has no configuration or inputs that fit",
    "does not run here": "the model needs a package or files, or fails by itself",
}


def markdown(rows: Iterable[Row], limits: str) -> str:
    """The page.

    Arguments:
        rows: Rows of a sweep.
        limits: The limits of each process, in words.

    Returns:
        Markdown.
    """
    ordered = sorted(rows, key=lambda row: (row["package"], row["family"].lower(), row["name"].lower()))
    parts = [_HEAD.format(limits=limits), _versions(ordered), _totals(ordered), _outcomes(ordered), _codes(ordered)]
    parts += [_failures(ordered), _families(ordered)]
    return "\n".join(part for part in parts if part)


# ---- sums ------------------------------------------------------------------------------------------------------------


def _in_sites(row: Row) -> int:
    return min(row["ran"] or 0, row["calls"])


def _refused(row: Row) -> int:
    return max(0, (row["ran"] or 0) - _in_sites(row) - len(row["silent"]))


def _idle(row: Row) -> float:
    """Fraction of the model's parameters, counted by name, that its inputs did not reach."""
    return float(row["untouched"] / row["parameters"]) if row["parameters"] else 0.0


def _versions(rows: Sequence[Row]) -> str:
    names = ["torch", *sorted({row["package"] for row in rows} - {"torch"})]
    versions = [f"{name} {importlib.metadata.version(_DISTRIBUTIONS.get(name, name))}" for name in names]
    return f"Python {platform.python_version()}, {', '.join(versions)}.\n"


def _totals(rows: Sequence[Row]) -> str:
    def line(name: str, some: Sequence[Row]) -> list[object]:
        ran, found = sum(row["ran"] or 0 for row in some), sum(map(_in_sites, some))
        share = f"{100 * found / ran:.1f} %" if ran else ""
        silent, refuted = sum(len(row["silent"]) for row in some), sum(row["status"] == "refuted" for row in some)
        sites, proved = sum(len(row["sites"]) for row in some), sum(row["proved"] for row in some)
        counted = sum(row["ran"] is not None for row in some)
        return [name, len(some), counted, ran, found, share, sum(map(_refused, some)), silent, sites, proved, refuted]

    packages = _grouped(rows, lambda row: row["package"])
    lines = [line(name, some) for name, some in packages.items()]
    lines.append([f"**{cell}**" if cell != "" else "" for cell in line("all", rows)])
    heads = (
        "package|models|counted|attentions run|in sites|share|refused with a reason|missed|sites|proved|models refuted"
    )
    return "## Totals\n\n" + _table(heads.split("|"), lines)


def _outcomes(rows: Sequence[Row]) -> str:
    count = Counter(row["status"] for row in rows)
    lines = [[status, count[status], text] for status, text in _STATUSES.items() if count[status]]
    return "## Outcomes\n\n" + _table(["outcome", "models", "what it means"], lines)


def _codes(rows: Sequence[Row]) -> str:
    entries = [(entry["code"], entry["reason"], row) for row in rows for entry in row["skipped"]]
    lines = []
    for code, number in Counter(code for code, _, _ in entries).most_common():
        models = {row["name"]: row for other, _, row in entries if other == code}
        reason = Counter(reason for other, reason, _ in entries if other == code).most_common(1)[0][0]
        lines.append([f"`{code}`", number, len(models), _some(models), reason])
    if not lines:
        return ""
    return "## Refused\n\nNot all of these are attention: a router or a linear attention is refused, too.\n\n" + _table(
        ["code", "entries", "models", "for example", "most frequent reason"], lines
    )


def _failures(rows: Sequence[Row]) -> str:
    bad = [row for row in rows if row["status"] not in ("proved", "refused", "no attention")]
    bad += [row for row in rows if row["silent"] and row not in bad]
    if not bad:
        return ""
    lines = [[row["package"], f"`{row['name']}`", row["status"], _why(row)] for row in bad]
    return "## Neither proved nor refused\n\n" + _table(["package", "model", "outcome", "why"], lines)


def _why(row: Row) -> str:
    reasons = Counter(reason for _, reason in row["open"])
    open_sites = "; ".join(f"{number} of {len(row['sites'])} sites: {reason}" for reason, number in reasons.items())
    silent = f"missed in {', '.join(sorted(set(row['silent'])))}" if row["silent"] else ""
    return "; ".join(part for part in (row["error"], open_sites, silent) if part)


def _families(rows: Sequence[Row]) -> str:
    lines = []
    for (package, family), some in _grouped(rows, lambda row: (row["package"], row["family"])).items():
        codes = Counter(entry["code"] for row in some for entry in row["skipped"])
        refused = ", ".join(f"{number} {code}" for code, number in codes.most_common())
        outcomes = Counter(row["status"] for row in some)
        told = ", ".join(
            status if len(some) == 1 else f"{number} {status}" for status, number in outcomes.most_common()
        )
        sites, proved = sum(len(row["sites"]) for row in some), sum(row["proved"] for row in some)
        ran, idle = sum(row["ran"] or 0 for row in some), max(map(_idle, some))
        unreached = f"{100 * idle:.0f} %" if idle >= 0.05 else ""
        lines.append([package, family, len(some), ran, sites, proved, refused, unreached, told])
    heads = "package|family|models|attentions run|sites|proved|refused|parameters not reached|outcome"
    return "## Families\n\n" + _table(heads.split("|"), lines)


# ---- text ------------------------------------------------------------------------------------------------------------


def _grouped(rows: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _some(names: Iterable[str]) -> str:
    first = sorted(names)
    return ", ".join(f"`{name}`" for name in first[:3]) + (", ..." if len(first) > 3 else "")


def _table(heads: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    cells = [[" ".join(str(cell).replace("|", "\\|").split())[:300] for cell in line] for line in lines]
    rows = [heads, ["---"] * len(heads), *cells]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
