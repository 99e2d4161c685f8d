"""Targets that are neither a Python file nor a module: configs, names in other libraries, saved programs and modules.

Libraries that the tests do not install have a stand-in with the few names that their adapter asks for, and a test with
the library itself where it happens to be there.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quack_fx
from quack_fx.cli.app import main
from quack_fx.errors import TargetError
from quack_fx.layout import QKLayout
from quack_fx.targets import resolve
from quack_fx.targets.adapters import ADAPTERS, adapt

pytestmark = [
    pytest.mark.usefixtures("own_folder"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # torch's, of its own programs
]

VOCABULARY, WIDTH, HEADS, LAYERS = 32, 16, 2, 3
MODULE = """
import torch
from torch import nn
import torch.nn.functional as F
class Attention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
    def forward(self, x):
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
"""


class Attention(nn.Module):
    """Heads of queries and keys out of one fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x_BTD).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class GPT(nn.Module):
    """Ids in, logits out; the table of tokens serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.tokens(idx)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def ids() -> Tensor:
    return torch.arange(8).view(2, 4)


def found(target: str, **options: Any) -> QKLayout:
    """Pairs of a target."""
    resolved = resolve(target, **options)
    return quack_fx.find_qk_pairs(resolved.model, *resolved.args, **resolved.kwargs)


def rows(layout: QKLayout) -> list[tuple[str, str, str, Any, Any]]:
    return [(s.name, s.kind, s.query[0].param, s.query[0].heads, s.key[0].heads) for s in layout.sites]


def saved(what: Any, name: str) -> str:
    torch.save(what, name)
    return name


def exported(device: str, name: str = "gpt.pt2") -> str:
    """The GPT, exported on a device and saved."""
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(GPT(), (ids().to(device),)), name)
    return name


# ---- Hugging Face configs --------------------------------------------------------------------------------------------

LLAMA = dict(model_type="llama", hidden_size=64, intermediate_size=64, num_attention_heads=8, num_key_value_heads=2)
LLAMA |= dict(num_hidden_layers=4, vocab_size=32, architectures=["LlamaForCausalLM"])


@pytest.mark.parametrize("target", ["config.json", "hf:config.json", ".", "hf:."])
def test_a_config_with_and_without_its_prefix(target: str) -> None:
    Path("config.json").write_text(json.dumps(LLAMA))
    resolved = resolve(target)
    assert resolved.title == f"LlamaForCausalLM of {target}" and "built on the meta device" in resolved.how
    assert resolve(target, build="transformers.LlamaModel(config)").model.layers is not None


def test_a_small_config_stands_for_a_large_one() -> None:
    Path("config.json").write_text(json.dumps(LLAMA))
    adapted = adapt("hf:config.json")
    assert adapted is not None and adapted.smaller is not None
    small, size = next(adapted.smaller())
    assert size == "2 layers, width 64" and len(small.recipe.make().model.layers) == 2
    assert len(adapted.recipe.make().model.layers) == 4


# ---- programs of torch.export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_exported_program(device: str) -> None:
    layout = quack_fx.find_qk_pairs(GPT(), ids())
    assert len(layout.sites) == LAYERS
    target = resolve(exported(device))
    assert target.title == "the program of gpt.pt2" and "inputs int64[2, 4] (its own)" in target.how
    of_program = quack_fx.find_qk_pairs(target.model, *target.args, **target.kwargs)
    assert rows(of_program) == rows(layout) and not of_program.skipped
    # Of two names of one weight, export reads one; that they are one, a file with numbers tells.
    assert of_program.untouched == (() if device == "cpu" else ("tokens.weight",))
    weights = {name: p.shape for name, p in target.model.named_parameters()}
    assert weights == {name: p.shape for name, p in GPT().named_parameters(remove_duplicate=device == "cpu")}


def test_an_exported_program_is_proved() -> None:
    target = resolve(exported("cpu"))
    layout = quack_fx.find_qk_pairs(target.model, *target.args)
    assert not quack_fx.verify_qk_pairs(target.model, layout, *target.args).not_proved


def test_inputs_for_an_exported_program() -> None:
    target = resolve(exported("cpu"), inputs="torch.zeros(program.example_inputs[0][0].shape, dtype=torch.int64)")
    assert "(given)" in target.how and not target.args[0].any()


# ---- pickled modules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.pt", "model.pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module(name: str, zipped: bool) -> None:
    torch.save(GPT().eval(), name, _use_new_zipfile_serialization=zipped)
    target = resolve(name)
    assert target.title == f"GPT of {name}" and "idx=int64[2, 4] (inferred)" in target.how and not target.model.training
    layout = quack_fx.find_qk_pairs(target.model, *target.args)
    assert rows(layout) == rows(quack_fx.find_qk_pairs(GPT(), ids()))
    assert not quack_fx.verify_qk_pairs(target.model, layout, *target.args).not_proved


def test_a_part_of_a_pickled_module() -> None:
    target = resolve(saved({"model": GPT(), "step": 3}, "model.pt"), build="loaded['model'].blocks[0]")
    assert type(target.model) is Attention and target.args[0].shape == (2, 4, WIDTH)


def test_the_class_of_a_pickled_module_may_lie_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("folder").mkdir()
    Path("folder/beside_pickled.py").write_text(MODULE)
    with monkeypatch.context() as only_here:
        only_here.syspath_prepend("folder")
        saved(__import__("beside_pickled").Attention(), "folder/model.pt")
        del sys.modules["beside_pickled"]
    assert type(resolve("folder/model.pt").model).__module__ == "beside_pickled"


def test_weights_alone_are_told_apart_without_running_code(monkeypatch: pytest.MonkeyPatch) -> None:
    saved(GPT().state_dict(), "weights.pt")
    asked = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: asked.append(k["weights_only"]) or load(*a, **k))
    with pytest.raises(TargetError, match=r"holds a state dict of 8 tensors"):
        resolve("weights.pt")
    assert asked == [True]


# ---- stand-ins for libraries -----------------------------------------------------------------------------------------


class Picture(nn.Module):
    """A model with the size of its pictures, as those of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.default_cfg = {"input_size": (3, 16, 16)}
        self.patches, self.attention = nn.Conv2d(3, WIDTH, 4, 4), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.patches(x).flatten(2).mT)


