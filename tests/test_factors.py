"""Factors: Algorithms 1 and 2 to the digit, the one rule by brute force, and layouts that do not fit."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quack_fx.errors import FactorError, LayoutError
from quack_fx.factors import (
    FactorPlan,
    PlanTables,
    Unit,
    check_layout,
    check_norms,
    factors,
    layout_params,
    row_squares,
    unit_norms,
)
from quack_fx.layout import AttentionSite, LogitTerm, Norm, QKLayout, Range, Ranges, WeightBlock

CPU = torch.device("cpu")
TOLERANCE = {"rtol": 1e-12, "atol": 0.0}


def heads(n: int, dim: int, start: int = 0, stride: int | None = None) -> tuple[Ranges, ...]:
    """Ranges of n heads of `dim` rows, every `stride` rows from `start`."""
    step = stride or dim
    return tuple(((start + h * step, start + h * step + dim),) for h in range(n))


def shared(n: int, rows: Range) -> tuple[Ranges, ...]:
    """The same rows for every head."""
    return ((rows,),) * n


def attention(
    name: str,
    query: Iterable[WeightBlock],
    key: Iterable[WeightBlock],
    head_map: Iterable[int],
    terms: Iterable[tuple[tuple[int, ...], tuple[int, ...]]] = (((0,), (0,)),),
    **fields: Any,
) -> AttentionSite:
    query, key, head_map = tuple(query), tuple(key), tuple(head_map)
    return AttentionSite(
        name=name,
        kind="other",
        cross=False,
        calls=1,
        query_heads=len(head_map),
        key_heads=len(key[0].heads),
        head_dim=1,
        head_map=head_map,
        query=query,
        key=key,
        terms=tuple(LogitTerm(q, k) for q, k in terms),
        **fields,
    )


def weights(*shapes: tuple[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """fp64 weights whose rows differ in size, so that no two norms agree by chance."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        * torch.rand(shape[0], generator=generator, dtype=torch.float64).add(0.1).view(-1, *[1] * (len(shape) - 1))
        for name, shape in shapes
    }


def by_unit(layout: QKLayout, params: dict[str, Tensor]) -> dict[str, float]:
    plan = FactorPlan.from_layout(layout)
    return dict(zip(map(str, plan.units), factors(plan, unit_norms(plan, params)).tolist(), strict=True))


def frobenius(*tensors: Tensor) -> float:
    return math.sqrt(sum(float((t * t).sum()) for t in tensors))


def test_algorithm_1() -> None:
    """Multi-head attention, fused q, k, v with biases, several layers: lr factors of Alg. 1."""
    n_layers, n_heads, dim, width = 3, 4, 6, 24
    params = weights(
        *((f"{i}.qkv.weight", (3 * width, width)) for i in range(n_layers)),
        *((f"{i}.qkv.bias", (3 * width,)) for i in range(n_layers)),
    )
    layout = QKLayout(
        tuple(
            attention(
                str(i),
                [WeightBlock(f"{i}.qkv.weight", "q", 0, heads(n_heads, dim), f"{i}.qkv.bias")],
                [WeightBlock(f"{i}.qkv.weight", "k", 0, heads(n_heads, dim, start=width), f"{i}.qkv.bias")],
                range(n_heads),
            )
            for i in range(n_layers)
        )
    )
    expected = {}
    for i in range(n_layers):
        weight, bias = params[f"{i}.qkv.weight"], params[f"{i}.qkv.bias"]
        for h in range(n_heads):
            q, k = slice(h * dim, (h + 1) * dim), slice(width + h * dim, width + (h + 1) * dim)
            expected[f"{i}.qkv.weight[{q.start}:{q.stop}] + {i}.qkv.bias"] = 1 / frobenius(weight[k], bias[k])
            expected[f"{i}.qkv.weight[{k.start}:{k.stop}] + {i}.qkv.bias"] = 1 / frobenius(weight[q], bias[q])
    found = by_unit(layout, params)
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[u], expected[u], rel_tol=1e-12) for u in expected)


