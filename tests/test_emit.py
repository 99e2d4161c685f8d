"""The emitted file: right table, right arithmetic, right form, and it stands alone.

The reference is `Reference` below: AdamW and the rule of QuacK in plain fp64 loops, head by head, from the layout.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quack_fx.emit import convert, emit
from quack_fx.errors import EmitError, LayoutError
from quack_fx.layout import AttentionSite, LogitTerm, Norm, QKLayout, Ranges, Role, Skipped, WeightBlock

Shapes = dict[str, tuple[int, ...]]

# Importing Inductor meets a deprecated call of torch's own.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

# ---- layouts written by hand ----------------------------------------------------------------------------------------


def rows(heads: int, width: int, start: int = 0, stride: int | None = None) -> tuple[Ranges, ...]:
    """One contiguous run of rows for each head."""
    step = width if stride is None else stride
    return tuple(((start + h * step, start + h * step + width),) for h in range(heads))


def block(param: str, role: Role, heads: tuple[Ranges, ...], axis: int = 0, bias: str | None = None) -> WeightBlock:
    return WeightBlock(param, role, axis, heads, bias)


def site(
    name: str, query: list[WeightBlock], key: list[WeightBlock], terms: list[tuple[tuple[int, ...], tuple[int, ...]]],
    **more: Any,
) -> AttentionSite:  # fmt: skip
    n, m = len(query[0].heads), len(key[0].heads)
    fields: dict[str, Any] = {
        "kind": "mha" if n == m else "gqa",
        "cross": False,
        "calls": 1,
        "query_heads": n,
        "key_heads": m,
        "head_dim": 4,
        "head_map": tuple(h // (n // m) for h in range(n)),
    }
    return AttentionSite(
        name=name, query=tuple(query), key=tuple(key), terms=tuple(LogitTerm(*term) for term in terms),
        **{**fields, **more},
    )  # fmt: skip


PAIR = [((0,), (0,))]


def gqa(name: str, n: int, m: int, width: int, bias: bool = False, **more: Any) -> AttentionSite:
    def one(part: str, heads: int) -> WeightBlock:
        return block(
            f"{name}.{part}_proj.weight", part, rows(heads, width), bias=f"{name}.{part}_proj.bias" * bias or None
        )  # type: ignore[arg-type]

    return site(name, [one("q", n)], [one("k", m)], PAIR, **more)


def fused(name: str, n: int, width: int, axis: int, interleaved: bool = False) -> AttentionSite:
    stride, start = (3 * width, width) if interleaved else (width, n * width)
    weight, bias = f"{name}.c_attn.weight", f"{name}.c_attn.bias"
    query = block(weight, "q", rows(n, width, 0, stride), axis, bias)
    return site(name, [query], [block(weight, "k", rows(n, width, start, stride), axis, bias)], PAIR)


def falcon(name: str, groups: int, per_group: int, width: int) -> AttentionSite:
    """Query heads, key and value of a group side by side."""
    weight, stride = f"{name}.qkv.weight", (per_group + 2) * width
    heads = tuple(rows(1, width, g * stride + i * width)[0] for g in range(groups) for i in range(per_group))
    key = block(weight, "k", rows(groups, width, per_group * width, stride))
    return site(name, [block(weight, "q", heads)], [key], PAIR)


def mla(name: str, n: int, nope: int, rope: int, value: int, q_rank: int | None, kv_rank: int) -> AttentionSite:
    ukv, dkv = f"{name}.kv_b_proj.weight", f"{name}.kv_a_proj.weight"
    up = f"{name}.q_b_proj.weight" if q_rank else f"{name}.q_proj.weight"
    query = [block(up, "uq", rows(n, nope, 0, nope + rope)), block(up, "qr", rows(n, rope, nope, nope + rope))]
    if q_rank:
        query.append(block(f"{name}.q_a_proj.weight", "dq", (((0, q_rank),),) * n))
    key = [
        block(ukv, "uk", rows(n, nope, 0, nope + value)),
        block(dkv, "dkv", (((0, kv_rank),),) * n),
        block(dkv, "kr", (((kv_rank, kv_rank + rope),),) * n),
    ]
    dq = (2,) if q_rank else ()
    return site(name, query, key, [((0, *dq), (0, 1)), ((1, *dq), (2,))], kind="mla")


def split_rotary(name: str, n: int, half: int) -> AttentionSite:
    """First halves of all heads, then second halves: each head has two runs of rows."""

    def heads(start: int) -> tuple[Ranges, ...]:
        first, second = rows(n, half, start), rows(n, half, start + n * half)
        return tuple(a + b for a, b in zip(first, second, strict=True))

    weight = f"{name}.qk.weight"
    return site(name, [block(weight, "q", heads(0))], [block(weight, "k", heads(2 * n * half))], PAIR)


IRREGULAR: tuple[Ranges, ...] = (((0, 4),), ((5, 9), (12, 14)), ((16, 24),))

SITES: dict[str, tuple[list[AttentionSite], Shapes]] = {
    "gqa": (
        [gqa(f"layers.{i}.attn", 6, 2, 4) for i in range(3)],
        {f"layers.{i}.attn.{p}_proj.weight": (r, 10) for i in range(3) for p, r in (("q", 24), ("k", 8))},
    ),
    "mqa_with_bias": (
        [gqa("attn", 4, 1, 4, bias=True)],
        {"attn.q_proj.weight": (16, 6), "attn.k_proj.weight": (4, 6), "attn.q_proj.bias": (16,), "attn.k_proj.bias": (4,)},
    ),
    "fused": (
        [fused(f"h.{i}.attn", 3, 4, 0) for i in range(2)],
        {f"h.{i}.attn.c_attn.{p}": s for i in range(2) for p, s in (("weight", (36, 8)), ("bias", (36,)))},
    ),
    "conv1d": (
        [fused(f"h.{i}.attn", 3, 4, 1) for i in range(2)],
        {f"h.{i}.attn.c_attn.{p}": s for i in range(2) for p, s in (("weight", (8, 36)), ("bias", (36,)))},
    ),
    "interleaved": (
        [fused("attn", 3, 4, 0, interleaved=True)],
        {"attn.c_attn.weight": (36, 8), "attn.c_attn.bias": (36,)},
    ),
    "grouped_fused": ([falcon("attn", 2, 3, 4)], {"attn.qkv.weight": (40, 6)}),
    "mla": (
        [mla(f"layers.{i}.attn", 4, 4, 2, 3, 6, 8) for i in (0, 2, 3)],
        {
            f"layers.{i}.attn.{p}.weight": s
            for i in (0, 2, 3)
            for p, s in (("q_a_proj", (6, 10)), ("q_b_proj", (24, 6)), ("kv_a_proj", (10, 10)), ("kv_b_proj", (28, 8)))
        },
    ),
    "mla_without_q_latent": (
        [mla("attn", 4, 4, 2, 3, None, 8)],
        {"attn.q_proj.weight": (24, 10), "attn.kv_a_proj.weight": (10, 10), "attn.kv_b_proj.weight": (28, 8)},
    ),
    "encoder_decoder": (
        [gqa(f"{side}.block.{i}.layer.{n}.{at}", 2, 2, 4, cross=n == 1) for side, n, at in
         (("encoder", 0, "SelfAttention"), ("decoder", 0, "SelfAttention"), ("decoder", 1, "EncDecAttention"))
         for i in range(2)],
        {
            f"{side}.block.{i}.layer.{n}.{at}.{p}_proj.weight": (8, 6)
            for side, n, at in
            (("encoder", 0, "SelfAttention"), ("decoder", 0, "SelfAttention"), ("decoder", 1, "EncDecAttention"))
            for i in range(2)
            for p in "qk"
        },
    ),
    "two_pieces": ([split_rotary("attn", 3, 2)], {"attn.qk.weight": (24, 6)}),
    "irregular": (
        [site("attn", [block("attn.q.weight", "q", IRREGULAR)], [block("attn.k.weight", "k", IRREGULAR)], PAIR)],
        {"attn.q.weight": (25, 6), "attn.k.weight": (24, 6)},
    ),
    "keys_of_the_layer_below": (
        [
            site(
                f"layers.{i}.attn",
                [block(f"layers.{i}.attn.q.weight", "q", rows(4, 4))],
                [block(f"layers.{i - i % 2}.attn.k.weight", "k", rows(2, 4))],
                PAIR,
            )
            for i in range(6)
        ],
        {f"layers.{i}.attn.{p}.weight": (r, 6) for i in range(6) for p, r in (("q", 16), ("k", 8)) if p == "q" or i % 2 == 0},
    ),
    "joint": (
        [
            site(
                "attn",
                [block(f"attn.{p}.weight", "q", rows(2, 4)) for p in ("to_q", "add_q")],
                [block(f"attn.{p}.weight", "k", rows(2, 4)) for p in ("to_k", "add_k")],
                [((0,), (0,)), ((0,), (1,)), ((1,), (0,)), ((1,), (1,))],
            )
        ],
        {f"attn.{p}.weight": (8, 6) for p in ("to_q", "add_q", "to_k", "add_k")},
    ),
    "low_rank_branch": (
        [
            site(
                "attn",
                [
                    block("attn.q.base.weight", "q", rows(2, 4)),
                    block("attn.q.lora_b.weight", "other", rows(2, 4)),
                    block("attn.q.lora_a.weight", "other", (((0, 3),),) * 2),
                ],
                [block("attn.k.weight", "k", rows(2, 4))],
                [((0,), (0,)), ((1, 2), (0,))],
            )
        ],
        {"attn.q.base.weight": (8, 6), "attn.q.lora_b.weight": (8, 3), "attn.q.lora_a.weight": (3, 6), "attn.k.weight": (8, 6)},
    ),
    "shared_query_and_key": (
        [site("attn", [block("attn.qk.weight", "q", rows(3, 4))], [block("attn.qk.weight", "k", rows(3, 4))], PAIR)],
        {"attn.qk.weight": (12, 6)},
    ),
    "called_twice": (
        [gqa("shared.attn", 2, 2, 4, calls=2)],
        {"shared.attn.q_proj.weight": (8, 6), "shared.attn.k_proj.weight": (8, 6)},
    ),
    "tiled_heads": (
        [gqa("attn", 6, 3, 4, head_map=(0, 1, 2, 0, 1, 2))],
        {"attn.q_proj.weight": (24, 6), "attn.k_proj.weight": (12, 6)},
    ),
    "odd_head_map": (
        [gqa("attn", 4, 2, 4, head_map=(0, 1, 1, 0))],
        {"attn.q_proj.weight": (16, 6), "attn.k_proj.weight": (8, 6)},
    ),
    "raw_3d": (
        [
            site(
                "attn",
                [block("attn.wq", "q", rows(3, 1), axis=1)],
                [block("attn.wk", "k", rows(3, 1), axis=0)],
                PAIR,
            )
        ],
        {"attn.wq": (6, 3, 4), "attn.wk": (3, 6, 4)},
    ),
    "names_that_clash": (
        [gqa("at.h.range", 2, 2, 4), gqa("{odd}.x1", 2, 2, 4), gqa("a b.class", 2, 2, 4)],
        {f"{at}.{p}_proj.weight": (8, 6) for at in ("at.h.range", "{odd}.x1", "a b.class") for p in "qk"},
    ),
    "grid_of_names": (
        [gqa(f"down.{i}.attn.{j}.blocks.{k}", 2, 2, 4) for i, n in ((1, 2), (2, 3)) for j in range(2) for k in range(n)],
        {
            f"down.{i}.attn.{j}.blocks.{k}.{p}_proj.weight": (8, 6)
            for i, n in ((1, 2), (2, 3)) for j in range(2) for k in range(n) for p in "qk"
        },
    ),
}  # fmt: skip


def layout_of(name: str) -> tuple[QKLayout, Shapes]:
    sites, shapes = SITES[name]
    # One weight that is nobody's, to see that the rest of a model is trained as ever.
    return QKLayout(tuple(sites)), {**shapes, "rest.weight": (5, 7)}


# ---- tools ----------------------------------------------------------------------------------------------------------

_numbers = count()


def load(source: str, folder: Path) -> ModuleType:
    """Emitted source as a module."""
    path = folder / f"emitted_{next(_numbers)}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


class Bag(nn.Module):
    """Parameters of given names and shapes, and a loss whose gradient is smooth and never small."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            at: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            scale = 1 + torch.rand((), generator=generator, dtype=torch.float64)
            value = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            at.register_parameter(leaf, nn.Parameter(value.to(dtype)))

    def forward(self, x: Tensor) -> Tensor:
        terms = [(p.square() / 2 + (x + i).cos() * p).sum() for i, p in enumerate(self.parameters())]
        return torch.stack(terms).sum()


