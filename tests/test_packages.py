"""Where a file lies: its module name by what it imports, and the modules of its repository, on trees written here."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from quack_fx.errors import TargetError
from quack_fx.targets import resolve
from quack_fx.targets.packages import locate

pytestmark = pytest.mark.usefixtures("own_folder")

HEADER = "import torch\nfrom torch import nn\nimport torch.nn.functional as F\n"
ATTENTION = HEADER + (
    "class Attention(nn.Module):\n"
    "    def __init__(self, width=8):\n"
    "        super().__init__()\n"
    "        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))\n"
    "    def forward(self, x):\n"
    "        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))\n"
)
NET = HEADER + (
    "class Net(nn.Module):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.attn = Attention(WIDTH)\n"
    "    def forward(self, x):\n"
    "        return self.attn(x)\n"
)


def tree(files: dict[str, str]) -> None:
    """Write files, each with its source."""
    for name, source in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(source))


def net(imports: str, width: int = 8) -> str:
    return f"{imports}\nWIDTH = {width}\n{NET}"


PLACES: dict[str, tuple[dict[str, str], str, str, str]] = {
    # Files, the target, the folder its name counts from, and the name.
    "alone": ({"model.py": net(ATTENTION)}, "model.py", ".", "model"),
    "called like its package": (
        {"a/tower/parts.py": ATTENTION, "a/tower/tower.py": net("from tower.parts import Attention")},
        "a/tower/tower.py",
        "a",
        "tower.tower",
    ),
    "called like its package, deeper": (
        {"a/tower/models/parts.py": ATTENTION, "a/tower/models/tower.py": net("from tower.models.parts import *")},
        "a/tower/models/tower.py",
        "a",
        "tower.models.tower",
    ),
    "a package": (
        {"pack_a/__init__.py": "", "pack_a/parts.py": ATTENTION, "pack_a/m.py": net("from pack_a.parts import *")},
        "pack_a/m.py",
        ".",
        "pack_a.m",
    ),
    "one level up": (
        {"pack_b/p.py": ATTENTION, "pack_b/m.py": net("from .p import *")},
        "pack_b/m.py",
        ".",
        "pack_b.m",
    ),
    "two levels up": (
        {"pack_c/p.py": ATTENTION, "pack_c/in/m.py": "", "pack_c/sub/m.py": net("from ..p import *")},
        "pack_c/sub/m.py",
        ".",
        "pack_c.sub.m",
    ),
    "two levels up, with files of packages": (
        {"pack_d/__init__.py": "", "pack_d/s/__init__.py": "", "pack_d/p.py": ATTENTION}
        | {"pack_d/s/m.py": net("from ..p import Attention")},
        "pack_d/s/m.py",
        ".",
        "pack_d.s.m",
    ),
    "src": (
        {"src/pack_e/__init__.py": "", "src/pack_e/p.py": ATTENTION, "src/pack_e/m.py": net("from pack_e.p import *")},
        "src/pack_e/m.py",
        "src",
        "pack_e.m",
    ),
    "src without files of packages": (
        {"src/pack_f/p.py": ATTENTION, "src/pack_f/m.py": net("from pack_f.p import *")},
        "src/pack_f/m.py",
        "src",
        "pack_f.m",
    ),
    "a folder called torch": (
        {"oss/torch/__init__.py": "", "oss/torch/p.py": ATTENTION, "oss/torch/m.py": net("from .p import Attention")},
        "oss/torch/m.py",
        ".",
        "oss.torch.m",
    ),
    "a folder like a module of Python": (
        {"lib/json/p.py": ATTENTION, "lib/json/m.py": net("from .p import Attention")},
        "lib/json/m.py",
        ".",
        "lib.json.m",
    ),
}


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("case", PLACES)
def test_name_and_folder(case: str, elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, target, base, name = PLACES[case]
    tree({f"repo/{n}": source for n, source in files.items()} | {"repo/.git/HEAD": "", "other/x.py": ""})
    file = tmp_path / "repo" / target
    monkeypatch.chdir(tmp_path / "other" if elsewhere else tmp_path / "repo")
    place = locate(file, ast.parse(file.read_bytes()))
    assert place.base == (tmp_path / "repo" / base).resolve() and place.name == name
    assert place.repository == tmp_path / "repo"
    before = set(sys.modules)
    model = resolve(str(file) if elsewhere else target).model
    assert model.attn.q.weight.shape == (8, 8)
    assert not {n for n in set(sys.modules) - before if n.split(".")[0] in (name.split(".")[0], "p", "parts")}
    assert sys.modules["torch"] is torch


IMPORTS: dict[str, tuple[dict[str, str], str]] = {
    "a neighbour of a script": ({"s/neighbour.py": ATTENTION, "s/m.py": net("from neighbour import *")}, "s/m.py"),
    "a module above": ({"above.py": ATTENTION, "s/t/m.py": net("from above import *")}, "s/t/m.py"),
    "a module below src": ({"src/lib_x/p.py": ATTENTION, "s/m.py": net("from lib_x.p import *")}, "s/m.py"),
    "a module somewhere else": (
        {"far/away/only_one.py": ATTENTION, "s/m.py": net("from only_one import Attention")},
        "s/m.py",
    ),
    "a package somewhere else": (
        {"far/away/lib_y/p.py": ATTENTION, "s/m.py": net("from lib_y.p import Attention")},
        "s/m.py",
    ),
    "a package whose own file fails": (
        {"lib_z/__init__.py": "raise RuntimeError('heavy')", "lib_z/p.py": ATTENTION}
        | {"lib_z/m.py": net("from .p import Attention")},
        "lib_z/m.py",
    ),
    "an import of a namespace package": (
        {"ns/one/p.py": ATTENTION, "ns/two/m.py": net("from ns.one.p import Attention")},
        "ns/two/m.py",
    ),
    "an import in the constructor": (
        {
            "s/late.py": ATTENTION,
            "s/m.py": net("").replace("        self.attn", "        from late import Attention\n        self.attn"),
        },
        "s/m.py",
    ),
    "an import of the file's own package": (
        {"own/__init__.py": "from own.m import Net", "own/p.py": ATTENTION}
        | {"own/m.py": net("from own.p import Attention")},
        "own/m.py",
    ),
}


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("case", IMPORTS)
def test_imports_of_the_repository(case: str, elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, target = IMPORTS[case]
    tree({f"repo/{n}": source for n, source in files.items()} | {"repo/.git/HEAD": "", "other/x.py": ""})
    monkeypatch.chdir(tmp_path / "other" if elsewhere else tmp_path / "repo")
    path, before = list(sys.path), set(sys.modules)
    resolved = resolve(str(tmp_path / "repo" / target) if elsewhere else target)
    assert resolved.model.attn.q.weight.shape == (8, 8)
    assert ("left out" in str(resolved.notes)) == ("fails" in case)
    assert not any(word == "missing" for word, _ in resolved.notes)
    own = [n for n in set(sys.modules) - before if str(tmp_path) in str(getattr(sys.modules[n], "__file__", ""))]
    assert not own and sys.path == path


def test_two_modules_of_one_name_somewhere_are_not_guessed_at() -> None:
    tree({"a/only_two.py": ATTENTION, "b/only_two.py": ATTENTION, "s/m.py": net("from only_two import Attention")})
    tree({".git/HEAD": ""})
    with pytest.raises(TargetError, match="only_two"):
        resolve("s/m.py")


def test_targets_of_equal_names_one_after_the_other() -> None:
    for width in (8, 16, 24):
        tree({f"r{width}/pack/p.py": ATTENTION, f"r{width}/pack/m.py": net("from pack.p import Attention", width)})
        tree({f"r{width}/pack/sub.py": f"WIDTH = {width}", f"r{width}/.git/HEAD": ""})
        tree({f"r{width}/pack/n.py": net("from .p import Attention").replace("WIDTH = 8", "from .sub import WIDTH")})
    for width in (8, 16, 24, 8):
        for name in ("m", "n"):
            assert resolve(f"r{width}/pack/{name}.py").model.attn.q.weight.shape == (width, width)


def test_a_folder_called_like_an_installed_package_hides_nothing() -> None:
    tree({"networkx/p.py": ATTENTION, "networkx/m.py": net("from .p import Attention"), ".git/HEAD": ""})
    loaded = sys.modules["networkx"]
    assert resolve("networkx/m.py").model.attn.q.weight.shape == (8, 8)
    assert sys.modules["networkx"] is loaded


def test_a_part_of_a_package_called_like_a_missing_package_is_not_it() -> None:
    """As torchtune/datasets imports what it needs from `datasets`."""
    tree(
        {
            "whole/__init__.py": "",
            "whole/absent_one/__init__.py": "from whole.absent_one.own import load",
            "whole/absent_one/own.py": "from absent_one import load",
            "whole/p.py": ATTENTION,
            "whole/m.py": net("from whole.absent_one import load\nfrom whole.p import Attention"),
            ".git/HEAD": "",
        }
    )
    target = resolve("whole/m.py")
    assert target.model.attn.q.weight.shape == (8, 8)
    assert any(word == "missing" and "absent_one" in text for word, text in target.notes)


@pytest.mark.parametrize("level", [1, 2])
def test_relative_imports_of_what_is_not_there(level: int) -> None:
    tree({"a/b/c/m.py": net(f"from {'.' * level}absent import Attention")})
    with pytest.raises(TargetError, match="absent") as caught:
        resolve("a/b/c/m.py")
    assert "\n" not in str(caught.value)