def mla(n: int, nope: int, rope: int, q_latent: int, kv_latent: int, v_dim: int) -> AttentionSite:
    """DeepSeek's MLA: [nope | rope] rows per head in q_up, [nope | value] in kv_up, [latent | rope] in kv_down."""
    return attention(
        "attn",
        [
            WeightBlock("q_up", "uq", 0, heads(n, nope, stride=nope + rope)),
            WeightBlock("q_up", "qr", 0, heads(n, rope, start=nope, stride=nope + rope)),
            WeightBlock("q_down", "dq", 0, shared(n, (0, q_latent))),
        ],
        [
            WeightBlock("kv_up", "uk", 0, heads(n, nope, stride=nope + v_dim)),
            WeightBlock("kv_down", "dkv", 0, shared(n, (0, kv_latent))),
            WeightBlock("kv_down", "kr", 0, shared(n, (kv_latent, kv_latent + rope))),
        ],
        range(n),
        terms=[((0, 2), (0, 1)), ((1, 2), (2,))],
    )


@pytest.mark.parametrize("seed", range(5))
def test_algorithm_2(seed: int) -> None:
    """MLA: the six formulas of Alg. 2, with the max taken over heads."""
    n, nope, rope, q_latent, kv_latent, v_dim, width = 5, 6, 4, 10, 8, 7, 16
    params = weights(
        ("q_up", (n * (nope + rope), q_latent)),
        ("q_down", (q_latent, width)),
        ("kv_up", (n * (nope + v_dim), kv_latent)),
        ("kv_down", (kv_latent + rope, width)),
        seed=seed,
    )
    q_up = params["q_up"].view(n, nope + rope, q_latent)
    kv_up = params["kv_up"].view(n, nope + v_dim, kv_latent)
    w_uq, w_qr = [frobenius(q_up[h, :nope]) for h in range(n)], [frobenius(q_up[h, nope:]) for h in range(n)]
    w_uk = [frobenius(kv_up[h, :nope]) for h in range(n)]
    w_dq = frobenius(params["q_down"])
    w_dkv, w_kr = frobenius(params["kv_down"][:kv_latent]), frobenius(params["kv_down"][kv_latent:])
    expected = {
        f"q_down[0:{q_latent}]": min(
            1 / max(w_uq[h] * w_uk[h] * w_dkv for h in range(n)), 1 / max(w_qr[h] * w_kr for h in range(n))
        ),
        f"kv_down[0:{kv_latent}]": 1 / max(w_uq[h] * w_dq * w_uk[h] for h in range(n)),
        f"kv_down[{kv_latent}:{kv_latent + rope}]": 1 / max(w_qr[h] * w_dq for h in range(n)),
    }
    for h in range(n):
        q, k = h * (nope + rope), h * (nope + v_dim)
        expected[f"q_up[{q}:{q + nope}]"] = 1 / (w_dq * w_uk[h] * w_dkv)
        expected[f"q_up[{q + nope}:{q + nope + rope}]"] = 1 / (w_dq * w_kr)
        expected[f"kv_up[{k}:{k + nope}]"] = 1 / (w_uq[h] * w_dq * w_dkv)
    found = by_unit(QKLayout((mla(n, nope, rope, q_latent, kv_latent, v_dim),)), params)
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[u], expected[u], rel_tol=1e-12) for u in expected)


def brute_force(layout: QKLayout, params: dict[str, Tensor]) -> dict[str, float]:
    """The one rule, read off its definition: every term of every head, every block in it, one at a time."""

    def norm(block: WeightBlock, ranges: Ranges) -> float:
        rows = sorted({r for start, stop in ranges for r in range(start, stop)})
        parts = [params[block.param].movedim(block.axis, 0)[rows]]
        return frobenius(*parts, *([params[block.bias][rows]] if block.bias else []))

    smallest: dict[str, float] = {}
    for site in layout.sites:
        for head in range(site.query_heads):
            for term in site.head_terms(head):
                for i, (block, ranges) in enumerate(term):
                    others = math.prod(norm(*other) for j, other in enumerate(term) if j != i)
                    unit = str(Unit.of(block, ranges))
                    smallest[unit] = min(smallest.get(unit, math.inf), 1 / others)
    return smallest


