"""The result of each entry, from the rows of its tries.

In: an entry and its rows. Out: a `Result`: how the first command ended, which flags were needed, what was found,
refused, missed, proved and converted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.wilding.entries import Entry

Row = dict[str, Any]
Key = tuple[str, tuple[str, ...]]

WORKS = "works"
TRACEBACK = "TRACEBACK"
TIMEOUT = "timeout"

_KINDS = (
    (r"^\w+ is given a module as ", "parts of the model have to be given"),
    (r" has \d+ models ", "several models to choose from"),
    (r"^no model in |^no name |is not an nn\.Module|gives .*, not an nn\.Module", "no model in the file"),
    (r"cannot be imported|importing .* fails|^no file|^'.*' fails", "the file cannot be imported"),
    (r"StandInUsed|needs .* cannot be imported here", "needs a package that is not there"),
    (r"takes more than|too large", "too large"),
    (r"^building .* fails|say what it is: --build", "the model cannot be built"),
    (r"fails on every input|no inputs can be inferred|--inputs", "no inputs fit"),
)


def kind_of(line: str) -> str:
    """The kind of reason in a printed error line, in a few words."""
    return next((kind for pattern, kind in _KINDS if re.search(pattern, line)), "another reason")


def outcome(entry: Entry, row: Row) -> str:
    """How one try ended, in a few words; "works" if it reported the intended model."""
    if row["stopped"].startswith("inspect"):
        return TIMEOUT if "stopped after" in row["stopped"] else f"died ({row['stopped'].removeprefix('inspect: ')})"
    if row["sites"] is None:
        return TRACEBACK if row["traceback"] and not row["line"] else f"refused: {kind_of(row['line'])}"
    if row["code"] not in (0, 1) or (row["code"] == 1 and row["sites"]):
        return TRACEBACK if row["traceback"] else f"refused: {kind_of(row['line'])}"
    if entry.models and row["model"] not in entry.models:
        return "takes another model"
    if row["sites"] or entry.expected(tuple(row["flags"])) == 0:
        return WORKS
    return "refuses every attention" if row["skipped"] else "finds nothing"


@dataclass(frozen=True)
class Result:
    """Result of an entry.

    Attributes:
        entry: The entry.
        first: Row of the command without flags.
        best: Row of the first try that works; if none does, the row without flags.
        tries: All rows.
    """

    entry: Entry
    first: Row
    best: Row
    tries: Sequence[Row]

    @property
    def works(self) -> bool:
        """Whether any try works."""
        return outcome(self.entry, self.best) == WORKS

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags of the try that works."""
        return tuple(self.best["flags"])

    @property
    def word(self) -> str:
        """The outcome: works, with how many flags, or how the first command failed."""
        if not self.works:
            return outcome(self.entry, self.first)
        return (WORKS, "works with one flag", "works with two flags")[len(self.flags)]

    @property
    def expected(self) -> int | None:
        """Expected number of attentions, if it is known and a try works."""
        return self.entry.expected(self.flags) if self.works else None

    @property
    def found(self) -> int:
        """Number of attentions found."""
        return int(self.best["sites"] or 0) if self.works else 0

    @property
    def refused(self) -> int:
        """Number of refusals with a reason; not all of them need be attention."""
        return len(self.best["skipped"]) if self.works else 0

    @property
    def missed(self) -> int:
        """Number of attentions neither found nor refused."""
        return max(0, (self.expected or 0) - self.found - self.refused)

    @property
    def surplus(self) -> int:
        """Number of attentions found beyond those counted by hand."""
        return max(0, self.found - self.expected) if self.expected is not None else 0

    @property
    def proved(self) -> int:
        """Number of attentions with proved rows."""
        return int(self.best["proved"] or 0) if self.works else 0

    @property
    def wrong(self) -> list[str]:
        """Errors in any try: layouts that were refuted, and rows that differ from those written down by hand."""
        wrong = [row["wrong"] for row in self.tries if row["wrong"]]
        if names := self.best["rows_wrong"]:
            wrong.append(f"rows of {len(names)} attentions are not those read by hand, the first {names[0]!r}")
        return wrong

    @property
    def tracebacks(self) -> list[str]:
        """Tracebacks that any try printed."""
        return [row["traceback"] for row in self.tries if row["traceback"]]


def result(entry: Entry, rows: Mapping[Key, Row]) -> Result | None:
    """The result of an entry; None if its first command was not tried."""
    tried = [rows[entry.key, flags] for flags in entry.tries() if (entry.key, flags) in rows]
    if not tried or tried[0]["flags"]:
        return None
    return Result(entry, tried[0], next((r for r in tried if outcome(entry, r) == WORKS), tried[0]), tried)


def next_try(entry: Entry, rows: Mapping[Key, Row]) -> tuple[str, ...] | None:
    """Flags of the next try of an entry; None if one works or all have been tried."""
    for flags in entry.tries():
        row = rows.get((entry.key, flags))
        if row is None:
            return flags
        if outcome(entry, row) == WORKS:
            return None
    return None
