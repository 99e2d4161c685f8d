"""Formulas of heads: what they say is what was given, and every regular arrangement has one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quack_fx.layout import Ranges
from quack_fx.layout.pattern import loops_of, map_pattern, row_pattern

NUMBERS = st.lists(st.integers(0, 6), min_size=1, max_size=9)
LOOPS = st.lists(st.tuples(st.integers(2, 4), st.integers(-3, 40)), max_size=2)


def run(first: int, loops: tuple[tuple[int, int], ...]) -> list[int]:
    """The numbers that nested loops go through."""
    values = [first]
    for count, step in loops:
        values = [value + step * i for value in values for i in range(count)]
    return values


@given(NUMBERS)
def test_loops_go_through_the_very_numbers(values: list[int]) -> None:
    loops = loops_of(values)
    assert loops is None or (len(loops) <= 2 and run(values[0], loops) == values)


@given(st.integers(0, 9), LOOPS)
def test_numbers_of_two_loops_have_a_formula(first: int, loops: list[tuple[int, int]]) -> None:
    values = run(first, tuple(loops))
    found = loops_of(values)
    assert found is not None and run(first, found) == values


@pytest.mark.parametrize(
    ("heads", "first", "loops", "ranges"),
    [
        ([((5, 9),)], 5, (), ((0, 4),)),
        ([((0, 64),), ((64, 128),), ((128, 192),)], 0, ((3, 64),), ((0, 64),)),
        ([((7, 8), (9, 10)), ((8, 9), (10, 11))], 7, ((2, 1),), ((0, 1), (2, 3))),
        ([((0, 4),), ((0, 4),), ((8, 12),), ((8, 12),)], 0, ((2, 8), (2, 0)), ((0, 4),)),
    ],
)
def test_rows_of_heads(heads: list[Ranges], first: int, loops: tuple[tuple[int, int], ...], ranges: Ranges) -> None:
    pattern = row_pattern(heads)
    assert pattern is not None and (pattern.first, pattern.loops, pattern.ranges) == (first, loops, ranges)


@pytest.mark.parametrize("heads", [[((0, 4),), ((4, 7),)], [((0, 1),), ((1, 2),), ((3, 4),)]])
def test_uneven_heads_have_no_formula(heads: list[Ranges]) -> None:
    assert row_pattern(heads) is None


@pytest.mark.parametrize(
    ("heads", "count", "pattern"),
    [
        ((0, 1, 2), 3, "own"),
        ((0, 1), 3, "own"),
        ((0, 0, 0), 1, "blocks"),
        ((0, 0, 1, 1), 2, "blocks"),
        ((0, 1, 0, 1), 2, "cycle"),
        ((0, 1, 0), 2, "cycle"),
        ((0, 1, 1, 0), 2, None),
        ((2, 1, 0), 3, None),
        ((1, 1), 4, None),
    ],
)
def test_head_maps(heads: tuple[int, ...], count: int, pattern: str | None) -> None:
    assert map_pattern(heads, count) == pattern
