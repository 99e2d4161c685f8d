"""The list of files that the benchmark over public repositories looks at.

In: benchmarks/wild.json. Out: an `Entry` for each of its objects, and the tries that are made of one: what a user types
after `quack-fx inspect`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

Rows = Mapping[str, Mapping[str, tuple[str, str]]]
"""By a regular expression for the names of sites: for "query" and "key" the end of the name of the parameter next to
the logits, and the rows of a head as "start:stop" in h (the head), d (its width) and n (the rows of the parameter)."""


@dataclass(frozen=True)
class Entry:
    """One file of a public repository, with what a person found in it by reading.

    Attributes:
        repo: Owner and name.
        commit: The commit that was read.
        file: The file, seen from the top of the repository.
        domain: What its models are for.
        run_from: Folder of the repository in which its own code is run; "" for the top.
        models: Classes of which any is the whole model that is meant; empty where that is open.
        attentions: How many attentions the model has that the command builds when it is told nothing; None where that
            depends on sizes that the repository does not fix.
        flags: What may be typed besides: "name" (as FILE:NAME), "build", "inputs".
        attentions_flags: How many the model of the flags has: that of "build" where there is one, else that of
            "name"; or None.
        rows: Weight rows of the heads, where they are simple to write down.
        note: What is particular about the entry.
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
        """What tells it from the others; a file may be there twice, for two of its models."""
        return f"{self.repo}:{self.file}" + (f" ({self.flags['name']})" if "name" in self.flags else "")

    def folder(self, repos: Path) -> Path:
        """Where its command is run."""
        return repos / self.repo.replace("/", "+") / self.run_from

    def target(self) -> str:
        """Its file, seen from there."""
        return str(PurePosixPath(self.file).relative_to(self.run_from))

    def tries(self) -> list[tuple[str, ...]]:
        """Names of the flags of each try, in order: none, each alone, then inputs with what picks the model."""
        alone: list[tuple[str, ...]] = [(), *((name,) for name in ("name", "build", "inputs") if name in self.flags)]
        if "inputs" in self.flags and len(self.flags) > 1:
            alone.append(("build" if "build" in self.flags else "name", "inputs"))
        return alone

    def words(self, flags: tuple[str, ...]) -> list[str]:
        """The words of the command line behind `inspect`."""
        words = [self.target() + (f":{self.flags['name']}" if "name" in flags else "")]
        for name in flags:
            if name != "name":
                words += [f"--{name}", self.flags[name]]
        return words

    def expected(self, flags: tuple[str, ...]) -> int | None:
        """How many attentions a try is to tell of, if that is known; a name fixes no sizes where a build has to."""
        fixed = "build" in flags or ("name" in flags and "build" not in self.flags)
        return self.attentions_flags if fixed else self.attentions


def read(path: Path) -> list[Entry]:
    """The entries of a file.

    Raises:
        ValueError: Two entries cannot be told apart.
    """
    entries = [_entry(data) for data in json.loads(path.read_text("utf-8"))]
    if len({entry.key for entry in entries}) < len(entries):
        raise ValueError(f"{path} has an entry twice")
    return entries


def _entry(data: dict[str, object]) -> Entry:
    return Entry(**{**data, "models": tuple(data.get("models", ()))})  # type: ignore[arg-type]
