"""The world that a target's files run in: missing packages, no GPU, one rank, scripts; nothing of it is left."""

from __future__ import annotations

import argparse
import builtins
import dataclasses
import importlib.util
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from textwrap import dedent, indent
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import _get_current_function_mode_stack

from quack_fx.errors import TargetError
from quack_fx.find import find
from quack_fx.targets import Target, opened, resolve
from quack_fx.targets.world import masks
from quack_fx.targets.world.one_rank import _COLLECTIVES

pytestmark = pytest.mark.usefixtures("own_folder")

HEADER = """
import torch
from torch import nn
import torch.nn.functional as F
"""
NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
    def forward(self, x):
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
"""


def write(path: str, *sources: str) -> str:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(dedent, sources)))
    return path


def net(before: str = "", init: str = "pass", forward: str = "pass", base: str = "nn.Module") -> str:
    """A file whose Net does something more: before it, in its constructor, at the end of its forward on y."""
    return "\n".join(
        (
            HEADER,
            dedent(before),
            f"class Net({base}):",
            "    def __init__(self):",
            "        super().__init__()",
            "        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))",
            indent(dedent(init), 8 * " "),
            "    def forward(self, x):",
            "        y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))",
            indent(dedent(forward), 8 * " "),
            "        return y",
        )
    )


def assert_rows(target: Target) -> None:
    """The one attention of `Net`: one head of 8 rows in q and in k."""
    (site,) = find(target.model, target.args, target.kwargs, recording=target.recording).layout.sites
    assert [(b.param, b.heads) for b in (*site.query, *site.key)] == [
        ("q.weight", (((0, 8),),)),
        ("k.weight", (((0, 8),),)),
    ]


def said(target: Target, about: str) -> str:
    return "; ".join(text for word, text in target.notes if word == about)


# ---- imports ---------------------------------------------------------------------------------------------------------

MISSING: dict[str, str] = {
    # What stands at the top of a file; `missing_one` cannot be imported.
    "a decorator": net(
        "from missing_one import decorate\n@decorate\ndef f(x):\n    return x + 1\n", forward="assert f(1) == 2"
    ),
    "a decorator with arguments": net(
        "import missing_one as m\n@m.decorate(3, mode='fast')\ndef f(x):\n    return x + 1\n",
        forward="assert f(1) == 2",
    ),
    "a decorator of the class": net("import missing_one\n@missing_one.register()\nclass Other: pass"),
    "a decorator of forward": HEADER
    + "from missing_one import typed"
    + NET.replace("    def forward", "    @typed(x=float)\n    def forward"),
    "a base class": net("from missing_one import Base", base="Base"),
    "a base class before Module": net("from missing_one import Base", base="Base, nn.Module"),
    "a base class behind Module": net("from missing_one import Base", base="nn.Module, Base"),
    "two base classes": net("from missing_one import A, B", base="A, B"),
    "two base classes around Module": net("from missing_one import A, B", base="A, nn.Module, B"),
    "a base class with keywords": net("from missing_one import Base", base="Base, repo_url='x', license='y'"),
    "a base class with keywords behind Module": net("from missing_one import Base", base="nn.Module, Base, tags=[1]"),
    "a base class that is subscripted": net("from missing_one import Base", base="Base[int, str]"),
    "an annotation": HEADER
    + "from typing import Optional, Union\nfrom missing_one import A, B\n"
    + "def f(a: A | None, b: Optional[B], c: A[int], d: 'B', e: Union[A, int], g: None | A, h: list[A]): pass"
    + NET,
    "an annotation of a dataclass": HEADER
    + "from dataclasses import dataclass\nfrom missing_one import A\n@dataclass\nclass C:\n    a: A | None = None\n"
    + NET,
    "calculation": HEADER
    + "from missing_one import A\nB = (A * 2 + 1) ** 2 / 3 - A % 2\nC = -A // 2; D = 2 ** A"
    + NET,
    "comparison": HEADER + "import missing_one\nif missing_one.__version__ >= '2' or missing_one.N > 3: X = 1" + NET,
    "containers": HEADER
    + "from missing_one import A\nB = {A: 1, 'x': A[0], 'y': [*A]}\nfor a in A: pass\nlen(A)"
    + NET,
    "a context": HEADER + "from missing_one import A\nwith A() as a: pass\n" + NET,
    "calls of calls": HEADER + "from missing_one import log\nlog.get(__name__).set(3).x.y(4)[5]\nlog(log, x=log)" + NET,
    "a submodule by another name": net("import missing_one.b.c as d\nd.e(3)"),
    "a submodule": net("import missing_one.b.c\nmissing_one.b.c.d(3)\nmissing_one.b.e(3)"),
    "a submodule of a submodule": net("from missing_one.b.c import d\nfrom missing_one.b import c, e\nd(3)\nc.d(e)"),
    "isinstance": net("from missing_one import A", forward="assert not isinstance(x, A)"),
    "issubclass": net("from missing_one import A\nassert not issubclass(int, A)"),
    "a part that nobody runs": net("from missing_one import Loss", "self.loss = Loss(reduction='none')"),
    "a part within parts": net("import missing_one", "self.m = nn.ModuleList([missing_one.Loss(), nn.Identity()])"),
    "an import in the constructor": net(init="from missing_one import a\na(3)"),
    "an import in a guard that ends": net(
        "try:\n    import missing_one\nexcept ImportError as e:\n    raise ImportError('please install') from e\n"
    ),
    "an import in a guard that exits": net(
        "import sys\ntry:\n    import missing_one\nexcept ImportError:\n    print('please')\n    sys.exit(1)\n"
    ),
    "a guard for other errors": net("try:\n    import missing_one\nexcept KeyError:\n    pass\nmissing_one.x(3)"),
    "a version that is asserted": net("import missing_one", "assert missing_one.__version__ == '0.4.5' <= '1'"),
    "import_module": net('import importlib\nx = importlib.import_module("missing_one.x")\nx.y(3)'),
    "a guard around much": net("try:\n    import missing_one\nfinally:\n    pass\nmissing_one.x(3)"),
}


@pytest.mark.parametrize("case", MISSING)
def test_missing_packages_have_stand_ins(case: str) -> None:
    target = resolve(write("model.py", MISSING[case]))
    assert_rows(target)
    assert said(target, "missing") == "missing_one cannot be imported here and had stand-ins"
    assert not [name for name in sys.modules if name.startswith("missing_one")]


LEFT = {
    "a name": "try:\n    import missing_one\n    HAS = True\nexcept ImportError:\n    HAS = False\n",
    "a tuple": "try:\n    from missing_one import x\n    HAS = True\nexcept (ImportError, OSError):\n    HAS = False\n",
    "anything": "try:\n    from missing_one.x import y\n    HAS = True\nexcept:\n    HAS = False\n",
    "Exception": "HAS = False\ntry:\n    import missing_one.x\n    HAS = True\nexcept Exception as e:\n    print(e)\n",
    "ModuleNotFoundError": "HAS = 1\ntry:\n    import missing_one\nexcept ModuleNotFoundError:\n    HAS = 0\n",
    "builtins": "try:\n    import missing_one\n    HAS = True\nexcept builtins.ImportError:\n    HAS = False\n",
    "find_spec": "import importlib.util\nHAS = importlib.util.find_spec('missing_one') is not None\n",
    "suppress": "import contextlib as c\nHAS = 0\nwith c.suppress(ImportError):\n    import missing_one\n    HAS = 1\n",
    "in a function": "def f():\n    try:\n        import missing_one\n        return True\n    except ImportError:\n"
    "        return False\nHAS = f()\n",
    "import_module": "import importlib\ntry:\n    importlib.import_module('missing_one')\n    HAS = True\n"
    "except ImportError:\n    HAS = False\n",
}


@pytest.mark.parametrize("case", LEFT)
def test_a_guarded_import_is_left_to_fail(case: str) -> None:
    """The code without the package is what is read."""
    target = resolve(write("model.py", net("import builtins\n" + LEFT[case], forward="assert not HAS")))
    assert_rows(target)
    assert not said(target, "missing")


def test_a_guard_in_one_file_around_an_import_in_another() -> None:
    write("fast.py", "import missing_one\n")
    source = "try:\n    import fast\n    HAS = True\nexcept ImportError:\n    HAS = False\n"
    assert_rows(resolve(write("model.py", net(source, forward="assert not HAS"))))


def test_where_the_fallback_does_not_run_the_guarded_import_has_a_stand_in() -> None:
    source = "try:\n    from flash_attn import flash_attn_func\nexcept ImportError:\n    flash_attn_func = None\n"
    call = "q, k, v = (w(x).unflatten(-1, (1, 8)) for w in (self.q, self.k, self.v))\nreturn flash_attn_func(q, k, v)"
    text = net(source, forward=call).replace("y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))", "")
    target = resolve(write("model.py", text))
    assert_rows(target)
    assert said(target, "missing") == "flash_attn cannot be imported here and had stand-ins"


def test_where_neither_way_runs_the_error_is_that_of_the_fallback() -> None:
    source = "try:\n    import missing_one\nexcept ImportError:\n    missing_one = None\n"
    with pytest.raises(TargetError, match="KeyError: 'mine'"):
        resolve(write("model.py", net(source, forward="missing_one.f(x) if missing_one else {}['mine']")))


def test_all_names_of_a_missing_package_are_refused_where_they_are_needed() -> None:
    target = resolve(write("model.py", net("from missing_one import *\nthing(3)")))
    assert_rows(target)
    assert "NameError: name 'thing' is not defined" in said(target, "loaded")
    with pytest.raises(
        TargetError, match=r"NameError: name 'thing' is not defined .*stood in for: missing_one"
    ) as caught:
        resolve(write("model.py", net("from missing_one import *", forward="y = thing(y)")))
    assert "\n" not in str(caught.value)


INERT_IN_FORWARD = {
    "a function": ("from missing_one.ops import fast", "pass", "y = fast(y)", "missing_one.ops.fast"),
    "a module": ("import missing_one", "self.m = missing_one.Layer(8)", "y = self.m(y)", "missing_one.Layer"),
    "a method": ("import missing_one", "self.m = missing_one.Layer(8)", "y = self.m.run(y)", "missing_one.Layer.run"),
    "calculation": ("from missing_one import A", "pass", "y = y * A", "missing_one.A"),
    "calculation on the left": ("from missing_one import A", "pass", "y = A * y", "missing_one.A"),
    "an item": ("from missing_one import A", "pass", "y = A[0]", "missing_one.A"),
    "a loop": ("from missing_one import A", "pass", "for f in A: y = f(y)", "missing_one.A"),
    "a comparison": ("from missing_one import A", "pass", "y = y if A > 3 else -y", "missing_one.A"),
    "a condition": ("from missing_one import A", "pass", "y = y if A else -y", "missing_one.A"),
    "its length": ("from missing_one import A", "pass", "y = y + len(A)", "missing_one.A"),
    "equality": ("from missing_one import A", "pass", "y = y if A == 3 else -y", "missing_one.A"),
    "membership": ("from missing_one import A", "pass", "y = y if 3 in A else -y", "missing_one.A"),
    "conversion": ("from missing_one import A", "pass", "y = y * float(A)", "missing_one.A"),
    "a function of torch": ("from missing_one import A", "pass", "y = torch.add(y, A)", "missing_one.A"),
    "a call of what was made": (
        "from missing_one import make",
        "self.f = make(3)",
        "y = self.f(y)",
        "missing_one.make",
    ),
    "a flag of what was made": (
        "from missing_one import C",
        "self.c = C()",
        "y = -y if self.c.flag else y",
        "missing_one",
    ),
    "a base class's forward": ("from missing_one import Base", "pass", "y = super().forward(y)", "forward"),
    "a base class's method": ("from missing_one import Base", "pass", "y = self.helper(y)", "helper"),
    "a kernel": ("import triton\n@triton.jit\ndef kernel(x): pass", "pass", "kernel[(1,)](y)", "triton .kernel kernel"),
}


@pytest.mark.parametrize("case", INERT_IN_FORWARD)
def test_what_the_forward_needs_of_a_missing_package_is_named(case: str) -> None:
    before, init, forward, name = INERT_IN_FORWARD[case]
    base = "Base, nn.Module" if "Base" in before else "nn.Module"
    with pytest.raises(TargetError, match=name) as caught:
        resolve(write("model.py", net(before, init, forward, base)))
    assert "\n" not in str(caught.value)


def test_installed_packages_do_not_see_stand_ins() -> None:
    source = net("import missing_one\nimport json.tool, colorsys", "import wave", "from missing_one import x")
    with opened(write("model.py", source)) as target:
        assert_rows(target)
        assert "missing_one" not in sys.modules
        with pytest.raises(ImportError):
            __import__("missing_one")


def test_an_installed_package_that_fails_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("site-packages/broken_one/__init__.py", "raise RuntimeError('no driver')")
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    target = resolve(write("repo/model.py", net("import broken_one\nfrom broken_one.x import y\ny(broken_one.z)")))
    assert_rows(target)
    assert "broken_one" in said(target, "missing")


def test_a_name_that_an_installed_package_lacks() -> None:
    before = "from json import loads, faster_loads\nassert loads('3') == 3\nfaster_loads('3')"
    target = resolve(write("model.py", net(before)))
    assert_rows(target)
    assert "json.faster_loads" in said(target, "missing")


def test_a_name_that_has_moved_within_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("site-packages/moved_one/__init__.py", "")
    write("site-packages/moved_one/old.py", "")
    write("site-packages/moved_one/new.py", "def double(x): return 2 * x\n")
    write("site-packages/moved_one/one.py", "def twice(x): return x\n")
    write("site-packages/moved_one/two.py", "def twice(x): return x\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    before = "from moved_one.old import double, twice\nfrom moved_one.gone import double as again\nassert again(3) == 6"
    target = resolve(write("repo/model.py", net(before, forward="assert double(3) == 6")))
    assert_rows(target)
    assert "moved_one.old.twice" in said(target, "missing") and "old.double" not in said(target, "missing")


def test_a_module_that_an_installed_package_lacks() -> None:
    target = resolve(write("model.py", net("from json.faster import loads\nimport json.other\nloads('3')")))
    assert_rows(target)
    assert said(target, "missing") == "json.faster, json.other cannot be imported here and had stand-ins"


CONFIGS = {
    "ml_collections": """
