"""Sizes that nobody gives: found in the repository or assumed, told, and made again by what is printed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import pytest

from quack_fx.errors import TargetError
from quack_fx.targets import Target, resolve
from quack_fx.train.convert import convert

pytestmark = pytest.mark.usefixtures("own_folder")

HEADER = "import torch\nfrom torch import nn\nimport torch.nn.functional as F\n"


def net(width: str, heads: str, head: str = "config", before: str = "", more: str = "") -> str:
    """A model whose width and heads are expressions of its constructor's arguments."""
    return (
        f"{HEADER}{dedent(before)}\nclass Net(nn.Module):\n    def __init__(self, {head}):\n"
        "        super().__init__()\n"
        f"        {more or 'pass'}\n        width, self.heads = {width}, {heads}\n"
        "        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))\n"
        "    def forward(self, x):\n"
        "        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))\n"
        "        return F.scaled_dot_product_attention(q, k, v)\n"
    )


@dataclass
class Case:
    """A repository, and the sizes that the model has then.

    Attributes:
        files: Sources by name; the target is model.py.
        width: Of the model.
        heads: Of the model.
        found: Names whose values stand in the repository.
        assumed: Names whose values were made up.
    """

    model: str
    files: dict[str, str] = field(default_factory=dict)
    width: int = 64
    heads: int = 4
    found: set[str] = field(default_factory=set)
    assumed: set[str] = field(default_factory=set)


