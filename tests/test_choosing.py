"""Which model is taken of those that a file and its repository can make, and how it is built, on repositories of a few
lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from quack_fx.errors import TargetError
from quack_fx.targets import resolve

pytestmark = pytest.mark.usefixtures("own_folder")

HEADER = "import torch\nfrom torch import nn\nimport torch.nn.functional as F\n"
FORWARD = (
    "    def forward(self, x):\n"
    "        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))\n"
    "        return F.scaled_dot_product_attention(q, k, v)\n"
)


def net(head: str = "width=16, heads=2", name: str = "Net", check: str = "pass") -> str:
    """A model of some width and heads."""
    return (
        f"class {name}(nn.Module):\n    def __init__(self, {head}):\n        super().__init__()\n        {check}\n"
        "        self.heads = heads\n        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))\n"
        + FORWARD
    )


NEEDS_SCALE = net("width=16, heads=2, scale=None", check="scale * torch.ones(2)")
SUB = "class {}(Net):\n    def __init__(self, *args, **kwargs):\n        super().__init__(*args, **kwargs)\n"
OWN_FORWARD = "    def forward(self, x):\n        return super().forward(x) + 1\n"


@dataclass
class Case:
    """A repository with the target model.py, and what is to be made of it.

    Attributes:
        model: Source of the target.
        files: Other files by name.
        made: Name of the class of the model.
        width: Its width.
        title: What its title begins with.
        told: Words of the note of how it was chosen.
    """

    model: str
    files: dict[str, str] = field(default_factory=dict)
    made: str = "Net"
    width: int = 16
    title: str = "Net("
    told: str = ""


FACTORIES = (
    "def net_small(): return Net(width=32, scale=2.0)\ndef net_large(**kw):\n    model = Net(64, scale=1, **kw)\n"
)
FACTORIES += "    return model\n"
PARTS = "from parts import Net\n"
UNHASHABLE = "from dataclasses import dataclass\n@dataclass\nclass Options:\n    steps: int = 3\noptions = Options()\n"
CASES = {
    "a file with values that have no hash": Case(
        net() + UNHASHABLE + SUB.format("Wider") + OWN_FORWARD, {"train.py": "from model import Net\nNet()\n"}
    ),
    "a class that only its functions can make": Case(
        NEEDS_SCALE + FACTORIES, width=32, title="net_small()", told="net_small was taken .* net_large"
    ),
    "the function that is used most": Case(
        NEEDS_SCALE + FACTORIES, {"run.py": "from model import net_large\n"}, width=64, title="net_large()"
    ),
    "functions alone": Case(
        PARTS + FACTORIES.replace(", scale=2.0", "").replace(", scale=1", ""),
        {"parts.py": HEADER + net()},
        width=32,
        title="net_small()",
        told="others: net_large",
    ),
    "a function of another function": Case(
        PARTS + "def _net(width): return Net(width)\ndef net_small(): return _net(32)\n",
        {"parts.py": HEADER + net()},
        width=32,
        title="net_small()",
    ),
    "a model and a variant of it": Case(
        net() + SUB.format("Wrapped"), {"run.py": "from model import Net, Wrapped\n"}, title="Net("
    ),
    "a model and two variants of it": Case(
        net() + SUB.format("One") + OWN_FORWARD + SUB.format("Two") + OWN_FORWARD,
        {"run.py": "from model import Net, One, Two\n"},
    ),
    "a variant that is used more": Case(
        net() + SUB.format("Wrapped"), {"run.py": "from model import Wrapped\n"}, made="Wrapped", title="Wrapped("
    ),
    "a variant that passes on what its base needs": Case(
        net("width, heads") + SUB.format("Wrapped"),
        {"run.py": "from model import Wrapped\nWrapped(width=32, heads=4)\n"},
        made="Wrapped",
        width=32,
        title="Wrapped(width=32, heads=4)",
    ),
    "a factory that reads what is not there, beside one that asks for values": Case(
        net("width, heads=2") + "def make_model(width): return Net(width)\n"
        "def load_trained_model(): return make_model(len(open('weights').read()))\n",
        {"run.py": "from model import make_model\nmake_model(32)\n"},
        width=32,
        title="make_model(",
        told="make_model was taken, since load_trained_model does not work here",
    ),
    "one model in several sizes": Case(
        net()
        + "".join(
            f"class {n}(Net):\n    def __init__(self, **kw):\n        super().__init__(width={w}, heads=2, **kw)\n"
            for n, w in (("Small", 32), ("Large", 64))
        ),
        made="Small",
        width=32,
        title="Small(",
        told="others: Large",
    ),
    "one function's model in several sizes": Case(
        net("width, heads")
        + "".join(f"def tower_{n}() -> Net: return Net({w}, heads=2)\n" for n, w in (("small", 32), ("large", 64))),
        title="tower_small()",
        width=32,
        told="others: tower_large",
    ),
    "a model that a config names": Case(
        net() + net(name="Other"),
        {"conf.yaml": "target: model.Other\nparams:\n  width: 16\n"},
        made="Other",
        title="Other(",
        told="Other was taken of the models",
    ),
    "a function of another file": Case(
        net("width, heads, at", check="assert all(isinstance(a, int) for a in at)"),
        {
            "build.py": "from model import Net\n\ndef create(width, at):\n"
            "    return Net(width, 2, tuple(int(a) for a in at.split(',')))\n\n"
            "def defaults():\n    return dict(width=32, at='8,4')\n"
        },
        width=32,
        title="create(",
        told="Net is made by create of build.py",
    ),
    "a value behind the line where the file stops": Case(
        "import os\nrank = int(os.environ['NO_SUCH_RANK'])\nparts = 8 // 4\nfactor = 4 / float(parts)\n"
        + net(check="assert factor == 2.0"),
        told="stops at line 5",
    ),
    "a value that a function needs that a class calls": Case(
        "import os\nrank = int(os.environ['NO_SUCH_RANK'])\nbase = int(7.5)\ndef size(): return base + 1\n"
        + net(check="assert size() == 8"),
        told="stops at line 5",
    ),
}


def write(case: Case) -> None:
    """Write the files of a case."""
    for name, source in {"model.py": HEADER + case.model, ".git/HEAD": "", **case.files}.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(source)


@pytest.mark.parametrize("name", CASES)
def test_what_is_taken_and_told(name: str) -> None:
    case = CASES[name]
    write(case)
    target = resolve("model.py")
    assert type(target.model).__name__ == case.made and target.model.q.in_features == case.width
    assert target.title.startswith(case.title)
    assert re.search(case.told, "; ".join(text for word, text in target.notes if word == "loaded"))


@pytest.mark.parametrize("name", ["a function of another file", "a variant that passes on what its base needs"])
def test_the_printed_expression_makes_the_same_model(name: str) -> None:
    write(CASES[name])
    target = resolve("model.py")
    again = resolve("model.py", build=target.build)
    assert [p.shape for p in again.model.parameters()] == [p.shape for p in target.model.parameters()]


@pytest.mark.parametrize(
    ("model", "files", "said"),
    [
        (net() + net(name="Other"), {}, r"has 2 models \(Net, Other\)"),
        (net() + SUB.format("One") + SUB.format("Two"), {}, r"has 2 models \(One, Two\)"),
        (
            net("width, heads, at", check="at[0] + 0"),
            {"run.py": "from model import Net\nopen('data', 'w')\ndef create(): return Net(*map(len, 'abc'))\n"},
            "fails",
        ),
    ],
)
def test_what_is_not_clear_is_refused(model: str, files: dict[str, str], said: str) -> None:
    write(Case(model, files))
    with pytest.raises(TargetError, match=said) as caught:
        resolve("model.py")
    assert "\n" not in str(caught.value) and not Path("data").exists()


PART = (
    "class Part(nn.Module):\n    def __init__(self, width, heads=2):\n        super().__init__()\n"
    "        self.width = width\n"
)
OPEN = "import abc\nclass Kind(nn.Module):\n    @abc.abstractmethod\n    def size(self): ...\n"


def test_parts_are_made_as_the_model_is() -> None:
    check = "assert part.width == 64; width = part.width"
    write(Case(PART + net("part: Part, heads=2", check=check), {}))
    target = resolve("model.py")
    assert target.model.q.in_features == 64 and target.assumed == {"part.width": 64}
    assert target.build == "Net(part=Part(width=64))" or target.build == "Net(Part(width=64))"


@pytest.mark.parametrize(
    ("classes", "made"),
    [("Layer", "Layer"), ("Layer NetLayer", "NetLayer"), ("Layer OtherLayer", None), ("Norm", None)],
)
def test_a_part_of_any_class_is_the_one_named_like_it(classes: str, made: str | None) -> None:
    parts = "".join(PART.replace("Part", name) for name in classes.split())
    write(Case(parts + net("layer: nn.Module, heads=2", check="width = layer.width")))
    if made is None:
        with pytest.raises(TargetError, match="Net is given a module as 'layer'"):
            resolve("model.py:Net")
    else:
        assert resolve("model.py:Net").build in (f"Net(layer={made}(width=64))", f"Net({made}(width=64))")


def test_an_abstract_config_is_one_of_the_class_that_fills_it_in() -> None:
    options = "import abc\nclass Options(abc.ABC):\n    @abc.abstractmethod\n    def width(self): ...\n"
    filled = "class Wide(Options):\n    def width(self): return 24\n"
    write(Case(options + filled + net("options: Options, heads=2", check="width = options.width()")))
    assert resolve("model.py:Net").model.q.in_features == 24


def test_the_one_class_that_fills_in_what_a_part_leaves_open() -> None:
    filled = "class Filled(Kind):\n    def size(self): return 24\n"
    write(Case(OPEN + filled + net("part: Kind, heads=2", check="width = part.size()")))
    assert resolve("model.py:Net").model.q.in_features == 24
    other = "class Other(Kind):\n    def size(self): return 40\n"
    write(Case(OPEN + filled + other + net("part: Kind, heads=2", check="width = part.size()")))
    with pytest.raises(TargetError, match=r"is given a module as .part. \(Kind\), which cannot be made up"):
        resolve("model.py:Net")