GROUPED = attention(
    "grouped",
    [WeightBlock("q", "q", 0, heads(6, 4), "q_bias")],
    [WeightBlock("k", "k", 0, heads(2, 4))],
    [0, 0, 0, 1, 1, 1],
)
SHARED_QK = attention(
    "shared", [WeightBlock("qk", "q", 0, heads(3, 4))], [WeightBlock("qk", "k", 0, heads(3, 4))], range(3)
)
TRANSPOSED = attention(  # GPT-2's Conv1D: features along axis 1, q | k | v
    "transposed",
    [WeightBlock("c_attn", "q", 1, heads(3, 4), "c_bias")],
    [WeightBlock("c_attn", "k", 1, heads(3, 4, start=12), "c_bias")],
    range(3),
)
CUBE = attention("cube", [WeightBlock("q3", "q", 1, heads(4, 1))], [WeightBlock("k3", "k", 0, heads(4, 1))], range(4))
SHARED_LAYER = (
    dataclasses.replace(GROUPED, name="layer", calls=3),
    dataclasses.replace(GROUPED, name="the same weights under another site"),
)
CROSS_LAYER = (  # two layers with their own queries read one layer's keys
    attention("one", [WeightBlock("q", "q", 0, heads(6, 4))], [WeightBlock("k", "k", 0, heads(6, 4))], range(6)),
    attention("two", [WeightBlock("qk", "q", 0, heads(6, 4))], [WeightBlock("k", "k", 0, heads(6, 4))], range(6)),
)
JOINT = attention(  # image and text projections side by side: all four products are in the logits
    "joint",
    [WeightBlock("q", "q", 0, heads(6, 4)), WeightBlock("qk", "q", 0, heads(6, 4))],
    [WeightBlock("k", "k", 0, heads(6, 4)), WeightBlock("k_text", "k", 0, heads(6, 4))],
    range(6),
    terms=[((i,), (j,)) for i in range(2) for j in range(2)],
)
LORA = attention(  # (W + B A) on both sides: four products
    "lora",
    [
        WeightBlock("q", "q", 0, heads(6, 4)),
        WeightBlock("q_b", "other", 0, heads(6, 4)),
        WeightBlock("q_a", "other", 0, shared(6, (0, 2))),
    ],
    [
        WeightBlock("k", "k", 0, heads(6, 4)),
        WeightBlock("k_b", "other", 0, heads(6, 4)),
        WeightBlock("k_a", "other", 0, shared(6, (0, 2))),
    ],
    range(6),
    terms=[(q, k) for q in ((0,), (1, 2)) for k in ((0,), (1, 2))],
)
SPLIT_HEADS = attention(  # rotate-half pairs: a head's rows in two places, and a head that one side does not have
    "split",
    [WeightBlock("q", "q", 0, (*(((h * 2, h * 2 + 2), (12 + h * 2, 14 + h * 2)) for h in range(5)), ()))],
    [WeightBlock("k", "k", 0, tuple(((12 + h * 2, 14 + h * 2), (h * 2, h * 2 + 2)) for h in range(6)))],
    range(6),
)
PARAMS = weights(
    *((name, (24, 16)) for name in ("q", "k", "qk", "k_text")),
    *((name, (24, 2)) for name in ("q_b", "k_b")),
    *((name, (2, 16)) for name in ("q_a", "k_a")),
    *((name, (24,)) for name in ("q_bias", "k_bias")),
    ("c_attn", (12, 36)),
    ("c_bias", (36,)),
    ("q3", (12, 4, 3)),
    ("k3", (4, 12, 3)),
)
LAYOUTS = {
    "grouped queries": (GROUPED,),
    "shared Q=K": (SHARED_QK,),
    "transposed weight": (TRANSPOSED,),
    "3-d weights": (CUBE,),
    "shared layer": SHARED_LAYER,
    "keys of another layer": CROSS_LAYER,
    "joint attention": (JOINT,),
    "low-rank branches": (LORA,),
    "heads in two places": (SPLIT_HEADS,),
    "MLA": (mla(2, 6, 6, 16, 2, 6),),
    "all together": (GROUPED, SHARED_QK, TRANSPOSED, CUBE, *CROSS_LAYER, JOINT, LORA, SPLIT_HEADS),
}
PARAMS |= weights(("q_up", (24, 16)), ("q_down", (16, 16)), ("kv_up", (24, 2)), ("kv_down", (8, 16)), seed=1)


@pytest.mark.parametrize("sites", LAYOUTS.values(), ids=LAYOUTS)
def test_one_rule_by_brute_force(sites: tuple[AttentionSite, ...]) -> None:
    layout = QKLayout(sites)
    found, expected = by_unit(layout, PARAMS), brute_force(layout, PARAMS)
    assert found.keys() == expected.keys()
    assert all(math.isclose(found[u], expected[u], rel_tol=1e-12) for u in expected)


