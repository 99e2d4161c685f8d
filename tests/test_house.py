"""The folders of the package are wings of a house, and imports go one way through it.

Read off the source: every import counts, one in a function or under TYPE_CHECKING as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx as nx
import pytest

import quack_fx

ROOT = Path(quack_fx.__file__).parents[1]
LOOSE = {"__init__.py", "errors.py", "py.typed"}
MOST_LINES = 500

EVERYTHING = {
    "errors",
    "layout",
    "graph",
    "find",
    "prove",
    "qk_norm",
    "train",
    "report",
    "targets",
    "bench",
    "cli",
}
ARROWS = {
    "errors": set[str](),
    "layout": {"errors"},
    "graph": {"errors"},
    "find": {"layout", "graph"},
    "prove": {"errors", "layout", "graph"},  # and nothing of find: a proof must not share its mistakes
    "qk_norm": {"errors", "layout", "graph", "find"},
    "train": {"errors", "layout", "find"},
    "report": {"errors", "layout", "__version__"},
    "targets": {"errors", "graph"},
    "bench": {"errors", "layout", "graph", "qk_norm", "train"},
    "cli": EVERYTHING | {"__version__"},
    "": EVERYTHING - {"cli", "bench", "report", "targets"},  # the public names
}
"""What each wing may import, besides itself."""

MORE = {
    # From what was typed to the text of a step, in one call: the one public name that goes through the whole house.
    "quack_fx.train.convert": {"qk_norm", "targets"},
}
"""What single modules may import, besides what their wing may."""

DOORS = {"find"}
"""Wings of which others import `quack_fx.WING` itself, and none of its files."""

Imports = dict[str, set[str]]
"""For each module what it imports: modules, and `quack_fx.__version__`."""


def sources() -> dict[str, Path]:
    """The file of every module."""
    found = {}
    for folder, package in ((ROOT / "quack_fx", "quack_fx"), (ROOT / "cli", "quack_fx.cli")):
        for file in folder.rglob("*.py"):
            path = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(path[:-1] if path[-1] == "__init__" else path)] = file
    return found


def imports_of(module: str, text: str, is_package: bool, modules: Mapping[str, object]) -> Iterator[str]:
    """What a module imports of the package; a name that is no module stands for the module it is taken from."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "quack_fx")
        elif isinstance(node, ast.ImportFrom):
            path = module.split(".") if is_package else module.split(".")[:-1]
            above = path[: len(path) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            if source.split(".")[0] == "quack_fx":
                for alias in node.names:
                    full = f"{source}.{alias.name}"
                    yield full if full in modules or full == "quack_fx.__version__" else source


def wing(module: str) -> str:
    """The wing that a module belongs to."""
    return [*module.split("."), ""][1]


def wrong_arrows(imports: Imports) -> list[str]:
    """Imports that the plan does not have."""
    return [
        f"{module} -> {target}"
        for module, targets in sorted(imports.items())
        for target in sorted(targets)
        if wing(module) != wing(target)
        and (
            wing(target) not in ARROWS.get(wing(module), set()) | MORE.get(module, set())
            or (wing(target) in DOORS and target.count(".") > 1)
        )
    ]


def circles(imports: Imports) -> list[list[str]]:
    """Modules that import each other."""
    graph = nx.DiGraph((module, target) for module, targets in imports.items() for target in targets)
    found = [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]
    return found + [[module] for module in nx.nodes_with_selfloops(graph)]


@pytest.fixture(scope="module")
def imports() -> Imports:
    files = sources()
    return {
        module: set(imports_of(module, file.read_text("utf-8"), file.name == "__init__.py", files))
        for module, file in files.items()
    }


def test_every_import_is_an_arrow_of_the_plan(imports: Imports) -> None:
    assert wrong_arrows(imports) == []


def test_no_modules_import_each_other(imports: Imports) -> None:
    assert circles(imports) == []


def test_every_arrow_of_the_plan_is_used(imports: Imports) -> None:
    used = {(wing(module), wing(target)) for module, targets in imports.items() for target in targets}
    unused = {(own, other) for own, others in ARROWS.items() if own not in ("cli", "") for other in others} - used
    assert unused == set()
    for module, others in MORE.items():
        assert others <= {wing(target) for target in imports[module]}


def test_nothing_lies_loose() -> None:
    wings = {path.name for path in (ROOT / "quack_fx").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert wings == EVERYTHING - {"errors", "cli"}
    assert {path.name for path in (ROOT / "quack_fx").iterdir() if path.is_file()} == LOOSE


def test_no_file_is_long() -> None:
    lines = {module: len(file.read_text("utf-8").splitlines()) for module, file in sources().items()}
    assert {module: n for module, n in lines.items() if n > MOST_LINES} == {}


@pytest.mark.parametrize(
    ("module", "text", "wrong"),
    [
        ("quack_fx.prove.graph", "def f():\n    from quack_fx.find import find", ["quack_fx.find"]),
        ("quack_fx.prove.graph", "if TYPE_CHECKING:\n    from quack_fx import find", ["quack_fx.find"]),
        ("quack_fx.train.step", "import quack_fx.find.search", ["quack_fx.find.search"]),
        ("quack_fx.layout.fit", "from ..graph import ops", ["quack_fx.graph.ops"]),
        ("quack_fx.train.step", "from quack_fx.targets import resolve", ["quack_fx.targets"]),
        ("quack_fx.train.convert", "from quack_fx.targets import resolve", []),
        ("quack_fx.train.convert", "from quack_fx.find.search import find", ["quack_fx.find.search"]),
        ("quack_fx.graph.ops", "from quack_fx import __version__", ["quack_fx.__version__"]),
        ("quack_fx.graph.ops", "from quack_fx import find_qk_pairs", ["quack_fx"]),
        ("quack_fx.find.search", "from .provenance import Heads\nimport torch", []),
    ],
)
def test_a_wrong_arrow_is_seen(module: str, text: str, wrong: list[str]) -> None:
    found = {module: set(imports_of(module, text, False, sources()))}
    assert wrong_arrows(found) == [f"{module} -> {target}" for target in wrong]


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d"}}) == [["b", "c"], ["d"]]
