"""The lines of the model's own Python that run an op.

In: the call stack, while an op is recorded. Out: those frames of it that are neither torch's nor ours, in the form of
`Node.stack_trace` as torch.export writes it.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch

_FOREIGN = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[2]))
_MOST = 5
"""Innermost frames that are kept."""


def own_lines() -> str:
    """The innermost frames of the model's code, the innermost last."""
    frame, found = sys._getframe(1), list[traceback.FrameSummary]()
    while frame.f_back is not None and len(found) < _MOST:
        frame = frame.f_back
        code = frame.f_code
        if not code.co_filename.startswith(_FOREIGN):
            found.append(traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name))
    return "".join(traceback.StackSummary.from_list(found[::-1]).format())
