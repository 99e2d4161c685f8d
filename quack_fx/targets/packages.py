"""The module name of a Python file, and the folders in which its imports are looked up.

In: a file, in a package or not. Out: its `Location`, and `LocalImports`, an import finder for the modules of its
repository. The name follows from the file's imports: `from tower.models.parts import x` in a/tower/models/tower.py
shows that the import root is a. sys.path is not changed, so no folder hides an installed package from other packages.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from quack_fx.targets.source import text_of, tree_of

_INSTALLED = tuple(
    str(Path(p).resolve()) for p in {sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")} if p
)
_ROOT_MARKS = (".git", "pyproject.toml", "setup.py", "setup.cfg", "requirements.txt", "environment.yml", "LICENSE")
_SKIPPED = frozenset({"node_modules", "__pycache__", "site-packages", "build", "dist", "venv"})
EXPRESSIONS = ("--build", "--inputs")
"""File names of code that was typed on the command line; its imports are those of the target's file."""
_FILES, PARSED = 4000, 300
"""The most files of a repository that are listed, and the most Python files that are read."""


@dataclass(frozen=True)
class Location:
    """Where a Python file is: its import root `base`, its module name below that, and the folder of its repository."""

    file: Path
    base: Path
    name: str
    repository: Path


def locate(file: Path, tree: ast.Module) -> Location:
    """The location of a file (an absolute path without links), by its imports and the folders above it.

    Relative imports and `__init__.py` files set the least number of folders in the module name.
    """
    above = [file.parent, *file.parent.parents]
    inside = next((i for i, folder in enumerate(above) if not (folder / "__init__.py").exists()), 0)
    relative = max((n.level for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)), default=0)
    depth = min(max(inside, relative, _own_depth(above, _absolute(tree))), len(above) - 1)
    while depth < len(above) - 1 and depth > 0 and _is_taken(above[depth - 1].name, above[depth - 1]):
        depth += 1
    parts = file.relative_to(above[depth]).with_suffix("").parts
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return Location(file, above[depth], ".".join(parts), repository_of(file, above[depth]))


def repository_of(file: Path, base: Path | None = None) -> Path:
    """The folder of a file's repository: the outermost above its import root with a .git, a pyproject.toml or such."""
    base = base or file.parent
    if is_installed(str(file)):
        return file.parent if base == file.parent else base / file.relative_to(base).parts[0]
    home, candidates = Path.home(), [base]
    for folder in (base, *base.parents):
        if folder in (home, Path(folder.anchor)) or folder == Path("/tmp"):
            break
        if any((folder / mark).exists() for mark in _ROOT_MARKS):
            candidates.append(folder)
        if (folder / ".git").exists():
            break
    if file.is_relative_to(Path.cwd()) and Path.cwd() not in (home, Path(file.anchor)):
        candidates.append(Path.cwd())
    return min(candidates, key=lambda folder: len(folder.parts))


def python_files(repository: Path, near: Path) -> Sequence[Path]:
    """The `PARSED` Python files of a repository that are nearest to a file, nearest first."""

    def distance(file: Path) -> int:
        return len(Path(os.path.relpath(file.parent, near.parent)).parts)

    return sorted(_python_files(repository), key=lambda f: (distance(f), str(f)))[:PARSED]


@lru_cache(maxsize=8)
def _python_files(repository: Path) -> tuple[Path, ...]:
    return tuple(files_of(repository, ".py"))


def files_of(repository: Path, *endings: str) -> Iterator[Path]:
    """Files of a repository with these endings, breadth first, without those that tools generate."""
    level, count = [repository], 0
    while level:
        following: list[Path] = []
        for folder in level:
            try:
                entries = sorted(folder.iterdir())
            except OSError:
                continue
            for entry in entries:
                if entry.name.startswith(".") or entry.name in _SKIPPED or entry.is_symlink():
                    continue
                if entry.is_dir():
                    following.append(entry)
                elif entry.name.endswith(endings):
                    count += 1
                    yield entry
                    if count >= _FILES:
                        return
        level = following


def _absolute(tree: ast.Module) -> set[str]:
    """Dotted names of the modules in a file's absolute imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module)
    return names


def _own_depth(above: Sequence[Path], imported: set[str]) -> int:
    """How many folders are part of the file's module name, by an import that begins with one of them; 0 for none."""
    for depth, base in enumerate(above):
        for name in imported:
            first, *rest = name.split(".")
            if depth and rest and base / first == above[depth - 1] and _lies_in(base, name):
                return depth
    return 0


def _lies_in(base: Path, name: str) -> bool:
    """Whether a folder contains the module of a dotted name."""
    path = base.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path.is_dir() and any(path.glob("*.py")))


def _is_taken(name: str, folder: Path) -> bool:
    """Whether the standard library or an installed package has the name of a folder of the repository."""
    if name in sys.stdlib_module_names:
        return True
    if (loaded := sys.modules.get(name)) is not None:
        _, *folders = paths_of(loaded)
        return bool(folders) and str(folder) not in folders
    try:
        spec = PathFinder.find_spec(name)
    except Exception:  # a broken package
        return False
    return spec is not None and spec.origin is not None and is_installed(spec.origin)


