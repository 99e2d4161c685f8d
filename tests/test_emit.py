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


def scattered(heads: int, runs: int, width: int, start: int = 0) -> tuple[Ranges, ...]:
    """A few rows of every head in turn, again and again."""
    return tuple(
        tuple(rows(1, width, start + (run * heads + h) * width)[0][0] for run in range(runs)) for h in range(heads)
    )


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


LONG = "a_wrapper.another_wrapper_inside.backbone.transformer_stack.blocks.7.self_attention.the_core_of_it"
IRREGULAR: tuple[Ranges, ...] = (((0, 4),), ((5, 9), (12, 14)), ((16, 24),))

SITES: dict[str, tuple[list[AttentionSite], Shapes]] = {
    "gqa": (
        [gqa(f"layers.{i}.attn", 6, 2, 4) for i in range(3)],
        {f"layers.{i}.attn.{p}_proj.weight": (r, 10) for i in range(3) for p, r in (("q", 24), ("k", 8))},
    ),
    "mqa_with_bias": (
        [gqa("attn", 4, 1, 4, bias=True)],
        {
            **{"attn.q_proj.weight": (16, 6), "attn.q_proj.bias": (16,)},
            **{"attn.k_proj.weight": (4, 6), "attn.k_proj.bias": (4,)},
        },
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
    "row_by_row": (
        [
            site(
                "attn",
                [block("attn.qk.weight", "q", scattered(3, 4, 1))],
                [block("attn.qk.weight", "k", scattered(3, 4, 1, start=12))],
                PAIR,
            )
        ],
        {"attn.qk.weight": (24, 6)},
    ),
    "two_by_two": (
        [
            site(
                "attn",
                [block("attn.q.weight", "q", scattered(3, 6, 2))],
                [block("attn.k.weight", "k", rows(3, 4))],
                PAIR,
            )
        ],
        {"attn.q.weight": (36, 6), "attn.k.weight": (12, 6)},
    ),
    "odd_head_map_of_many": (
        [gqa("attn", 40, 5, 2, head_map=tuple(h * h % 5 for h in range(40)))],
        {"attn.q_proj.weight": (80, 6), "attn.k_proj.weight": (10, 6)},
    ),
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
        {
            **{f"layers.{i}.attn.q.weight": (16, 6) for i in range(6)},
            **{f"layers.{i}.attn.k.weight": (8, 6) for i in range(0, 6, 2)},
        },
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
        {
            **{"attn.q.base.weight": (8, 6), "attn.q.lora_b.weight": (8, 3)},
            **{"attn.q.lora_a.weight": (3, 6), "attn.k.weight": (8, 6)},
        },
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
    "keys_of_two_layers": (
        [
            site(
                f"layers.{i}.attn",
                [block(f"layers.{i}.attn.q.weight", "q", rows(2, 4))],
                [block(f"layers.{min(i, 5)}.attn.k.weight", "k", rows(2, 4))],
                PAIR,
            )
            for i in range(12)
        ],
        {f"layers.{i}.attn.{p}.weight": (8, 6) for i in range(12) for p in "qk" if p == "q" or i < 6},
    ),
    "pairs_without_a_rule": (
        [
            site(
                f"layers.{i}.attn",
                [block(f"layers.{i}.attn.query_projection.weight", "q", rows(2, 4))],
                [block(f"layers.{i * i % 23}.attn.k.weight", "k", rows(2, 4))],
                PAIR,
            )
            for i in range(23)
        ],
        {
            f"layers.{i}.attn.{p}.weight": (8, 6)
            for i in range(23) for p in ("query_projection", "k") if p != "k" or i in {j * j % 23 for j in range(23)}
        },
    ),
    "long_names": (
        [gqa(LONG, 2, 2, 4, bias=True)],
        {f"{LONG}.{p}_proj.{w}": s for p in "qk" for w, s in (("weight", (8, 6)), ("bias", (8,)))},
    ),
    "names_that_clash": (
        [gqa("at.h.range", 2, 2, 4), gqa("{odd}.x1", 2, 2, 4), gqa("a b.class", 2, 2, 4)],
        {f"{at}.{p}_proj.weight": (8, 6) for at in ("at.h.range", "{odd}.x1", "a b.class") for p in "qk"},
    ),
    "grid_of_names": (
        [
            gqa(f"down.{i}.attn.{j}.blocks.{k}", 2, 2, 4)
            for i, n in ((1, 2), (2, 3)) for j in range(2) for k in range(n)
        ],
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
        # A constant slope of either sign, and a wave that is never steep enough to turn it.
        terms = [
            ((1 + i + 3 * torch.arange(p.numel()).view_as(p)).sin().sign() * p + (p + x + i).sin() / 2).sum()
            for i, p in enumerate(self.parameters())
        ]
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
        pieces = getattr(b, "pieces", None) or (range(b.start, b.stop),)
        ranges = tuple(run for p in pieces for run in ([(p.start, p.stop)] if p.step == 1 else [(r, r + 1) for r in p]))
        return b.weight.name, getattr(b.weight, "axis", 0), ranges, getattr(b.weight, "bias", None)

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


TOGETHER = (
    "gqa",
    "conv1d",
    "interleaved",
    "grouped_fused",
    "mla",
    "two_pieces",
    "irregular",
    "joint",
    "shared_query_and_key",
)


@pytest.fixture(scope="module")
def everything(folder: Path) -> tuple[ModuleType, QKLayout, Shapes]:
    """A model with one site of many layouts, so that one compilation proves them all."""
    sites: list[AttentionSite] = []
    shapes: Shapes = {"rest.weight": (5, 7), "rest.bias": (5,)}
    for layout in TOGETHER:
        some, some_shapes = SITES[layout]

        def renamed(b: WeightBlock, at: str = f"{layout}.") -> WeightBlock:
            return replace(b, param=at + b.param, bias=b.bias and at + b.bias)

        one = replace(some[0], query=tuple(map(renamed, some[0].query)), key=tuple(map(renamed, some[0].key)))
        sites.append(one)
        names = {name for _, b in some[0].blocks() for name in (b.param, b.bias) if name}
        shapes |= {f"{layout}.{name}": some_shapes[name] for name in sorted(names)}
    layout_of_all = QKLayout(tuple(sites))
    return load(emit(layout_of_all, shapes, title="everything"), folder), layout_of_all, shapes


def two_groups(module: ModuleType, model: nn.Module, compile: bool) -> Any:
    """The emitted optimizer, with biases in a group of their own."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0, "lr": 0.01},
    ]
    return module.QuacKAdamW(model, lr=0.02, tau=0.7, param_groups=groups, compile=compile)


def schedule(step: int) -> float:
    return min(1.0, (step + 1) / 10) * 0.99**step


@pytest.mark.parametrize("compile", [False, True])
def test_fifty_steps_with_groups_and_schedule(everything: tuple[ModuleType, QKLayout, Shapes], compile: bool) -> None:
    """Two parameter groups, a scheduler, 50 steps in fp32: within 1e-5 of fp64, and compiled only once."""
    module, layout, shapes = everything
    model = Bag(shapes)
    names = dict(model.named_parameters())
    reference = Reference(layout, names, tau=0.7)
    optimizer = two_groups(module, model, compile)
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
    if compile:  # once for all learning rates
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


@pytest.mark.parametrize("compile", [False, True])
def test_resume_is_bitwise(everything: tuple[ModuleType, QKLayout, Shapes], compile: bool, tmp_path: Path) -> None:
    """Save after three steps, load into new objects, go on: the same bits as without the stop."""
    module, _, shapes = everything

    def train(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            model(torch.tensor(0.3 * step)).backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = Bag(shapes)
    optimizer = two_groups(module, straight, compile)
    train(straight, optimizer, range(3))
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(straight, optimizer, range(3, 6))

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = Bag(shapes, seed=1)
    optimizer = two_groups(module, resumed, compile)
    optimizer.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["model"])
    train(resumed, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_state_dict_is_torchs_own_and_ours(emitted: dict[str, ModuleType]) -> None:
    """Plain AdamW goes on from it; a plain one's state is refused, for it has no norms."""
    _, shapes = layout_of("mla")
    model = Bag(shapes)
    optimizer = emitted["mla"].QuacKAdamW(model, compile=False)
    model(torch.tensor(0.1)).backward()
    optimizer.step()
    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    plain.step()
    assert all(float(state["step"]) == 2 for state in plain.state.values())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"not a state_dict\(\) of QuacKAdamW"):
        optimizer.load_state_dict(plain.state_dict())
    assert repr(optimizer.state_dict()) == repr(before)


def test_low_precision_and_frozen_weights(emitted: dict[str, ModuleType]) -> None:
    """bf16 weights keep fp32 norms through a save; a frozen key weight still counts and stays as it is."""
    _, shapes = layout_of("gqa")
    model = Bag(shapes, torch.bfloat16)
    key = dict(model.named_parameters())["layers.0.attn.k_proj.weight"].requires_grad_(False)
    before = key.clone()
    optimizer = emitted["gqa"].QuacKAdamW(model, lr=0.01, compile=False)
    for x in batches(3, torch.bfloat16):
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(key, before)
    saved = optimizer.state_dict()
    assert saved["quack"]["scale"].dtype == torch.float32
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.heads.scale, saved["quack"]["scale"])


def test_closure_and_learning_rate_as_tensor(emitted: dict[str, ModuleType]) -> None:
    """Both ways to give a learning rate, with and without a closure, make the same step."""
    _, shapes = layout_of("fused")
    ends = []
    for lr in (0.02, torch.tensor(0.02)):
        model = Bag(shapes)
        optimizer = emitted["fused"].QuacKAdamW(model, lr=lr, compile=False)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(torch.tensor(0.2))
            loss.backward()
            return loss

        first = optimizer.step(closure)
        scheduler.step()
        assert optimizer.step(closure).item() < first.item()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, rtol=1e-6)


