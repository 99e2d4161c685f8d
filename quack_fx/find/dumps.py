"""What quack-fx made on the way, as files for whoever works on it.

In: the name of a file and what it is to hold. Out: the file, in the folder that the environment variable QUACK_FX_DUMP
names; nothing where that is not set.

    QUACK_FX_DUMP=out quack-fx inspect model.py     # out/graph.py, and out/NAME.walk.txt for each attention

A training step that is made in the process leaves its program, "program.py".

Names are those of attentions, so that one wrong site is one file. What was done, and why something else was not, goes
to the logger `quack_fx` of Python's logging: each module logs under its own name.
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
    """Whether files are asked for."""
    return bool(os.environ.get(VARIABLE))


def dump(name: str, ending: str, text: Callable[[], str]) -> None:
    """Write a file, if files are asked for.

    A second file of the same name in one process gets a number: "graph-2.py" is the graph of the second search. Where a
    folder cannot be written to, the log says so, and the work goes on.

    Arguments:
        name: What the file is about: the name of an attention, or "" for the root module.
        ending: What is in it: ".walk.txt", ".py".
        text: Makes the text; called only if it is written.
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