def is_installed(file: str) -> bool:
    """Whether a file belongs to the standard library or to an installed package."""
    return "site-packages" in file or "dist-packages" in file or file.startswith(_INSTALLED)


def paths_of(module: ModuleType) -> list[str]:
    """The file of a module, "" where it has none, and the search path of a package."""
    return [str(getattr(module, "__file__", None) or ""), *map(str, getattr(module, "__path__", None) or ())]


@lru_cache(maxsize=256)
def moved(module: str, name: str) -> str | None:
    """The module in which an installed package defines a name today that older code imports from `module`. Its folder
    is searched, then the folders above; None where no file or several files define the name."""
    top = sys.modules.get(module.split(".")[0])
    roots = [Path(p) for p in getattr(top, "__path__", ())]
    if not roots:
        return None
    defines = re.compile(rf"^(def|class) {re.escape(name)}\b", re.MULTILINE)
    inner = module.split(".")[1:-1]
    for depth in range(len(inner), -1, -1):
        folder = roots[0].joinpath(*inner[:depth])
        files = sorted(folder.glob("*.py")) if folder.is_dir() else []
        found = [f for f in files if defines.search(text_of(f))]
        if found:
            stem = [] if found[0].stem == "__init__" else [found[0].stem]
            return ".".join([module.split(".")[0], *inner[:depth], *stem]) if len(found) == 1 else None
    return None


class LocalImports:
    """Import finder for the modules of a repository. It serves only imports in files that are `is_own`."""

    def __init__(self, location: Location, is_own: Callable[[str], bool]) -> None:
        self._location, self._is_own = location, is_own
        above = [folder for folder in location.file.parents if folder.is_relative_to(location.repository)]
        below = [location.repository / "src"] if (location.repository / "src").is_dir() else []
        self._bases = list(dict.fromkeys([location.base, *above, *below, Path.cwd()]))
        self._extra: dict[str, Path] = {}
        self.asked = ""
        """A top-level module that is served although no file of the repository imports it."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which this finder is installed."""
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The import spec of a top-level module of the repository; None for any other module."""
        if path is not None or "." in name or name in sys.builtin_module_names:
            return None
        first = name in (self._location.name.split(".")[0], self.asked)
        importer = _importer()
        if importer in EXPRESSIONS:
            importer = str(self._location.file)
        if not first and (importer is None or not self._is_own(importer)):
            return None
        imported = _imports_of(importer) if importer else ()
        wanted = [other for other in imported if other.startswith(f"{name}.")]
        found = None
        for base in [self._extra[name]] if name in self._extra else [self._location.base] if first else self._bases:
            spec = PathFinder.find_spec(name, [str(base)])
            if spec is None or _is_part_of_another(name, spec):
                continue
            if spec.loader is None:  # a folder without __init__.py
                if first or any(_lies_in(base, w) for w in wanted):
                    return spec
                continue
            if first or all(_lies_in(base, w) for w in wanted):
                return None if not first and self._is_better_elsewhere(name, base) else spec
            found = found or spec
        if found is not None and name not in sys.stdlib_module_names and not _is_taken(name, Path("/")):
            return found
        return None

    def _is_better_elsewhere(self, name: str, base: Path) -> bool:
        """Whether a name of the repository means a module of the standard library or an installed one all the same."""
        beside = base in (self._location.base, self._location.file.parent, Path.cwd())
        return name in sys.stdlib_module_names or (not beside and _is_taken(name, base / name))

    def look_elsewhere(self, name: str) -> bool:
        """Make a module importable that some folder of the repository contains; False unless exactly one does."""
        first = name.split(".")[0]
        if first in self._extra or first in sys.modules or is_installed(str(self._location.file)):
            return False
        tail = Path(*name.split("."))
        bases = set()
        for file in _python_files(self._location.repository):
            for end in (tail.with_suffix(".py"), tail / "__init__.py"):
                if file.parts[-len(end.parts) :] == end.parts:
                    bases.add(Path(*file.parts[: -len(end.parts)]))
        if len(bases) != 1:
            return False
        self._extra[first] = bases.pop()
        importlib.invalidate_caches()
        return True


def _is_part_of_another(name: str, spec: ModuleSpec) -> bool:
    """Whether a module was imported as part of a package, so that its last name alone means something else."""
    places = {spec.origin, *(spec.submodule_search_locations or ())} - {None}
    parts = [module for known, module in list(sys.modules.items()) if known.endswith(f".{name}")]
    return any(places.intersection(paths_of(module)) for module in parts)


def _importer() -> str | None:
    """The file of the running import statement; None for `importlib.util.find_spec`, which imports nothing."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == importlib.util.__file__:
            return None
        machinery = file.startswith("<frozen importlib") or file in (__file__, importlib.__file__)
        if not machinery and not frame.f_globals.get("__name__", "").startswith("quack_fx.targets"):
            return file
        frame = frame.f_back
    return None


@lru_cache(maxsize=512)
def _imports_of(file: str) -> frozenset[str]:
    return frozenset(_absolute(tree_of(Path(file))))
