"""Runs work in forked processes with limits on time and memory, a few at a time.

In: a function and the items to call it with; the function reports its progress repeatedly, as plain data. Out: for each
item, the last report, how the process ended and how long it took.

The parent has no threads, because a fork copies only the forking thread, but also locks held by other threads. Only the
parent holds the read ends of pipes, and no child holds the write end of another; otherwise the end of one child would
be noticed only when both have ended.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

LOOK = 0.25
"""Seconds between checks of the resources that the processes use."""

Tell = Callable[[dict[str, Any]], None]
Item = TypeVar("Item")


@dataclass
class Process(Generic[Item]):
    """A process that works on an item.

    Attributes:
        item: The item.
        pid: Process id.
        pipe: Read end of the pipe for its reports.
        begin: Start time.
        text: Data received from the pipe.
        killed: Why it was killed, or "".
    """

    item: Item
    pid: int
    pipe: int
    begin: float
    text: bytearray = field(default_factory=bytearray)
    killed: str = ""

    def last_told(self) -> dict[str, Any] | None:
        """The last complete report, or None if there is none."""
        lines = self.text.split(b"\n")[:-1]  # text after the last line break is incomplete
        return dict(json.loads(lines[-1])) if lines else None

    def resident(self) -> int:
        """Resident memory in bytes; 0 after the process has ended."""
        try:
            with open(f"/proc/{self.pid}/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            return 0


@dataclass(frozen=True)
class Ended(Generic[Item]):
    """Result for an item.

    Attributes:
        item: The item.
        told: The last report, or None.
        reason: Why the process did not finish, or "" if it did.
        seconds: Duration.
    """

    item: Item
    told: dict[str, Any] | None
    reason: str
    seconds: float


def run_apart(
    work: Callable[[Item, Tell], None], items: Iterable[Item], jobs: int, seconds: float, memory: int
) -> Iterator[Ended[Item]]:
    """Call a function with each item, each call in its own process.

    Arguments:
        work: Called with an item and a function for reporting plain data; the last report counts.
        items: The items, consumed lazily as processes become free.
        jobs: Maximum number of concurrent processes.
        seconds: A process is killed after this time.
        memory: A process is killed above this many bytes of resident memory.

    Yields:
        The result for each item, in the order in which they finish.
    """
    waiting = iter(items)
    running: list[Process[Item]] = []
    with selectors.DefaultSelector() as selector:
        try:
            while True:
                while len(running) < jobs and (item := next(waiting, None)) is not None:
                    running.append(_started(work, item))
                    selector.register(running[-1].pipe, selectors.EVENT_READ, running[-1])
                if not running:
                    return
                for key, _ in selector.select(LOOK):
                    process = key.data
                    if part := os.read(process.pipe, 1 << 16):
                        process.text += part
                    else:
                        selector.unregister(process.pipe)
                        running.remove(process)
                        yield _ended(process)
                for process in running:
                    _kill_beyond(process, seconds, memory)
        finally:
            for process in running:
                os.kill(process.pid, signal.SIGKILL)
                _ended(process)


def _started(work: Callable[[Item, Tell], None], item: Item) -> Process[Item]:
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return Process(item, pid, read, time.monotonic())
    status = 1
    try:
        os.close(read)
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            work(item, lambda data: _write(write, json.dumps(data).encode() + b"\n"))
        status = 0
    finally:
        os._exit(status)  # skip cleanup of what belongs to the parent, such as its files


def _write(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


def _kill_beyond(process: Process[Any], seconds: float, memory: int) -> None:
    if process.killed:
        return
    if time.monotonic() - process.begin > seconds:
        process.killed = f"stopped after {seconds:.0f} s"
    elif process.resident() > memory:
        process.killed = f"stopped with more than {memory / (1 << 30):.0f} GiB of memory"
    if process.killed:
        os.kill(process.pid, signal.SIGKILL)


def _ended(process: Process[Item]) -> Ended[Item]:
    os.close(process.pipe)
    _, status = os.waitpid(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    died = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}" if code else ""
    return Ended(process.item, process.last_told(), process.killed or died, time.monotonic() - process.begin)
