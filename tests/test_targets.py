"""Targets: from what a user types to a model and inputs for which its forward runs, on files written by the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from quack_fx.errors import TargetError
from quack_fx.find import find
from quack_fx.targets import Target, resolve

ATTENTION = """
import torch
from torch import nn
import torch.nn.functional as F
from dataclasses import dataclass

class Attention(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
    def forward(self, x):
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
"""


pytestmark = pytest.mark.usefixtures("own_folder")


def write(path: str, source: str) -> str:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dedent(source))
    return path


# ---- which model -----------------------------------------------------------------------------------------------------

GPT = (
    "class GPT(nn.Module):\n    def __init__(self{}):\n        super().__init__()\n        self.attn = Attention({})\n"
)
GPT += "    def forward(self, x):\n        return self.attn(x)\n"
CONFIG = "@dataclass\nclass Config:\n    width: int = 16\n"

PICKS = {
    "the root class": (GPT.format("", ""), "", "GPT()"),
    "the root class, listed first": ("def helper():\n    return Attention()\n" + GPT.format("", "8"), "", "GPT()"),
    "an annotated config": (CONFIG + GPT.format(", c: Config", "c.width"), "", "GPT(Config())"),
    "a config annotated by name": (CONFIG + GPT.format(", c: 'Config | None'", "c.width"), "", "GPT(Config())"),
    "the file's one config": (CONFIG + GPT.format(", config", "config.width"), "", "GPT(Config())"),
    "the config named after the model": (
        CONFIG + CONFIG.replace("Config", "GPTConfig") + GPT.format(", config", "config.width"),
        "",
        "GPT(GPTConfig())",
    ),
    "a factory before a class": (GPT.format("", "") + "def build_model(): return GPT()\n", "", "build_model()"),
    "a factory told by its annotation": (GPT.format("", "") + "def tiny() -> GPT: return GPT()\n", "", "tiny()"),
    "a module that the file made": (
        GPT.format("", "") + "model = GPT()\nhead = model.attn\nsame = model\n",
        "",
        "model",
    ),
    "a class that asks isinstance of its root": (
        "class Block(nn.Module):\n    def forward(self, x): return isinstance(self, GPT)\n"
        + GPT.format("", "").replace("super().__init__()", "super().__init__(); self.b = Block()"),
        "",
        "GPT()",
    ),
    "a class that cannot be built is not it": (
        "class Lora(nn.Module):\n    def __init__(self, base): pass\n    def forward(self, x): pass\n"
        + GPT.format("", ""),
        "",
        "GPT()",
    ),
    "an abstract base is not it": ("class Base(nn.Module): pass\n" + GPT.format("", ""), "", "GPT()"),
    "a class by name": (GPT.format("", ""), ":Attention", "Attention()"),
    "a factory by name": ("def whatever(width=8): return Attention(width)\n", ":whatever", "whatever()"),
    "an instance by name": ("a = Attention()\nb = Attention()\n", ":b", "b"),
    "an attribute by name": (GPT.format("", "") + "m = GPT()\n", ":m.attn", "m.attn"),
}


@pytest.mark.parametrize("case", PICKS)
def test_the_right_model_is_picked(case: str) -> None:
    source, name, title = PICKS[case]
    file = write("model.py", ATTENTION + source)
    target = resolve(file + name)
    assert target.title == f"{title} of model.py"
    assert target.source == "model.py"
    width = 16 if "Config" in title else 8
    assert {p.shape[0] for p in target.model.parameters()} == {width}
    assert [tuple(a.shape) for a in target.args] == [(2, 4, width)]


@pytest.mark.parametrize("build", ["GPT(Config(width=32))", "GPT(Config(32)).eval()"])
def test_build_expression(build: str) -> None:
    file = write("model.py", ATTENTION + CONFIG + GPT.format(", c: Config", "c.width"))
    target = resolve(file, build=build)
    assert target.title == f"{build} of model.py"
    assert target.model.attn.q.weight.shape == (32, 32) and target.model.attn.q.weight.is_meta
    assert target.model.training == ("eval" not in build)


# ---- how it is built -------------------------------------------------------------------------------------------------


def test_size_does_not_matter() -> None:
    file = write("big.py", ATTENTION + GPT.format("", "1 << 18"))
    target = resolve(file)
    assert sum(p.numel() for p in target.model.parameters()) > 200e9
    assert "built on the meta device" in target.how and "x=float32[2, 4, 262144]" in target.how


def test_a_constructor_that_looks_at_numbers_runs_for_real() -> None:
    file = write("model.py", ATTENTION + GPT.format("", "int(torch.ones(8).sum().item())"))
    target = resolve(file)
    assert "built for real" in target.how
    assert not any(p.is_meta for p in target.model.parameters())


CALLED_FIRST = """
import torch
from torch import nn
class Turns(nn.Module):
    def __init__(self):
        super().__init__()
        self.ready = False
        self.start()
    def start(self):
        table = torch.arange(8.0)
        if table.is_meta:
            return
        self.register_buffer("table", table, persistent=False)
        self.ready = True
    def forward(self, x):
        if not self.ready:
            raise RuntimeError("The table is not there. Please call start() first.")
        return x * self.table
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.turns = nn.ModuleList(Turns() for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
    def forward(self, x):
        q, k = (turn(f(x)) for turn, f in zip(self.turns, (self.q, self.k)))
        return (q @ k.mT).softmax(-1) @ self.v(x)
"""


def test_a_method_that_an_error_names_is_called_first() -> None:
    target = resolve(write("model.py", CALLED_FIRST))
    assert "on the meta device, start() called" in target.how
    (site,) = find(target.model, target.args, target.kwargs, recording=target.recording).layout.sites
    assert site.query[0].param == "q.weight"
    never = CALLED_FIRST.replace("call start() first", "call absent() first")
    assert "called" not in resolve(write("other.py", never)).how  # which a build with real weights does without


def test_a_real_model_is_given_when_asked_for() -> None:
    target = resolve(write("model.py", ATTENTION + GPT.format("", "")), real=True)
    assert "built for real" in target.how and not any(p.is_meta for p in target.model.parameters())


def test_a_real_model_is_compiled_while_its_files_can_be_imported() -> None:
    file = write("mine_alone.py", ATTENTION + GPT.format("", ""))
    target = resolve(file, real=True)
    assert "mine_alone" not in sys.modules
    with target.importable():
        assert sys.modules["mine_alone"].GPT is type(target.model)
        # A function of another file, as a loss is: its own file is imported, and those of what it calls.
        loss = torch.compile(lambda *args, **kwargs: target.model(*args, **kwargs), backend="eager", fullgraph=True)
        loss(*target.args, **target.kwargs)
    assert "mine_alone" not in sys.modules


def test_a_model_too_large_to_build_for_real_is_refused() -> None:
    source = """
    import torch
    from torch import nn
    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            torch.zeros(()).item()
            self.weights = nn.ParameterList(torch.empty(1 << 28) for _ in range(1 << 12))
    """
    file = write("big.py", source)
    with pytest.raises(
        TargetError, match=r"GPT\(\) .* more than \d+ GiB, and on the meta device, .* big.py:7: .*; build a"
    ):
        resolve(file + ":GPT")
    with pytest.raises(
        TargetError, match=r"GPT\(\) .* more than \d+ GiB, and on the meta device, .*; build a smaller one"
    ):
        resolve(file, build="GPT()")


def test_a_model_that_only_runs_on_its_own_numbers_is_built_for_real() -> None:
    source = """
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention()
            self.register_buffer("steps", torch.tensor(2))
        def forward(self, x):
            for _ in range(int(self.steps)):
                x = self.attn(x)
            self.steps.numpy()  # which no tensor without numbers has
            return x
    """
    assert "built for real" in resolve(write("model.py", ATTENTION + dedent(source))).how


def test_a_ready_model_is_taken_as_it_is() -> None:
    file = write("model.py", ATTENTION + "model = Attention().double().eval()\n")
    target = resolve(file)
    assert "built as the file made it" in target.how
    assert next(target.model.parameters()).dtype == torch.float64 and not target.model.training


def test_the_random_state_stays() -> None:
    file = write("model.py", ATTENTION + GPT.format("", ""))
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    resolve(file)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- imports ---------------------------------------------------------------------------------------------------------


def test_absolute_imports_of_a_package_from_the_repository_root() -> None:
    write("mypkg_a/layers.py", ATTENTION)
    file = write("mypkg_a/model.py", "from mypkg_a.layers import *\n" + GPT.format("", ""))
    assert resolve(file).title == "GPT() of mypkg_a/model.py"


def test_relative_imports_in_a_package_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("repo/mypkg_b/__init__.py", "")
    write("repo/mypkg_b/core/__init__.py", "")
    write("repo/mypkg_b/layers.py", ATTENTION)
    write("repo/mypkg_b/core/model.py", "from ..layers import *\n" + GPT.format("", ""))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert type(resolve("../repo/mypkg_b/core/model.py").model).__module__ == "mypkg_b.core.model"


def test_relative_imports_without_init_files() -> None:
    write("mypkg_c/layers.py", ATTENTION)
    file = write("mypkg_c/model.py", "from .layers import *\n" + GPT.format("", ""))
    assert type(resolve(file).model).__module__ == "mypkg_c.model"


def test_a_script_imports_its_neighbours(tmp_path: Path) -> None:
    write("scripts/neighbour_layers.py", ATTENTION)
    write("scripts/model.py", "from neighbour_layers import *\n" + GPT.format("", ""))
    assert resolve(str(tmp_path / "scripts/model.py")).model is not None


@pytest.mark.parametrize(
    "target", ["mypkg_d.model:GPT", "mypkg_d.model", "mypkg_d.model:make", "mypkg_d:GPT", "mypkg_d"]
)
def test_modules(target: str) -> None:
    write("mypkg_d/__init__.py", "from mypkg_d.model import GPT\nmodel = GPT()\n")
    write("mypkg_d/model.py", ATTENTION + GPT.format("", "") + "def make(): return GPT()\n")
    assert type(resolve(target).model).__name__ == "GPT"


def test_two_files_of_one_name_do_not_mix() -> None:
    for folder, width in (("a", 8), ("b", 24)):
        target = resolve(write(f"{folder}/model.py", ATTENTION + GPT.format("", str(width))))
        assert target.model.attn.q.weight.shape == (width, width)


def test_a_file_named_like_a_module_that_is_loaded() -> None:
    loaded = sys.modules["json"]
    assert resolve(write("json.py", ATTENTION + GPT.format("", ""))).title == "GPT() of json.py"
    assert sys.modules["json"] is loaded


# ---- inputs ----------------------------------------------------------------------------------------------------------

FORWARD = (
    "class M(nn.Module):\n    def __init__(self):\n        super().__init__()\n        {}\n    def forward(self, {}):\n"
)
FORWARD += "        {}\n"

INFERRED = {
    "ids, targets left out": (
        "self.e = nn.Embedding(11, 8); self.p = nn.Embedding(4, 8)",
        "idx, targets=None",
        "assert targets is None; return self.e(idx) + self.p(torch.arange(idx.shape[1]))",
        "idx=int64[2, 4]",
    ),
    "features": ("self.l = nn.Linear(12, 8)", "x", "return self.l(x)", "x=float32[2, 4, 12]"),
    "features without tokens": (
        "self.l = nn.Linear(12, 8); self.n = nn.BatchNorm1d(8)",
        "x",
        "return self.n(self.l(x))",
        "x=float32[2, 12]",
    ),
    "features behind a norm": (
        "self.n = nn.LayerNorm(12); self.l = nn.Linear(12, 8)",
        "x, mask=None",
        "return self.l(self.n(x))",
        "x=float32[2, 4, 12]",
    ),
    "an image": ("self.c = nn.Conv2d(3, 8, 4, 4)", "x", "return self.c(x)", "x=float32[2, 3, 32, 32]"),
    "an image of the size that the positions tell": (
        "self.c = nn.Conv2d(1, 8, 7, 7); self.p = nn.Parameter(torch.zeros(1, 17, 8))",
        "x",
        "x = self.c(x).flatten(2).mT; return torch.cat((x[:, :1], x), 1) + self.p",
        "x=float32[2, 1, 28, 28]",
    ),
    "an image of the size that is declared": (
        "self.img_size = 48; self.c = nn.Conv2d(3, 8, 4, 4)",
        "img",
        "assert img.shape[-1] == self.img_size; return self.c(img)",
        "img=float32[2, 3, 48, 48]",
    ),
    "two streams": (
        "self.q = nn.Linear(12, 8); self.k = nn.Linear(6, 8)",
        "x, context",
        "return self.q(x) @ self.k(context).mT",
        "x=float32[2, 4, 12], context=float32[2, 4, 6]",
    ),
    "a mask that may be None": (
        "self.e = nn.Embedding(11, 8)",
        "input_ids, attention_mask",
        "return self.e(input_ids)",
        "input_ids=int64[2, 4], attention_mask=None",
    ),
    "a mask that is used": (
        "self.e = nn.Embedding(11, 8)",
        "input_ids, attention_mask: torch.Tensor",
        "return self.e(input_ids).masked_fill(~attention_mask[..., None], 0)",
        "input_ids=int64[2, 4], attention_mask=bool[2, 4]",
    ),
    "Llama's start position": (
        "self.e = nn.Embedding(11, 8)",
        "tokens: torch.Tensor, start_pos: int",
        "return self.e(tokens)[:, start_pos:]",
        "tokens=int64[2, 4], start_pos=0",
    ),
    "a diffusion model": (
        "self.c = nn.Conv2d(4, 8, 2, 2); self.t = nn.Linear(1, 8); self.y = nn.Embedding(11, 8)",
        "x, t, y",
        "return self.c(x) + (self.t(t[:, None]) + self.y(y))[..., None, None]",
        "x=float32[2, 4, 32, 32], t=float32[2], y=int64[2]",
    ),
    "an optional time step that is needed": (
        "self.c = nn.Conv2d(4, 8, 2, 2); self.t = nn.Linear(1, 8)",
        "x, timestep=None",
        "return self.c(x) + self.t(timestep[:, None])[..., None, None]",
        "x=float32[2, 4, 32, 32], timestep=float32[2]",
    ),
    "positions": (
        "self.e = nn.Embedding(11, 8)",
        "x, positions, lengths",
        "return self.e(x) * positions[:, None] * lengths[:, None, None]",
        "x=int64[2, 4], positions=int64[4], lengths=int64[2]",
    ),
    "parameters of its own": (
        "self.w = nn.Parameter(torch.zeros(12, 8))",
        "x",
        "return x @ self.w",
        "x=float32[2, 4, 12]",
    ),
    "a keyword": ("self.l = nn.Linear(12, 8)", "*, x", "return self.l(x)", "x=float32[2, 4, 12]"),
    "ids although a linear comes first": (
        "self.l = nn.Linear(12, 8); self.e = nn.Embedding(11, 12)",
        "input_ids",
        "return self.l(self.e(input_ids))",
        "input_ids=int64[2, 4]",
    ),
    "everything optional": ("self.l = nn.Linear(12, 8)", "x=None, y=None", "return self.l(x)", "x=float32[2, 4, 12]"),
}


@pytest.mark.parametrize("case", INFERRED)
def test_inputs_are_inferred(case: str) -> None:
    init, parameters, body, text = INFERRED[case]
    file = write("model.py", "import torch\nfrom torch import nn\n" + FORWARD.format(init, parameters, body))
    target = resolve(file)
    assert f"inputs {text} (inferred)" in target.how
    real = resolve(file, build="M()").model.to_empty(device="cpu")
    real(*target.args, **target.kwargs)  # true for the module itself, not only for its recording


@pytest.mark.parametrize(
    "name", ["Transformer", "TransformerEncoderLayer", "TransformerDecoderLayer", "MultiheadAttention"]
)
def test_modules_of_torch_itself(name: str) -> None:
    arguments = {"Transformer": "8, 2, 1, 1, 16, batch_first=True"}.get(name, "8, 2")
    target = resolve("torch.nn", build=f"nn.{name}({arguments})")
    assert all(a.shape == (2, 4, 8) for a in target.args)


@pytest.mark.parametrize(
    ("expression", "args", "kwargs"),
    [
        ("torch.ones(3, 5, 8)", [(3, 5, 8)], {}),
        ("(torch.ones(3, 5, 8), None)", [(3, 5, 8), None], {}),
        ("dict(x=torch.ones(1, 5, 8))", [], {"x": (1, 5, 8)}),
        ("((torch.ones(1, 5, 8),), {'scale': torch.ones(1)})", [(1, 5, 8)], {"scale": (1,)}),
        ("torch.ones(1, 2, model.attn.q.in_features)", [(1, 2, 8)], {}),
    ],
)
def test_given_inputs(expression: str, args: list[tuple[int, ...]], kwargs: dict[str, tuple[int, ...]]) -> None:
    source = GPT.format("", "").replace("forward(self, x)", "forward(self, x, scale=None)")
    target = resolve(write("model.py", ATTENTION + source), inputs=expression)
    assert [None if a is None else tuple(a.shape) for a in target.args] == args
    assert {k: tuple(v.shape) for k, v in target.kwargs.items()} == kwargs
    assert f"inputs {expression} (given)" in target.how


# ---- Hugging Face configs --------------------------------------------------------------------------------------------

TINY = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
CONFIGS = {
    "LlamaForCausalLM": (
        dict(model_type="llama", architectures=["LlamaForCausalLM"], use_cache=True, **TINY),
        {"input_ids": (2, 4)},
    ),
    "BertModel": (dict(model_type="bert", **TINY), {"input_ids": (2, 4)}),
    "T5ForConditionalGeneration": (
        dict(model_type="t5", architectures=["T5ForConditionalGeneration"], d_model=8, d_kv=4, d_ff=8, num_heads=2,
             num_layers=1, vocab_size=32),
        {"input_ids": (2, 4), "decoder_input_ids": (2, 4)},
    ),
    "ViTModel": (
        dict(model_type="vit", image_size=24, patch_size=8, num_channels=1, **TINY),
        {"pixel_values": (2, 1, 24, 24)},
    ),
    "WhisperModel": (
        dict(model_type="whisper", d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
             decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, num_mel_bins=10, max_source_positions=6,
             vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
        {"input_features": (2, 10, 12), "decoder_input_ids": (2, 4)},
    ),
    "CLIPModel": (
        dict(model_type="clip", text_config=TINY, vision_config=dict(TINY, image_size=16, patch_size=8)),
        {"input_ids": (2, 4), "pixel_values": (2, 3, 16, 16)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_transformers(name: str, tmp_path: Path) -> None:
    fields, shapes = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    target = resolve(str(tmp_path))
    assert target.title == f"{name} of {tmp_path}" and type(target.model).__name__ == name
    assert all(p.is_meta for p in target.model.parameters()) and not target.args
    assert {k: tuple(v.shape) for k, v in target.kwargs.items()} == shapes
    assert not getattr(target.model.config, "use_cache", False)
    assert resolve("config.json").title == f"{name} of config.json"


def test_a_config_with_expressions(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["BertModel"][0]))
    build = "transformers.BertForMaskedLM(config)"
    target = resolve("config.json", build=build, inputs="dict(input_ids=torch.ones(1, 3, dtype=torch.int64))")
    assert type(target.model).__name__ == "BertForMaskedLM" and target.title == f"{build} of config.json"


def test_transformers_is_imported_for_configs_alone() -> None:
    write("model.py", ATTENTION + GPT.format("", ""))
    code = "import sys; from quack_fx.targets import resolve; resolve('model.py'); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "False"


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["BertModel"][0]))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TargetError, match=r'needs transformers: pip install "quack-fx\[hf\]"'):
        resolve("config.json")


def test_progress_names_every_stage() -> None:
    stages: list[str] = []
    target = resolve(write("model.py", ATTENTION + GPT.format("", "")), progress=stages.append)
    assert isinstance(target, Target)
    assert stages == [
        "loading model.py",
        "building GPT() on the meta device",
        "recording the forward of GPT on x=float32[2, 4, 8]",
    ]
