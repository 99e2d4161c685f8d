"""The world that a user's files run in: this machine, with what it lacks stood in for.

In: where the target lies. Out: a `World` that is open while the target is loaded, built, run and reported on. It leaves
nothing behind: no module, no path, no process group, no argument.

    imports.py    imports that fail get stand-ins
    inert.py      what a name of a missing package is: nothing that does anything
    known.py      names of missing packages whose meaning is known ...
    attention.py  ... what fused attention computes
    flash_attn.py ... that of flash_attn too
    vision.py     ... layers of timm, and timm_vit.py its transformer
    fields.py     ... config objects
    devices.py    what torch.cuda says without a GPU
    old_names.py  names that Python and numpy have given up
    one_rank.py   torch.distributed, with one rank
    script.py     arguments, and no training
"""

from __future__ import annotations

import importlib
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

import torch._dynamo

from quack_fx.graph.forward.gpus import Device, OnThisMachine
from quack_fx.targets.packages import LocalImports, Place, is_installed
from quack_fx.targets.source import text_of
from quack_fx.targets.world.devices import no_gpu
from quack_fx.targets.world.imports import Imports
from quack_fx.targets.world.inert import Phase, StandInUsed
from quack_fx.targets.world.old_names import old_names
from quack_fx.targets.world.one_rank import one_rank
from quack_fx.targets.world.script import TrainingBegins, as_script, before_training

__all__ = ["StandInUsed", "TrainingBegins", "World", "before_training"]

PATIENCE = 90.0
"""Seconds for which sizes and inputs are guessed; what is going on then is brought to its end."""


class World:
    """What the files of one target find around them; see the docstring of this package.

    Arguments:
        guarded: Whether imports that a `try` of the user's would catch get stand-ins, too.
        group: Whether a process group of one rank is there from the start.
    """

    def __init__(self, guarded: bool = False, group: bool = False) -> None:
        self._guarded, self._group = guarded, group
        self._until = time.monotonic() + PATIENCE
        self._place: Place | None = None
        self._own: dict[tuple[str, str], bool] = {}
        self.modules: dict[str, ModuleType] = {}
        """The target's own files by the names that they were imported by, once the world is closed."""
        self._stack = ExitStack()
        self.imports = Imports(self.is_own, self._look_elsewhere, guarded)
        self.notes: list[str] = []
        """What a person should know of how the target was loaded."""
        self._local: LocalImports | None = None

    @contextmanager
    def open(self) -> Iterator[World]:
        """Context in which the world is there."""
        before, path, random = set(sys.modules), list(sys.path), torch.random.get_rng_state()
        Phase.strict = False
        try:
            with self._stack, warnings.catch_warnings(action="ignore"):
                self._stack.enter_context(old_names())
                self._stack.enter_context(no_gpu())
                self._stack.enter_context(one_rank(self._group))
                yield self
        finally:
            Phase.strict = False
            sys.path[:] = path
            torch.random.set_rng_state(random)
            # All are looked at before any goes: the path of a folder without __init__.py is told by what is above it.
            for name in [n for n in set(sys.modules) - before if any(map(self.is_own, _places(sys.modules[n])))]:
                self.modules[name] = sys.modules.pop(name)

    def is_late(self) -> bool:
        """Whether guessing has gone on for so long that a person would rather be told what is missing."""
        return time.monotonic() > self._until

    def settle_at(self, place: Place) -> None:
        """Say where the target lies; from here on the imports of its files are looked after."""
        self._place = place
        self._local = LocalImports(place, self.is_own)
        self._stack.enter_context(as_script(str(place.file)))
        self._stack.enter_context(self._local.active())
        self._stack.enter_context(self.imports.active())

    @contextmanager
    def building(self, device: str) -> Iterator[None]:
        """Context in which the model is built on "cpu" or "meta"; afterwards stand-ins may not be used any more."""
        Phase.strict, Device.now = False, device
        try:
            with OnThisMachine():
                yield
        finally:
            Phase.strict, Device.now = True, "cpu"

    def is_own(self, file: str) -> bool:
        """Whether a file is one of the target's repository."""
        if self._place is None or not file:
            return False
        repository = str(self._place.repository)
        if (repository, file) not in self._own:  # asked at every import, of torch's own too
            inside = str(Path(file)).startswith(repository.rstrip("/") + "/")
            self._own[repository, file] = inside and (is_installed(repository) or not is_installed(file))
        return self._own[repository, file]

    def own_files(self) -> list[Path]:
        """Files of the repository that are loaded, the target first."""
        if self._place is None:
            return []
        files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
        return list(dict.fromkeys([self._place.file, *(Path(f) for f in files if f and self.is_own(f))]))

    def module_of(self, file: Path) -> str:
        """The name by which the target's files import another file of the repository; "" where they cannot."""
        base = self._place.base if self._place else None
        if base is None or not file.is_relative_to(base):
            return ""
        parts = file.relative_to(base).with_suffix("").parts
        return ".".join(parts) if all(part.isidentifier() for part in parts) else ""

    def import_own(self, name: str) -> ModuleType:
        """Another module of the repository, by a name that `module_of` gave."""
        if self._local is not None:
            self._local.asked = name.split(".")[0]
        return importlib.import_module(name)

    @property
    def missing(self) -> list[str]:
        """Packages that were stood in for."""
        return list(self.imports.missing)

    @property
    def asks_for_ranks(self) -> bool:
        """Whether a file of the target's speaks of torch.distributed."""
        return any(re.search("distributed|RANK", text_of(file)) for file in self.own_files())

    def others(self) -> list[World]:
        """Worlds to try where this one did not do."""
        more = []
        if self.asks_for_ranks and not self._group:
            more.append(World(self._guarded, True))
        if self.imports.left and not self._guarded:
            more.append(World(True, self._group))
        return more

    def _look_elsewhere(self, name: str) -> bool:
        return self._local is not None and self._local.look_elsewhere(name)


def _places(module: ModuleType) -> list[str]:
    """The file of a module, and the folders of a package."""
    return [str(getattr(module, "__file__", None) or ""), *map(str, getattr(module, "__path__", None) or ())]
