"""The table of benchmarks.sharded: every way to shard, attention, step and optimizer against one process."""

from __future__ import annotations

import pytest

from benchmarks.sharded import Cell, cells, verdicts

FAST = [
    Cell(2, "FSDP2 odd", "MLA", "hooks", "AdamW"),
    Cell(2, "FSDP2 odd", "fused", "step", "AdamW"),
    Cell(2, "TP", "GQA", "emitted", "AdamW"),
    Cell(2, "DDP", "MHA", "step", "Muon", double=True),
]


def assert_equal(wanted: list[Cell]) -> None:
    """Each is equal to one process; where torch's Muon or bfloat16 alone part them, no farther than those do."""
    found = verdicts(wanted, print)
    assert list(found) == wanted
    for cell, verdict in found.items():
        rounds = cell.optimizer == "Muon" and (not cell.double or cell.taker == "hooks")
        assert verdict.outcome(cell) in (("equal", "rounding") if rounds else ("equal",)), (cell, verdict)


def test_some_cells() -> None:
    assert_equal(FAST)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_all_cells(world: int) -> None:
    assert_equal(list(cells(world)))
