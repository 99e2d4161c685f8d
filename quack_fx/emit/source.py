"""USER: small pieces of Python source, laid out the way `ruff format` lays them out at 120 columns.

In: numbers, names, expressions. Out: text that a formatter leaves alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

WIDTH = 120
INDENT = "    "


def quoted(text: str, fields: bool = False) -> str:
    """A string literal; an f-string where `fields` says that the text holds replacement fields."""
    escaped = text.replace("\\", "\\\\")
    quote = "'" if '"' in escaped and "'" not in escaped else '"'
    return ("f" if fields else "") + quote + escaped.replace(quote, "\\" + quote) + quote


def bracketed(depth: int, opening: str, entries: Sequence[str], closing: str) -> list[str]:
    """`opening`, the entries with commas between them, `closing`: on one line if it fits, else on several.

    Arguments:
        depth: Levels of indentation.
        opening: Text up to and including the bracket, `"x = f("`.
        entries: What stands in the brackets.
        closing: The closing bracket and what follows, `"):"`.
    """
    pad = INDENT * depth
    line = f"{pad}{opening}{', '.join(entries)}{closing}"
    if len(line) <= WIDTH:
        return [line]
    inner = f"{pad}{INDENT}{', '.join(entries)}"
    if len(inner) <= WIDTH and re.search(r"\w\($", opening):  # the arguments of a call; other entries go one a line
        return [f"{pad}{opening}", inner, f"{pad}{closing}"]
    return [f"{pad}{opening}", *(f"{pad}{INDENT}{entry}," for entry in entries), f"{pad}{closing}"]


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
    runs: list[list[int]] = []
    for value in values:
        if runs and (len(runs[-1]) < 2 or value - runs[-1][-1] == runs[-1][1] - runs[-1][0]):
            runs[-1].append(value)
        else:
            runs.append([value])
    if len(runs) == 1 and len(values) > 1:
        return [f"{INDENT * depth}for {variable} in {_range(values)}:"]
    entries = [str(value) for value in values]
    if len(entries) > 12:
        entries = [text for run in runs for text in ([f"*{_range(run)}"] if len(run) > 2 else map(str, run))]
    return bracketed(depth, f"for {variable} in (", entries, ",):" if len(entries) == 1 else "):")


def _range(values: Sequence[int]) -> str:
    """An evenly spaced sequence as a range."""
    step = values[1] - values[0]
    start, stop = values[0], values[-1] + step
    if step == 1:
        return f"range({start}, {stop})" if start else f"range({stop})"
    return f"range({start}, {stop}, {step})"
