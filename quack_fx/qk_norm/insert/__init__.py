"""QK norm into a model that has none, so that it can be compared with QuacK on one's own model.

In: a model and its layout, or a graph. Out: an `InsertReport`; queries and keys pass an RMS norm with a gain, head by
head, as in Qwen3. `InsertReport.restore` takes the norms out again, and so does `strip_qk_norm`.

    modules.py   norms behind the projections of a model, in place; streams.py tells heads that several of them make
    graph.py     norms before the products of a graph, in a copy of it: for heads of any make; operands.py says where
    report.py    the account that both ways give
"""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule

from quack_fx.errors import StripError
from quack_fx.layout import QKLayout
from quack_fx.qk_norm.call import Inputs
from quack_fx.qk_norm.insert.graph import insert_in_graph
from quack_fx.qk_norm.insert.modules import insert_in_modules
from quack_fx.qk_norm.insert.report import InsertReport
from quack_fx.qk_norm.wrapped import refuse_wrapped

__all__ = ["InsertReport", "insert_qk_norm"]


def insert_qk_norm(
    model: nn.Module, layout: QKLayout | None = None, *, eps: float = 1e-6, inputs: Inputs | None = None
) -> InsertReport:
    """Put an RMS norm with a gain on the queries and on the keys of each attention.

    In a model the norms stand right behind the projections, as in Qwen3: submodules `q_norm` and `k_norm` of the
    modules that hold the weights, called by hooks on those, so that no name of a parameter changes. In a graph they
    stand right before the product, where all features of a head are together however they came about.

    Do it before the optimizer is built: the gains are parameters of the model.

    Arguments:
        model: The model that the layout was found on; or an ATen-level `GraphModule` (of torch.export, of make_fx, of
            `quack_fx.capture(..., executable=True)`). A graph is not changed: the report's `model` has the norms, and
            its other parameters are those of the original.
        layout: Layout of the model. A graph needs none.
        eps: What the norms add to the mean square.
        inputs: Example inputs of the forward, a tuple or a dict of named ones. With them, joint attention (each kind of
            token has projections of its own) is told from heads that are sums of projections, and gets its norms, too.

    Returns:
        Where norms are now, and the layout with them. A site is left as it is where it has a QK norm. In a model also
        where its heads are put together in one token from more than one projection (MLA, LoRA), or a weight is not that
        of a module which multiplies with it (`nn.MultiheadAttention`): take a graph for those.

    Raises:
        StripError: The layout names a parameter that the model does not have, or a model comes without a layout. The
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
