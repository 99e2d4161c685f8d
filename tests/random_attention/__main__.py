"""Random models by the thousand, or one by its number.

python -m tests.random_attention 12345               model 12345: decisions, source, truth, what was found
python -m tests.random_attention 12345 --small       the same with as few decisions as fail in the same way
python -m tests.random_attention --models 10000      that many, from a random first one on; exit status 1 if one fails
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence

import torch

from .choices import Choices, shrink
from .judge import Verdict, judge

Outcome = tuple[int, str, str]


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_attention", description=__doc__.splitlines()[0])
    parser.add_argument("number", type=int, nargs="?", help="number of the model to show")
    parser.add_argument(
        "--small", action="store_true", help="make the shown model as small as it fails in the same way"
    )
    parser.add_argument("--models", type=int, default=0, help="how many models to try")
    parser.add_argument("--first", type=int, help="number of the first one; default: random")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    _quietly()
    if options.models:
        first = random.randrange(10**9) if options.first is None else options.first
        return fuzz(range(first, first + options.models), options.processes)
    if options.number is None:
        parser.error("give the number of a model, or --models")
    return show(options.number, options.small)


def _quietly() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


# ---- one model -------------------------------------------------------------------------------------------------------


def show(number: int, small: bool) -> int:
    """Print a model, the truth and what was found."""
    verdict = judge(Choices.seeded(number))
    if small and verdict.differences:
        verdict = smaller(verdict)
    print("\n".join(verdict.lines()))
    return 1 if verdict.differences else 0


def smaller(verdict: Verdict) -> Verdict:
    """A model of fewer decisions that fails in the same way."""

    def fails(numbers: Sequence[int]) -> bool:
        return judge(Choices.replayed(numbers)).sort == verdict.sort

    return judge(Choices.replayed(shrink(verdict.model.choices.numbers, fails)))


# ---- thousands -------------------------------------------------------------------------------------------------------


def fuzz(numbers: range, processes: int) -> int:
    """Judge many models in several processes; print a summary."""
    counts: Counter[str] = Counter()
    failed: dict[str, list[Outcome]] = {}
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(processes, _quietly) as pool:
        for done, (number, sort, text) in enumerate(pool.imap_unordered(outcome, numbers, chunksize=20), 1):
            counts[sort] += 1
            if sort != "right":
                failed.setdefault(sort, []).append((number, sort, text))
                if len(failed[sort]) <= 3:
                    print(f"\n{sort}: {text}\n    python -m tests.random_attention {number} --small", flush=True)
            if done % 50 == 0 or done == len(numbers):
                print(f"\r{_line(done, len(numbers), counts, start)}", end="", file=sys.stderr, flush=True)
    print(f"\n{_line(len(numbers), len(numbers), counts, start)}")
    for sort, count in counts.most_common():
        examples = " ".join(str(n) for n, _, _ in failed.get(sort, [])[:8])
        print(f"  {count:6}  {sort}  {examples}")
    return 0 if counts["right"] == len(numbers) else 1


def outcome(number: int) -> Outcome:
    """Number, sort and sentence of one model."""
    verdict = judge(Choices.seeded(number))
    text = verdict.differences[0].text if verdict.differences else ""
    return number, verdict.sort, " ".join(text.split())[:300]


def _line(done: int, total: int, counts: Counter[str], start: float) -> str:
    refused = sum(n for sort, n in counts.items() if sort.startswith("refused"))
    crashed = sum(n for sort, n in counts.items() if sort.startswith("crash"))
    wrong = done - counts["right"] - refused - crashed
    return (
        f"{done:,} of {total:,} models: {counts['right']:,} right, {refused:,} refused, {wrong:,} wrong, "
        f"{crashed:,} crashed; {time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
