"""Runs the source of a program as a module.

In: the source. Out: the module. Its source is in `linecache`, so tracebacks and debuggers show it.
"""

from __future__ import annotations

import linecache
from itertools import count
from types import ModuleType

from quack_fx.find import dump

_numbers = count(1)


def execute(source: str) -> ModuleType:
    """Run the source of a program.

    Each call creates a new module, because torch.compile limits recompilations per code object.

    Arguments:
        source: The source, from `write_program`.

    Returns:
        The module; `inspect.getsource` returns its source.

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
