"""The training step written down for a model: the rule's scales, fp64's steps, and text as a person would leave it."""

from __future__ import annotations

import ast
import copy
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import by_hand
import emit_cases
import pytest
import rule
import tiny_models
import torch
from emit_cases import PAIR, Bag, Shapes, batches, block, gqa, layout_of, mla, rows, site
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import quack_fx
from quack_fx import QuacK
from quack_fx.errors import FactorError, LayoutError
from quack_fx.layout import AttentionSite, Norm, QKLayout, Ranges
from quack_fx.train.program.rows import index_of
from quack_fx.train.program.scaling import NormName, execute, scaling_of
from quack_fx.train.program.source import OPTIMIZERS, write_program
from quack_fx.train.program.text import Tables
from quack_fx.train.program.write import StandIn

ROOT = Path(__file__).parent.parent
Case = Callable[[], tuple[nn.Module, QKLayout]]


def hand(name: str) -> Case:
    def make() -> tuple[nn.Module, QKLayout]:
        model, _, made = by_hand.CASES[name]()
        return model, QKLayout((made,))

    return make


def tiny(name: str) -> Case:
    def make() -> tuple[nn.Module, QKLayout]:
        case = tiny_models.CASES[name]()
        return case.model, case.layout

    return make


def written(name: str) -> Case:
    def make() -> tuple[nn.Module, QKLayout]:
        layout, shapes = layout_of(name)
        return Bag(shapes), layout

    return make


CASES: dict[str, Case] = {f"hand-{name}": hand(name) for name in by_hand.CASES}
CASES |= {f"tiny-{name}": tiny(name) for name in tiny_models.CASES}
CASES |= {f"written-{name}": written(name) for name in emit_cases.SITES}


def shapes_of(model: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def shuffle(model: nn.Module, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64))


# ---- the rule --------------------------------------------------------------------------------------------------------


def assert_scales(model: nn.Module, layout: QKLayout, quack: Any, expected: Mapping[str, Mapping[int, float]]) -> None:
    """The scales of a program are those, and 1 for all other rows of the weights with heads."""
    params = dict(model.named_parameters(remove_duplicate=False))
    scales = quack.scales()
    names = {weight: name for name, weight in params.items()}
    assert scales.keys() >= {params[name] for name in expected}
    for weight, found in scales.items():
        name = names[weight]
        wanted = torch.ones(found.numel(), dtype=torch.float64)
        for row, scale in expected.get(name, {}).items():
            wanted[row] = scale
        torch.testing.assert_close(found.flatten(), wanted, rtol=1e-10, atol=0)
        axes = {b.param: b.axis for s in layout.sites for _, b in s.blocks()}
        assert found.shape == tuple(n if d == axes.get(name, 0) else 1 for d, n in enumerate(weight.shape))


def follow_the_rule(model: nn.Module, layout: QKLayout, norm: NormName = "frobenius") -> None:
    """Train a model at random, and compare the scales of its program with the rule's."""
    model = model.double()
    shuffle(model, 0)
    first, quack = weights_of(model), scaling_of(model, layout, 0.7, norm)
    shuffle(model, 1, 0.5)
    expected = rule.scales(layout, first, weights_of(model), 0.7, getattr(rule, norm))
    assert_scales(model, layout, quack, expected)


