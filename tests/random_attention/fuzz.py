"""Thousands of random models, judged in several processes.

In: numbers of models. Out: a summary on stdout, a line of progress on stderr.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections import Counter

import torch

from .choices import Choices
from .judge import judge

Outcome = tuple[int, str, str]
"""Number of a model, the sort of its verdict, a sentence."""
RIGHT = ("right", "by design")
"""Sorts that are no failures."""
SHOWN = 3
"""Failures of one sort that are told as they come."""


def fuzz(numbers: range, processes: int) -> int:
    """Judge many models in several processes; print a summary."""
    counts: Counter[str] = Counter()
    failed: dict[str, list[Outcome]] = {}
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(processes, alone) as pool:
        for done, (number, sort, text) in enumerate(pool.imap_unordered(outcome, numbers, chunksize=20), 1):
            counts[sort] += 1
            if sort not in RIGHT:
                failed.setdefault(sort, []).append((number, sort, text))
                if len(failed[sort]) <= SHOWN:
                    print(f"\n{sort}: {text}\n    python -m tests.random_attention {number} --small", flush=True)
            if done % 50 == 0 or done == len(numbers):
                print(f"\r{_line(done, len(numbers), counts, start)}", end="", file=sys.stderr, flush=True)
    print(f"\n{_line(len(numbers), len(numbers), counts, start)}")
    for sort, count in counts.most_common():
        examples = " ".join(str(n) for n, _, _ in failed.get(sort, [])[:8])
        print(f"  {count:6}  {sort}  {examples}")
    return 1 if failed else 0


def alone() -> None:
    """One thread: other processes fill the other cores."""
    torch.set_num_threads(1)


def outcome(number: int) -> Outcome:
    """Number, sort and sentence of one model."""
    try:
        verdict = judge(Choices.seeded(number))
    except Exception as error:
        return number, "crash of the generator", f"{type(error).__name__}: {error}"
    text = verdict.differences[0].text if verdict.differences else ""
    return number, verdict.sort, " ".join(text.split())[:300]


def _line(done: int, total: int, counts: Counter[str], start: float) -> str:
    refused = sum(n for sort, n in counts.items() if sort.startswith("refused"))
    crashed = sum(n for sort, n in counts.items() if sort.startswith("crash"))
    wrong = done - counts["right"] - counts["by design"] - refused - crashed
    return (
        f"{done:,} of {total:,} models: {counts['right']:,} right, {counts['by design']:,} refused by design, "
        f"{refused:,} refused, {wrong:,} wrong, {crashed:,} crashed; {time.monotonic() - start:.0f} s"
    )
