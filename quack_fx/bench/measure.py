"""Interleaved timing, and the limits of the machine.

In: functions. Out: medians and ratios, with quartiles. All functions run in one process, one after the other in each
round, so that a temporary slowdown affects all of them; ratios are computed within a round.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler logs each start


@dataclass(frozen=True)
class Times:
    """Seconds of each round.

    Attributes:
        seconds: One value per round.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.seconds)

    def over(self, other: Times) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the ratio to `other`, round by round."""
        return _quartiles(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def minus(self, other: Times) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the difference to `other`, round by round."""
        return _quartiles(a - b for a, b in zip(self.seconds, other.seconds, strict=True))


def _quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    values = sorted(values)
    quarter = len(values) // 4
    return values[quarter], statistics.median(values), values[-1 - quarter]


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, warm: Collection[str] = ()
) -> dict[str, Times]:
    """Time functions, interleaved, in a rotating order; those in `warm` run once, untimed, before each timing."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if name in warm:
                functions[name]()
            seconds[name].append(time_of(functions[name]))
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def time_of(function: Callable[[], object]) -> float:
    """Seconds of one call, including its work on the device."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(function: Callable[[], object]) -> int:
    """Peak memory of tensors during a call, beyond what they held before it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = [e["args"] for e in events if e.get("name") == "[memory]" and e["args"].get("Device Type") == 0]
    totals = [int(args["Total Allocated"]) for args in held]
    return max(totals) - (totals[0] - int(held[0]["Bytes"])) if totals else 0


@dataclass(frozen=True)
class Work:
    """Work of a call on the device.

    Attributes:
        kernels: Number of kernels.
        seconds: Total device time of kernels, copies and fills, without the gaps between them.
    """

    kernels: int
    seconds: float


def device_work(function: Callable[[], object]) -> Work | None:
    """Work of a call on the device, from the median of three calls; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return sorted((_traced(function) for _ in range(3)), key=lambda work: work.seconds)[1]


def _traced(function: Callable[[], object]) -> Work:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        function()
        synchronize()
    on_device = [e for e in profile.events() if e.device_type.name == "CUDA" and not e.is_user_annotation]
    kernels = [e for e in on_device if not e.name.startswith(("Memcpy", "Memset"))]
    return Work(len(kernels), 1e-6 * sum(e.device_time for e in on_device))


def bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes per second, read and written, of a copy of a large tensor; the best of several."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / min(time_of(lambda: target.copy_(source)) for _ in range(10))


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOPs per second of a large matrix product; the best of several."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    a @ b
    return 2 * size**3 / min(time_of(lambda: a @ b) for _ in range(10))


def machine() -> str:
    """Kind of machine and versions, for the head of a table of results."""
    cpu = f"CPU, {torch.get_num_threads()} threads, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}"
