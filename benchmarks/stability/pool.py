"""Runs many trainings in a few processes, on a CPU with one thread each.

In: runs, and the file of their results. Out: that file, with a line for each run as soon as it is done; progress and
remaining time on stderr.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn

from benchmarks.stability.grid import Run, Setup
from benchmarks.stability.records import Record, Records
from benchmarks.stability.text import Text
from benchmarks.stability.train import Result, train

_console = Console(stderr=True, highlight=False)


def run_all(runs: Sequence[Run], records: Records, setup: Setup, text: Text, jobs: int, minutes: float | None) -> int:
    """Do the runs that are not in the file yet.

    Arguments:
        runs: All runs, in order.
        records: The file of results.
        setup: Settings that all runs share.
        text: The training text.
        jobs: Number of processes.
        minutes: Time limit, after which active runs write a checkpoint and stop; None for no limit.

    Returns:
        Number of failed runs; they are tried again next time.
    """
    done = {record.run.key for record in records}
    waiting = [run for run in runs if run.key not in done]
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    # Background jobs of a shell ignore SIGINT, so SIGTERM also raises KeyboardInterrupt.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed, under_way = 0, dict[Future[Result | None], Run]()
    with _processes(jobs, setup, text) as (pool, stop), _bar(len(runs), len(runs) - len(waiting)) as (progress, told):
        queue = iter(waiting)

        def fill() -> None:
            while len(under_way) < jobs and not stop.is_set() and (run := next(queue, None)) is not None:
                under_way[pool.submit(_work, run, str(records.checkpoint(run)))] = run

        fill()
        while under_way:
            try:
                timeout = None if deadline is None or stop.is_set() else max(0.0, deadline - time.monotonic())
                ended, _ = wait(under_way, timeout, FIRST_COMPLETED)
            except KeyboardInterrupt:  # or SIGTERM: active runs write a checkpoint
                stop.set()
                continue
            if not ended:
                stop.set()
            for future in ended:
                run = under_way.pop(future)
                if future.exception() is not None:
                    failed += 1
                    error = "".join(traceback.format_exception(future.exception()))
                    _console.print(f"{run.key} failed:\n{error}", markup=False)
                elif (result := future.result()) is not None:
                    records.add(Record(run, result))
                    progress.advance(told)
                    progress.update(told, left=_left(progress.tasks[told]))
                    _console.print(_line(run, result), markup=False, soft_wrap=True)
            fill()
    left = len(waiting) - sum(record.run.key not in done for record in records)
    if left:
        _console.print(f"{left} of {len(runs)} runs are left; the same command goes on with them")
    return failed


@contextmanager
def _processes(jobs: int, setup: Setup, text: Text) -> Iterator[tuple[ProcessPoolExecutor, Event]]:
    """Worker processes, and the event that stops them."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(jobs, context, _start, (setup, text, stop)) as pool:
        yield pool, stop


_setup: Setup
_text: Text
_stop: Event


def _start(setup: Setup, text: Text, stop: Event) -> None:
    """Initialise a worker process."""
    global _setup, _text, _stop
    _setup, _text, _stop = setup, text, stop
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # the parent process stops this one
    torch.set_num_threads(1)


def _work(run: Run, checkpoint: str) -> Result | None:
    """Do one run, in a worker process."""
    return train(run, _setup, _text, Path(checkpoint), _stop.is_set)


@contextmanager
def _bar(total: int, done: int) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar, on a terminal."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=_console, disable=not _console.is_terminal) as progress:
        yield progress, progress.add_task("runs", total=total, completed=done, begun=done, left="")


def _left(task: Task) -> str:
    """The remaining time, estimated from the runs so far."""
    each = (task.elapsed or 0.0) / (task.completed - task.fields["begun"])
    seconds = each * ((task.total or 0.0) - task.completed)
    return f"about {int(seconds // 3600)}:{int(seconds % 3600 // 60):02} h left"


def _line(run: Run, result: Result) -> str:
    end = f"diverged at step {result.diverged}" if result.diverged is not None else f"loss {result.loss:.3f}"
    return f"{run.key}: {end}, largest logit {result.largest:.4g}, {result.seconds:.0f} s"