c = ml_collections.ConfigDict({'a': {'b': 8}})
with c.unlocked():
    c.d = ml_collections.ConfigDict()
c.d.e = 2
assert c.a.b == c['a']['b'] == 8 and c.a.get('x') is None
assert c.copy_and_resolve_references().d.e == 2 and c.to_dict()['d'] == {'e': 2}
del c.a.b
assert 'b' not in c.a
""",
    "omegaconf": """
c = omegaconf.OmegaConf.merge({'a': {'b': 8, 'c': 1}}, {'a': {'b': 9}})
assert c.a.b == 9 and c.a.c == 1
assert omegaconf.OmegaConf.to_container(c) == {'a': {'b': 9, 'c': 1}}
""",
    "easydict": """
c = easydict.EasyDict(a=[1], b={'c': 3})
c.update(d={'e': 4})
assert c.b.c == 3 and c.d.e == 4
""",
    "mmcv": """
R = mmcv.Registry('models')
@R.register_module()
class A:
    def __init__(self, n): self.n = n
assert R.build(dict(type='A', n=3)).n == 3 and R.get('A') is A and 'B' not in R
""",
}


@pytest.mark.parametrize("package", [p for p in CONFIGS if importlib.util.find_spec(p) is None])
def test_config_objects_and_registries(package: str) -> None:
    target = resolve(write("model.py", net(f"import {package}\n{CONFIGS[package]}")))
    assert_rows(target)
    assert not said(target, "loaded")


def test_names_that_a_package_moved_mean_what_they_meant() -> None:
    pytest.importorskip("transformers")
    before = """
    from transformers.modeling_utils import Conv1D
    from transformers.file_utils import add_code_sample_docstrings, ModelOutput
    assert Conv1D(8, 8)(torch.ones(2, 8)).shape == (2, 8)
    @add_code_sample_docstrings(tokenizer_class="Old", checkpoint="old", no_such_option=3)
    def documented(): return ModelOutput
    assert documented() is ModelOutput
    """
    target = resolve(write("model.py", net(dedent(before))))
    assert_rows(target)
    assert not said(target, "missing") and not said(target, "loaded")


ORDINARY = dataclasses.dataclass


def test_defaults_of_dataclasses_without_a_hash_are_those_of_before() -> None:
    before = """
    from dataclasses import dataclass
    @dataclass
    class Part:
        size: int = 3
    @dataclass
    class Whole:
        part: Part = Part(4)
        name: str = "whole"
    assert Whole().part.size == 4 and Whole().part is Whole().part
    """
    target = resolve(write("model.py", net(dedent(before))))
    assert_rows(target)
    assert not said(target, "loaded")
    assert dataclasses.dataclass is ORDINARY


@pytest.mark.skipif(importlib.util.find_spec("scipy") is not None, reason="scipy is there")
def test_normal_numbers_with_bounds() -> None:
    drawn = "import scipy.stats as stats\nassert stats.truncnorm(-2, 2, loc=1.0).rvs(3).shape == (3,)"
    assert_rows(resolve(write("model.py", net(drawn))))


OLD_MODEL = """
from transformers import GPT2Config, PreTrainedModel
class Old(PreTrainedModel):
    config_class = GPT2Config
    def __init__(self, config):
        super().__init__(config)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("seen", torch.ones(config.n_ctx, config.n_ctx).tril())
        self.init_weights()
    def forward(self, x, head_mask=None):
        scale = self.get_head_mask(head_mask, 1)[0]
        n = x.shape[1]
        scores = self.q(x) @ self.k(x).mT + self.invert_attention_mask(torch.ones(x.shape[:2]))[:, 0]
        scores = scores.masked_fill(self.seen[:n, :n] == 0, -1e9).softmax(-1)
        return (scores if scale is None else scores * scale) @ self.v(x)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.old = Old(GPT2Config(vocab_size=60000, n_positions=16))
    def forward(self, x):
        return self.old(x)
