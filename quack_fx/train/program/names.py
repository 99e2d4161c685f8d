"""Parameter names in a program: templates with numbers as fields, variables, common prefixes.

In: fully qualified names. Out: templates, identifiers, prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import takewhile

from quack_fx.layout.pattern import joined_name, split_name


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
