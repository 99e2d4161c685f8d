"""DOOR: a Python file or module -> its namespace; errors of the user's code -> one line.

In: the target as typed. Out: a `Namespace` and the name after the colon, if any. The working directory and the file's
own package root are importable while and after the file runs, as a script's folder is for `python model.py`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from quack_fx.errors import TargetError


@dataclass(frozen=True)
class Namespace:
    """The names that a target's expressions may use.

    Attributes:
        source: The file, module or config, as the user typed it (without the name after the colon).
        names: Its global names.
        file: Its path, or None where there is none.
        module: Name of the module that owns the names, by which a class says where it was defined.
    """

    source: str
    names: dict[str, Any] = field(repr=False)
    file: Path | None = None
    module: str = ""


def load(target: str) -> tuple[Namespace, str | None]:
    """The namespace of "file.py[:NAME]" or "package.module[:NAME]", and the name.

    Raises:
        TargetError: There is no such file or module, or it raises.
    """
    place, colon, name = target.rpartition(":") if ":" in target else (target, "", "")
    if colon and not all(part.isidentifier() for part in name.split(".")):
        if not name or not Path(target).exists():
            raise TargetError(f"{target!r}: what follows the colon must be a Python name; type file.py:NAME")
        place, name = target, ""
    if not place.strip():
        raise TargetError(f"{target!r} names no file; type file.py, file.py:NAME or package.module:NAME")
    path = Path(place).expanduser()
    if (path / "__init__.py").exists():
        return _file(path / "__init__.py", place), name or None
    if path.is_dir():
        raise TargetError(f"{place!r} is a folder without a config.json; give one that has it, or a Python file")
    if path.exists():
        if path.suffix != ".py":
            raise TargetError(
                f"{place!r} is neither a Python file (.py) nor a Hugging Face config (.json) nor a model (.pt2, .pt)"
            )
        return _file(path, place), name or None
    if path.suffix == ".py" or os.sep in place:
        raise TargetError(f"no file {place!r} (seen from {Path.cwd()})")
    if not all(part.isidentifier() for part in place.split(".")):
        raise TargetError(f"{place!r} is neither a file nor a module; type file.py:NAME or package.module:NAME")
    return _module(place), name or None


def _file(path: Path, typed: str) -> Namespace:
    """Run a Python file as a module of the package it lies in."""
    path = path.resolve()
    try:
        tree = ast.parse(path.read_bytes(), typed)
    except (SyntaxError, ValueError) as error:
        raise TargetError(_syntax(error, typed)) from error
    except OSError as error:
        raise TargetError(f"{typed!r} cannot be read: {error.strerror}") from error
    root = path.parent
    while (root / "__init__.py").exists() and root.parent != root:
        root = root.parent
    relative = any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    if relative and root == path.parent and path.is_relative_to(Path.cwd()):
        root = Path.cwd()  # a package without __init__.py: relative imports need the folders above it
    _importable(Path.cwd(), root)
    parts = path.relative_to(root).with_suffix("").parts
    space = Namespace(typed, {}, path)
    try:
        if len(parts) > 1:
            module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        else:
            module = _run(path, parts[0])
    except (Exception, SystemExit) as error:
        raise TargetError(f"{typed} does not run: {one_line(error, space)}") from error
    if module.__file__ is None or Path(module.__file__).resolve() != path:
        raise TargetError(
            f"{typed!r} would be module {module.__name__}, which is {module.__file__}; rename one of them"
        )
    return Namespace(typed, vars(module), path, module.__name__)


def _run(path: Path, stem: str) -> ModuleType:
    """Run a file that is in no package, under its own name where nobody else has it."""
    taken = sys.modules.get(stem)
    if not stem.isidentifier() or (taken is not None and getattr(taken, "__file__", None) != str(path)):
        stem = f"_target_{abs(hash(str(path)))}"
    spec = importlib.util.spec_from_file_location(stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module  # dataclasses and string annotations look their module up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[stem]
        raise
    return module


def _module(name: str) -> Namespace:
    _importable(Path.cwd())
    space = Namespace(name, {})
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise TargetError(f"no file and no module {name!r} (seen from {Path.cwd()})") from error
        raise TargetError(f"{name} does not run: {one_line(error, space)}") from error
    except (Exception, SystemExit) as error:
        raise TargetError(f"{name} does not run: {one_line(error, space)}") from error
    file = getattr(module, "__file__", None)
    return Namespace(name, vars(module), Path(file).resolve() if file else None, module.__name__)


def _importable(*folders: Path) -> None:
    """Put folders in front of the import path, as Python does with the folder of a script."""
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def evaluate(expression: str, option: str, namespace: Namespace, extra: Mapping[str, Any] | None = None) -> Any:
    """Value of an expression of the command line in a namespace; torch and nn are there unless the file has its own.

    Raises:
        TargetError: The expression is no expression. What it raises by itself comes through.
    """
    names = {"torch": torch, "nn": torch.nn, **namespace.names, **(extra or {})}
    try:
        code = compile(expression.strip(), option, "eval")
    except (SyntaxError, ValueError) as error:
        raise TargetError(f"{option} {expression!r} is not a Python expression: {error}") from error
    return eval(code, names)


def one_line(error: BaseException, namespace: Namespace) -> str:
    """An error of the user's code in one line, with the file and line of theirs that it came from.

    The place is the innermost one in the target's own file, or else beside it.
    """
    if isinstance(error, SyntaxError):
        return _syntax(error, namespace.source)
    said = name_and_text(error)
    if namespace.file is None:
        return said
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if frame.filename == str(namespace.file):
            return f"{namespace.source}:{frame.lineno}: {said}"
    for frame in reversed(frames):
        path = Path(frame.filename)
        if path.is_relative_to(namespace.file.parent) and "site-packages" not in path.parts:
            return f"{os.path.relpath(path)}:{frame.lineno}: {said}"
    return said


def name_and_text(error: BaseException) -> str:
    """ "ValueError: 7 is odd": the class of an error and its first line, with the next where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    announced = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines))
    text = " ".join(lines[: announced + 1])
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _syntax(error: Exception, typed: str) -> str:
    if not isinstance(error, SyntaxError):
        return f"{typed} is not Python source: {error}"
    file = (
        typed
        if error.filename in (None, typed) or Path(str(error.filename)).name == Path(typed).name
        else error.filename
    )
    line = f":{error.lineno}" if error.lineno else ""
    return f"{file}{line}: {type(error).__name__}: {error.msg}"
