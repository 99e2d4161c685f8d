"""The environment that the user's files run in: this machine, with stand-ins for what it lacks.

In: the location of the target's file. Out: a `World`, which is open while the target is imported, built, run and
reported on. `imports.py` gives stand-ins to failed imports: those of `known.py` compute what the original does, those
of `inert.py` nothing. When it closes, sys.modules, sys.path, sys.argv and the process group are as they were before.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch._dynamo

from quack_fx.graph.forward.gpus import Device, OnThisMachine
from quack_fx.targets.packages import LocalImports, Location, is_installed, paths_of
from quack_fx.targets.source import text_of
from quack_fx.targets.world.devices import no_gpu
from quack_fx.targets.world.imports import Imports
from quack_fx.targets.world.inert import Phase, StandInUsed
from quack_fx.targets.world.old_names import old_names
from quack_fx.targets.world.one_rank import one_rank
from quack_fx.targets.world.script import STOPS, TrainingBegins, as_script, before_training

__all__ = ["STOPS", "StandInUsed", "TrainingBegins", "World", "before_training"]

PATIENCE = 90.0
"""Seconds after which no further sizes or inputs are tried."""


@contextmanager
def _errors_only() -> Iterator[None]:
    """Context in which loggers other than ours log errors only: the model may be built many times."""
    enabled = logging.Logger.isEnabledFor

    def is_enabled(self: logging.Logger, level: int) -> bool:
        return enabled(self, level) and (level >= logging.ERROR or self.name.split(".")[0] == "quack_fx")

    with patch.object(logging.Logger, "isEnabledFor", is_enabled):
        yield


class World:
    """The environment of one target's files. With `guarded`, failed imports inside a `try` of the user's get stand-ins,
    too; with `group`, a process group of one rank exists from the start."""

    def __init__(self, guarded: bool = False, group: bool = False) -> None:
        self._guarded, self._group = guarded, group
        self._until = time.monotonic() + PATIENCE
        self._location: Location | None = None
        self._own: dict[tuple[str, str], bool] = {}
        self.modules: dict[str, ModuleType] = {}
        """Modules of the target's repository by name; filled when the world closes."""
        self._stack = ExitStack()
        self.imports = Imports(self.is_own, self._look_elsewhere, guarded)
        self.notes: list[str] = []
        """What the report says about how the target was imported."""
        self._local: LocalImports | None = None

    @contextmanager
    def open(self) -> Iterator[World]:
        """Context in which the environment is set up."""
        before, path, random = set(sys.modules), list(sys.path), torch.random.get_rng_state()
        Phase.strict = False
        try:
            with self._stack, warnings.catch_warnings(action="ignore"), _errors_only():
                self._stack.enter_context(old_names())
                self._stack.enter_context(no_gpu())
                self._stack.enter_context(one_rank(self._group))
                yield self
        finally:
            Phase.strict = False
            sys.path[:] = path
            torch.random.set_rng_state(random)
            # A list first: Python computes the path of a namespace package from its parent, which must still be there.
            for name in [n for n in set(sys.modules) - before if any(map(self.is_own, paths_of(sys.modules[n])))]:
                self.modules[name] = sys.modules.pop(name)

    def is_late(self) -> bool:
        """Whether `PATIENCE` has passed."""
        return time.monotonic() > self._until

    def enter(self, location: Location) -> None:
        """Set the location of the target; from now on imports in files of its repository are handled here."""
        self._location = location
        self._local = LocalImports(location, self.is_own)
        self._stack.enter_context(as_script(str(location.file)))
        self._stack.enter_context(self._local.active())
        self._stack.enter_context(self.imports.active())

    @contextmanager
    def building(self, device: str) -> Iterator[None]:
        """Context in which the model is built, on "cpu" or "meta"; after it, using an inert stand-in is an error."""
        Phase.strict, Device.now = False, device
        try:
            with OnThisMachine():
                yield
        finally:
            Phase.strict, Device.now = True, "cpu"

    def is_own(self, file: str) -> bool:
        """Whether a file belongs to the target's repository."""
        if self._location is None or not file:
            return False
        repository = str(self._location.repository)
        if (repository, file) not in self._own:  # kept, since every import asks
            inside = str(Path(file)).startswith(repository.rstrip("/") + "/")
            self._own[repository, file] = inside and (is_installed(repository) or not is_installed(file))
        return self._own[repository, file]

    def own_files(self) -> list[Path]:
        """Imported files of the repository, the target first."""
        if self._location is None:
            return []
        files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
        return list(dict.fromkeys([self._location.file, *(Path(f) for f in files if f and self.is_own(f))]))

    def module_of(self, file: Path) -> str:
        """The module name of another file of the repository; "" where the target's files cannot import it."""
        base = self._location.base if self._location else None
        if base is None or not file.is_relative_to(base):
            return ""
        parts = file.relative_to(base).with_suffix("").parts
        return ".".join(parts) if all(part.isidentifier() for part in parts) else ""

    def import_own(self, name: str) -> ModuleType:
        """Import another module of the repository, by a name that `module_of` gave."""
        if self._local is not None:
            self._local.asked = name.split(".")[0]
        return importlib.import_module(name)

    @property
    def missing(self) -> list[str]:
        """Packages with stand-ins."""
        return list(self.imports.missing)

    def others(self) -> list[World]:
        """Further environments to try after a failure in this one: with a process group, with more stand-ins."""
        more = []
        if not self._group and any(
            re.search("distributed|RANK|WORLD_SIZE", text_of(file)) for file in self.own_files()
        ):
            more.append(World(self._guarded, True))
        if self.imports.left and not self._guarded:
            more.append(World(True, self._group))
        return more

    def _look_elsewhere(self, name: str) -> bool:
        return self._local is not None and self._local.look_elsewhere(name)
