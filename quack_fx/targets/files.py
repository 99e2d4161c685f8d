"""Imports the Python file or module of a target, and puts errors of the user's code into one line.

In: a target as typed, and the `World` to import it in. Out: a `Namespace`, and the name after the colon, if any.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from quack_fx.errors import TargetError
from quack_fx.graph.forward.gpus import OnThisMachine
from quack_fx.graph.walk import walk
from quack_fx.targets.packages import Location, locate, repository_of
from quack_fx.targets.source import assignments, names_in
from quack_fx.targets.world import STOPS, TrainingBegins, World, before_training


@dataclass(frozen=True)
class Namespace:
    """The global names of a target, which --build and --inputs may use: of a file, module or config (`source`, as typed
    without the name after the colon). `file` is the Python file, if there is one, and `module` the `__module__` of its
    classes."""

    source: str
    names: dict[str, Any] = field(repr=False)
    file: Path | None = None
    module: str = ""


def load(target: str, world: World) -> tuple[Namespace, str | None]:
    """The namespace of "file.py[:NAME]" or "package.module[:NAME]", and the name."""
    source, colon, name = target.rpartition(":") if ":" in target else (target, "", "")
    if colon and not all(part.isidentifier() for part in name.split(".")):
        if not name or not Path(target).exists():
            raise TargetError(f"{target!r}: what follows the colon must be a Python name; type file.py:NAME")
        source, name = target, ""
    if not source.strip():
        raise TargetError(f"{target!r} names no file; type file.py, file.py:NAME or package.module:NAME")
    path = Path(source).expanduser()
    if (path / "__init__.py").exists():
        return _file(path / "__init__.py", source, world), name or None
    if path.is_dir():
        raise TargetError(f"{source!r} is a folder without a config.json; give one that has it, or a Python file")
    if path.exists():
        if path.suffix != ".py":
            raise TargetError(
                f"{source!r} is neither a Python file (.py) nor a Hugging Face config (.json) nor a model (.pt2, .pt)"
            )
        return _file(path, source, world), name or None
    if path.suffix == ".py" or os.sep in source:
        raise TargetError(f"no file {source!r} (seen from {Path.cwd()})")
    if not all(part.isidentifier() for part in source.split(".")):
        raise TargetError(f"{source!r} is neither a file nor a module; type file.py:NAME or package.module:NAME")
    return _module(source, world), name or None


def _file(path: Path, typed: str, world: World) -> Namespace:
    path = path.resolve()
    try:
        tree = ast.parse(path.read_bytes(), typed)
    except (SyntaxError, ValueError) as error:
        raise TargetError(_syntax(error, typed)) from error
    except OSError as error:
        raise TargetError(f"{typed!r} cannot be read: {error.strerror}") from error
    location = locate(path, tree)
    world.enter(location)
    try:
        module = _run(location, tree, world)
    except STOPS as error:
        raise TargetError(_does_not_run(typed, error, Namespace(typed, {}, path), world)) from error
    return Namespace(typed, vars(module), path, module.__name__)


def _run(location: Location, tree: ast.Module, world: World) -> ModuleType:
    """Import a file under its module name, after the packages that contain it.

    Where the import of such a package fails, empty packages take its place: the file may not need its contents.
    """
    package, _, leaf = location.name.rpartition(".")
    is_package = location.file.name == "__init__.py"
    if package or is_package:
        try:
            with OnThisMachine():
                importlib.import_module(location.name if is_package else package)
        except STOPS as error:
            if is_package:
                raise
            world.notes.append(f"package {package} left out, since it fails: {name_and_text(error)}")
            _empty_packages(location)
    loaded = sys.modules.get(location.name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(location.file):
        return loaded
    name = location.name
    if not package and (loaded is not None or "." in leaf or leaf in sys.stdlib_module_names):
        name = f"_target_{abs(hash(str(location.file)))}"  # another module has that name
    spec = importlib.util.spec_from_file_location(name, location.file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and string annotations look their module up here
    if package:
        setattr(sys.modules[package], leaf, module)
    _execute(module, tree, location, world)
    return module


def _empty_packages(location: Location) -> None:
    """Put the packages that contain a file into sys.modules without running their files."""
    folder, parent, name = location.base, None, ""
    for part in location.name.split(".")[:-1]:
        folder, name = folder / part, f"{name}.{part}".lstrip(".")
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        package.__file__ = str(folder / "__init__.py")
        sys.modules[name] = package
        if parent is not None:
            setattr(parent, part, package)
        parent = package


def _execute(module: ModuleType, tree: ast.Module, location: Location, world: World) -> None:
    """Run the statements of a file; after one that fails, run only the definitions that follow it.

    So a script that reads data or trains at its top level still defines its model.
    """
    names, file = vars(module), str(location.file)
    try:
        with OnThisMachine(), before_training():
            exec(compile(tree, file, "exec"), names)
    except STOPS as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in frames if frame.filename == file), 0) or 0
        wanted = _names_of_classes(tree)
        rest = [node for node in tree.body if node.lineno > line and (defines(node) or _assigned_names(node) & wanted)]
        for node in rest:
            # A definition that depends on the failed statement may fail, too.
            with OnThisMachine(), suppress(*STOPS):
                exec(compile(ast.Module([node], []), file, "exec"), names)
        if not any(isinstance(v, type) and v.__module__ == module.__name__ for v in names.values()):
            raise
        what = "training begins" if isinstance(error, TrainingBegins) else name_and_text(error)
        world.notes.append(f"{location.file.name} stops at line {line} ({what}); what it defines was used")


def defines(node: ast.stmt) -> bool:
    """Whether a statement only defines: an import, function, class or plain value, or an `if` or `try` around those."""
    if isinstance(node, ast.If | ast.Try):
        handlers = node.handlers if isinstance(node, ast.Try) else []
        inner = [*node.body, *node.orelse, *(s for h in handlers for s in h.body)]
        return all(map(defines, inner))
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return not any(isinstance(part, ast.Call | ast.Await) for part in ast.walk(node))
    return isinstance(
        node, ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Pass
    )


def _names_of_classes(tree: ast.Module) -> set[str]:
    """Top-level names of a file that its classes use, directly or through the values of other names."""
    made: dict[str, ast.stmt] = {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    made |= {name: node for node in tree.body for name in _assigned_names(node)}
    start = set[str]().union(*(names_in(node) for node in tree.body if isinstance(node, ast.ClassDef)))
    return set(walk(start & made.keys(), lambda name: names_in(made[name]) & made.keys()))


def _assigned_names(node: ast.stmt) -> set[str]:
    return {name for target, _ in assignments(node) for name in names_in(target)}


def _module(name: str, world: World) -> Namespace:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    space = Namespace(name, {})
    try:
        if (spec := importlib.util.find_spec(name)) is None:
            raise ModuleNotFoundError(name)
    except ModuleNotFoundError as error:
        raise TargetError(f"no file and no module {name!r} (seen from {Path.cwd()})") from error
    except STOPS as error:
        raise TargetError(_does_not_run(name, error, space, world)) from error
    if spec.origin is not None and spec.origin.endswith(".py"):
        file = Path(spec.origin).resolve()
        parts = name.split(".") + (["__init__"] if file.name == "__init__.py" else [])
        base = file.parents[len(parts) - 1]
        world.enter(Location(file, base, name, repository_of(file, base)))
    try:
        with OnThisMachine():
            module = importlib.import_module(name)
    except STOPS as error:
        raise TargetError(_does_not_run(name, error, space, world)) from error
    origin = getattr(module, "__file__", None)
    return Namespace(name, vars(module), Path(origin).resolve() if origin else None, module.__name__)


def _does_not_run(typed: str, error: BaseException, space: Namespace, world: World) -> str:
    what = "it trains where it is imported" if isinstance(error, TrainingBegins) else one_line(error, space)
    return f"{typed} does not run: {what}{without(world)}"


def without(world: World) -> str:
    """What an error message adds about missing packages and code that was not run; "" where there is nothing to add."""
    stops = [note for note in world.notes if " stops at line " in note or " left out" in note]
    missing = [f"not importable here, and stood in for: {', '.join(world.missing)}"] if world.missing else []
    return f" ({'; '.join(missing + stops)})" if missing + stops else ""


def evaluate(expression: str, option: str, namespace: Namespace, extra: Mapping[str, Any] | None = None) -> Any:
    """The value of an expression from the command line, which may also use torch, nn and a few helpers. Errors of
    evaluating it are not caught."""
    helpers = {"torch": torch, "nn": torch.nn, "SimpleNamespace": SimpleNamespace, "changed": changed}
    names = {**helpers, **namespace.names, **(extra or {})}
    try:
        code = compile(expression.strip(), option, "eval")
    except (SyntaxError, ValueError) as error:
        raise TargetError(f"{option} {expression!r} is not a Python expression: {error}") from error
    return eval(code, names)


def changed(config: Any, **fields: Any) -> Any:
    """Set fields of a config and return it; the reports print expressions that call this."""
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def one_line(error: BaseException, namespace: Namespace) -> str:
    """An error of the user's code in one line, with the innermost line in the target's file, or else in its folder."""
    if isinstance(error, SyntaxError):
        return _syntax(error, namespace.source)
    said = name_and_text(error)
    if namespace.file is None:
        return said
    frames = traceback.extract_tb(error.__traceback__)[::-1]
    for frame in frames:
        if frame.filename == str(namespace.file):
            return f"{namespace.source}:{frame.lineno}: {said}"
    for frame in frames:
        path = Path(frame.filename)
        if path.is_relative_to(namespace.file.parent) and "site-packages" not in path.parts:
            return f"{os.path.relpath(path)}:{frame.lineno}: {said}"
    return said


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint for an unknown name: the nearest known ones, or else `otherwise`."""
    close = difflib.get_close_matches(name, list(known), 3)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def kind_of(value: Any) -> str:
    """ "the class Net", "a dict": what a value is, for errors."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def name_and_text(error: BaseException) -> str:
    """ "ValueError: 7 is odd": the class of an error, and its message to the first line that does not end in a
    colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    announced = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines))
    text = " ".join(lines[: announced + 1])
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _syntax(error: Exception, typed: str) -> str:
    if not isinstance(error, SyntaxError):
        return f"{typed} is not Python source: {error}"
    is_target = error.filename in (None, typed) or Path(str(error.filename)).name == Path(typed).name
    line = f":{error.lineno}" if error.lineno else ""
    return f"{typed if is_target else error.filename}{line}: {type(error).__name__}: {error.msg}"