SIZES = {"d_model", "n_heads"}
DATACLASS = "from dataclasses import dataclass\n@dataclass\nclass Config:\n"
PARSER = "import argparse\nfrom model import Net\np = argparse.ArgumentParser()\n"
BY_NAME = net("config.d_model", "config.n_heads")
PLAIN = net("d_model", "n_heads", "d_model, n_heads")
CASES = {
    "by attribute": Case(BY_NAME, assumed=SIZES),
    "by key": Case(net("config['d_model']", "config['n_heads']"), assumed=SIZES),
    "by both": Case(net("config['d_model']", "config.n_heads"), assumed=SIZES),
    "another name": Case(net("hps.d_model", "hps.n_heads", "hps"), assumed=SIZES),
    "a name that says nothing": Case(net("c.d_model", "c.n_heads", "c"), assumed=SIZES),
    "nested": Case(net("config.model.d_model", "config.model.n_heads"), assumed={"model", *SIZES}),
    "nested by key": Case(net("config['model']['d_model']", "config['model']['n_heads']"), assumed={"model", *SIZES}),
    "getattr with a default": Case(
        net("getattr(config, 'd_model', 24)", "config.n_heads"), width=24, assumed={"n_heads"}
    ),
    "get with a default": Case(net("config.get('d_model', 24)", "config['n_heads']"), width=24, assumed={"n_heads"}),
    "hasattr": Case(
        net("config.d_model if hasattr(config, 'd_model') else 24", "config.n_heads"), width=24, assumed={"n_heads"}
    ),
    "in": Case(
        net("config['d_model'] if 'd_model' in config else 24", "config['n_heads']"), width=24, assumed={"n_heads"}
    ),
    "parameters": Case(PLAIN, assumed=SIZES),
    "a parameter by name alone": Case(net("d_model", "n_heads", "*, d_model, n_heads=2"), heads=2, assumed={"d_model"}),
    "a parameter behind another": Case(
        net("d_model", "n_heads", "n_heads=2, *, d_model"), heads=2, assumed={"d_model"}
    ),
    "a config by name alone": Case(net("config.d_model", "config.n_heads", "*, config"), assumed=SIZES),
    "parameters with types": Case(net("d_model", "n_heads", "d_model: int, n_heads: int"), assumed=SIZES),
    "parameters beside defaults": Case(net("d_model", "n_heads", "d_model, n_heads=2"), heads=2, assumed={"d_model"}),
    "a flag": Case(
        net("d_model", "n_heads", "d_model, n_heads, use_bias", more="assert not use_bias"),
        assumed={*SIZES, "use_bias"},
    ),
    "a word the code chooses by": Case(
        net("d_model", "n_heads", "d_model, n_heads, kind", more="{'wide': 3, 'narrow': 4}[kind]"),
        assumed={*SIZES, "kind"},
    ),
    "a word that is compared": Case(
        net(
            "config.d_model",
            "config.n_heads",
            more="assert config.norm == 'rms' or config.norm == 'layer', config.norm",
        ),
        assumed={*SIZES, "norm"},
    ),
    "the second word": Case(
        net("config.d_model", "config.n_heads", more="assert config.norm != 'rms' and config.norm == 'layer'"),
        assumed={*SIZES, "norm"},
    ),
    "a list": Case(net("sum(widths) // len(widths)", "n_heads", "widths, n_heads"), assumed={"widths", "n_heads"}),
    "a typed list": Case(
        net("d_model", "n_heads", "d_model, n_heads, depths: list[int]", more="assert len(depths)"),
        assumed={*SIZES, "depths"},
    ),
    "a required field": Case(
        net("config.d_model", "config.n_heads", "config: Config", DATACLASS + "    d_model: int\n    n_heads: int = 2"),
        heads=2,
        assumed={"d_model"},
    ),
    "unpacked": Case(
        net(
            "c.d_model",
            "c.n_heads",
            before=DATACLASS + "    d_model: int\n    n_heads: int",
            more="c = Config(**config)",
        ),
        assumed=SIZES,
    ),
    "sizes of -1": Case(
        net(
            "config.d_model",
            "config.n_heads",
            "config: Config",
            DATACLASS + "    d_model: int = -1\n    n_heads: int = -1",
            more="assert config.d_model > 0",
        ),
        assumed=SIZES,
    ),
    "a config class that the model declares": Case(
        net("config.d_model", "config.n_heads", before="import settings").replace(
            "class Net(nn.Module):\n", "class Net(nn.Module):\n    config_class = settings.Sizes\n"
        ),
        {"settings.py": "class Sizes:\n    def __init__(self, d_model, n_heads=4): vars(self).update(locals())\n"},
        assumed={"d_model"},
    ),
    "a method of a package that sounds like a config": Case(
        net("config.d_model", "config.n_heads", before="from torch import Tensor").replace(
            "class Net(nn.Module):\n",
            "class Base(nn.Module):\n    @classmethod\n    def get_config_dict(cls): raise ValueError\n"
            "Base.__module__ = 'elsewhere.models'\nclass Net(Base):\n",
        ),
        assumed=SIZES,
    ),
    "a default config with None": Case(
        net("config.d_model", "config.n_heads", before="from types import SimpleNamespace")
        .replace(
            "    def forward",
            "    @staticmethod\n    def get_default_config():\n"
            "        return SimpleNamespace(d_model=None, n_heads=2)\n    def forward",
        )
        .replace("        pass\n", "        assert config.d_model is not None\n"),
        heads=2,
        assumed={"d_model"},
    ),
    "options": Case(
        PLAIN,
        {
            "train.py": PARSER + "p.add_argument('--d_model', type=int, default=48)\n"
            "p.add_argument('--n_heads', type=int, default=6)\na = p.parse_args()\nNet(a.d_model, n_heads=a.n_heads)\n"
        },
        48,
        6,
        SIZES,
    ),
    "options for a config": Case(
        BY_NAME,
        {
            "train.py": PARSER + "p.add_argument('--d-model', default=48)\n"
            "p.add_argument('-n', '--heads', dest='n_heads', default=6)\nNet(p.parse_args())\n"
        },
        48,
        6,
        SIZES,
    ),
    "a call elsewhere": Case(
        PLAIN, {"s/run.py": "from model import Net\nW = 12\nm = Net(W * 4, n_heads=W // 2)\n"}, 48, 6, SIZES
    ),
    "a call with a dict": Case(
        PLAIN, {"run.py": "from model import Net\nc = dict(d_model=48, n_heads=6)\nm = Net(**c)\n"}, 48, 6, SIZES
    ),
    "a dataclass elsewhere": Case(
        BY_NAME,
        {"conf.py": DATACLASS.replace("Config", "Sizes") + "    d_model: int = 48\n    n_heads: int = 6\n"},
        48,
        6,
        SIZES,
    ),
    "a dict": Case(
        net("config['d_model']", "config['n_heads']"),
        {"t.py": "GPT_SMALL = {'d_model': 48, 'n_heads': 6}\n"},
        48,
        6,
        SIZES,
    ),
    "a dict in the file": Case(BY_NAME + "\nTINY = dict(d_model=48, n_heads=6)\n", {}, 48, 6, SIZES),
    "a JSON file": Case(
        BY_NAME, {"conf/small.json": '{"model": {"d_model": 48, "n_heads": 6}, "lr": 0.1}'}, 48, 6, SIZES
    ),
    "a YAML file": Case(BY_NAME, {"conf/small.yaml": "model:\n  d_model: 48\n  n_heads: 6\nlr: 0.1\n"}, 48, 6, SIZES),
    "constants": Case(
        BY_NAME, {"train.py": "from model import Net\nd_model = 48\nn_heads = d_model // 8\nlr = 0.1\n"}, 48, 6, SIZES
    ),
    "assignments": Case(
        BY_NAME, {"train.py": "from model import Net\nc = Config()\nc.d_model = 48\nc.n_heads = 6\n"}, 48, 6, SIZES
    ),
    "some found, some assumed": Case(
        net("config.d_model", "config.n_heads", more="config.d_ff"),
        {"c.json": '{"d_model": 48, "n_heads": 6}'},
        48,
        6,
        SIZES,
        {"d_ff"},
    ),
    "unpacked and found": Case(
        net(
            "c.d_model",
            "c.n_heads",
            before=DATACLASS + "    d_model: int\n    n_heads: int",
            more="c = Config(**config)",
        ),
        {"c.json": '{"d_model": 48, "n_heads": 6}'},
        48,
        6,
        SIZES,
    ),
    "a table of configs in the file": Case(
        BY_NAME
        + "\nclass Sizes: pass\ndef made(w):\n    s = Sizes()\n    s.d_model, s.n_heads = w, w // 8\n    return s\n"
        "TABLE = {'small': made(48), 'large': made(96)}\n",
        {},
        48,
        6,
        SIZES,
    ),
    "a config that a function of the file gives": Case(
        BY_NAME + "\nclass Sizes: pass\ndef small_config():\n    s = Sizes()\n    s.d_model, s.n_heads = 48, 3 * 2\n"
        "    return s\n",
        {},
        48,
        6,
        SIZES,
    ),
    "options that a script sets later": Case(
        net("config.d_model", "config.n_heads", more="int(config.seed)"),
        {
            "options.py": PARSER
            + "p.add_argument('--d_model')\np.add_argument('--n_heads', default=None)\n"
            "p.add_argument('--seed', default=None)\n".replace("'--d_model'", "'--d_model', default=None"),
            "presets.py": "def preset(args):\n    args.d_model = 48\n    args.n_heads = 6\n    args.seed = 0\n",
        },
        48,
        6,
        {*SIZES, "seed"},
    ),
    "a call in a page": Case(
        PLAIN,
        {"README.md": "# Net\n```python\nfrom model import Net\nNet(d_model = 48, n_heads = 6)\n```\n"},
        48,
        6,
        SIZES,
    ),
    "many options of a file that does not name the model": Case(
        net("d_model", "n_heads", "d_model, n_heads, d_ff, n_layers, vocab, max_len"),
        {
            "conf/base.py": "size = 8 * int(6)\n"
            "cfg = dict(d_model=size, n_heads=6, d_ff=96, n_layers=3, vocab=99, max_len=12)\n"
        },
        48,
        6,
        {*SIZES, "d_ff", "n_layers", "vocab", "max_len"},
    ),
    "an optional parameter without which it fails": Case(
        net("d_model", "n_heads", "d_model, n_heads=2, vocab=None, bins=None", more="vocab['<pad>'] + bins"),
        heads=2,
        assumed={"d_model", "<pad>", "bins"},
    ),
    "a vocabulary of which the length is asked": Case(
        net("d_model", "n_heads", "d_model, n_heads, alphabet", more="alphabet.pad_idx; assert len(alphabet) > 1"),
        assumed={*SIZES, "pad_idx", "vocab_size"},
    ),
    "hasattr of what is found": Case(
        net("config.d_model if hasattr(config, 'd_model') else 24", "config.n_heads"),
        {"c.json": '{"d_model": 48, "n_heads": 6}'},
        48,
        6,
        SIZES,
    ),
}


