"""USER: small pieces of Python source, laid out the way `ruff format` lays them out at 120 columns.

In: numbers, names, expressions. Out: text that a formatter leaves alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from quack_fx.train.program.text import INDENT, bracketed, even_runs, range_of


def linear(terms: Mapping[str, int], constant: int) -> str:
    """A sum: `linear({"h": 64, "g": -1}, 32)` is "64 * h - g + 32"."""
    parts: list[tuple[int, str]] = [
        (factor, name if abs(factor) == 1 else f"{abs(factor)} * {name}") for name, factor in terms.items() if factor
    ]
    if constant or not parts:
        parts.append((constant, str(abs(constant))))
    text = ""
    for sign, part in parts:
        text += (" - " if sign < 0 else " + ") + part
    return text[3:] if parts[0][0] >= 0 else "-" + text[3:]


def slice_of(*ends: str) -> str:
    """`start:stop` or `start:stop:step`, with spaces around the colons if one is more than a name or a number."""
    return (":" if all(end.isalnum() for end in ends) else " : ").join(ends)


def loop(depth: int, variable: str, values: Sequence[int]) -> list[str]:
    """`for variable in ...:` over ascending integers: a range if they are evenly spaced, else a tuple."""
    runs = even_runs(values)
    if len(runs) == 1 and len(values) > 1:
        return [f"{INDENT * depth}for {variable} in {range_of(values)}:"]
    entries = [str(value) for value in values]
    if len(entries) > 12:
        entries = [text for run in runs for text in ([f"*{range_of(run)}"] if len(run) > 2 else map(str, run))]
    return bracketed(depth, f"for {variable} in (", entries, ",):" if len(entries) == 1 else "):")
