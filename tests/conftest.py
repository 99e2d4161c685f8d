"""Settings of every test: one thread a process, as many processes run beside each other. Fixtures that files share."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

# Inductor looks its code up by graph and not by instructions: what it made for AVX-512 gives NaN under
# ATEN_CPU_CAPABILITY=avx2.
_CAPABILITY = torch.backends.cpu.get_cpu_capability().lower()
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"quack_fx_inductor_{_CAPABILITY}")))


@pytest.fixture(autouse=True)
def counted_anew() -> None:
    """What torch.compile has counted (graphs, breaks) is a process's; here it is each test's own, in any order."""
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        folders = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", ())]
        if any(folder.startswith(str(tmp_path)) for folder in folders):
            del sys.modules[name]
