"""Work in forked processes with limits on time and memory, a few at once.

In: a function and the items to call it with; it tells how far it has come as plain data, again and again. Out: for each
item, the last that was told, how the process ended and how long it took.

The parent has no threads: a fork copies only the thread that forks, with all the locks that others hold. It also is the
only process that holds the reading ends, and no child holds the writing end of another, or the end of one would be
noticed only when both have ended.
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
"""Seconds between two looks at what the processes use."""

Tell = Callable[[dict[str, Any]], None]
Item = TypeVar("Item")


@dataclass
class Process(Generic[Item]):
    """A process that works on an item.

    Attributes:
        item: The item.
        pid: Number of the process.
        pipe: Where it tells what it has.
        begin: When it was started.
        text: What has come out of the pipe.
        killed: Why it was killed, or "".
    """

    item: Item
    pid: int
    pipe: int
    begin: float
    text: bytearray = field(default_factory=bytearray)
    killed: str = ""

    def last_told(self) -> dict[str, Any] | None:
        """The last whole line, or None if it told nothing."""
        lines = self.text.split(b"\n")[:-1]  # what follows the last line break was cut off
        return dict(json.loads(lines[-1])) if lines else None

    def resident(self) -> int:
        """Bytes of memory that it uses; 0 once it has ended."""
        try:
            with open(f"/proc/{self.pid}/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            return 0


@dataclass(frozen=True)
class Ended(Generic[Item]):
    """What came of an item.

    Attributes:
        item: The item.
        told: The last that was told, or None.
        reason: Why the process did not come to its end, or "" if it did.
        seconds: How long it took.
    """

    item: Item
    told: dict[str, Any] | None
    reason: str
    seconds: float


def run_apart(
    work: Callable[[Item, Tell], None], items: Iterable[Item], jobs: int, seconds: float, memory: int
) -> Iterator[Ended[Item]]:
    """Call a function with each item, each call in a process of its own.

    Arguments:
        work: Called with an item and a function to tell plain data with; the last that it tells counts.
        items: The items; they are taken when a process is free for them.
        jobs: How many processes run at once.
        seconds: After how long a process is killed.
        memory: With how many bytes of resident memory a process is killed.

    Yields:
        What came of each item, in the order in which they end.
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
        os._exit(status)  # nothing of the parent's is cleaned up here, its files included


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
