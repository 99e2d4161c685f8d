"""A program is run.

In: its text. Out: the module that it is. Tracebacks and debuggers show its lines, by way of `linecache`.
"""

from __future__ import annotations

import linecache
from itertools import count
from types import ModuleType

from quack_fx.find import dump

_numbers = count(1)


def execute(source: str) -> ModuleType:
    """The module of a program.

    Each call makes a module of its own: torch.compile counts what it compiled by function, and gives up after some.

    Arguments:
        source: What `write_program` gave.

    Returns:
        The module; `inspect.getsource` gives its text back.

    Example:
        >>> program = execute(write_program(layout, shapes, "GPT"))
        >>> program.TrainStep(model, optimizer)
    """
    dump("program", ".py", lambda: source)
    name = f"quack_fx_program_{next(_numbers)}"
    module = ModuleType(name)
    module.__file__ = f"<{name}>"
    linecache.cache[module.__file__] = len(source), None, source.splitlines(keepends=True), module.__file__
    exec(compile(source, module.__file__, "exec"), vars(module))
    return module
