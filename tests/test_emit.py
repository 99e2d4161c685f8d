"""The emitted file: right table, right form, and it stands alone. What its optimizers do: test_emit_step.py."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emit_cases import (
    PAIR,
    SITES,
    Bag,
    Reference,
    Shapes,
    block,
    example_mla,
    gqa,
    layout_of,
    load,
    rows,
    site,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from quack_fx.emit import convert, emit
from quack_fx.emit.optimizers import CHOICES
from quack_fx.errors import EmitError, LayoutError
from quack_fx.layout import AttentionSite, Norm, QKLayout, Skipped

# Importing Inductor meets a deprecated call of torch's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

# ---- tools ----------------------------------------------------------------------------------------------------------


def table_of(module: ModuleType) -> set[tuple[Any, ...]]:
    """Products of the emitted table, in the reference's terms."""

    def unit(b: Any) -> tuple[Any, ...]:
        return b.weight.name, getattr(b.weight, "axis", 0), b.ranges, getattr(b.weight, "bias", None)

    return {tuple(unit(b) for b in product) for product in module.logit_products()}


def ruff(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SITES)
def test_table_has_the_products_of_the_layout(name: str, emitted: dict[str, ModuleType]) -> None:
    layout, shapes = layout_of(name)
    reference = Reference(layout, {n: torch.ones(s) for n, s in shapes.items()}, 1.0)
    assert table_of(emitted[name]) == {tuple(map(_joined, term)) for term in reference.terms}


@st.composite
def random_layouts(draw: st.DrawFn) -> tuple[QKLayout, Shapes]:
    """Sites with heads anywhere in their weights: regular, in pieces, permuted, with any head map."""
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    width, pieces = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    n, m = groups * per_group, groups
    slots = (n + m + draw(st.integers(0, 2))) * pieces
    order = draw(st.permutations(range(slots))) if draw(st.booleans()) else list(range(slots))
    start = draw(st.integers(0, 2))
    runs = [(start + i * width, start + (i + 1) * width) for i in order]
    heads = [tuple(sorted(runs[i :: n + m][:pieces])) for i in range(n + m)]
    head_map = draw(st.lists(st.integers(0, m - 1), min_size=n, max_size=n)) if draw(st.booleans()) else None
    layers = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=8, unique=True))
    axis, bias = draw(st.integers(0, 1)), draw(st.booleans())
    sites, shapes = [], {}
    for i, j in layers:
        name = f"m.{i}.sub{j}.qkv"
        shape = [5, 5]
        shape[axis] = total = start + slots * width
        shapes[f"{name}.weight"] = tuple(shape)
        shapes[f"{name}.bias"] = (total,)
        query = block(f"{name}.weight", "q", tuple(heads[:n]), axis, f"{name}.bias" if bias else None)
        key = block(f"{name}.weight", "k", tuple(heads[n:]), axis, f"{name}.bias" if bias else None)
        more = {} if head_map is None else {"head_map": tuple(head_map)}
        sites.append(site(name, [query], [key], PAIR, **more))
    return QKLayout(tuple(sites)), shapes


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=random_layouts())
def test_table_of_random_layouts(case: tuple[QKLayout, Shapes], tmp_path: Path) -> None:
    layout, shapes = case
    source = emit(layout, shapes, title="random")
    module = load(source, tmp_path)
    merged = Reference(layout, {n: torch.ones(s) for n, s in shapes.items()}, 1.0).terms
    assert {tuple(map(_joined, term)) for term in merged} == table_of(module)
    assert max(map(len, source.splitlines())) <= 120
    del sys.modules[module.__name__]


def _joined(unit: Any) -> Any:
    """The unit with adjacent ranges made one."""
    param, axis, ranges, bias = unit
    joined: list[tuple[int, int]] = []
    for a, b in ranges:
        if joined and joined[-1][1] == a:
            joined[-1] = (joined[-1][0], b)
        else:
            joined.append((a, b))
    return param, axis, tuple(joined), bias


