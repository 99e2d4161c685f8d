"""Adds QK norms to a model without them, as a baseline for QuacK.

In: a model and its layout, or a graph. Out: an `InsertReport`. An RMS norm with a gain then normalises the queries and
keys of each head, as in Qwen3. `InsertReport.restore` removes the norms again, and so does `strip_qk_norm`.

    modules.py    norms after the projections of a model, in place
    graph.py      norms before the query-key products of a graph, in a copy of it; for all kinds of heads
    operands.py   the nodes at which they are inserted
"""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule

from quack_fx.errors import StripError
from quack_fx.layout import QKLayout
from quack_fx.qk_norm.call import Inputs, refuse_wrapped
from quack_fx.qk_norm.insert.graph import insert_in_graph
from quack_fx.qk_norm.insert.modules import insert_in_modules
from quack_fx.qk_norm.report import InsertReport

__all__ = ["InsertReport", "insert_qk_norm"]


def insert_qk_norm(
    model: nn.Module, layout: QKLayout | None = None, *, eps: float = 1e-6, inputs: Inputs | None = None
) -> InsertReport:
    """Add an RMS norm with a gain to the queries and to the keys of each attention.

    In a model, the norms follow the projections, as in Qwen3: they are submodules `q_norm` and `k_norm` of the modules
    that hold the weights, called by forward hooks of these modules, so that no parameter is renamed. In a graph, they
    directly precede the query-key product, where all features of a head are in one tensor, however they were computed.

    Call it before creating the optimizer: the gains are parameters of the model.

    Arguments:
        model: The model that the layout was found on; or an ATen-level `GraphModule` (from torch.export, make_fx, or
            `quack_fx.capture(..., executable=True)`). A graph is not changed: the report's `model` is a copy with norms
            that shares its other parameters.
        layout: Layout of the model. A graph needs none.
        eps: Added to the mean square by the norms.
        inputs: Example inputs of the forward, a tuple or a dict of keyword arguments. Joint attention, where each kind
            of token has its own projections, gets norms only with them: they distinguish it from sums of projections.

    Returns:
        The new norms, and the layout with them. A site that has a QK norm is left as it is. In a model, so is a site
        where several projections make the heads of one token (MLA, LoRA), or whose weight does not belong to a module
        that multiplies by it (`nn.MultiheadAttention`); use a graph of the model for those.

    Raises:
        StripError: The layout names a parameter that the model does not have, or a model is given without a layout. The
            model is then unchanged.

    Example:
        >>> import torch
        >>> from quack_fx.find import find_qk_pairs
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv = nn.Linear(8, 24)
        ...     def forward(self, x):
        ...         q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        ...         return (q @ k.mT / 2).softmax(-1) @ v
        >>> model = Attention()
        >>> insert_qk_norm(model, find_qk_pairs(model, torch.zeros(1, 3, 8))).inserted
        ('qkv.q_norm', 'qkv.k_norm')
    """
    if isinstance(model, GraphModule):
        return insert_in_graph(model, eps)
    if layout is None:
        raise StripError("give the layout of the model, quack_fx.find_qk_pairs(model, *example_args)")
    refuse_wrapped(model)
    return insert_in_modules(model, layout, eps, inputs)
