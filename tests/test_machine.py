"""Memory runs out as an error that can be told, not as the end of the process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from quack_fx.errors import TargetError
from quack_fx.graph.forward.machine import available_memory, bounded_memory
from quack_fx.targets import resolve

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what a process has")


def test_the_last_part_of_memory_is_not_given() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with bounded_memory():
        assert available_memory() > 0
        with pytest.raises((MemoryError, RuntimeError)):
            torch.empty(available_memory() + (1 << 28), dtype=torch.uint8)
        with pytest.raises(MemoryError):
            bytearray(available_memory() + (1 << 28))
        with bounded_memory():  # what is within counts what is left there
            pass
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


MODEL = """
import torch
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(8, 8)
        if self.l.weight.device.type == "meta":
            raise ValueError("numbers are needed")
        {hoards}
    def forward(self, x):
        return self.l(x)
"""


@pytest.mark.usefixtures("own_folder")
def test_a_constructor_that_computes_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("model.py").write_text(
        MODEL.format(hoards="self.tables = [torch.eye(1 << 12).mul(n).flip(0) for n in range(16)]")
    )
    left = iter(range(10**9, 0, -(10**8)))
    monkeypatch.setattr(sys.modules["quack_fx.targets.settle"], "available_memory", lambda: next(left))
    with pytest.raises(TargetError, match=r"takes more than .* GiB"):
        resolve("model.py")


@pytest.mark.usefixtures("own_folder")
def test_a_constructor_that_asks_for_more_than_there_is_is_told_in_one_line() -> None:
    Path("model.py").write_text(MODEL.format(hoards="self.numbers = bytearray(1 << 50)"))
    with pytest.raises(TargetError, match="MemoryError"):
        resolve("model.py")