# ---- what is refused ------------------------------------------------------------------------------------------------


def refusal(module: ModuleType, model: nn.Module, **more: Any) -> str:
    with pytest.raises(ValueError) as caught:
        module.QuacKAdamW(model, compile=False, **more)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_emitted_file_refuses_what_does_not_fit(emitted: dict[str, ModuleType]) -> None:
    module = emitted["gqa"]
    _, shapes = layout_of("gqa")
    name = "layers.1.attn.k_proj.weight"
    assert name in refusal(module, Bag({n: s for n, s in shapes.items() if n != name}))
    wider = refusal(module, Bag({**shapes, name: (16, 10)}))
    assert name in wider and "[8, 10]" in wider and "[16, 10]" in wider

    model = Bag(shapes)
    with torch.no_grad():
        dict(model.named_parameters())[name][4:] = 0
    zero = refusal(module, model)
    assert f"rows 4:8 of {name} have norm 0" in zero and "initial values" in zero

    model = Bag(shapes)
    some = [p for n, p in model.named_parameters() if n != name]
    assert "param_groups" in refusal(module, model, param_groups=some)
    assert "differentiable=True" in refusal(module, model, differentiable=True)
    betas = (torch.tensor(0.9), torch.tensor(0.99))
    assert "betas given as tensors" in refusal(module, model, betas=betas, foreach=False, capturable=False)
    with pytest.raises(ValueError, match="clip_grad_norm is -1; need a positive number"):
        module.compile_train_step(model, module.QuacKAdamW(model, compile=False), clip_grad_norm=-1)


def test_wrapped_models_are_recognised(emitted: dict[str, ModuleType]) -> None:
    """Names as torch.compile and DistributedDataParallel change them."""
    _, shapes = layout_of("gqa")
    for wrapped in (torch.compile(Bag(shapes)), _in_module(Bag(shapes)), torch.compile(_in_module(Bag(shapes)))):
        assert len(emitted["gqa"].QuacKAdamW(wrapped, compile=False).quack.params) == 6


def _in_module(model: nn.Module) -> nn.Module:
    outer = nn.Module()
    outer.add_module("module", model)
    return outer


def _biased(one: AttentionSite) -> AttentionSite:
    return replace(one, query=(replace(one.query[0], bias="b"),))


NORM = Norm("query", "rms", 4, "attn.q_norm", "attn.q_norm.weight")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda s, w: (QKLayout(), w), EmitError, "no query/key pairs"),
        (lambda s, w: (QKLayout(skipped=(Skipped("m.0", "x", "it adds"),)), w), EmitError, "'m.0': it adds"),
        (lambda s, w: (QKLayout((replace(s, qk_norm=(NORM,)),)), w), EmitError, "strip_qk_norm"),
        (lambda s, w: (QKLayout((s,)), {}), LayoutError, "no such parameter"),
        (lambda s, w: (QKLayout((s,)), {**w, "attn.q.weight": (8, 6)}), LayoutError, "up to row 12"),
        (lambda s, w: (QKLayout((replace(s, query=(replace(s.query[0], axis=2),)),)), w), LayoutError, "axis 2"),
        (lambda s, w: (QKLayout((_biased(s),)), w), LayoutError, "does not exist"),
        (
            lambda s, w: (QKLayout((_biased(s),)), {**w, "b": (3,)}),
            LayoutError,
            "need [12]",
        ),
    ],
)  # fmt: skip
def test_layouts_that_cannot_be_emitted(change: Any, error: type[Exception], words: str) -> None:
    one = site("attn", [block("attn.q.weight", "q", rows(3, 4))], [block("attn.k.weight", "k", rows(3, 4))], PAIR)
    layout, shapes = change(one, {"attn.q.weight": (12, 6), "attn.k.weight": (12, 6)})
    with pytest.raises(error) as caught:
        emit(layout, shapes, title="bad")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_optimizer_must_be_known() -> None:
    layout, shapes = layout_of("gqa")
    with pytest.raises(EmitError, match=r"optimizer 'adagrad' is not one of adamw, adam, sgd, muon, lion"):
        emit(layout, shapes, title="bad", optimizer="adagrad")  # type: ignore[arg-type]


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
def test_tau_must_be_positive(tau: float) -> None:
    layout, shapes = layout_of("gqa")
    with pytest.raises(EmitError, match="tau"):
        emit(layout, shapes, title="bad", tau=tau)


