"""Gives stand-ins to failed imports while a target is imported, built and run.

In: the imports of the user's files; those of installed packages are never changed. Out: the real module, one found
elsewhere in the repository, or a stand-in. An import inside a `try` that handles its failure fails as usual, so that
the code for a missing package runs; with `guarded=True` it gets a stand-in, too.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any
from unittest.mock import patch

from quack_fx.targets.packages import is_installed, moved, paths_of
from quack_fx.targets.source import read_name, text_of, tree_of
from quack_fx.targets.world.inert import Inert, InertPackage
from quack_fx.targets.world.known import meaning
from quack_fx.targets.world.old_names import today


class Imports:
    """The imports of the user's files while the world is open.

    `is_own` tells whether a file is the user's; `elsewhere` makes a module importable that is not found, if the
    repository has it. With `guarded`, imports inside a `try` get stand-ins, too.
    """

    def __init__(self, is_own: Callable[[str], bool], elsewhere: Callable[[str], bool], guarded: bool = False) -> None:
        self._is_own, self._elsewhere, self._guarded = is_own, elsewhere, guarded
        self._import = builtins.__import__
        self._import_module = importlib.import_module
        self.missing: dict[str, None] = {}
        """Packages with a stand-in, in the order in which they were missed."""
        # Not in sys.modules, where installed packages would find them.
        self._modules: dict[str, InertPackage] = {}
        self.left = False
        """Whether an import inside a `try` has failed without a stand-in."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which imports of the user's files are handled here."""
        with (
            patch.object(builtins, "__import__", self._wrapped),
            patch.object(importlib, "import_module", self._by_name),
        ):
            yield

    def _by_name(self, name: str, package: str | None = None) -> Any:
        """Replaces `importlib.import_module`, with which files import extensions that they compile."""
        frame = sys._getframe(1)
        file = frame.f_globals.get("__file__")
        try:
            return self._import_module(name, package)
        except ModuleNotFoundError as error:
            # A name that does not occur in the file is computed, to test whether such a module exists.
            written = file and self._is_own(file) and f'"{name}"' in text_of(Path(file))
            if not written or package or not self._is_missing(name, error) or _is_guarded(frame):
                raise
            return self._stand_in(name, error, leaf=True)

    def _wrapped(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        frame = sys._getframe(1)
        file = globals.get("__file__") if globals else None
        if file is None or level or not self._is_own(file):
            return self._import(name, globals, locals, fromlist or (), level)
        try:
            module = self._import(name, globals, locals, fromlist or (), level)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name is not None and self._elsewhere(name):
                return self._wrapped(name, globals, locals, fromlist, level)
            if not self._is_missing(name, error):
                raise
            if not self._guarded and _is_guarded(frame):
                self.left = True
                raise
            module = self._stand_in(name, error, bool(fromlist))
        return self._with_names(module, name, fromlist or (), frame)

    def _is_missing(self, name: str, error: Exception) -> bool:
        """Whether an import failed because of a package that is not the user's."""
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            top = error.name.split(".")[0]
            return top == name.split(".")[0] or not self._has_own(name)
        return not self._has_own(name)

    def _has_own(self, name: str) -> bool:
        """Whether the repository has a module of that name, so that its own error counts."""
        top = name.split(".")[0]
        if top in sys.modules:
            return any(map(self._is_own, paths_of(sys.modules[top])))
        for finder in sys.meta_path:
            spec = finder.find_spec(top, None) if hasattr(finder, "find_spec") else None
            if spec is not None:
                return any(map(self._is_own, [spec.origin or "", *(spec.submodule_search_locations or ())]))
        return False

    def _stand_in(self, name: str, error: Exception, leaf: bool) -> ModuleType:
        """Make stand-in modules for a dotted name and its parents; returns the one that the import statement binds."""
        parent, full = None, ""
        for part in name.split("."):
            full = f"{full}.{part}".lstrip(".")
            if full not in self._modules:
                self.missing[_lacking(name, error)] = None
                self._modules[full] = InertPackage(full, meaning)
                if parent is not None:
                    setattr(parent, part, self._modules[full])
            parent = self._modules[full]
        return self._modules[name if leaf else name.split(".")[0]]

    def _with_names(self, module: Any, name: str, names: Sequence[str], frame: FrameType) -> Any:
        """The module; or, where an installed module lacks an imported name, a module with that name: from elsewhere in
        its package, or else a stand-in."""
        if not names or "*" in names or self._has_own(name):
            return module
        inside = isinstance(module, InertPackage)
        if inside and name.split(".")[0] not in sys.modules:
            return module
        absent = [wanted for wanted in names if inside or not _has(module, wanted)]
        if not inside:
            lacking = [wanted for wanted in absent if today(name, wanted, False) is None]
            if lacking and not self._guarded and _is_guarded(frame):
                self.left = True
                return module
            if not absent and all(today(name, wanted, True) is None for wanted in names):
                return module
        proxy = ModuleType(name)
        for wanted in names:
            if (now := today(name, wanted, wanted not in absent)) is not None:
                value = now
            elif wanted not in absent:
                value = getattr(module, wanted)
            elif (place := moved(name, wanted)) is not None and _has(elsewhere := self._quietly(place), wanted):
                value = getattr(elsewhere, wanted)
            elif inside:
                value = getattr(module, wanted)
            else:
                self.missing[full := f"{name}.{wanted}"] = None
                value = Inert(full) if (known := meaning(full)) is None else known
            setattr(proxy, wanted, value)
        return proxy

    def _quietly(self, name: str) -> Any:
        try:
            return self._import_module(name)
        except Exception:
            return None


def _lacking(name: str, error: Exception) -> str:
    """What a failed import lacks: a package, a module of an installed package, or what that module imports."""
    top = name.split(".")[0]
    if top not in sys.modules:
        return top
    needed = getattr(error, "name", None) or name
    return needed if needed.split(".")[0] == top else needed.split(".")[0]


def _has(module: Any, name: str) -> bool:
    """Whether a module has a name; False if reading it raises."""
    try:
        getattr(module, name)
    except Exception:
        return False
    return True


def _is_guarded(frame: FrameType | None) -> bool:
    """Whether this import, or one that led to it, is inside a `try` that handles its failure."""
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith("<") and file != __file__ and not is_installed(file):
            if frame.f_globals.get("__name__", "").startswith("quack_fx"):
                return False
            if any(first <= frame.f_lineno <= last for first, last in _guards(file)):
                return True
        frame = frame.f_back
    return False


@functools.lru_cache(maxsize=512)
def _guards(file: str) -> tuple[tuple[int, int], ...]:
    """Ranges of lines inside a `try` that handles a failed import."""
    return tuple(
        (node.body[0].lineno, node.body[-1].end_lineno or node.body[-1].lineno)
        for node in ast.walk(tree_of(Path(file)))
        if (isinstance(node, ast.Try) and any(_handles(handler) for handler in node.handlers))
        or (isinstance(node, ast.With) and any(_suppresses(item.context_expr) for item in node.items))
    )


def _suppresses(context: ast.expr) -> bool:
    match context:
        case ast.Call(func=function, args=kinds) if read_name(function) == "suppress":
            return any(read_name(kind) in _CAUGHT for kind in kinds)
    return False


_CAUGHT = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}


def _handles(handler: ast.ExceptHandler) -> bool:
    """Whether a handler catches import errors and does not end the program."""
    caught = {read_name(node) for node in ast.walk(handler.type)} if handler.type else set()
    if caught and not caught & _CAUGHT:
        return False
    return not any(_ends(statement) for statement in handler.body)


def _ends(statement: ast.stmt) -> bool:
    match statement:
        case ast.Raise():
            return True
        case ast.Expr(value=ast.Call(func=function)):
            return read_name(function) in ("exit", "quit", "_exit")
    return False
