"""Available memory, a limit on its use, and a pause of garbage collection.

Callers build, copy or record for real only what takes a fraction of `available_memory()`, and run unknown code within
`bounded_memory`: a failed allocation is an error that can be reported, while a process that exhausts the memory is
killed without a message.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

SMALL_MACHINE = 8 << 30
"""Available memory in bytes, assumed if the system does not report it (Windows)."""

_GROUP = Path("/sys/fs/cgroup")
"""Folder in which Linux reports a container's memory limit."""


def available_memory() -> int:
    """Return the bytes that can be allocated now: the least of what machine, container and process have left."""
    return max(0, min(_limits(), default=SMALL_MACHINE))


def _limits() -> Iterator[int]:
    free = _free()
    if free is not None:
        yield free
    with suppress(OSError, ValueError):  # the limit is "max" if there is none
        limit = int((_GROUP / "memory.max").read_text())
        used = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        yield limit - int(used.get("anon", 0))
    with suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            yield soft - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
        if soft != resource.RLIM_INFINITY:
            yield soft - _own_data()


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Make allocations fail that would use the last eighth of the available memory."""
    with ExitStack() as stack:
        with suppress(ImportError, OSError, ValueError):  # macOS does not report a process's size
            import resource  # not on Windows

            before = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (_own_data() + available_memory() // 8 * 7, before[1]))
            stack.callback(resource.setrlimit, resource.RLIMIT_DATA, before)
        yield


@contextmanager
def without_collecting() -> Iterator[None]:
    """Disable garbage collection: a recording, or an import of torch, makes a million objects that all stay alive, and
    scanning them takes longer than the work itself."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _own_data() -> int:
    """Bytes of this process that count toward RLIMIT_DATA."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    raise OSError("the system does not tell")


def _free() -> int | None:
    """Free memory of the machine, including file caches, which the system can drop; half of all memory if unknown."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) << 10
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
