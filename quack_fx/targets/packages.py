"""Where a Python file lies: the name it is imported by, and the folders that its own imports are found in.

In: a file as it lies on the disk, in a package or in none, run from any folder. Out: a `Place` (module name and the
folder above it), and `LocalImports`, a finder for modules of the same repository. Nothing in sys.path is changed, so a
folder of the repository that is called like an installed package hides nothing from anybody else.

A file's name is told by what it imports: `from tower.models.parts import x` in a/tower/models/tower.py says that the
folder is a. Relative imports and `__init__.py` files say how many folders at least belong to the name.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from quack_fx.targets.source import text_of, tree_of

_INSTALLED = tuple(
    str(Path(p).resolve()) for p in {sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")} if p
)
_ROOT_MARKS = (".git", "pyproject.toml", "setup.py", "setup.cfg", "requirements.txt", "environment.yml", "LICENSE")
_SKIPPED = frozenset({".git", "node_modules", "__pycache__", "site-packages", "build", "dist", ".venv", "venv"})
EXPRESSIONS = ("--build", "--inputs")
"""Names of the expressions of the command line, which see what the target's file sees."""
_FILES = 4000
"""Python files of a repository that are looked at, at most."""


@dataclass(frozen=True)
class Place:
    """Where a file lies.

    Attributes:
        file: The file.
        base: The folder from which its module name counts.
        name: Its module name: "tower.models.tower".
        repository: The folder of the repository that it belongs to.
    """

    file: Path
    base: Path
    name: str
    repository: Path


def place_of(file: Path, tree: ast.Module) -> Place:
    """Module name of a file, told by its imports and by the folders around it.

    Arguments:
        file: The file, resolved.
        tree: Its source.
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
    return Place(file, above[depth], ".".join(parts), repository_of(file, above[depth]))


def repository_of(file: Path, base: Path) -> Path:
    """The folder of the repository that a file belongs to: the outermost below which everything looks like one."""
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
    """Python files of a repository, those nearest to a file first."""
    files = _python_files(repository)
    return sorted(files, key=lambda f: (_distance(f, near), str(f)))


@lru_cache(maxsize=8)
def _python_files(repository: Path) -> tuple[Path, ...]:
    return tuple(walk(repository, (".py",)))


def walk(repository: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    """Files of a repository with these endings, level by level, without what tools put there."""
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


def _distance(one: Path, other: Path) -> int:
    """Folders between two files."""
    a, b = one.parent.parts, other.parent.parts
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return len(a) + len(b) - 2 * common


def _absolute(tree: ast.Module) -> set[str]:
    """Dotted names of the modules that a file imports absolutely."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module)
    return names


def _own_depth(above: Sequence[Path], imported: set[str]) -> int:
    """How many folders belong to the file's name, by imports that name one of those folders."""
    for depth, base in enumerate(above):
        for name in imported:
            first, *rest = name.split(".")
            if depth and rest and base / first == above[depth - 1] and _lies_in(base, name):
                return depth
    return 0


def _lies_in(base: Path, name: str) -> bool:
    """Whether a dotted name is a module below a folder."""
    path = base.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path.is_dir() and any(path.glob("*.py")))


def _is_taken(name: str, folder: Path) -> bool:
    """Whether an installed package, or one of Python's own, is called like a folder of the repository."""
    if name in sys.stdlib_module_names:
        return True
    loaded = sys.modules.get(name)
    if loaded is not None:
        places = [*map(str, getattr(loaded, "__path__", ()))]
        return bool(places) and str(folder) not in places
    try:
        spec = PathFinder.find_spec(name)
    except Exception:  # a broken package of that name is not in the way
        return False
    return spec is not None and spec.origin is not None and is_installed(spec.origin)


def is_installed(file: str) -> bool:
    """Whether a file is one of Python's own or of an installed package."""
    return "site-packages" in file or "dist-packages" in file or file.startswith(_INSTALLED)