def test_convert_takes_a_target_as_text(folder: Path) -> None:
    """The model is built on meta and never run, for the layout is given."""
    _, layout = example_mla()
    path = Path(__file__).parent.parent / "examples" / "mla.py"
    source = convert(f"{path}:MLATransformer", layout=layout, tau=0.3)
    assert "for MLATransformer:" in source and "tau: float = 0.3," in source
    reference = Reference(layout, {n: torch.ones(p.shape) for n, p in example_mla()[0].named_parameters()}, 1.0)
    assert table_of(load(source, folder)) == {tuple(term) for term in reference.terms}


def test_convert_says_what_it_lacks() -> None:
    with pytest.raises(EmitError, match="example inputs"):
        convert(nn.Linear(2, 2))
    with pytest.raises(EmitError, match="build and inputs"):
        convert(nn.Linear(2, 2), torch.zeros(2), build="x")


# ---- the form -------------------------------------------------------------------------------------------------------


def test_ruff_finds_nothing(tmp_path: Path) -> None:
    """Lint and format, for every layout and optimizer at once."""
    for name, optimizer in [*((name, "adamw") for name in SITES), *(("mla", optimizer) for optimizer in CHOICES)]:
        layout, shapes = layout_of(name)
        skipped = (Skipped("enc.3.mixer", "linear-attention", 'no softmax; "gated" \\ and so on ' + "long " * 40),) * 3
        layout = replace(layout, skipped=skipped) if name == "mla" else layout
        title = f'{name} of "C:\\x.py" ' * 5
        source = emit(layout, shapes, title=title, optimizer=optimizer)  # type: ignore[arg-type]
        (tmp_path / f"{name}_{optimizer}.py").write_text(source)
    options = ("--isolated", "--line-length", "120", "--target-version", "py311")
    ruff("check", *options, "--extend-select", "I,UP,B,E501,W,SIM,RUF", str(tmp_path))
    ruff("format", "--check", *options, str(tmp_path))


@pytest.mark.slow
def test_mypy_finds_nothing(tmp_path: Path) -> None:
    names = ("mla", "conv1d", "two_pieces", "gqa", "irregular")
    for name in names:
        (tmp_path / f"{name}.py").write_text(emit(*layout_of(name), title=name))
    for optimizer in CHOICES:
        (tmp_path / f"with_{optimizer}.py").write_text(emit(*layout_of("conv1d"), title="x", optimizer=optimizer))  # type: ignore[arg-type]
    files = list(map(str, tmp_path.glob("*.py")))
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_imports_torch_and_the_standard_library_alone() -> None:
    for name in SITES:
        tree = ast.parse(emit(*layout_of(name), title=name))
        modules = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {module.split(".")[0] for module in modules} <= {"torch"} | sys.stdlib_module_names