def write(case: Case) -> str:
    for name, source in {"model.py": case.model, ".git/HEAD": "", **case.files}.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(source)
    return "model.py"


def shapes(target: Target) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in target.model.named_parameters()}


def notes(target: Target, word: str) -> str:
    return "; ".join(text for about, text in target.notes if about == word)


@pytest.mark.parametrize("name", CASES)
def test_sizes_are_found_or_assumed_and_told(name: str) -> None:
    case = CASES[name]
    target = resolve(write(case))
    assert target.model.q.weight.shape == (case.width, case.width) and target.model.heads == case.heads
    assert set(target.assumed) == case.assumed
    assert all(f"{n}=" in notes(target, "assumed") for n in case.assumed)
    assert all(f"{n}=" in notes(target, "taken") for n in case.found)
    assert bool(notes(target, "assumed")) == bool(case.assumed) and bool(notes(target, "taken")) == bool(case.found)
    assert bool(notes(target, "edit")) == bool(case.assumed)


@pytest.mark.parametrize("name", CASES)
def test_the_printed_expression_makes_the_same_model(name: str) -> None:
    target = resolve(write(CASES[name]))
    assert target.build
    again = resolve("model.py", build=target.build)
    assert shapes(again) == shapes(target) and again.model.heads == target.model.heads
    assert not again.assumed and not again.build