@lru_cache(maxsize=256)
def moved(module: str, name: str) -> str | None:
    """The module of an installed package that defines a name now which older code imports from another one: one that
    lies beside that or above it. None where there is none, or more than one."""
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
        if len(found) == 1:
            stem = [] if found[0].stem == "__init__" else [found[0].stem]
            return ".".join([module.split(".")[0], *inner[:depth], *stem])
        if found:
            return None
    return None


class LocalImports:
    """Finds the modules of a repository for its own files.

    Arguments:
        place: Where the target lies.
        is_own: Whether a file is the user's.
    """

    def __init__(self, place: Place, is_own: Callable[[str], bool]) -> None:
        self._place, self._is_own = place, is_own
        above = [folder for folder in place.file.parents if folder.is_relative_to(place.repository)]
        below = [place.repository / "src"] if (place.repository / "src").is_dir() else []
        self._bases = list(dict.fromkeys([place.base, *above, *below, Path.cwd()]))
        self._extra: dict[str, Path] = {}
        self.asked = ""
        """A top-level module of the repository that is imported for itself, and by none of its files."""

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the repository's modules can be imported."""
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of a top-level module of the repository; None for all others."""
        if path is not None or "." in name or name in sys.builtin_module_names:
            return None
        first = name in (self._place.name.split(".")[0], self.asked)
        importer = _importer()
        if importer in EXPRESSIONS:
            importer = str(self._place.file)
        if not first and (importer is None or not self._is_own(importer)):
            return None
        wanted = _imported_by(importer, name) if importer else set()
        found = None
        for base in [self._extra[name]] if name in self._extra else [self._place.base] if first else self._bases:
            spec = PathFinder.find_spec(name, [str(base)])
            if spec is None:
                continue
            if spec.loader is None:  # a folder without __init__.py
                full = any(_lies_in(base, w) for w in wanted if "." in w)
                if not first and not full:
                    continue
                return spec
            if first or all(_lies_in(base, w) for w in wanted if "." in w):
                return None if not first and self._is_better_elsewhere(name, base) else spec
            found = found or spec
        if found is not None and name not in sys.stdlib_module_names and not _is_taken(name, Path("/")):
            return found
        return None

    def _is_better_elsewhere(self, name: str, base: Path) -> bool:
        """Whether a name that is Python's own or installed is meant by its usual meaning."""
        beside = base in (self._place.base, self._place.file.parent, Path.cwd())
        return name in sys.stdlib_module_names or (not beside and _is_taken(name, base / name))

    def look_elsewhere(self, name: str) -> bool:
        """Make a dotted name importable that lies in one other folder of the repository; whether there is one."""
        first = name.split(".")[0]
        if first in self._extra or first in sys.modules or is_installed(str(self._place.file)):
            return False
        tail = Path(*name.split("."))
        bases = set()
        for file in _python_files(self._place.repository):
            for end in (tail.with_suffix(".py"), tail / "__init__.py"):
                if file.parts[-len(end.parts) :] == end.parts:
                    bases.add(Path(*file.parts[: -len(end.parts)]))
        if len(bases) != 1:
            return False
        self._extra[first] = bases.pop()
        importlib.invalidate_caches()
        return True


def _importer() -> str | None:
    """The file whose import is being carried out; None where it only asks whether something is there."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file == importlib.util.__file__:
            return None
        machinery = file.startswith("<frozen importlib") or file in (__file__, importlib.__file__)
        if not machinery and not frame.f_globals.get("__name__", "").startswith("quack_fx.targets"):
            return file
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


@lru_cache(maxsize=512)
def _imports_of(file: str) -> frozenset[str]:
    return frozenset(_absolute(tree_of(Path(file))))


def _imported_by(file: str, first: str) -> set[str]:
    """Modules that a file imports out of a top-level package."""
    return {name for name in _imports_of(file) if name.split(".")[0] == first}