@pytest.fixture(params=[False, True], ids=["small", "large"])
def as_large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether programs are written as for large weights, whose norms are taken one by one and without values."""
    if request.param:
        monkeypatch.setattr("quack_fx.train.program.source._most_small", lambda: 0)
    return bool(request.param)


@pytest.mark.parametrize("name", CASES)
def test_scales_are_those_of_the_rule(name: str, as_large: bool) -> None:
    model, layout = CASES[name]()
    follow_the_rule(model, layout)
    if name in ("written-fused", "written-conv1d"):  # queries, keys, then values
        assert ("ends={" in write_program(layout, shapes_of(model), "")) == as_large


SPECTRAL = ("tiny-our_mla", "written-mqa_with_bias", "written-conv1d", "written-raw_3d", "written-overlapping_heads")


@pytest.mark.parametrize("name", SPECTRAL)
def test_scales_by_the_spectral_norm(name: str) -> None:
    follow_the_rule(*CASES[name](), "spectral")


SEARCH = [phase for phase in Phase if phase is not Phase.shrink]
"""A layout as it was drawn is as good to look at as a small one, which takes minutes to find."""


@st.composite
def layouts(draw: st.DrawFn) -> tuple[QKLayout, Shapes]:
    """Layers of sites with chains of one to three blocks a side: heads anywhere, in pieces, overlapping, shared."""
    axes = {name: draw(st.integers(0, 1)) for name in ("q", "k", "qk")}
    shared = draw(st.sets(st.sampled_from(["q", "k", "qk", "q_bias", "k_bias"])))
    layers = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True))

    def heads(n: int) -> tuple[Ranges, ...]:
        width = draw(st.integers(1, 4))
        if draw(st.booleans()):
            return rows(n, width, draw(st.integers(0, 3)), draw(st.integers(0, 5)))
        each = st.sets(st.integers(0, 23), min_size=1, max_size=width)
        return tuple(tuple((r, r + 1) for r in sorted(draw(each))) for _ in range(n))

    def blocks(n: int) -> list[tuple[str, tuple[Ranges, ...], str | None]]:
        names, biases = st.sampled_from(["q", "k", "qk"]), st.sampled_from([None, "q_bias", "k_bias"])
        return [(draw(names), heads(n), draw(biases)) for _ in range(draw(st.integers(1, 3)))]

    sites = []
    for number in range(draw(st.integers(1, 2))):
        n_query, n_key = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        query, key = blocks(n_query), blocks(n_key)
        places = [st.lists(st.integers(0, len(side) - 1), min_size=1, max_size=3) for side in (query, key)]
        count = draw(st.integers(1, 3))
        terms = [tuple(tuple(draw(place)) for place in places) for _ in range(count)]
        head_map = tuple(draw(st.lists(st.integers(0, n_key - 1), min_size=n_query, max_size=n_query)))
        for layer in layers:

            def named(name: str, layer: int = layer) -> str:
                return name if name in shared else f"{layer}.{name}"

            sides = [
                [block(named(name), "other", own, axes[name], bias and named(bias)) for name, own, bias in side]
                for side in (query, key)
            ]
            sites.append(site(f"{layer}.{number}", *sides, terms, head_map=head_map))  # type: ignore[arg-type]
    shapes = {name: (24, 24) if name.endswith(("q", "k")) else (24,) for name in _names(sites)}
    return QKLayout(tuple(sites)), shapes


def _names(sites: list[AttentionSite]) -> list[str]:
    return sorted({name for one in sites for _, b in one.blocks() for name in (b.param, b.bias) if name})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=SEARCH)
@given(layouts())
def test_scales_of_random_layouts(case: tuple[QKLayout, Shapes]) -> None:
    layout, shapes = case
    follow_the_rule(Bag(shapes), layout)


def norm_of(*tensors: Tensor) -> float:
    return math.sqrt(sum(float((t * t).sum()) for t in tensors))


def test_algorithm_1() -> None:
    """Multi-head attention, fused q, k, v with biases, several layers."""
    layers, heads, width = 2, 3, 4
    layout, shapes = layout_of("fused")
    model = Bag(shapes, torch.float64)
    w = weights_of(model)
    (found,) = scaling_of(model, layout, 1.0, "frobenius").factors()
    assert found._fields == ("q", "k") and found.q.shape == (layers, heads)
    for i in range(layers):
        weight, bias = (w[f"h.{i}.attn.c_attn.{part}"] for part in ("weight", "bias"))
        for h in range(heads):
            q, k = (slice(start + h * width, start + (h + 1) * width) for start in (0, heads * width))
            assert float(found.q[i, h]) == pytest.approx(1 / norm_of(weight[k], bias[k]), rel=1e-12)
            assert float(found.k[i, h]) == pytest.approx(1 / norm_of(weight[q], bias[q]), rel=1e-12)


def test_algorithm_1_with_grouped_queries() -> None:
    """A key head takes the smallest over the query heads that read it."""
    layout, shapes = layout_of("gqa")
    model = Bag(shapes, torch.float64)
    w = weights_of(model)
    (found,) = scaling_of(model, layout, 1.0, "frobenius").factors()
    for i in range(3):
        q = [norm_of(w[f"layers.{i}.attn.q_proj.weight"][4 * h : 4 * h + 4]) for h in range(6)]
        k = [norm_of(w[f"layers.{i}.attn.k_proj.weight"][4 * h : 4 * h + 4]) for h in range(2)]
        assert found.q[i].tolist() == pytest.approx([1 / k[h // 3] for h in range(6)], rel=1e-12)
        assert found.k[i].tolist() == pytest.approx([1 / max(q[:3]), 1 / max(q[3:])], rel=1e-12)


def test_algorithm_1_with_keys_of_another_layer() -> None:
    """A key that two layers read takes the smallest over the queries of both."""
    layout, shapes = layout_of("keys_of_the_layer_below")
    model = Bag(shapes, torch.float64)
    w = weights_of(model)
    quack = scaling_of(model, layout, 1.0, "frobenius")
    for i in (0, 2, 4):
        for h in range(2):
            q = [
                norm_of(w[f"layers.{layer}.attn.q.weight"][4 * r : 4 * r + 4])
                for layer in (i, i + 1)
                for r in (2 * h, 2 * h + 1)
            ]
            kind, own = quack.home[dict(model.named_parameters())[f"layers.{i}.attn.k.weight"]]
            factors = quack.factors()[kind]
            assert float(factors.k[own, h]) == pytest.approx(1 / max(q), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_algorithm_2(seed: int) -> None:
    """MLA: the six formulas, with the max taken over heads."""
    n, nope, rope, value, q_latent, kv_latent, width = 5, 6, 4, 7, 10, 8, 16
    layout = QKLayout((mla("attn", n, nope, rope, value, q_latent, kv_latent),))
    shapes = {
        "attn.q_a_proj.weight": (q_latent, width),
        "attn.q_b_proj.weight": (n * (nope + rope), q_latent),
        "attn.kv_a_proj.weight": (kv_latent + rope, width),
        "attn.kv_b_proj.weight": (n * (nope + value), kv_latent),
    }
    model = Bag(shapes, torch.float64, seed)
    q_down, q_up, kv_down, kv_up = weights_of(model).values()
    q_up, kv_up = q_up.unflatten(0, (n, -1)), kv_up.unflatten(0, (n, -1))
    uq, qr = ([norm_of(own[h]) for h in range(n)] for own in (q_up[:, :nope], q_up[:, nope:]))
    uk = [norm_of(kv_up[h, :nope]) for h in range(n)]
    dq, dkv, kr = norm_of(q_down), norm_of(kv_down[:kv_latent]), norm_of(kv_down[kv_latent:])
    expected = {
        "dq": [min(1 / max(uq[h] * uk[h] * dkv for h in range(n)), 1 / max(qr[h] * kr for h in range(n)))],
        "dkv": [1 / max(uq[h] * dq * uk[h] for h in range(n))],
        "kr": [1 / max(qr[h] * dq for h in range(n))],
        "uq": [1 / (dq * uk[h] * dkv) for h in range(n)],
        "qr": [1 / (dq * kr)] * n,
        "uk": [1 / (uq[h] * dq * dkv) for h in range(n)],
    }
    (found,) = scaling_of(model, layout, 1.0, "frobenius").factors()
    assert set(found._fields) == expected.keys()
    for name, values in expected.items():
        assert getattr(found, name)[0].tolist() == pytest.approx(values, rel=1e-12)


def test_a_layer_that_is_called_again_is_one() -> None:
    """Its weights have one factor each, however often and from wherever they are used."""
    one, shapes = emit_cases.SITES["called_twice"]
    again = replace(one[0], name="another call", calls=1)
    text = write_program(QKLayout(tuple(one)), shapes, "x")
    assert write_program(QKLayout((*one, again)), shapes, "x") == text


def test_values_beside_queries_and_keys_may_be_anything() -> None:
    layout, shapes = layout_of("conv1d")
    model = Bag(shapes)
    with torch.no_grad():
        for i in range(2):
            model.get_parameter(f"h.{i}.attn.c_attn.weight")[:, 24:] = math.nan
    quack = scaling_of(model, layout, 1.0, "frobenius")
    assert all(scale.isfinite().all() for scale in quack.scales().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_low_precision_weights_have_exact_scales(dtype: torch.dtype, norm: NormName) -> None:
    """Numbers that overflow in half precision, and products of four norms that do so in single."""
    layout, shapes = layout_of("mla")
    model = Bag(shapes)
    large = {torch.bfloat16: 1e11, torch.float16: 1e3, torch.float32: 1e11}[dtype]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(large)
    model = model.to(dtype)
    first, quack = weights_of(model), scaling_of(model, layout, 1.0, norm)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.linspace(0.5, 1, len(p)).unsqueeze(-1))
    expected = rule.scales(layout, first, weights_of(model), 1.0, getattr(rule, norm))
    for name, own in expected.items():
        found = quack.scales()[model.get_parameter(name)].flatten()
        assert found.dtype == torch.float32
        assert all(float(found[row]) == pytest.approx(scale, rel=1e-5) for row, scale in own.items())


def test_thousands_of_heads_cost_few_operations() -> None:
    """The scales of 16,000 heads take some tensor operations for each of 40 weights, and none for each head."""
    layers, heads = 20, 400
    sites = tuple(gqa(f"{i}", heads, heads, 2) for i in range(layers))
    shapes = {f"{i}.{p}_proj.weight": (2 * heads, 3) for i in range(layers) for p in "qk"}
    quack = scaling_of(Bag(shapes), QKLayout(sites), 1.0, "frobenius")
    with torch.profiler.profile() as profile:
        quack.scales()
    operations = sum(e.count for e in profile.key_averages() if e.key.startswith("aten::"))
    assert operations < 20 * len(shapes) + 100


# ---- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", emit_cases.SITES)
def test_adamw_takes_the_steps_of_fp64(name: str) -> None:
    """Twelve steps beside the reference, to fp64's last digits; biases at half the rate, without decay."""
    layout, shapes = layout_of(name)
    model = Bag(shapes, torch.float64)
    names = dict(model.named_parameters())
    reference = rule.AdamW(layout, names, tau=0.5)
    lr = {n: 0.02 if p.dim() > 1 else 0.01 for n, p in names.items()}
    decay = {n: 0.1 if p.dim() > 1 else 0.0 for n, p in names.items()}
    groups = [{"params": [p], "lr": lr[n], "weight_decay": decay[n]} for n, p in names.items()]
    program = execute(write_program(layout, shapes, name, tau=0.5))
    optimizer = torch.optim.AdamW(groups)
    step = program.TrainStep(model, optimizer, compile=False)
    for x in batches(12, torch.float64):
        model(x).backward()
        grads = {n: p.grad for n, p in names.items() if p.grad is not None}
        reference.step(grads, lr, decay)
        step.update()
        optimizer.zero_grad()
    for n, p in names.items():
        assert float((p.detach() - reference.weights[n]).norm() / reference.weights[n].norm()) < 1e-13
    moved = [float((scale[scale != 1] / 0.5 - 1).abs().max()) for scale in step.quack.scales().values()]
    assert max(moved) > 5e-3, "the factors have to move for this test to prove anything"