def batches(n: int, dtype: torch.dtype) -> Iterator[Tensor]:
    for i in range(n):
        yield torch.tensor(0.3 * i, dtype=dtype)


class Reference:
    """AdamW (Loshchilov & Hutter, Alg. 2) with QuacK, in fp64 and as plain as can be."""

    def __init__(
        self, layout: QKLayout, params: Mapping[str, Tensor], tau: float, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:  # fmt: skip
        self.terms = [
            [(b.param, b.axis, tuple(sorted(ranges)), b.bias) for b, ranges in term]
            for s in layout.sites if not s.qk_norm for h in range(s.query_heads) for term in s.head_terms(h)
        ]  # fmt: skip
        self.units = list(dict.fromkeys(unit for term in self.terms for unit in term))
        self.params = {name: p.detach().double().clone() for name, p in params.items()}
        self.m = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.t, self.tau, self.betas, self.eps = 0, tau, betas, eps
        self.first = self.factors()

    def slices(self, unit: Any) -> Iterator[tuple[str, tuple[slice, ...]]]:
        param, axis, ranges, bias = unit
        for a, b in ranges:
            yield param, (slice(None),) * axis + (slice(a, b),)
            if bias:
                yield bias, (slice(a, b),)

    def norm(self, unit: Any) -> float:
        return sum(float(self.params[name][at].square().sum()) for name, at in self.slices(unit)) ** 0.5

    def factors(self) -> dict[Any, float]:
        norms = {unit: self.norm(unit) for unit in self.units}
        result = {unit: float("inf") for unit in self.units}
        for term in self.terms:
            for i, unit in enumerate(term):
                others = prod(norms[other] for j, other in enumerate(term) if j != i)
                result[unit] = min(result[unit], 1 / others)
        return result

    def step(self, grads: Mapping[str, Tensor], lr: float, decay: Mapping[str, float]) -> None:
        scale = {name: torch.ones_like(p) for name, p in self.params.items()}
        for unit, factor in self.factors().items():
            for name, at in self.slices(unit):
                scale[name][at] = self.tau * factor / self.first[unit]
        self.t += 1
        b1, b2 = self.betas
        for name, p in self.params.items():
            g = grads[name].double()
            self.m[name] = b1 * self.m[name] + (1 - b1) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
            change = self.m[name] / (1 - b1**self.t) / ((self.v[name] / (1 - b2**self.t)).sqrt() + self.eps)
            self.params[name] = p - lr * scale[name] * (change + decay[name] * p)


def distance(model: nn.Module, reference: Reference) -> float:
    """Largest relative distance of a parameter, by norms."""
    return max(
        float((p.detach().double() - reference.params[n]).norm() / reference.params[n].norm())
        for n, p in model.named_parameters()
    )


def table_of(module: ModuleType) -> set[tuple[Any, ...]]:
    """Products of the emitted table, in the reference's terms."""

    def unit(b: Any) -> tuple[Any, ...]:
        pieces = getattr(b, "pieces", None) or ((b.start, b.stop),)
        return b.weight.name, getattr(b.weight, "axis", 0), tuple(pieces), getattr(b.weight, "bias", None)

    return {tuple(unit(b) for b in product) for product in module.logit_products()}


def ruff(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emitted")


@pytest.fixture(scope="module")
def emitted(folder: Path) -> dict[str, ModuleType]:
    """Every layout's emitted file, as a module."""
    modules = {}
    for name in SITES:
        layout, shapes = layout_of(name)
        modules[name] = load(emit(layout, shapes, title=name, tau=0.5), folder)
    return modules


# ---- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SITES)
def test_table_has_the_products_of_the_layout(name: str, emitted: dict[str, ModuleType]) -> None:
    layout, shapes = layout_of(name)
    reference = Reference(layout, {n: torch.ones(s) for n, s in shapes.items()}, 1.0)
    assert table_of(emitted[name]) == {tuple(term) for term in reference.terms}


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


# ---- the arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SITES)
def test_eager_update_equals_the_reference(name: str, emitted: dict[str, ModuleType]) -> None:
    layout, shapes = layout_of(name)
    model = Bag(shapes, torch.float64)
    names = dict(model.named_parameters())
    reference = Reference(layout, names, tau=0.5)
    optimizer = emitted[name].QuacKAdamW(model, lr=0.02, weight_decay=0.1, compile=False)
    for x in batches(12, torch.float64):
        model(x).backward()
        reference.step({n: p.grad for n, p in names.items() if p.grad is not None}, 0.02, dict.fromkeys(names, 0.1))
        optimizer.step()
        optimizer.zero_grad()
    assert distance(model, reference) < 1e-13
    scale = optimizer.heads.scale[optimizer.heads.owner < optimizer.heads.blocks]
    assert float((scale / 0.5 - 1).abs().max()) > 1e-2, "the factors have to move for this test to prove anything"


@pytest.fixture(scope="module")
def everything(folder: Path) -> tuple[ModuleType, QKLayout, Shapes]:
    """One model that holds all layouts side by side, so that one compilation proves all of them."""
    sites, shapes = [], {"rest.weight": (5, 7), "rest.bias": (5,)}
    for n, (name, (some, some_shapes)) in enumerate(SITES.items()):
        if name == "names_that_clash":
            continue

        def renamed(b: WeightBlock, at: str = f"{name}_{n}.") -> WeightBlock:
            return replace(b, param=at + b.param, bias=b.bias and at + b.bias)

        sites += [
            replace(s, name=f"{name}.{s.name}", query=tuple(map(renamed, s.query)), key=tuple(map(renamed, s.key)))
            for s in some
        ]
        shapes |= {f"{name}_{n}.{k}": v for k, v in some_shapes.items()}
    layout = QKLayout(tuple(sites))
    return load(emit(layout, shapes, title="everything"), folder), layout, shapes


def schedule(step: int) -> float:
    return min(1.0, (step + 1) / 10) * 0.99**step


@pytest.mark.parametrize("compile", [False, True])
def test_fifty_steps_with_groups_and_schedule(everything: tuple[ModuleType, QKLayout, Shapes], compile: bool) -> None:
    """Two parameter groups, a scheduler, 50 steps in fp32: within 1e-5 of fp64, and compiled only once."""
    module, layout, shapes = everything
    model = Bag(shapes)
    names = dict(model.named_parameters())
    reference = Reference(layout, names, tau=0.7)
    groups = [
        {"params": [p for p in names.values() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in names.values() if p.dim() == 1], "weight_decay": 0.0, "lr": 0.01},
    ]
    optimizer = module.QuacKAdamW(model, lr=0.02, tau=0.7, param_groups=groups, compile=compile)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    decay = {n: 0.1 if p.dim() > 1 else 0.0 for n, p in names.items()}
    double = Bag(shapes, torch.float64)
    torch._dynamo.utils.counters.clear()
    for step, x in enumerate(batches(50, torch.float32)):
        model(x).backward()
        with torch.no_grad():
            for name, p in double.named_parameters():
                p.copy_(reference.params[name])
        double(x.double()).backward()
        grads = {n: p.grad for n, p in double.named_parameters() if p.grad is not None}
        _step_two_rates(reference, grads, decay, schedule(step))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        double.zero_grad()
    assert distance(model, reference) < 1e-5
    if compile:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]


def _step_two_rates(reference: Reference, grads: dict[str, Tensor], decay: dict[str, float], factor: float) -> None:
    """A step in which biases have half the learning rate: twice the same step, each keeping its own parameters."""
    slow = copy.deepcopy(reference)
    reference.step(grads, 0.02 * factor, decay)
    slow.step(grads, 0.01 * factor, decay)
    for name, p in slow.params.items():
        if p.dim() == 1:
            reference.params[name] = p