def test_equal_units_are_one() -> None:
    assert len(FactorPlan.from_layout(QKLayout((GROUPED,))).units) == 6 + 2
    assert FactorPlan.from_layout(QKLayout(SHARED_LAYER)) == FactorPlan.from_layout(QKLayout((GROUPED,)))
    shared_qk = FactorPlan.from_layout(QKLayout((SHARED_QK,)))
    assert shared_qk.terms == ((0, 0), (1, 1), (2, 2))
    one, two = WeightBlock("q", "q", 0, (((0, 2), (2, 4)),)), WeightBlock("q", "q", 0, (((2, 4), (0, 2)),))
    assert Unit.of(one, one.heads[0]) == Unit.of(two, two.heads[0]) == Unit("q", 0, ((0, 4),), None)


@st.composite
def random_layouts(draw: st.DrawFn) -> QKLayout:
    """Sites with chains of 1 to 3 blocks a side over four parameters, heads anywhere, also overlapping."""
    sites = []
    for number in range(draw(st.integers(1, 3))):
        n_query, n_key = draw(st.integers(1, 4)), draw(st.integers(1, 3))

        def block(n: int) -> WeightBlock:
            starts = draw(st.lists(st.integers(0, 20), min_size=n, max_size=n))
            bias = draw(st.sampled_from([None, "q_bias", "k_bias"]))
            dim = draw(st.integers(1, 4))
            return WeightBlock(
                draw(st.sampled_from(["q", "k", "qk"])), "other", 0, tuple(((s, s + dim),) for s in starts), bias
            )

        query, key = ([block(n) for _ in range(draw(st.integers(1, 3)))] for n in (n_query, n_key))
        indices = st.lists(st.integers(0, 2), min_size=1, max_size=3)
        terms = [
            (tuple(i % len(query) for i in draw(indices)), tuple(i % len(key) for i in draw(indices)))
            for _ in range(draw(st.integers(1, 3)))
        ]
        head_map = draw(st.lists(st.integers(0, n_key - 1), min_size=n_query, max_size=n_query))
        sites.append(attention(str(number), query, key, head_map, terms))
    return QKLayout(tuple(sites))


@given(random_layouts())
@settings(max_examples=60, deadline=None)
def test_one_rule_on_random_layouts(layout: QKLayout) -> None:
    plan = FactorPlan.from_layout(layout)
    found = factors(plan, unit_norms(plan, PARAMS)).tolist()

    def norm(unit: Unit) -> float:
        return frobenius(*(PARAMS[name][list(unit.rows())] for name, _ in unit.parts()))

    expected = [math.inf] * len(plan.units)
    for site in layout.sites:
        for head in range(site.query_heads):
            for term in site.head_terms(head):
                units = [plan.units.index(Unit.of(block, ranges)) for block, ranges in term]
                for i, unit in enumerate(units):
                    others = math.prod(norm(plan.units[u]) for j, u in enumerate(units) if j != i)
                    expected[unit] = min(expected[unit], 1 / others)
    assert all(math.isclose(f, e, rel_tol=1e-12) for f, e in zip(found, expected, strict=True))

    scales = torch.rand(len(plan.units), dtype=torch.float64)
    spread = PlanTables.of(plan).spread(scales)
    for strip in PlanTables.of(plan).strips:
        for row in range(strip.start, strip.stop):
            owners = [i for i, u in enumerate(plan.units) if strip.name in dict(u.parts()) and row in u.rows()]
            wanted = min((float(scales[i]) for i in owners), default=1.0)
            assert spread[strip.offset + row - strip.start] == wanted


@pytest.mark.parametrize("sites", LAYOUTS.values(), ids=LAYOUTS)
def test_spectral_norm(sites: tuple[AttentionSite, ...]) -> None:
    plan = FactorPlan.from_layout(QKLayout(sites))
    expected = []
    for unit in plan.units:
        parts = [
            PARAMS[name].movedim(axis, 0)[list(unit.rows())].flatten(1)
            if name != unit.bias
            else PARAMS[name][list(unit.rows())][:, None]
            for name, axis in unit.parts()
        ]
        expected.append(torch.linalg.svdvals(torch.cat(parts, 1))[0])
    torch.testing.assert_close(unit_norms(plan, PARAMS, "spectral"), torch.stack(expected), **TOLERANCE)
    assert (unit_norms(plan, PARAMS, "spectral") <= unit_norms(plan, PARAMS) * (1 + 1e-12)).all()


