"""Helpers that write Python source in the format of `ruff format` at 120 columns.

In: numbers, names of parameters, expressions. Out: source that the formatter does not change; names of variables, and
templates of names with numbers as fields.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import takewhile

from quack_fx.layout.pattern import joined_name, split_name

WIDTH = 120
INDENT = "    "

_LONG = 60
"""Maximum length, in characters, of a list that is written inline."""


def quoted(text: str, fields: bool = False) -> str:
    """A string literal; an f-string with `fields`, for text with replacement fields."""
    escaped = text.replace("\\", "\\\\")
    quote = "'" if '"' in escaped and "'" not in escaped else '"'
    return ("f" if fields else "") + quote + escaped.replace(quote, "\\" + quote) + quote


def bracketed(depth: int, opening: str, entries: Sequence[str], closing: str) -> list[str]:
    """`opening`, the comma-separated entries, and `closing`, on one line if it fits, else on several.

    Arguments:
        depth: Levels of indentation.
        opening: Text up to and including the bracket, `"x = f("`.
        entries: The text of each entry in the brackets.
        closing: The closing bracket and what follows, `"):"`.
    """
    pad = INDENT * depth
    line = f"{pad}{opening}{', '.join(entries)}{closing}"
    if len(line) <= WIDTH:
        return [line]
    inner = f"{pad}{INDENT}{', '.join(entries)}"
    if len(inner) <= WIDTH and re.search(r"\w\($", opening):  # arguments of a call; other entries get a line each
        return [f"{pad}{opening}", inner, f"{pad}{closing}"]
    return [f"{pad}{opening}", *(f"{pad}{INDENT}{entry}," for entry in entries), f"{pad}{closing}"]


class Tables:
    """Lists in a program: short ones are written inline, long ones become constants.

    Arguments:
        prefix: Prefix of the constants' names.

    Attributes:
        lines: Source lines that define the constants.
    """

    def __init__(self, prefix: str) -> None:
        self.lines: list[str] = []
        self._names: dict[tuple[str, ...], str] = {}
        self._prefix = prefix

    def text(self, entries: Sequence[str]) -> str:
        """A list as an expression."""
        text = f"[{', '.join(entries)}]"
        if len(text) <= _LONG:
            return text
        key = tuple(entries)
        if key not in self._names:
            self._names[key] = name = f"{self._prefix}_{len(self._names) + 1}"
            self.lines += [*bracketed(0, f"{name} = [", entries, "]"), "", ""]
        return self._names[key]


def as_ranges(values: Sequence[int]) -> list[str]:
    """Integers as entries of a list literal; three or more with equal steps become a range: `0, 5, *range(8, 12)`."""
    runs = even_runs(values)
    parts = []
    for run in runs:
        step = run[1] - run[0] if len(run) > 1 else 0
        parts += [f"*{range_of(run)}"] if len(run) > 2 and step > 0 else list(map(str, run))
    return parts


def even_runs(values: Sequence[int]) -> list[list[int]]:
    """Integers split into runs with equal steps."""
    runs: list[list[int]] = []
    for value in values:
        if runs and (len(runs[-1]) < 2 or value - runs[-1][-1] == runs[-1][1] - runs[-1][0]):
            runs[-1].append(value)
        else:
            runs.append([value])
    return runs


def range_of(values: Sequence[int]) -> str:
    """Ascending integers with equal steps as a `range` expression."""
    step = values[1] - values[0]
    start, stop = values[0], values[-1] + step
    if step == 1:
        return f"range({start}, {stop})" if start else f"range({stop})"
    return f"range({start}, {stop}, {step})"


# ---- names -----------------------------------------------------------------------------------------------------------


def name_template(name: str, numbers: list[int]) -> str:
    """A `str.format` template of a name with a field for every number; the numbers are appended to `numbers`."""
    texts, own = split_name(name, inside=True)
    fields = [f"{{{len(numbers) + i}}}" for i in range(len(own))]
    numbers += own
    # Braces are doubled twice: str.format halves them, and so does the f-string in the program.
    return joined_name([text.replace("{", "{{{{").replace("}", "}}}}") for text in texts], fields)


def variable_names(full_names: Sequence[str], reserved: Collection[str], biases: bool = False) -> list[str]:
    """A variable name for every parameter, taken from the module that holds it.

    Arguments:
        full_names: The names, with or without fields.
        reserved: Names that are taken.
        biases: Whether a parameter `bias` of a module gets the name `MODULE_bias`.
    """
    taken = set(reserved)
    names: list[str] = []
    for full_name in full_names:
        path = [re.sub(r"\{.*?\}|\W", "", part).strip("_") for part in full_name.split(".")]
        path = [part for part in path if part and not part.isdigit()] or ["weight"]
        tails = ("weight", "bias") if biases else ("weight",)
        tail = path.pop() if len(path) > 1 and path[-1] in tails else ""
        name = path.pop().removesuffix("_weight")
        name = f"{name}_bias" if tail == "bias" else name
        while path and (name in taken or not name.isidentifier()):
            name = f"{path.pop()}_{name}"
        names.append(unique_name(name if name.isidentifier() else f"w_{name}", taken))
        taken.add(names[-1])
    return names


def unique_name(name: str, taken: Collection[str]) -> str:
    """The name, with a number appended if it is taken."""
    unique, n = name, 2
    while unique in taken:
        unique, n = f"{name}_{n}", n + 1
    return unique


def common_prefix(names: Sequence[str]) -> str:
    """The common module path of all names."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