HOOKED: dict[str, tuple[str, Callable[[Any], torch.optim.Optimizer]]] = {
    "AdamW": ("adamw", lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1)),
    "Adam": ("adam", lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.01, amsgrad=True)),
    "SGD": ("sgd", lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1)),
}


@pytest.mark.parametrize(("clip", "rtol"), [(None, 1e-11), (0.3, 1e-5)], ids=["plain", "clipped in fp32"])
@pytest.mark.parametrize("optimizer", HOOKED)
@pytest.mark.parametrize("name", ["tiny-our_gpt", "written-mla", "written-conv1d", "written-joint"])
def test_steps_are_those_of_the_optimizer_with_hooks(
    name: str, optimizer: str, clip: float | None, rtol: float
) -> None:
    model, layout = CASES[name]()
    model = model.double()
    shuffle(model, 0, 0.1)
    other = copy.deepcopy(model)
    chosen, make = HOOKED[optimizer]
    program = execute(write_program(layout, shapes_of(model), name, OPTIMIZERS[chosen]))
    step = program.TrainStep(model, make(model.parameters()), compile=False, tau=0.5, clip_grad_norm=clip)
    hooked = make(other.parameters())
    QuacK(hooked, other, layout, tau=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            q.grad = p.grad.clone()
        step.update()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(other.parameters(), clip)
        hooked.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)


