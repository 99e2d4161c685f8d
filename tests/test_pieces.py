"""Pieces cover a weight once, and their runs give the norms and scales of the units: against the rows one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quack_fx.factors import FactorPlan, Unit, unit_norms
from quack_fx.step.pieces import cut


@st.composite
def plans(draw: Any) -> tuple[FactorPlan, dict[str, Tensor]]:
    """Units of one to three parameters: heads in patterns, with gaps, overlaps, several ranges, biases, either axis."""
    units: list[Unit] = []
    params: dict[str, Tensor] = {}
    for n in range(draw(st.integers(1, 3))):
        axis, name = draw(st.integers(0, 1)), f"p{n}"
        sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
        bias = f"{name}.bias" if draw(st.booleans()) else None
        repeats, length, own = draw(st.integers(1, 4)), draw(st.integers(0, 3)), list[Unit]()
        for _ in range(repeats):
            for size in sizes:
                if draw(st.booleans()) or not own:
                    ranges = [(length, length + size)]
                    if size > 1 and draw(st.booleans()):
                        ranges = [(length, length + 1), (length + size, length + size + 1)]  # with a hole
                    own.append(Unit(name, axis, tuple(ranges), bias))
                length += size
        length += draw(st.integers(1, 3))
        units += dict.fromkeys(own)
        shape = (length, 3) if axis == 0 else (3, length)
        params[name] = torch.randn(shape, dtype=torch.float64)
        if bias is not None:
            params[bias] = torch.randn(length, dtype=torch.float64)
    return FactorPlan(tuple(units), ((*range(len(units)),),), ()), params


@settings(max_examples=300, deadline=None)
@given(plans())
def test_pieces_cover_once_and_measure_the_units(case: tuple[FactorPlan, dict[str, Tensor]]) -> None:
    plan, params = case
    pieces, runs = cut(plan, params)
    assert pieces.keys() == params.keys()
    squares = torch.empty(len(runs.owners), dtype=torch.float64).fill_(torch.nan)
    scales = torch.rand(len(plan.units), dtype=torch.float64) + 0.5
    by_run = runs.spread(scales)
    tables = plan.tables(torch.device("cpu"))
    by_row = tables.spread(scales)
    for name, parts in pieces.items():
        count, spread = torch.zeros_like(params[name]), torch.ones_like(params[name])
        for piece in parts:
            piece.of(count).add_(1)
            if piece.first is not None:
                own = slice(piece.first, piece.first + piece.count)
                assert squares[own].isnan().all()
                squares[own] = piece.squares(piece.of(params[name]))
                piece.of(spread).mul_(piece.along(by_run[own], piece.of(spread)))
        assert (count == 1).all()
        expected = torch.ones_like(spread)
        for strip in (strip for strip in tables.strips if strip.name == name):
            rows = by_row[strip.offset : strip.offset + strip.stop - strip.start]
            strip.of(expected).copy_(rows.view(-1, *[1] * (expected.dim() - 1)).expand_as(strip.of(expected)))
        assert torch.equal(spread, expected)
    assert torch.allclose(runs.norms(squares), unit_norms(plan, params), rtol=1e-12)


def heads(param: str, count: int, size: int, start: int = 0, stride: int | None = None) -> list[Unit]:
    starts = [start + h * (stride or size) for h in range(count)]
    return [Unit(param, 0, ((a, a + size),), None) for a in starts]


PATTERNS = {
    "query, key, value": ([*heads("w", 8, 4), *heads("w", 2, 4, 32)], 48, [(10, 4, True), (1, 8, False)]),
    "query, key, value of each head": (heads("w", 4, 6, stride=9), 36, [(4, 6, True), (4, 3, False)]),
    "two kinds of heads": ([*heads("w", 4, 6), *heads("w", 4, 3, 24)], 36, [(4, 6, True), (4, 3, True)]),
    "a pattern with a rest": (heads("w", 3, 2, 1, stride=3), 12, [(3, 1, False), (3, 2, True), (1, 3, False)]),
    "none of a kind": ([Unit("w", 0, ((2, 7),), None)], 9, [(1, 2, False), (1, 5, True), (1, 2, False)]),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_equal_heads_are_one_piece(name: str) -> None:
    """What the speed rests on: few pieces, each a loop."""
    units, length, expected = PATTERNS[name]
    pieces, _ = cut(FactorPlan(tuple(units), ((0,),), ()), {"w": torch.zeros(length, 5)})
    assert [(p.count, p.size, p.first is not None) for p in pieces["w"]] == expected
    assert all(p.of(torch.zeros(length, 5)).shape == (p.count, p.size * 5) for p in pieces["w"])