def test_low_precision_weights_are_summed_in_float32() -> None:
    plan = FactorPlan.from_layout(QKLayout((GROUPED,)))
    params = {name: p.bfloat16() for name, p in PARAMS.items()}
    for norm in ("frobenius", "spectral"):
        found = unit_norms(plan, params, norm)
        assert found.dtype == torch.float32
        exact = unit_norms(plan, {name: p.double() for name, p in params.items()}, norm)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0.0)


def test_bit_for_bit_and_compiled() -> None:
    """The same weights give the same bits every time, and the rule goes into a compiled step whole."""
    plan = FactorPlan.from_layout(QKLayout(LAYOUTS["all together"]))
    params = {name: p.float() for name, p in PARAMS.items()}
    once = factors(plan, unit_norms(plan, params))
    assert all(torch.equal(once, factors(plan, unit_norms(plan, params))) for _ in range(3))
    compiled = torch.compile(lambda p: factors(plan, unit_norms(plan, p)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params), once)


def test_left_out_and_empty() -> None:
    normed = dataclasses.replace(GROUPED, name="normed", qk_norm=(Norm("query", "rms", 4),))
    assert FactorPlan.from_layout(QKLayout((normed,))) == FactorPlan((), (), ("normed",))
    plan = FactorPlan.from_layout(QKLayout())
    assert unit_norms(plan, {}).shape == factors(plan, torch.empty(0)).shape == (0,)
    both = FactorPlan.from_layout(QKLayout((normed, SHARED_QK)))
    assert both.left_out == ("normed",) and {u.param for u in both.units} == {"qk"}


