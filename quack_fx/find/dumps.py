"""Write intermediate results to files, for debugging.

In: a file name and a text. Out: the file, in the folder that the environment variable QUACK_FX_DUMP names; nothing if
it is not set.

    QUACK_FX_DUMP=out quack-fx inspect model.py     # out/graph.py, and out/NAME.walk.txt for each attention

NAME is the attention's name, so a wrong site has one file. A training step made in the process writes "program.py".
Decisions and their reasons go to Python's logging under `quack_fx`; each module logs under its own name.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

VARIABLE = "QUACK_FX_DUMP"

_log = logging.getLogger(__name__)
_written: Counter[Path] = Counter()


def dumping() -> bool:
    """Whether QUACK_FX_DUMP is set."""
    return bool(os.environ.get(VARIABLE))


def dump(name: str, ending: str, text: Callable[[], str]) -> None:
    """Write a file if QUACK_FX_DUMP is set.

    A second file of the same name in one process gets a number: "graph-2.py" is the graph of the second search. If
    the folder cannot be written to, a warning is logged and execution continues.

    Arguments:
        name: Stem of the file name, for example the name of an attention; "" becomes "root".
        ending: Rest of the file name: ".walk.txt" or ".py".
        text: Function that returns the text; called only if the file is written.
    """
    if not dumping():
        return
    folder = Path(os.environ[VARIABLE]).expanduser()
    stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in name) or "root"
    first = folder / (stem + ending)
    _written[first] += 1
    path = first if _written[first] == 1 else folder / f"{stem}-{_written[first]}{ending}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text(), "utf-8")
    except OSError as error:
        _log.warning("%s=%s: %s cannot be written: %s", VARIABLE, folder, path.name, error.strerror)
    else:
        _log.debug("wrote %s", path)