class Masked(GPT):
    """A model that wants what torchtitan's trainer gives."""

    def init_states(self) -> None:
        nn.init.ones_(self.tokens.weight)

    def get_attention_masks(self, positions: Tensor) -> Tensor:
        return positions[:, None, :] <= positions[:, :, None]

    def forward(self, tokens: Tensor, positions: Any = None, attention_masks: Any = None) -> Tensor:
        assert attention_masks.shape == (*positions.shape, tokens.shape[1])
        return super().forward(tokens)


@dataclass
class Config:
    """A config that builds its model."""

    cls: type[nn.Module] = Masked

    @classmethod
    def from_name(cls, name: str) -> Config:
        if name != "pythia-14m":
            raise ValueError(name)
        return cls(GPT)

    def build(self) -> nn.Module:
        return self.cls()


def timm() -> dict[str, SimpleNamespace]:
    names = ["vit_tiny", "vit_small"]
    made = SimpleNamespace(__version__="0", list_models=lambda: names, is_model=names.__contains__)
    made.create_model = lambda name, **_: Picture()
    return {"timm": made}


def litgpt() -> dict[str, SimpleNamespace]:
    table = SimpleNamespace(name_to_config={"pythia-14m": {}, "pythia-70m": {}})
    return {"litgpt": SimpleNamespace(Config=Config, GPT=lambda config: config.build()), "litgpt.config": table}