def test_equals_the_hooked_optimizer(everything: tuple[ModuleType, QKLayout, Shapes]) -> None:
    """The emitted file and quack_fx.QuacK on torch's AdamW take the same 50 steps in fp32."""
    QuacK = pytest.importorskip("quack_fx.optim").QuacK
    module, layout, shapes = everything
    ours, hooked = Bag(shapes), Bag(shapes)
    emitted_optimizer = module.QuacKAdamW(ours, lr=0.02, weight_decay=0.1, compile=False)
    optimizer = torch.optim.AdamW(hooked.parameters(), lr=0.02, weight_decay=0.1)
    QuacK(optimizer, hooked, layout)
    for x in batches(50, torch.float32):
        for model, step in ((ours, emitted_optimizer), (hooked, optimizer)):
            model(x).backward()
            step.step()
            step.zero_grad()
    for a, b in zip(ours.parameters(), hooked.parameters(), strict=True):
        assert float((a - b).detach().norm() / b.detach().norm()) < 1e-5


# ---- the compiled step on a real model ------------------------------------------------------------------------------


def example(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def example_mla() -> tuple[nn.Module, QKLayout]:
    """One layer of the example, and its layout by hand."""
    module = example("mla")
    torch.manual_seed(0)
    at = "blocks.0.attn"
    ukv, dkv, uq, dq = (f"{at}.{part}.weight" for part in ("kv_up", "kv_down", "q_up", "q_down"))
    layout = QKLayout((
        site(
            at,
            [
                block(uq, "uq", rows(6, 32, 0, 48)),
                block(uq, "qr", rows(6, 16, 32, 48)),
                block(dq, "dq", (((0, 96),),) * 6),
            ],
            [
                block(ukv, "uk", rows(6, 32, 0, 64)),
                block(dkv, "dkv", (((0, 64),),) * 6),
                block(dkv, "kr", (((64, 80),),) * 6),
            ],
            [((0, 2), (0, 1)), ((1, 2), (2,))],
            kind="mla",
        ),
    ))  # fmt: skip
    return module.MLATransformer(module.MLAConfig(layers=1)), layout


def test_compiled_step_trains_the_example(folder: Path) -> None:
    """With a schedule, the compiled step follows the eager loop, the loss falls, and nothing compiles twice."""
    model, layout = example_mla()
    module = load(convert(model, layout=layout), folder)
    twin = copy.deepcopy(model)
    optimizer = module.QuacKAdamW(model, lr=3e-3)
    eager = module.QuacKAdamW(twin, lr=3e-3, compile=False)
    train_step = module.compile_train_step(model, optimizer)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: (step + 1) / 10) for o in (optimizer, eager)]
    text = torch.arange(2 * 17).view(2, 17) % 7
    losses = []
    torch._dynamo.utils.counters.clear()
    for _ in range(8):
        loss = train_step(text[:, :-1], text[:, 1:])
        assert not loss.requires_grad
        _, expected = twin(text[:, :-1], text[:, 1:])
        expected.backward()
        expected = expected.detach()
        eager.step()
        eager.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        assert float(loss) == pytest.approx(float(expected), rel=1e-4)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("returns", "loss_fn"),
    [
        ("loss", None),
        ("tuple", None),
        ("object", None),
        ("logits", lambda model, x: model(x).square().mean()),
    ],
)
def test_where_the_loss_comes_from(
    returns: str, loss_fn: Any, emitted: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scalar, a tuple with one, an object with `.loss`, or a loss function of the model and the batch."""
    monkeypatch.setattr(torch, "compile", lambda function: function)

    class Output:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    class Model(Bag):
        def forward(self, x: Tensor) -> Any:
            logits = x + sum(p.sum() for p in self.parameters())
            loss = logits.square().mean()
            return {"loss": loss, "tuple": (logits, None, loss), "object": Output(loss), "logits": logits}[returns]

    _, shapes = layout_of("fused")
    model = Model(shapes)
    optimizer = emitted["fused"].QuacKAdamW(model, lr=0.01, compile=False)
    step = emitted["fused"].compile_train_step(model, optimizer, loss_fn)
    x = torch.ones(3)
    first = step(x)
    assert first.dim() == 0 and step(x) < first


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
    assert f"rows (4, 8) of {name} are zero" in zero and "initial values" in zero

    model = Bag(shapes)
    some = [p for n, p in model.named_parameters() if n != name]
    assert "param_groups" in refusal(module, model, param_groups=some)
    for option in ("amsgrad", "maximize", "fused", "differentiable"):
        assert option in refusal(module, model, **{option: True})


def test_wrapped_models_are_recognised(emitted: dict[str, ModuleType]) -> None:
    """Names as torch.compile and DistributedDataParallel change them."""
    _, shapes = layout_of("gqa")
    for wrapped in (torch.compile(Bag(shapes)), _in_module(Bag(shapes)), torch.compile(_in_module(Bag(shapes)))):
        assert len(emitted["gqa"].QuacKAdamW(wrapped, compile=False).heads.weights) == 6


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
        (
            lambda s, w: (QKLayout((s, replace(s, query=(replace(s.query[0], heads=rows(3, 4, 2, 3)),)))), w),
            EmitError,
            "two blocks",
        ),
        (
            lambda s, w: (QKLayout((s, _biased(s))), {**w, "b": (12,)}),
            EmitError,
            "two biases",
        ),
    ],
)  # fmt: skip
def test_layouts_that_cannot_be_emitted(change: Any, error: type[Exception], words: str) -> None:
    one = site("attn", [block("attn.q.weight", "q", rows(3, 4))], [block("attn.k.weight", "k", rows(3, 4))], PAIR)
    layout, shapes = change(one, {"attn.q.weight": (12, 6), "attn.k.weight": (12, 6)})
    with pytest.raises(error) as caught:
        emit(layout, shapes, title="bad")
    assert words in str(caught.value) and "\n" not in str(caught.value)


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
    """Lint and format, for every layout at once."""
    for name in SITES:
        layout, shapes = layout_of(name)
        skipped = (Skipped("enc.3.mixer", "linear-attention", 'no softmax; "gated" \\ and so on ' + "long " * 40),) * 3
        layout = replace(layout, skipped=skipped) if name == "mla" else layout
        (tmp_path / f"{name}.py").write_text(emit(layout, shapes, title=f'{name} of "C:\\x.py" ' * 5))
    options = ("--isolated", "--line-length", "120", "--target-version", "py311")
    ruff("check", *options, "--extend-select", "I,UP,B,E501,W,SIM,RUF", str(tmp_path))
    ruff("format", "--check", *options, str(tmp_path))


@pytest.mark.slow
def test_mypy_finds_nothing(tmp_path: Path) -> None:
    names = ("mla", "conv1d", "two_pieces", "gqa", "irregular")
    for name in names:
        (tmp_path / f"{name}.py").write_text(emit(*layout_of(name), title=name))
    files = [str(tmp_path / f"{name}.py") for name in names]
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
    assert source.count("\n") <= 240
    products = list(load(source, folder).logit_products())
    assert len(products) == 126 * 128
    q, k = products[-1]
    assert (q.weight.name, q.start, q.stop) == ("model.layers.125.self_attn.q_proj.weight", 16256, 16384)
    assert (k.weight.name, k.start, k.stop) == ("model.layers.125.self_attn.k_proj.weight", 896, 1024)


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
        ("shared_query_and_key", ("bias=", ".bias", "axis", "pieces", "longest", "functional.pad")),
        ("gqa", ("bias=", ".bias", "axis", "pieces", "longest", "functional.pad")),
        ("mla", ("bias=", ".bias", "axis=", "pieces")),
        ("fused", ("axis=", "pieces")),
    ],
)
def test_no_dead_code(name: str, absent: tuple[str, ...]) -> None:
    """What a table does not use, the file does not carry."""
    source = emit(*layout_of(name), title="model")
    assert [word for word in absent if word in source] == []