@pytest.mark.parametrize("name", ["by attribute", "parameters", "some found, some assumed"])
def test_nothing_is_written_on_assumed_sizes_unless_asked_for(name: str) -> None:
    write(CASES[name])
    with pytest.raises(TargetError, match=r"are assumed, .*--build '?Net\(.* or add assume=True") as caught:
        convert("model.py")
    assert "\n" not in str(caught.value)
    assert "class " in convert("model.py", assume=True)


@pytest.mark.parametrize("name", ["options", "a JSON file", "a dict in the file"])
def test_what_is_found_is_written(name: str) -> None:
    assert "class " in convert(write(CASES[name]))


def test_sizes_that_are_given_are_nobodys_guess() -> None:
    target = resolve(write(CASES["options"]), build="Net(32, 2)")
    assert target.model.q.weight.shape == (32, 32) and not target.assumed and not target.notes


VOCABULARY = (
    HEADER + "class Net(nn.Module):\n    def __init__(self, words):\n        super().__init__()\n"
    "        self.e = nn.Embedding(len(words), 8, padding_idx=words.padding_idx)\n"
    "    def forward(self, ids):\n        return self.e(ids)\n"
)
NOTHING = (
    HEADER + DATACLASS + "    width: int = 8\n    max_batch_size: int = 0\n    experts: int = 0\n"
    "class Net(nn.Module):\n    def __init__(self, config: Config):\n        super().__init__()\n"
    "        self.most, self.l = config.max_batch_size, nn.Linear(config.width, 8)\n"
    "        assert not config.experts\n"
    "    def forward(self, x):\n        assert len(x) <= self.most\n        return self.l(x)\n"
)


def test_a_vocabulary_that_is_counted_has_a_size() -> None:
    Path("model.py").write_text(VOCABULARY)
    target = resolve("model.py")
    assert target.assumed["vocab_size"] == len(target.model.e.weight)
    assert shapes(resolve("model.py", build=target.build)) == shapes(target)


def test_none_of_what_there_must_be_some_of_is_no_size() -> None:
    Path("model.py").write_text(NOTHING)
    assert resolve("model.py").assumed == {"max_batch_size": 2}


def test_what_stands_below_a_condition_that_holds_is_a_size() -> None:
    source = HEADER + DATACLASS + "    d_model: int = 9\n    n_heads: int = 2\n"
    source += (
        "class Net(nn.Module):\n    def __init__(self, config: Config):\n        super().__init__()\n"
        "        self.heads, self.l = config.n_heads, nn.Linear(config.d_model, config.d_model)\n"
        "    def forward(self, x):\n        b, t, _ = x.shape\n"
        "        return self.l(x).view(b, t, self.heads, self.l.out_features // self.heads)\n"
    )
    Path("model.py").write_text(source)
    Path("train.py").write_text(
        "from model import Config, Net\nif (1):\n    d_model = 9\n    n_heads = 3\n    steps = 10\n"
    )
    Path(".git").mkdir()
    assert resolve("model.py").model.heads == 3


REFUSED: dict[str, tuple[str, str]] = {
    "a module": (
        net("8", "2", "backbone: nn.Module"),
        "is given a module as 'backbone' .Module., which cannot be made up",
    ),
    "a constructor that fails on all": (net("{}[3]", "2", "d_model"), r"KeyError.*--build"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_constructors_that_cannot_be_called_are_refused(name: str) -> None:
    source, said = REFUSED[name]
    Path("model.py").write_text(source)
    with pytest.raises(TargetError, match=said) as caught:
        resolve("model.py")
    assert "\n" not in str(caught.value)
