"""The list of files for the benchmark over public repositories.

In: benchmarks/wild.json. Out: an `Entry` for each object, and its tries: the arguments that a user types after
`quack-fx inspect`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

Rows = Mapping[str, Mapping[str, tuple[str, str]]]
"""Keyed by a regular expression for site names. For "query" and "key": the end of the name of the parameter next to the
logits, and the rows of a head as "start:stop" in h (the head), d (the head dimension) and n (rows of the parameter)."""


@dataclass(frozen=True)
class Entry:
    """One file of a public repository, with what a person found by reading it.

    Attributes:
        repo: Owner and name.
        commit: The commit that was read.
        file: The file, relative to the root of the repository.
        domain: What its models are for.
        run_from: Folder of the repository from which its own code is run; "" for the root.
        models: Classes that count as the intended whole model; empty if any class does.
        attentions: Number of attentions in the model that the command builds without flags; None if it depends on sizes
            that the repository does not fix.
        flags: Additional flags that may be passed: "name" (as FILE:NAME), "build", "inputs".
        attentions_flags: Number of attentions in the model selected by flags ("build" if there is one, else "name");
            or None.
        rows: Weight rows of the heads, if they are simple to write down.
        note: Peculiarities of the entry.
    """

    repo: str
    commit: str
    file: str
    domain: str
    run_from: str = ""
    models: tuple[str, ...] = ()
    attentions: int | None = None
    flags: Mapping[str, str] = field(default_factory=dict)
    attentions_flags: int | None = None
    rows: Rows = field(default_factory=dict)
    note: str = ""

    @property
    def key(self) -> str:
        """The unique key of the entry; a file may be listed twice, for two of its models."""
        return f"{self.repo}:{self.file}" + (f" ({self.flags['name']})" if "name" in self.flags else "")

    def folder(self, repos: Path) -> Path:
        """The folder in which its command is run."""
        return repos / self.repo.replace("/", "+") / self.run_from

    def target(self) -> str:
        """Its file, relative to that folder."""
        return str(PurePosixPath(self.file).relative_to(self.run_from))

    def tries(self) -> list[tuple[str, ...]]:
        """Names of the flags of each try, in order: none, each alone, then "inputs" with the flag for the model."""
        alone: list[tuple[str, ...]] = [(), *((name,) for name in ("name", "build", "inputs") if name in self.flags)]
        if "inputs" in self.flags and len(self.flags) > 1:
            alone.append(("build" if "build" in self.flags else "name", "inputs"))
        return alone

    def words(self, flags: tuple[str, ...]) -> list[str]:
        """The command-line arguments after `inspect`."""
        words = [self.target() + (f":{self.flags['name']}" if "name" in flags else "")]
        for name in flags:
            if name != "name":
                words += [f"--{name}", self.flags[name]]
        return words

    def expected(self, flags: tuple[str, ...]) -> int | None:
        """Expected number of attentions in a try, or None; a name alone fixes no sizes if there is a "build" flag."""
        fixed = "build" in flags or ("name" in flags and "build" not in self.flags)
        return self.attentions_flags if fixed else self.attentions


def read(path: Path) -> list[Entry]:
    """The entries of a file.

    Raises:
        ValueError: Two entries have the same key.
    """
    entries = [_entry(data) for data in json.loads(path.read_text("utf-8"))]
    if len({entry.key for entry in entries}) < len(entries):
        raise ValueError(f"{path} has an entry twice")
    return entries


def _entry(data: dict[str, object]) -> Entry:
    return Entry(**{**data, "models": tuple(data.get("models", ()))})  # type: ignore[arg-type]
