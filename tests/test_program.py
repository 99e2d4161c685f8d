"""The training step written down for a model: the rule's scales, text that a formatter leaves alone, and the steps of a
plain optimizer with QuacK."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import by_hand
import emit_cases
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quack_fx import QuacK
from quack_fx.errors import EmitError, LayoutError
from quack_fx.factors import FactorPlan, factors, layout_params, unit_norms
from quack_fx.layout import QKLayout, Ranges
from quack_fx.train.program.rows import index_of
from quack_fx.train.program.source import write_program
from quack_fx.train.program.text import Tables

Case = Callable[[], tuple[nn.Module, QKLayout]]


def hand(name: str) -> Case:
    def make() -> tuple[nn.Module, QKLayout]:
        model, _, site = by_hand.CASES[name]()
        return model, QKLayout((site,))

    return make


def tiny(name: str) -> Case:
    def make() -> tuple[nn.Module, QKLayout]:
        case = tiny_models.CASES[name]()
        return case.model, case.layout

    return make


def written(name: str) -> Case:
    def make() -> tuple[nn.Module, QKLayout]:
        layout, shapes = emit_cases.layout_of(name)
        return emit_cases.Bag(shapes), layout

    return make


CASES: dict[str, Case] = {f"hand-{name}": hand(name) for name in by_hand.CASES}
CASES |= {f"tiny-{name}": tiny(name) for name in tiny_models.CASES}
CASES |= {f"written-{name}": written(name) for name in emit_cases.SITES}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def load(source: str) -> ModuleType:
    module = ModuleType("program")
    sys.modules["program"] = module
    exec(compile(source, "program", "exec"), vars(module))
    return module


def shuffle(model: nn.Module, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("name", CASES)
def test_scales_are_those_of_the_rule(name: str) -> None:
    model, layout = CASES[name]()
    if all(site.qk_norm for site in layout.sites):
        with pytest.raises(EmitError, match="keep their QK norm"):
            write_program(layout, shapes_of(model), name)
        return
    model = model.double()
    shuffle(model, 0)
    quack = load(write_program(layout, shapes_of(model), name)).QuacK(model, tau=0.7)
    plan, params = FactorPlan.from_layout(layout), layout_params(layout, model)
    first = factors(plan, unit_norms(plan, params))
    shuffle(model, 1, 0.5)
    by_unit = 0.7 * factors(plan, unit_norms(plan, params)) / first

    scales = quack.scales()
    tables = plan.tables(torch.device("cpu"))
    by_row = tables.spread(by_unit)
    rest = {name: torch.ones(scales[p].numel(), dtype=torch.bool) for name, p in params.items()}
    for strip in tables.strips:
        own = scales[params[strip.name]].flatten()[strip.start : strip.stop]
        expected = by_row[strip.offset : strip.offset + strip.stop - strip.start]
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=0)
        rest[strip.name][strip.start : strip.stop] = False
    for name, other in rest.items():
        assert (scales[params[name]].flatten()[other] == 1).all()
    assert scales.keys() == set(params.values())


@pytest.mark.parametrize("sharded", [False, True])
def test_text_is_as_a_formatter_and_a_linter_leave_it(sharded: bool, tmp_path: Path) -> None:
    for name, make in CASES.items():
        model, layout = make()
        if not all(site.qk_norm for site in layout.sites):
            source = write_program(layout, shapes_of(model), name, sharded=sharded)
            (tmp_path / f"{name.replace('-', '_')}.py").write_text(source)
    config = Path(__file__).parents[1] / "pyproject.toml"
    for command in (["format", "--diff"], ["check"]):
        ran = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", str(config), str(tmp_path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout[:3000]


@pytest.mark.parametrize(("clip", "rtol"), [(None, 1e-11), (0.3, 1e-5)], ids=["plain", "clipped in fp32"])
@pytest.mark.parametrize("name", ["tiny-our_gpt", "tiny-our_mla", "written-conv1d", "written-joint"])
def test_steps_are_those_of_the_optimizer_with_hooks(name: str, clip: float | None, rtol: float) -> None:
    model, layout = CASES[name]()
    model = model.double()
    shuffle(model, 0, 0.1)
    other = copy.deepcopy(model)
    options = {"lr": 1e-2, "weight_decay": 0.1}
    step = load(write_program(layout, shapes_of(model), name)).TrainStep(
        model, torch.optim.AdamW(model.parameters(), **options), compile=False, tau=0.5, clip_grad_norm=clip
    )
    optimizer = torch.optim.AdamW(other.parameters(), **options)
    QuacK(optimizer, other, layout, tau=0.5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            q.grad = p.grad.clone()
        step.update()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(other.parameters(), clip)
        optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=rtol / 10)


def test_a_step_that_is_not_finite_changes_nothing_and_a_pruned_head_stays_finite() -> None:
    model, layout = CASES["tiny-our_gpt"]()
    optimizer = torch.optim.AdamW(model.parameters())
    step = load(write_program(layout, shapes_of(model), "")).TrainStep(
        model, optimizer, compile=False, skip_nonfinite=True
    )

    def update(value: float) -> list[Tensor]:
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        step.update()
        states = [x for p in model.parameters() for x in optimizer.state[p].values()]
        return [t.clone() for t in (*model.parameters(), *states)]

    before = update(0.1)
    assert all(map(torch.equal, before, update(float("nan"))))
    block = layout.sites[0].query[0]
    with torch.no_grad():
        dict(model.named_parameters())[block.param][slice(*block.heads[0][0])] = 0
        if block.bias is not None:
            dict(model.named_parameters())[block.bias][slice(*block.heads[0][0])] = 0
    assert all(t.isfinite().all() for t in update(0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_a_saved_state_to_the_bit(dtype: torch.dtype) -> None:
    model, layout = CASES["tiny-our_mla"]()
    program = load(write_program(layout, shapes_of(model), ""))
    model = model.to(dtype)

    def train(model: nn.Module, step: Any, updates: range) -> None:
        for i in updates:
            generator = torch.Generator().manual_seed(i)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            step.update()

    def made(model: nn.Module) -> tuple[torch.optim.AdamW, Any]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return optimizer, program.TrainStep(model, optimizer, compile=False)

    optimizer, step = made(model)
    train(model, step, range(3))
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, step, range(3, 6))
    resumed = CASES["tiny-our_mla"]()[0].to(dtype)
    shuffle(resumed, 7)
    optimizer, step = made(resumed)
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(resumed, step, range(3, 6))
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))

    for own in state["state"].values():
        own.pop("quack", None)
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="make the step after loading it"):
        train(resumed, step, range(1))


def test_bad_layouts_are_refused() -> None:
    model, layout = CASES["tiny-our_gpt"]()
    shapes = shapes_of(model)
    with pytest.raises(LayoutError, match="has no parameter"):
        write_program(layout, {}, "")
    with pytest.raises(LayoutError, match="goes up to row"):
        write_program(layout, {name: tuple(1 for _ in shape) for name, shape in shapes.items()}, "")
    with pytest.raises(EmitError, match="no query/key pairs"):
        write_program(QKLayout(), shapes, "")
    site = layout.sites[0]
    moved = replace(site.query[0], heads=tuple(((a + 1, b + 1),) for ((a, b),) in site.query[0].heads))
    with pytest.raises(EmitError, match="is part of two heads that are not the same"):
        write_program(QKLayout((site, replace(site, name="other", query=(moved,)))), shapes, "")
    with torch.no_grad():
        for site in layout.sites:
            for _, block in site.blocks():
                dict(model.named_parameters())[block.param].zero_()
    with pytest.raises(ValueError, match="is zero; initialise it"):
        load(write_program(layout, shapes, "")).QuacK(model)


@st.composite
def heads_of_rows(draw: st.DrawFn) -> list[Ranges]:
    """Heads evenly apart, in groups, row by row in turn, or anywhere."""
    heads, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    start = draw(st.integers(0, 20))
    way = draw(st.sampled_from(["apart", "groups", "in turn", "anywhere"]))
    if way == "apart":
        step = width + draw(st.integers(0, 5))
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
    rows = draw(st.permutations(range(40)))
    return [tuple((r, r + 1) for r in sorted(rows[h * width : (h + 1) * width])) for h in range(heads)]


@given(heads_of_rows())
@settings(deadline=None, max_examples=300)
def test_rows_as_an_expression_are_the_rows(heads: list[Ranges]) -> None:
    tables = Tables("ROWS")
    text = index_of(heads, tables)
    names = {"torch": torch}
    exec("\n".join(tables.lines), names)
    numbers = eval(text, names)
    assert numbers.tolist() == [[row for start, stop in ranges for row in range(start, stop)] for ranges in heads]