def test_it_runs_where_quack_fx_cannot_be_imported(tmp_path: Path) -> None:
    layout, shapes = layout_of("fused")
    (tmp_path / "train_step.py").write_text(emit(layout, shapes, title="fused"))
    script = f"""
import sys
sys.modules["quack_fx"] = None
sys.path.insert(0, {str(tmp_path)!r})
import torch, train_step
from torch import nn
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(8, 36)
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.ModuleList([Layer(), Layer()])
    def forward(self, x):
        return sum(layer.attn.c_attn(x).square().mean() for layer in self.h)
model = Model()
optimizer = train_step.QuacKAdamW(model, lr=0.01, compile=False)
x = torch.ones(2, 8)
first = float(model(x))
for _ in range(5):
    model(x).backward()
    optimizer.step()
    optimizer.zero_grad()
assert float(model(x)) < first and not any(name.startswith("quack_fx.") for name in sys.modules)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "done\n", done.stderr


def test_emission_needs_no_torch() -> None:
    script = "import sys; sys.modules['torch'] = None; from quack_fx.emit import emit"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_llama_405b_stays_short(folder: Path) -> None:
    """126 layers, 128 query heads on 8 key heads of width 128; from numbers alone."""
    sites = [gqa(f"model.layers.{i}.self_attn", 128, 8, 128) for i in range(126)]
    shapes = {
        f"model.layers.{i}.self_attn.{p}_proj.weight": (r, 16384)
        for i in range(126)
        for p, r in (("q", 16384), ("k", 1024))
    }
    source = emit(QKLayout(tuple(sites)), shapes, title="LlamaForCausalLM")
    table = source[source.index("def logit_products") : source.index("class Weight")]
    assert table.count("\n") <= 16
    one_layer = {name: shape for name, shape in shapes.items() if ".0." in name}
    assert source.count("\n") <= emit(QKLayout(tuple(sites[:1])), one_layer, title="x").count("\n") + 2
    products = list(load(source, folder).logit_products())
    assert len(products) == 126 * 128
    q, k = products[-1]
    assert (q.weight.name, q.ranges) == ("model.layers.125.self_attn.q_proj.weight", ((16256, 16384),))
    assert (k.weight.name, k.ranges) == ("model.layers.125.self_attn.k_proj.weight", ((896, 1024),))


def test_docstring_names_what_is_left_out() -> None:
    layout, shapes = layout_of("mla")
    kept = [replace(gqa(f"vision.{i}.attn", 2, 2, 4), qk_norm=(NORM,)) for i in range(9)]
    skipped = tuple(Skipped(f"mixer.{i}", "linear-attention", "there is no softmax") for i in range(4))
    many = tuple(Skipped(f"{c}.x", "other", f"reason {c}") for c in "abcdefghij")
    source = emit(QKLayout((*layout.sites, *kept), skipped + many), shapes, title="DeepSeek")
    doc = ast.get_docstring(ast.parse(source)) or ""
    assert "DeepSeek" in doc and "arXiv 2511.21377, Algorithm 2" in doc
    assert "- vision.*.attn (9 times): QK norm is kept" in doc
    assert "- mixer.* (4 times): there is no softmax" in doc
    assert doc.rstrip().endswith("- and 6 more")
    assert "Left out" not in emit(layout, shapes, title="DeepSeek")
    assert "Algorithm 1)" in emit(*layout_of("gqa"), title="Llama")
    assert "Algorithms 1 and 2)" in emit(*layout_of("low_rank_branch"), title="LoRA")


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("gqa", ("bias=", ".bias", "weight.axis", "axis=", "piece.start", "PassThrough")),
        ("mla", ("bias=", ".bias", "weight.axis", "axis=", "piece.start", "PassThrough")),
        ("fused", ("weight.axis", "axis=", "piece.start")),
        ("conv1d", ("piece.start",)),
    ],
)
def test_no_dead_code(name: str, absent: tuple[str, ...]) -> None:
    """What a table does not use, the file does not carry."""
    source = emit(*layout_of(name), title="model")
    assert [word for word in absent if word in source] == []


@pytest.mark.parametrize("optimizer", CHOICES)
def test_the_chosen_optimizer_only(optimizer: str) -> None:
    source = emit(*layout_of("gqa"), title="model", optimizer=optimizer)  # type: ignore[arg-type]
    assert set(re.findall(r"class (\w+)Rule", source)) == {kind.name for kind in CHOICES[optimizer].kinds}
    defined = {node.name for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    used = Counter(re.findall(r"\w+", source))
    for_users = {"compile_train_step"}
    assert {name for name in defined if used[name] < 2} <= for_users, "nothing is carried that nothing calls"
