"""A copy of a model with QK norm, to compare with.

In: a model and its layout, optionally the arguments of its forward. Out: a model with RMS QK norms, or the reason why
they cannot be added.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from quack_fx.errors import CaptureError
from quack_fx.graph.capture import capture
from quack_fx.layout import QKLayout
from quack_fx.qk_norm.insert import InsertReport, insert_qk_norm


def with_qk_norm(
    model: nn.Module, layout: QKLayout, inputs: tuple[Sequence[Any], Mapping[str, Any]] | None = None
) -> nn.Module | str:
    """A copy of a model with an RMS norm on the queries and the keys of its attentions.

    Arguments:
        model: The model; it is not changed.
        layout: Its layout.
        inputs: Positional and keyword arguments of the forward. They are needed for attentions with heads from more
            than one projection (MLA), which get their norms in a graph of the model with these input sizes.

    Returns:
        The model with norms on all attentions, or the reason why one cannot have them.
    """
    normed = copy.deepcopy(model)
    report = insert_qk_norm(normed, layout)
    reason = _lacking(report)
    if reason is None or inputs is None:
        return normed if reason is None else reason
    report.restore()
    try:
        graph = capture(normed, *inputs, executable=True).graph_module
    except CaptureError as error:
        return str(error)
    report = insert_qk_norm(graph)
    reason = _lacking(report)
    return report.model if reason is None else reason


def _lacking(report: InsertReport) -> str | None:
    """Why an attention still has no QK norm; None if all have one."""
    bare = {site.name for site in report.layout.sites if not site.qk_norm}
    if bare:
        return next(left.reason for left in report.left if left.site in bare)
    return None if report.layout.sites else "it has no attention"