"""


def test_what_subclasses_of_before_rely_on_is_there_while_they_are_used() -> None:
    transformers = pytest.importorskip("transformers")
    source = HEADER + OLD_MODEL
    with opened(write("model.py", source) + ":Net") as target:
        (site,) = find(target.model, target.args, target.kwargs, recording=target.recording).layout.sites
        assert site.query[0].param == "old.q.weight"
    assert not hasattr(transformers.GPT2Config(), "n_ctx")
    assert not hasattr(transformers.PreTrainedModel, "get_head_mask")


OLD_LANGUAGE_MODEL = """
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_attn_mask_utils import _prepare_4d_causal_attention_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.import_utils import is_torch_fx_available
if is_torch_fx_available():
    _prepare_4d_causal_attention_mask = torch.fx.wrap(_prepare_4d_causal_attention_mask)
class OldConfig(PretrainedConfig):
    model_type = "old"
    def __init__(self, vocab_size=32, hidden_size=16, num_attention_heads=2, rope_scaling=None, **kwargs):
        self.vocab_size, self.hidden_size, self.num_attention_heads = vocab_size, hidden_size, num_attention_heads
        self.rope_scaling, self.use_cache = rope_scaling, True
        super().__init__(**kwargs)
class Net(PreTrainedModel):
    config_class = OldConfig
    _tied_weights_keys = ["lm_head.weight"]
    def __init__(self, config: OldConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.rope_scaling is not None:
            raise ValueError(config.rope_scaling["type"])
        frequencies, self.factor = ROPE_INIT_FUNCTIONS["default"](config)
        self.register_buffer("frequencies", frequencies, persistent=False)
        assert not (config.is_decoder or config.add_cross_attention or config.pruned_heads)
        assert config.rope_theta == 10000.0 and not self.model_parallel
        self.post_init()
    def get_input_embeddings(self):
        return self.embed
    def get_output_embeddings(self):
        return self.lm_head
    def turned(self, x):
        angles = torch.arange(x.shape[-2])[:, None] * self.frequencies
        a, b = x.chunk(2, -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)
    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        if not isinstance(past_key_values, Cache):
            past_key_values = DynamicCache.from_legacy_cache(past_key_values)
        past = past_key_values.get_usable_length(input_ids.shape[1])
        x = self.embed(input_ids)
        mask = _prepare_4d_causal_attention_mask(attention_mask, input_ids.shape, x, past)
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = past_key_values.update(self.turned(k), v, 0)
        seen = self.get_extended_attention_mask(torch.ones(input_ids.shape), input_ids.shape)
        y = ((self.turned(q) @ k.mT + mask + seen).softmax(-1) @ v).transpose(1, 2).flatten(2)
        assert past_key_values.seen_tokens == k.shape[2] and past_key_values[0][0] is past_key_values.key_cache[0]
        return self.lm_head(y), past_key_values.to_legacy_cache()
"""


def test_files_for_transformers_4() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    with opened(write("model.py", HEADER + OLD_LANGUAGE_MODEL)) as target:
        (site,) = find(target.model, target.args, target.kwargs, recording=target.recording).layout.sites
        assert [block.param for block in (*site.query, *site.key)] == ["q.weight", "k.weight"]
        assert site.query_heads == 2
        model: Any = target.model
        assert model.lm_head.weight is model.embed.weight  # as its config says by default
    assert not hasattr(transformers.DynamicCache, "from_legacy_cache") and "default" not in ROPE_INIT_FUNCTIONS
    assert transformers.LlamaConfig().rope_scaling == transformers.LlamaConfig().rope_parameters
    assert not hasattr(transformers.LlamaConfig(), "rope_theta")
    assert not hasattr(transformers.PreTrainedModel.get_expanded_tied_weights_keys, "also_lists")


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("padded", [None, True])
def test_masks_of_transformers_4(window: int | None, past: int, padded: bool | None) -> None:
    """Against the rule, element by element."""
    queries, keys = 4, 4 + past
    tokens = torch.ones(2, keys, dtype=torch.int64)
    tokens[1, :2] = 0
    given = tokens if padded else None
    x = torch.zeros(2, queries, 8, dtype=torch.float64)
    made = masks.causal_mask(given, (2, queries), x, past, window)
    least = torch.finfo(torch.float64).min
    for b, i, j in product(range(2), range(queries), range(keys)):
        at = i + past
        seen = j <= at and (window is None or j > at - window) and (given is None or bool(tokens[b, j]))
        assert made[b, 0, i, j] == (0.0 if seen else least)
    of_keys = masks.mask_of_keys(tokens, x.dtype, queries)
    assert of_keys.shape == (2, 1, queries, keys) and of_keys[0].max() == of_keys[0].min() == 0.0
    assert of_keys[1, 0, :, :2].eq(least).all() and of_keys[1, 0, :, 2:].eq(0.0).all()


def test_constructors_that_read_tables_are_built_on_meta() -> None:
    """As those of vision models read their rates of stochastic depth."""
    init = """
    self.rates = [x.item() for x in torch.linspace(0, 0.1, 3)]
    self.w = nn.Linear(8, 1 << 40)
    self.register_buffer("angles", torch.cat([torch.zeros(2), torch.arange(3.0)]))
    """
    target = resolve(write("model.py", net(init=init)))
    model: Any = target.model
    assert model.q.weight.is_meta and model.rates == pytest.approx([0.0, 0.05, 0.1]) and model.angles.is_meta
    assert_rows(target)


@pytest.mark.parametrize(
    ("mine", "statement", "error"),
    [
        ("raise ValueError('of mine')", "import mine", "ValueError: of mine"),
        ("x = 3", "from mine import absent", "cannot import name 'absent'"),
    ],
)
def test_errors_of_ones_own_files_are_no_missing_packages(mine: str, statement: str, error: str) -> None:
    write("mine.py", mine)
    target = resolve(write("model.py", net(statement)))
    assert error in said(target, "loaded") and not said(target, "missing")
    with pytest.raises(TargetError, match="NameError"):
        resolve(write("model.py", net(statement, forward="absent(mine)")))


TRITON = """
import triton
import triton.language as tl
@triton.autotune(configs=[triton.Config({'B': 2}, num_warps=4)], key=['n'])
@triton.heuristics({'E': lambda args: args['n'] % 2 == 0})
@triton.jit
def kernel(x, n, B: tl.constexpr, E: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(x + at, tl.load(x + at, mask=at < n), mask=at < n)
@triton.jit(do_not_specialize=['n'])
def other(x, n): pass
other.tuned = [config for config in other.configs if config] or other.fn
class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        kernel[(triton.cdiv(x.numel(), 2),)](x, x.numel(), B=2)
        return x
"""


def test_kernels_can_be_made_and_not_be_run() -> None:
    assert_rows(resolve(write("model.py", net(TRITON, forward="if y.is_cuda: kernel[(1,)](y, 3)"))))
    with pytest.raises(TargetError, match="triton"):
        resolve(write("model.py", net(TRITON, forward="y = Double.apply(y)")))


def test_lightning_modules() -> None:
    before = "import pytorch_lightning as pl"
    target = resolve(
        write(
            "model.py",
            net(before, "self.save_hyperparameters()", "self.log('x', 3); y = y.to(self.device)", "pl.LightningModule"),
        )
    )
    assert_rows(target)


# ---- nothing is left -------------------------------------------------------------------------------------------------

WATCHED: dict[str, Any] = {
    "torch": ("set_default_device", "set_default_tensor_type"),
    "torch.Tensor": ("backward",),
    "torch.autograd": ("backward",),
    "torch.nn.Module": ("to_empty",),
    "argparse.ArgumentParser": ("parse_known_args", "parse_args"),
    "torch.distributed": ("init_process_group", *_COLLECTIVES),
    "torch.cuda": ("set_device", "synchronize", "current_device", "get_device_name", "Stream", "Event", "device"),
}


def state() -> dict[str, Any]:
    """Everything of this process that a target's world touches."""
    found: dict[str, Any] = {
        "modules": {
            n: id(m) for n, m in sys.modules.items() if not n.startswith(("torch.", "sympy", "numpy", "mpmath"))
        },
        "path": list(sys.path),
        "meta path": list(map(id, sys.meta_path)),
        "argv": list(sys.argv),
        "import": builtins.__import__,
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "group": dist.is_initialized(),
        "modes": len(_get_current_function_mode_stack()),
        "gradients": torch.is_grad_enabled(),
        "warnings": list(warnings.filters),
        "random": torch.random.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
    }
    for owner, names in WATCHED.items():
        root = {"argparse": argparse, "torch": torch}[owner.split(".")[0]]
        place = root
        for part in owner.split(".")[1:]:
            place = getattr(place, part)
        found |= {f"{owner}.{n}": getattr(place, n) for n in names if hasattr(place, n)}
    return found


CHANGES = """
import sys, os, argparse, warnings
import torch.distributed as dist
import missing_one
import beside
sys.path.insert(0, "/nowhere"); sys.argv.append("x")
torch.set_default_dtype(torch.float64)
torch.set_default_device("cuda")
dist.init_process_group("nccl")
warnings.simplefilter("error")
parser = argparse.ArgumentParser(); parser.add_argument("--size", type=int, required=True); parser.parse_args()
"""
ENDS = {
    "success": net(CHANGES),
    "an error of the file": HEADER + CHANGES + "raise ValueError",
    "an error of the constructor": net(CHANGES, "raise ValueError"),
    "an error of the forward": net(CHANGES, forward="raise ValueError"),
    "a missing function in the forward": net(CHANGES, forward="missing_one.f(y)"),
    "training": HEADER + CHANGES + NET + "Net()(torch.zeros(2, 3, 8)).sum().backward()",
    "exit": HEADER + CHANGES + "sys.exit(3)",
    "two attempts": net(
        "try:\n    import missing_one as m\nexcept ImportError:\n    m = None\n" + CHANGES, forward="m.f(y)"
    ),
}


@pytest.mark.parametrize("case", ENDS)
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_left(case: str) -> None:
    write("beside.py", "")
    file = write("model.py", ENDS[case])
    with suppress(TargetError):
        resolve(write("warm.py", net()))  # what this toolkit itself imports when it is first used
    before = state()
    with suppress(TargetError):
        resolve(file)
    after = state()
    new = after["modules"].keys() - before["modules"].keys()
    assert not {n for n in new if "beside" in n or n == "model" or "missing" in n or "target" in n}
    for name in before.keys() - {"modules"}:
        assert after[name] == before[name], name


def test_loggers_of_the_file_log_errors_only(caplog: pytest.LogCaptureFixture) -> None:
    """It may be imported and built many times."""
    lines = "log = __import__('logging').getLogger('mine')"
    resolve(write("model.py", net(lines, init="log.warning('built'); log.error('wrong')", forward="log.info('run')")))
    assert {r.message for r in caplog.records if r.name == "mine"} == {"wrong"}
    logging.getLogger("mine").warning("after")
    assert caplog.records[-1].message == "after"


# ---- devices ---------------------------------------------------------------------------------------------------------

GPU = {
    # Before the class, in the constructor, in the forward.
    "parameters are moved": ("", "self.cuda(); self.q.to('cuda'); self.to(torch.device('cuda:0'))", "pass"),
    "factories": (
        "",
        "self.register_buffer('b', torch.ones(8, device='cuda')); self.p = torch.zeros(3, device=torch.device('cuda'))",
        "y = y + torch.zeros(8, device='cuda') + self.b + self.p.sum()",
    ),
    "the layer's device": (
        "",
        "self.q = nn.Linear(8, 8, device='cuda'); self.k = nn.Linear(8, 8, device='cuda:1')",
        "pass",
    ),
    "moved in the forward": ("", "pass", "y = y.cuda() + x.to('cuda').to(device='cuda', dtype=y.dtype)"),
    "to with types": ("", "pass", "y = y.to('cuda', torch.float32, non_blocking=True).to(x)"),
    "the default device": ("torch.set_default_device('cuda')", "self.b = torch.zeros(8)", "y = y + torch.zeros(8)"),
    "the default type": ("torch.set_default_tensor_type('torch.cuda.FloatTensor')", "pass", "pass"),
    "a context": (
        "",
        "with torch.device('cuda'): self.b = torch.zeros(8)",
        "with torch.device('cuda'): y = y + torch.zeros(8)",
    ),
    "a context at the top": ("with torch.device('cuda'): B = torch.zeros(8)", "pass", "y = y + B"),
    "a device that is current": (
        "torch.cuda.set_device(0)",
        "self.d = torch.cuda.current_device(); self.to(self.d)",
        "y = y.to(self.d)",
    ),
    "what the GPU is": (
        "N = torch.cuda.get_device_properties(0).total_memory; C = torch.cuda.get_device_capability()",
        "assert C[0] >= 7 and N",
        "torch.cuda.synchronize()",
    ),
    "streams": (
        "S = torch.cuda.Stream()",
        "pass",
        "with torch.cuda.stream(S): y = y + 1\ntorch.cuda.current_stream().wait_stream(S)",
    ),
    "to_empty": ("", "self.to_empty(device='cuda') if self.q.weight.is_meta else self", "pass"),
    "type": ("", "pass", "y = y.type(torch.FloatTensor)"),
    "new tensors": ("", "pass", "y = y + y.new_zeros(8, device='cuda') + torch.arange(8, device='cuda')"),
    "pinned": ("P = torch.zeros(8).pin_memory().cuda(non_blocking=True)", "pass", "y = y + P"),
    "generators": ("", "nn.init.normal_(self.q.weight)", "pass"),
    "a way for CPUs": ("D = 'cuda' if torch.cuda.is_available() else 'cpu'", "assert D == 'cpu'", "y = y.to(D)"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("case", GPU)
@pytest.mark.filterwarnings("ignore")
def test_code_for_a_gpu(case: str, real: bool) -> None:
    target = resolve(write("model.py", net(*GPU[case])), real=real)
    assert_rows(target)
    kinds = {t.device.type for t in (*target.model.parameters(), *target.model.buffers())}
    assert kinds == {"cpu"} if real else kinds <= {"cpu", "meta"}
    assert all(a.device.type in ("cpu", "meta") for a in target.args)


# ---- one rank --------------------------------------------------------------------------------------------------------

COLLECTIVES = {
    "all_reduce": "dist.all_reduce(y)",
    "all_reduce, waited for": "w = dist.all_reduce(y, op=dist.ReduceOp.SUM, async_op=True); w.wait()",
    "all_gather": "o = [torch.empty_like(y)] * dist.get_world_size(); dist.all_gather(o, y); y = torch.cat(o)",
    "all_gather_into_tensor": "o = torch.empty_like(y); dist.all_gather_into_tensor(o, y); y = o",
    "reduce_scatter": "o = torch.empty_like(y); dist.reduce_scatter(o, [y]); y = o",
    "reduce_scatter_tensor": "o = torch.empty_like(y); dist.reduce_scatter_tensor(o, y); y = o",
    "all_to_all_single": "o = torch.empty_like(y); dist.all_to_all_single(o, y); y = o",
    "all_to_all": "o = [torch.empty_like(y)]; dist.all_to_all(o, [y]); y = o[0]",
    "broadcast": "dist.broadcast(y, src=0); dist.barrier()",
    "scatter": "o = torch.empty_like(y); dist.scatter(o, [y], src=0); y = o",
    "gather": "o = [torch.empty_like(y)]; dist.gather(y, o, dst=0); y = o[0]",
    "reduce": "dist.reduce(y, 0)",
    "objects": "o = [None]; dist.all_gather_object(o, 3); assert o == [3]; p = [4]; dist.broadcast_object_list(p)",
    "ranks": "assert (dist.get_rank(), dist.get_world_size()) == (0, 1)",
}


def on_ranks(collective: str) -> str:
    """A Net whose keys pass through a collective."""
    asks = 'assert dist.is_initialized(), "model parallel group is not initialized"'
    source = net("import torch.distributed as dist", asks)
    keys = f"y = self.k(x)\n{dedent(collective)}\nkeys = y\n"
    source = source.replace("    def forward(self, x):\n", "    def forward(self, x):\n" + indent(keys, 8 * " "))
    return source.replace(
        "F.scaled_dot_product_attention(self.q(x), self.k(x)", "F.scaled_dot_product_attention(self.q(x), keys"
    )


@pytest.mark.parametrize("case", COLLECTIVES)
def test_collectives_of_one_rank(case: str) -> None:
    assert_rows(resolve(write("model.py", on_ranks(COLLECTIVES[case]))))
    assert not dist.is_initialized()


def test_the_variables_of_torchrun_are_there_and_go() -> None:
    before = "import os\nRANK = int(os.environ['LOCAL_RANK']); torch.cuda.set_device(RANK)"
    assert_rows(resolve(write("model.py", net(before, "assert RANK == 0"))))
    assert "LOCAL_RANK" not in os.environ


def test_a_file_may_make_the_group_itself() -> None:
    before = "import torch.distributed as dist\ndist.init_process_group('nccl', init_method='env://')"
    assert_rows(resolve(write("model.py", net(before, "assert dist.is_initialized(); dist.new_group([0])"))))
    assert not dist.is_initialized()


@pytest.fixture
def group() -> Iterator[Any]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_process_keeps_a_group_of_its_own(group: Any) -> None:
    assert_rows(resolve(write("model.py", on_ranks("assert dist.get_world_size() == 1"))))
    assert dist.group.WORLD is group
    with suppress(TargetError):
        resolve(write("model.py", net("import torch.distributed as dist", "raise ValueError")))
    assert dist.group.WORLD is group


# ---- scripts ---------------------------------------------------------------------------------------------------------

PARSER = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("more", nargs="+")
parser.add_argument("--n_heads", type=int, required=True)
parser.add_argument("--mode", choices=["a", "b"], required=True)
parser.add_argument("--given", type=int, default=7)
args = parser.parse_args()
"""
LOOP = """
model = {}
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for step in range(100):
    loss = model(torch.zeros(2, 3, 8)).square().mean()
    loss.backward()
    optimizer.step()
"""
MLP = "class Small(nn.Module):\n    def __init__(s):\n        super().__init__()\n        s.l = nn.Linear(8, 8)\n"
MLP += "    def forward(s, x): return s.l(x)\n"
SCRIPTS = {
    "argv": net("import sys, os\nassert os.path.basename(sys.argv[0]) == 'model.py' and len(sys.argv) == 1"),
    "reads what lies beside": net(
        "import sys, os\nopen(os.path.join(os.path.dirname(sys.argv[0]), 'model.py')).read()"
    ),
    "required options": net(PARSER, "assert isinstance(args.n_heads, int) and args.mode == 'a' and args.given == 7"),
    "parse_known_args": net(PARSER.replace("args = parser.parse_args()", "args, rest = parser.parse_known_args()")),
    "a main that is not called": net(forward="pass") + "\nif __name__ == '__main__':\n    raise ValueError\n",
    "it trains behind the class": HEADER + NET + LOOP.format("Net()"),
    "it trains before the class": HEADER + MLP + LOOP.format("Small()") + NET.replace("Net", "Model"),
    "it trains by autograd": HEADER + NET + "torch.autograd.backward(Net()(torch.zeros(2, 3, 8)).sum())",
    "it trains by gradients": HEADER
    + NET
    + "m = Net()\ntorch.autograd.grad(m(torch.zeros(2, 3, 8)).sum(), m.parameters())",
    "it measures before it trains": HEADER
    + NET
    + "model = Net()\nwhile model(torch.zeros(2, 3, 8)).isfinite().all():\n    pass\n",
    "it trains in a try": HEADER
    + NET
    + "try:\n"
    + indent(LOOP.format("Net()"), "    ")
    + "except Exception:\n    pass\n",
    "it exits": HEADER + NET + "import sys\nsys.exit(1)\n",
    "it exits before the class": HEADER + "import sys\nsys.exit(1)\n" + NET,
    "a variable of the environment": HEADER + "import os\nROOT = os.environ['NOWHERE_ROOT']\n" + NET,
    "a file that is not there": HEADER + "data = open('nowhere.txt').read()\nn = len(data)\n" + NET,
    "a download": HEADER + "import missing_one\ntokens = missing_one.load('x')\nids = [t + 1 for t in tokens]\n" + NET,
}


@pytest.mark.parametrize("case", SCRIPTS)
def test_scripts(case: str) -> None:
    file = write("model.py", SCRIPTS[case])
    name = ":Model" if "before the class" in case and "trains" in case else ":Net"
    assert_rows(resolve(file + name))


@pytest.mark.parametrize("case", ["it trains behind the class", "it exits", "a variable of the environment"])
def test_a_file_that_stops_is_told(case: str) -> None:
    assert "model.py stops at line" in said(resolve(write("model.py", SCRIPTS[case]) + ":Net"), "loaded")


def test_arguments_that_are_given_are_parsed_as_ever() -> None:
    with opened(write("model.py", net())):
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--size", type=int, required=True)
        assert parser.parse_args(["--size", "3"]).size == 3
        with pytest.raises((SystemExit, argparse.ArgumentError)):
            parser.parse_args([])


def test_a_fresh_process_sees_the_same(tmp_path: Path) -> None:
    file = write("model.py", net("import missing_one"))
    code = f"import sys; from quack_fx.targets import resolve; resolve({file!r}); print('missing_one' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False" and isinstance(sys, ModuleType)