def test_a_step_that_is_not_finite_changes_nothing_and_a_pruned_head_stays_finite() -> None:
    layout, shapes = layout_of("fused")
    model = Bag(shapes)
    optimizer = torch.optim.AdamW(model.parameters())
    step = execute(write_program(layout, shapes, "")).TrainStep(model, optimizer, compile=False, skip_nonfinite=True)

    def update(value: float) -> list[Tensor]:
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        step.update()
        states = [x for p in model.parameters() for x in optimizer.state[p].values()]
        return [t.clone() for t in (*model.parameters(), *states)]

    before = update(0.1)
    assert all(map(torch.equal, before, update(float("nan"))))
    with torch.no_grad():
        for part in ("weight", "bias"):
            model.get_parameter(f"h.0.attn.c_attn.{part}")[:4] = 0
    assert all(t.isfinite().all() for t in update(0.1))


def at_random(model: nn.Module, step: Any, updates: range) -> None:
    """Updates by random gradients."""
    for i in updates:
        generator = torch.Generator().manual_seed(i)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        step.update()


def begun(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Module, torch.optim.AdamW, Any]:
    """A model, its optimizer, and the step of its program."""
    layout, shapes = layout_of(name)
    model = Bag(shapes, dtype, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return model, optimizer, execute(write_program(layout, shapes, "")).TrainStep(model, optimizer, compile=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_a_saved_state_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model, optimizer, step = begun("mla", dtype)
    at_random(model, step, range(3))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    at_random(model, step, range(3, 6))
    resumed, optimizer, step = begun("mla", dtype, seed=7)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(state)
    at_random(resumed, step, range(3, 6))
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_a_state_without_first_factors_or_with_those_of_others_is_refused() -> None:
    model, optimizer, step = begun("mla")
    at_random(model, step, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    for own in state["state"].values():
        own.pop("quack_init", None)
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="no initial factors of QuacK for these heads and norm"):
        at_random(model, step, range(1))

    other, theirs, another = begun("mla_without_q_latent")
    at_random(other, another, range(1))
    foreign = next(own["quack_init"] for own in theirs.state.values() if "quack_init" in own)
    for own in state["state"].values():
        own["quack_init"] = foreign
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="no initial factors of QuacK for these heads and norm"):
        at_random(model, step, range(1))


def test_a_state_of_the_step_is_the_optimizers_own() -> None:
    """Plain AdamW goes on from it."""
    model, optimizer, step = begun("gqa")
    at_random(model, step, range(2))
    plain = torch.optim.AdamW(model.parameters())
    plain.load_state_dict(optimizer.state_dict())
    plain.step()
    assert all(float(state["step"]) == 3 for state in plain.state.values())


# ---- refusals --------------------------------------------------------------------------------------------------------

UNFIT: dict[str, tuple[Callable[[AttentionSite, Shapes], tuple[AttentionSite, Shapes]], str]] = {
    "no such weight": (lambda s, w: (s, {}), "the model has no parameter 'attn.q.weight'"),
    "too few rows": (lambda s, w: (s, {**w, "attn.q.weight": (8, 6)}), r"up to row 12, but axis 0 of \[8, 6\] has 8"),
    "no such axis": (lambda s, w: (replace(s, query=(replace(s.query[0], axis=2),)), w), "has axis 2"),
    "no such bias": (lambda s, w: (replace(s, query=(replace(s.query[0], bias="b"),)), w), "has no parameter 'b'"),
    "a short bias": (
        lambda s, w: (replace(s, query=(replace(s.query[0], bias="b"),)), {**w, "b": (3,)}),
        r"up to row 12, but axis 0 of \[3\] has 3",
    ),
    "two axes": (
        lambda s, w: (replace(s, key=(replace(s.key[0], param="attn.q.weight", axis=1),)), {"attn.q.weight": (12, 12)}),
        "along axis 0 and along axis 1; one parameter can have head rows along one axis only",
    ),
}


@pytest.mark.parametrize("why", UNFIT)
def test_layouts_that_do_not_fit_are_refused(why: str) -> None:
    change, words = UNFIT[why]
    one = site("attn", [block("attn.q.weight", "q", rows(3, 4))], [block("attn.k.weight", "k", rows(3, 4))], PAIR)
    one, shapes = change(one, {"attn.q.weight": (12, 6), "attn.k.weight": (12, 6)})
    with pytest.raises(LayoutError, match=words) as caught:
        write_program(QKLayout((one,)), shapes, "bad")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_norms_that_cannot_be_divided_by_are_refused(value: float) -> None:
    layout, shapes = layout_of("gqa")
    model = Bag(shapes)
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            model.get_parameter(f"layers.1.attn.{name}.weight")[:] = value
    with pytest.raises(
        FactorError, match=r"a head in .*layers\.1\.attn\.k_proj.* has norm zero, or one that is not finite"
    ) as error:
        scaling_of(model, layout, 1.0, "frobenius")
    assert "\n" not in str(error.value)


def test_norms_that_are_not_known_are_refused() -> None:
    layout, shapes = layout_of("gqa")
    with pytest.raises(FactorError, match="norm is 'nuclear'; use 'frobenius' or 'spectral'"):
        scaling_of(Bag(shapes), layout, 1.0, "nuclear")  # type: ignore[arg-type]


def test_optimizers_that_the_program_does_not_know_are_refused() -> None:
    layout, shapes = layout_of("gqa")
    model, program = Bag(shapes), execute(write_program(layout, shapes, ""))
    with pytest.raises(TypeError, match="SGD is not among AdamW"):
        program.TrainStep(model, torch.optim.SGD(model.parameters()))


def test_attentions_that_keep_their_norms_are_left_out() -> None:
    layout, shapes = layout_of("gqa")
    kept = replace(gqa("kept.attn", 2, 2, 4), qk_norm=(Norm("query", "rms", 4),))
    more = {f"kept.attn.{p}_proj.weight": (8, 10) for p in "qk"}
    program = execute(write_program(replace(layout, sites=(*layout.sites, kept)), shapes | more, ""))
    model = Bag(shapes | more)
    assert program.QuacK(model).scales().keys() == {model.get_parameter(n) for n in shapes if n != "rest.weight"}
    assert execute(write_program(QKLayout((kept,)), more, "")).KINDS == ()


# ---- the text --------------------------------------------------------------------------------------------------------

FEATURES = ((), ("sharded",), ("masters",), ("sharded", "masters"))
STAND_INS = {f"layers.{i}.attn.{side}_norm": StandIn() for i in range(3) for side in "qk"}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every layout with AdamW, and a few with every optimizer and feature."""
    found = {name.replace("-", "_"): text_of(*make()) for name, make in CASES.items()}
    for optimizer, names in OPTIMIZERS.items():
        for features in FEATURES:
            for name in ("gqa", "mla", "conv1d", "odd_head_map_of_many"):
                stand_ins = STAND_INS if name == "gqa" else {}
                text = write_program(
                    *layout_of(name),
                    f'{name} of "C:\\x.py" ' * 5,
                    names,
                    tau=0.3,
                    features=features,
                    stand_ins=stand_ins,
                )
                found["_".join(("every", name, optimizer, *features))] = text
    return found


def text_of(model: nn.Module, layout: QKLayout) -> str:
    return write_program(layout, shapes_of(model), type(model).__name__)


@pytest.fixture(scope="module")
def folder(texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them as files."""
    folder = tmp_path_factory.mktemp("programs")
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_formatter_and_a_linter_leave_it_alone(folder: Path) -> None:
    options = ("--isolated", "--line-length", "120", "--target-version", "py311")
    for command in (["format", "--diff"], ["check", "--select", "E,F,W,I,UP,B,SIM,RUF,D1", "--ignore", "D105,D107"]):
        ran = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *options, str(folder)], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout[:3000]


