"""Random models by the thousand, or one by its number.

python -m tests.random_attention 12345               model 12345: decisions, source, truth, what was found
python -m tests.random_attention 12345 --small       the same with as few decisions as fail in the same way
python -m tests.random_attention --models 10000      that many, from a random first one on; exit status 1 if one fails
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

from .choices import Choices, shrink
from .fuzz import alone, fuzz
from .judge import Verdict, judge


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
    alone()
    if options.models:
        first = random.randrange(10**9) if options.first is None else options.first
        return fuzz(range(first, first + options.models), options.processes)
    if options.number is None:
        parser.error("give the number of a model, or --models")
    return show(options.number, options.small)


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


if __name__ == "__main__":
    sys.exit(main())