def test_row_squares_read_only_what_is_needed() -> None:
    """Values beside the queries and keys may be anything, even not a number."""
    plan = FactorPlan.from_layout(QKLayout((TRANSPOSED,)))
    params = {name: p.clone() for name, p in PARAMS.items()}
    params["c_attn"][:, 24:] = math.nan
    strips = PlanTables.of(plan).strips
    assert row_squares(strips, params, torch.float64).isfinite().all()
    torch.testing.assert_close(unit_norms(plan, params), unit_norms(plan, PARAMS), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0"), (math.inf, "inf"), (math.nan, "nan")])
def test_norms_that_cannot_be_divided_by(value: float, shown: str) -> None:
    layout = QKLayout((SHARED_QK, GROUPED))
    plan = FactorPlan.from_layout(layout)
    params = {name: p.clone() for name, p in PARAMS.items()}
    check_norms(layout, plan, unit_norms(plan, params))
    params["k"][4:8] = value
    with pytest.raises(FactorError) as error:
        check_norms(layout, plan, unit_norms(plan, params))
    message = str(error.value)
    assert f"site 'grouped', k head 1: rows k[4:8] have norm {shown}" in message and "\n" not in message


def test_unknown_norm() -> None:
    with pytest.raises(FactorError, match="norm 'nuclear' is not one of frobenius, spectral"):
        unit_norms(FactorPlan.from_layout(QKLayout()), {}, "nuclear")  # type: ignore[arg-type]


def test_one_axis_a_parameter() -> None:
    other = attention(
        "other", [WeightBlock("q", "q", 1, heads(2, 4))], [WeightBlock("k", "k", 0, heads(2, 4))], range(2)
    )
    with pytest.raises(LayoutError, match="of 'q' along axis 0 and along axis 1"):
        FactorPlan.from_layout(QKLayout((GROUPED, other)))


class Attention(nn.Module):
    """Parameters that fit `MODEL_LAYOUT`."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 12)
        self.k = nn.Linear(8, 12, bias=False)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) @ self.k(x).mT


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(x)
        return out


Q, K = (
    WeightBlock("attn.q.weight", "q", 0, heads(3, 4), "attn.q.bias"),
    WeightBlock("attn.k.weight", "k", 0, heads(3, 4)),
)
MODEL_LAYOUT = QKLayout((attention("attn", [Q], [K], range(3)),))


def renamed(layout: QKLayout, rename: Callable[[str], str]) -> QKLayout:
    def block(b: WeightBlock) -> WeightBlock:
        return dataclasses.replace(b, param=rename(b.param), bias=b.bias and rename(b.bias))

    return QKLayout(
        tuple(
            dataclasses.replace(s, query=tuple(map(block, s.query)), key=tuple(map(block, s.key))) for s in layout.sites
        )
    )


def test_wrapped_models_are_seen_through() -> None:
    model = Model()
    wanted = {name: id(p) for name, p in model.named_parameters()}
    partly = Model()
    partly.attn = torch.compile(model.attn, backend="eager")  # type: ignore[assignment]
    parallel = nn.Module()
    parallel.module = torch.compile(
        model, backend="eager"
    )  # the names that DistributedDataParallel(torch.compile(model)) has
    for wrapped in (model, parallel.module, partly, parallel):
        found = layout_params(MODEL_LAYOUT, wrapped)
        assert {name: id(p) for name, p in found.items()} == {name: wanted[name] for name in found}
        names = {id(p): name for name, p in wrapped.named_parameters()}
        theirs = renamed(MODEL_LAYOUT, lambda name, names=names: names[wanted[name]])  # type: ignore[misc]
        assert sorted(map(id, layout_params(theirs, model).values())) == sorted(map(id, found.values()))


def replaced(**fields: Any) -> QKLayout:
    return QKLayout((attention("attn", [dataclasses.replace(Q, **fields)], [K], range(3)),))


UNFIT = {
    "missing parameter": (replaced(param="attn.query.weight"), "'attn.query.weight', which is no parameter.*closest"),
    "missing bias": (replaced(bias="attn.q.offset"), "'attn.q.offset', which is no parameter"),
    "axis too high": (replaced(axis=2), r"axis 2 of 'attn.q.weight', whose shape is \(12, 8\)"),
    "rows past the end": (replaced(heads=heads(3, 5)), r"rows \[10, 15\] along axis 0 of 'attn.q.weight'"),
    "rows along the other axis": (replaced(axis=1, bias=None), r"rows \[8, 12\] along axis 1 of 'attn.q.weight'"),
    "empty range": (replaced(heads=(((4, 4),), *heads(2, 4))), r"rows \[4, 4\]"),
    "bias of too few rows": (replaced(bias="attn.scale"), r"bias 'attn.scale' of shape \(3,\); need 12"),
}


@pytest.mark.parametrize(("layout", "message"), UNFIT.values(), ids=UNFIT)
def test_layouts_that_do_not_fit(layout: QKLayout, message: str) -> None:
    with pytest.raises(LayoutError, match=message) as error:
        check_layout(layout, Model())
    assert "\n" not in str(error.value) and "site 'attn'" in str(error.value)


def test_ties_that_the_layout_does_not_know() -> None:
    model = Model()
    model.attn.k.weight = model.attn.q.weight
    with pytest.raises(LayoutError, match=r"'attn.q.weight' and 'attn.k.weight', which are one tied tensor"):
        check_layout(MODEL_LAYOUT, model)


def test_fsdp1_is_refused() -> None:
    flattened = nn.Module()
    flattened.register_parameter("_flat_param", nn.Parameter(torch.randn(100)))
    with pytest.raises(LayoutError, match=r"FSDP1.*fully_shard"):
        check_layout(MODEL_LAYOUT, flattened)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # of torch 2.11
def test_thousands_of_heads_cost_little_python() -> None:
    """Norms and factors of 16,000 units take as many tensor operations as there are parameters, not heads."""
    n_layers, n_heads = 20, 400
    sites = tuple(
        attention(
            str(i),
            [WeightBlock(f"{i}.q", "q", 0, heads(n_heads, 2))],
            [WeightBlock(f"{i}.k", "k", 0, heads(n_heads, 2))],
            range(n_heads),
        )
        for i in range(n_layers)
    )
    plan = FactorPlan.from_layout(QKLayout(sites))
    params = weights(*((f"{i}.{side}", (2 * n_heads, 3)) for i in range(n_layers) for side in "qk"))
    unit_norms(plan, params)  # makes the tables
    with torch.profiler.profile() as profile:
        factor = factors(plan, unit_norms(plan, params))
    operations = sum(e.count for e in profile.key_averages() if e.key.startswith("aten::"))
    assert operations < 15 * len(params) + 50
    sample = random.Random(0).sample(range(len(plan.units)), 20)
    for i in sample:
        term = next(t for t in plan.terms if i in t)
        other = plan.units[term[0] if term[1] == i else term[1]]
        assert math.isclose(factor[i], 1 / frobenius(params[other.param][list(other.rows())]), rel_tol=1e-12)