def torchtitan(folder: Path) -> dict[str, SimpleNamespace]:
    for name in ("llama3", "qwen3", "old", "common"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()

    def model_registry(flavor: str, attn_backend: str = "varlen") -> SimpleNamespace:
        if flavor == "sdpa":
            raise ValueError("no sdpa")
        assert attn_backend == "flex"
        return SimpleNamespace(model=Config())

    llama = SimpleNamespace(llama3_configs={"debugmodel": 1, "8B": 1, "sdpa": 1}, model_registry=model_registry)
    return {
        "torchtitan": SimpleNamespace(),
        "torchtitan.models": SimpleNamespace(__path__=[str(folder)]),
        "torchtitan.models.llama3": llama,
        "torchtitan.models.old": SimpleNamespace(),
    }


@pytest.fixture
def libraries(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for every library; what they lack is not installed."""
    for name in [n for n in sys.modules if n.partition(".")[0] in ("timm", "litgpt", "torchtitan")]:
        monkeypatch.delitem(sys.modules, name)
    made = {**timm(), **litgpt(), **torchtitan(tmp_path_factory.mktemp("torchtitan"))}
    for name, stand_in in {**made, "torchtitan.models.qwen3": None}.items():
        monkeypatch.setitem(sys.modules, name, stand_in)  # type: ignore[arg-type]


NAMED = {
    "timm:vit_tiny": ("Picture", "built on the meta device; inputs float32[2, 3, 16, 16] (its own)"),
    "litgpt:pythia-14m": ("GPT", "built on the meta device; inputs idx=int64[2, 4] (inferred)"),
    "torchtitan:llama3/debugmodel": (
        "Masked",
        "built on the meta device; inputs int64[2, 4], positions=int64[2, 4], attention_masks=bool[2, 4, 4] (its own)",
    ),
}


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("target", NAMED)
def test_a_name_in_a_library(target: str) -> None:
    name, how = NAMED[target]
    resolved = resolve(target)
    assert (resolved.title, resolved.source, resolved.how) == (f"{name} of {target}", target, how)
    assert len(found(target).sites) == (1 if name == "Picture" else LAYERS)


BUILDS = {
    "timm:vit_tiny": "timm.create_model(name, depth=1)",
    "litgpt:pythia-14m": "litgpt.GPT(config)",
    "torchtitan:llama3/debugmodel": "config.build()",
}


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("target", BUILDS)
def test_build_and_inputs_with_a_library(target: str) -> None:
    own = resolve(target)
    built = resolve(target, build=BUILDS[target])
    assert built.title == f"{BUILDS[target]} of {target}" and built.how == own.how
    values = [*own.args, *own.kwargs.values()]
    shapes = [f"torch.ones({tuple(v.shape)}, dtype={v.dtype})" for v in values]
    assert "(given)" in resolve(target, inputs=f"({', '.join(shapes)},)").how


@pytest.mark.usefixtures("libraries")
def test_torchtitan_models_get_their_weights() -> None:
    assert bool((resolve("torchtitan:llama3/debugmodel", real=True).model.tokens.weight == 1).all())


# ---- bad input -------------------------------------------------------------------------------------------------------


def no_files() -> None:
    """What is typed names no file."""


def write(name: str, what: Any) -> Callable[[], None]:
    return lambda: torch.save(what(), name)


def scripted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), "model.pt")


def of_main() -> None:
    """A module whose class lies in a script that is not running."""
    main_module = sys.modules["__main__"]
    made = type("Gone", (nn.Linear,), {"__module__": "__main__"})
    main_module.Gone = made  # type: ignore[attr-defined]
    torch.save(made(2, 2), "model.pt")
    del main_module.Gone  # type: ignore[attr-defined]


def without_inputs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(GPT(), (ids(),))
        program.example_inputs = None
        torch.export.save(program, "model.pt2")


# name: (what makes the files, command line, what the one line says)
CASES: dict[str, tuple[Callable[[], Any], str, str]] = {
    "nothing behind the prefix": (no_files, "inspect timm:", r"'timm:' names nothing; type timm:NAME"),
    "no such config": (no_files, "inspect hf:nope/config.json", r"no file 'nope/config.json' \(seen from"),
    "a model of the hub": (no_files, "inspect hf:org/model-7b", r"no file 'org/model-7b' .*nothing is downloaded"),
    "a folder without a config": (
        lambda: Path("d").mkdir(),
        "inspect hf:d",
        r"'hf:d' is a folder without a config.json; give one that has it",
    ),
    "unknown to timm": (no_files, "inspect timm:vit_tinny", r"timm 0 has no model 'vit_tinny'; did you mean vit_tiny"),
    "far from timm": (no_files, "inspect timm:zzz", r"no model 'zzz'; timm.list_models\(\) names them"),
    "unknown to LitGPT": (no_files, "inspect litgpt:pythia-15m", r"no config 'pythia-15m'; did you mean pythia-14m or"),
    "unknown to torchtitan": (no_files, "inspect torchtitan:lama3/8B", r"no model 'lama3'; did you mean llama3\?"),
    "far from torchtitan": (no_files, "inspect torchtitan:zzz/8B", r"no model 'zzz'; it has llama3, old, qwen3"),
    "no flavor": (
        no_files,
        "inspect torchtitan:llama3",
        r"names no flavor of llama3, which has debugmodel, 8B, sdpa; type torchtitan:MODEL/FLAVOR",
    ),
    "unknown flavor": (
        no_files,
        "inspect torchtitan:llama3/debug",
        r"torchtitan's llama3 has no flavor 'debug'; did you mean debugmodel\?",
    ),
    "a flavor that is refused": (
        no_files,
        "inspect torchtitan:llama3/sdpa",
        r"'torchtitan:llama3/sdpa' is refused by torchtitan: ValueError: no sdpa",
    ),
    "a torchtitan of before": (
        no_files,
        "inspect torchtitan:old/8B",
        r"needs the model_registry of torchtitan 0.3",
    ),
    "what a library needs": (
        no_files,
        "inspect torchtitan:qwen3/8B",
        r"'torchtitan:qwen3/8B' needs the module 'torchtitan.models.qwen3', which",
    ),
    "no such program": (no_files, "inspect nope.pt2", r"no file 'nope.pt2' \(seen from"),
    "no program": (
        lambda: Path("model.pt2").write_text("x"),
        "inspect model.pt2",
        r"'model.pt2' is no archive of torch.export.save",
    ),
    "a program without inputs": (
        without_inputs,
        "inspect model.pt2",
        r"'model.pt2' was saved without its example inputs; give them with --inputs",
    ),
    "a program by another name": (
        lambda: exported("cpu", "model.pt"),
        "inspect model.pt",
        r"'model.pt' is an archive of torch.export; call it 'model.pt2'",
    ),
    "no such module file": (no_files, "inspect nope.pth", r"no file 'nope.pth' \(seen from"),
    "a folder": (lambda: Path("model.pt").mkdir(), "inspect model.pt", r"'model.pt' is a folder"),
    "a name in a file of one model": (
        write("model.pt", GPT),
        "inspect model.pt:blocks",
        r"'model.pt:blocks': 'model.pt' holds one model; leave ':blocks' away or take a part with --build",
    ),
    "no file of torch": (
        lambda: Path("model.pt").write_bytes(b"hello"),
        "inspect model.pt",
        r"'model.pt' cannot be read by torch.load: .*; type the Python file that builds the model",
    ),
    "a state dict": (
        write("model.pt", lambda: GPT().state_dict()),
        "inspect model.pt",
        r"'model.pt' holds a state dict of 8 tensors, weights without a model; type the Python file that builds",
    ),
    "a checkpoint": (
        write("model.pt", lambda: {"model": GPT().state_dict(), "step": 3}),
        "inspect model.pt",
        r"holds a dict \(model, step\), weights without a model; type",
    ),
    "a tensor": (write("model.pt", ids), "inspect model.pt", r"holds a Tensor, not an nn.Module; type"),
    "a module in a dict": (
        write("model.pt", lambda: {"ema": nn.Linear(2, 2)}),
        "inspect model.pt",
        r"holds a dict with an nn.Module in it; type --build \"loaded\['ema'\]\"",
    ),
    "TorchScript": (scripted, "inspect model.pt", r"'model.pt' is a TorchScript archive, which is not read; type"),
    "a class that is nowhere": (
        of_main,
        "inspect model.pt",
        r"cannot be read by torch.load: AttributeError: .*Gone.*; type the Python file",
    ),
}


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, line, says = CASES[case]
    make()
    assert main(line.split()) == 2
    out, err = capfd.readouterr()
    assert not out and re.fullmatch(rf"quack-fx: .*{says}.*\n", err), err


@pytest.mark.parametrize("name", [a.prefix for a in ADAPTERS if a.prefix and a.prefix != "hf"])
def test_a_library_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match=rf"'{name}:x' needs {name}: pip install {name}$"):
        resolve(f"{name}:x")


def test_a_library_that_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(".")
    with pytest.raises(TargetError, match=r"'timm:x' needs timm, whose import fails: RuntimeError: operator"):
        resolve("timm:x")


# ---- the libraries themselves ----------------------------------------------------------------------------------------

REAL = {
    "timm:vit_base_patch16_224": ("timm", 12, "mha", 12, 12),
    "litgpt:pythia-14m": ("litgpt", 6, "mha", 4, 4),
    "torchtitan:llama3/debugmodel": ("torchtitan.models.llama3", 6, "mha", 16, 16),
    "torchtitan:deepseek_v3/debugmodel": ("torchtitan.models.deepseek_v3", 6, "mla", 16, 16),
    "torchtitan:qwen3/debugmodel": ("torchtitan.models.qwen3", 8, "gqa", 16, 8),
}


@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("target", REAL)
def test_models_of_the_libraries(target: str) -> None:
    module, count, kind, query_heads, key_heads = REAL[target]
    imported: ModuleType = pytest.importorskip(module, exc_type=ImportError)
    assert imported is not None
    resolved = resolve(target)
    layout = quack_fx.find_qk_pairs(resolved.model, *resolved.args, **resolved.kwargs)
    assert [(s.kind, s.query_heads, s.key_heads) for s in layout.sites] == [(kind, query_heads, key_heads)] * count
    assert not layout.skipped and not layout.untouched
    proof = quack_fx.verify_qk_pairs(resolved.model, layout, *resolved.args, **resolved.kwargs)
    assert not proof.not_proved
