"""Pieces cover a weight once, and their spans give the norms and scales of the units: against the rows one by one."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

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
@given(plans(), st.sampled_from((4096, 4)))
def test_pieces_cover_once_and_measure_the_units(case: tuple[FactorPlan, dict[str, Tensor]], span: int) -> None:
    plan, params = case
    with patch("quack_fx.step.pieces._SPAN", span):
        pieces, spans = cut(plan, params)
    assert pieces.keys() == params.keys()
    squares = torch.empty(len(spans.owners), dtype=torch.float64).fill_(torch.nan)
    scales = torch.rand(len(plan.units), dtype=torch.float64) + 0.5
    by_span = spans.spread(scales)
    tables = plan.tables(torch.device("cpu"))
    by_row = tables.spread(scales)
    for name, parts in pieces.items():
        count, spread = torch.zeros_like(params[name]), torch.ones_like(params[name])
        for piece in parts:
            piece.of(count).add_(1)
            if piece.first is not None:
                own = slice(piece.numbers().start, piece.numbers().stop)
                assert squares[own].isnan().all()
                squares[own] = piece.squares(piece.of(params[name])).flatten()
                piece.of(spread).mul_(piece.along(by_span[own], piece.of(spread)))
        assert (count == 1).all()
        expected = torch.ones_like(spread)
        for strip in (strip for strip in tables.strips if strip.name == name):
            rows = by_row[strip.offset : strip.offset + strip.stop - strip.start]
            strip.of(expected).copy_(rows.view(-1, *[1] * (expected.dim() - 1)).expand_as(strip.of(expected)))
        assert torch.equal(spread, expected)
    assert torch.allclose(spans.norms(squares), unit_norms(plan, params), rtol=1e-12)


def heads(param: str, count: int, size: int, start: int = 0, stride: int | None = None) -> list[Unit]:
    starts = [start + h * (stride or size) for h in range(count)]
    return [Unit(param, 0, ((a, a + size),), None) for a in starts]


PATTERNS = {
    "query, key, value": ([*heads("w", 8, 4), *heads("w", 2, 4, 32)], 48, [(12, 4, True)]),
    "query, key, value of each head": (heads("w", 4, 6, stride=9), 36, [(4, 6, True), (4, 3, False)]),
    "values of another size than the heads": ([*heads("w", 4, 6)], 31, [(4, 6, True), (1, 7, False)]),
    "query, key, value of each head, alike": (
        [unit for h in range(4) for unit in heads("w", 2, 3, 9 * h)], 36, [(12, 3, True)]
    ),
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
    assert all(p.of(torch.zeros(length, 5)).shape == (p.count, 1, p.size * 5) for p in pieces["w"])


@pytest.mark.parametrize(
    ("rows", "columns", "spans"),
    [(64, 768, 12), (64, 64, 1), (128, 1600, 50), (64, 1601, 32), (1, 4097, 1)],
)
def test_long_runs_are_cut_into_equal_spans(rows: int, columns: int, spans: int) -> None:
    """Into as few as are short enough; of 4097 numbers, 17 * 241, there are none that are not very short."""
    weight = torch.zeros(2 * rows, columns)
    pieces, table = cut(FactorPlan(tuple(heads("w", 2, rows)), ((0, 1),), ()), {"w": weight})
    (piece,) = pieces["w"]
    assert piece.spans == spans and piece.of(weight).shape == (2, spans, rows * columns // spans)
    assert table.of_unit.tolist() == [list(range(spans)), list(range(spans, 2 * spans))]