@pytest.mark.slow
def test_mypy_finds_nothing(folder: Path) -> None:
    files = [str(file) for file in folder.glob("*.py") if file.name.startswith(("every", "written"))]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *files], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stdout[:3000]


def test_it_imports_torch_and_the_standard_library_alone(texts: dict[str, str]) -> None:
    for text in texts.values():
        nodes = list(ast.walk(ast.parse(text)))
        modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {module.split(".")[0] for module in modules} <= {"torch"} | sys.stdlib_module_names


FOR_USERS = {"TrainStep", "strip_qk_norm", "Lion"}


def test_nothing_is_carried_that_nothing_uses(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        tree = ast.parse(text)
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert defined - used <= FOR_USERS, name
        methods = {
            one.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for one in node.body
            if isinstance(one, ast.FunctionDef) and not one.name.startswith("__")
        }  # fmt: skip
        reached = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert methods - reached <= {"forward", "step"}, name


@pytest.mark.parametrize("features", FEATURES, ids="-".join)
def test_only_what_was_asked_for(features: tuple[str, ...], texts: dict[str, str]) -> None:
    for optimizer, names in OPTIMIZERS.items():
        text = texts["_".join(("every", "mla", optimizer, *features))]
        program = execute(text)
        wanted = {getattr(torch.optim, name, getattr(program, name, None)) for name in names}
        assert program.STEPS.keys() == wanted
        assert hasattr(program, "Lion") == (optimizer == "lion")
        assert hasattr(program, "Masters") == ("masters" in features) == ("master_param" in text)
        assert ("DTensor" in text) == ("sharded" in features)
        assert "# if " not in text and "PassThrough" not in text
        assert program.TrainStep.__init__.__kwdefaults__["tau"] == 0.3


def test_equal_layers_are_written_once() -> None:
    """126 layers take no line more than one."""

    def text(layers: int) -> str:
        sites = tuple(gqa(f"model.layers.{i}.self_attn", 128, 8, 128) for i in range(layers))
        shapes = {
            f"model.layers.{i}.self_attn.{p}_proj.weight": (r, 16384)
            for i in range(layers)
            for p, r in (("q", 16384), ("k", 1024))
        }
        return write_program(QKLayout(sites), shapes, "Llama")

    assert text(126).count("\n") == text(12).count("\n")
    (kind,) = execute(text(126)).KINDS
    assert len(list(kind.numbers)) == 126
    assert kind.weights(125)["q_proj"] == ("model.layers.125.self_attn.q_proj.weight", 16384)
    rows_of_a_head, name = kind.rows().q
    assert name == "q_proj" and rows_of_a_head[127].tolist() == list(range(16256, 16384))


LIMITS = [
    ("examples/mla.py", "adamw", 320),
    ("examples/gpt.py", "adamw", 320),
    ("examples/mla.py", "muon", 440),
    ("examples/gpt.py", "muon", 440),
    ("examples/configs/llama-3.1-405b", "adamw", 360),
    ("examples/configs/deepseek-v3-671b", "adamw", 360),
]


@pytest.mark.parametrize(("target", "optimizer", "limit"), LIMITS, ids=[f"{t}-{o}" for t, o, _ in LIMITS])
def test_it_is_short_enough_to_be_read(target: str, optimizer: Any, limit: int) -> None:
    assert quack_fx.convert(str(ROOT / target), optimizer=optimizer).count("\n") <= limit


@st.composite
def heads_of_rows(draw: st.DrawFn) -> list[Ranges]:
    """Heads evenly apart, in groups, row by row in turn, or anywhere."""
    heads, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    start = draw(st.integers(0, 20))
    way = draw(st.sampled_from(["apart", "groups", "in turn", "anywhere"]))
    if way == "apart":
        step = draw(st.integers(1, width + 5))
        return [((start + step * h, start + step * h + width),) for h in range(heads)]
    if way == "groups":
        step = heads * width + draw(st.integers(0, 6))
        firsts = [start + step * g + width * h for g in range(draw(st.integers(1, 3))) for h in range(heads)]
        return [((first, first + width),) for first in firsts]
    if way == "in turn":
        step = draw(st.integers(1, 3))
        return [
            tuple((start + (i * heads + h) * step, start + (i * heads + h) * step + step) for i in range(width))
            for h in range(heads)
        ]
    numbers = draw(st.permutations(range(40)))
    return [tuple((r, r + 1) for r in sorted(numbers[h * width : (h + 1) * width])) for h in range(heads)]


@given(heads_of_rows())
@settings(deadline=None, max_examples=300)
def test_rows_as_an_expression_are_the_rows(heads: list[Ranges]) -> None:
    tables = Tables("ROWS")
    text = index_of(heads, tables)
    names = {"torch": torch}
    exec("\n".join(tables.lines), names)
    numbers = eval(text, names)
    assert numbers.tolist() == [[row for start, stop in ranges for row in range(start, stop)] for ranges in heads]
