"""Adds QK norms to an ATen graph, before the product of queries and keys.

In: a `GraphModule` of ATen ops. Out: an `InsertReport` whose `model` is a copy of the graph with norms; it shares its
other parameters with the original, which is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quack_fx.find import find_in_graph, pairs_of
from quack_fx.graph.copies import copy_graph
from quack_fx.layout import SIDES, AttentionSite, QKLayout
from quack_fx.qk_norm.insert.operands import Operand, find_operands
from quack_fx.qk_norm.report import InsertReport, LeftSite


def insert_in_graph(graph_module: GraphModule, eps: float) -> InsertReport:
    """Add an RMS norm with a gain to the queries and the keys of each attention, in a copy of a graph.

    Returns:
        The report; its model is the graph itself if no norm can be added.
    """
    layout, operands, reasons = find_operands(graph_module)
    reasons |= {i: "it has a QK norm" for i, site in enumerate(layout.sites) if site.qk_norm}
    while True:
        writing = _Writing(graph_module, eps)
        for i, site in enumerate(layout.sites):
            if i not in reasons:
                writing.put_on(i, site, operands[i])
        left = tuple(LeftSite(layout.sites[i].name, reason) for i, reason in sorted(reasons.items()))
        if not writing.norms:
            return InsertReport((), left, layout, graph_module)
        model = writing.done()
        found = find_in_graph(model, all_names=[name for name, _ in model.named_parameters()])
        unseen = _unseen(layout, found, writing.norms)
        if not unseen:
            return InsertReport(tuple(writing.norms), left, found, model)
        reasons |= dict.fromkeys(unseen, "a norm before its product is not seen as a QK norm there")


def _unseen(layout: QKLayout, found: QKLayout, norms: Mapping[str, int]) -> set[int]:
    """Indices of sites whose new norms the finder does not recognise as QK norms."""
    sites = {pairs_of(site): {norm.weight for norm in site.qk_norm} for site in found.sites}
    return {
        place
        for name, place in norms.items()
        if f"{name}.weight" not in sites.get(pairs_of(layout.sites[place]), set[str | None]())
    }


class _Writing:
    """A copy of a graph to which norms are added."""

    def __init__(self, graph_module: GraphModule, eps: float) -> None:
        self._graph, self._copy = copy_graph(graph_module)
        self._model = GraphModule(graph_module, self._graph).train(graph_module.training)
        self._eps = eps
        self.norms: dict[str, int] = {}
        """Names of the norms, each with the index of its site."""

    def put_on(self, place: int, site: AttentionSite, operands: Sequence[Operand]) -> None:
        """Add norms to all operands of a site; those of one side share a gain."""
        names = {side: self._add_norm(site, f"{side[0]}_norm") for side in SIDES}
        self.norms |= dict.fromkeys(names.values(), place)
        for operand in dict.fromkeys(operands):
            self._norm(operand, names[operand.side])

    def done(self) -> GraphModule:
        self._graph.lint()
        self._model.recompile()
        return self._model

    def _add_norm(self, site: AttentionSite, wanted: str) -> str:
        """Add the module with the gain, on the device and in the dtype of the site's weights, under an unused name."""
        taken = {name for name, _ in self._model.named_modules()}
        wanted = ".".join(filter(None, (site.name, wanted)))
        names = (wanted if n == 0 else f"{wanted}_{n}" for n in count())
        name = next(name for name in names if name not in taken)
        like = self._model.get_parameter(site.query[0].param)
        norm = nn.RMSNorm(site.head_dim, eps=self._eps, device=like.device, dtype=like.dtype)
        self._model.add_submodule(name, norm.train(self._model.training))
        return name

    def _norm(self, operand: Operand, name: str) -> None:
        """Insert a norm before one node.

        It is written in elementwise ops: they keep the strides that a later view op may rely on, which the fused op
        does not.
        """
        aten, axis, x = torch.ops.aten, operand.axis, self._copy[operand.x]
        value, reader = operand.x.meta["val"], self._copy[operand.reader]
        stack = operand.reader.meta.get("nn_module_stack")

        def made(op: Any, *args: Any, **kwargs: Any) -> Node:
            node = self._graph.call_function(op, args, kwargs)
            values = map_arg((args, kwargs), lambda n: n.meta["val"].to("meta"))
            node.meta = {"val": op(*values[0], **values[1]), "nn_module_stack": stack}
            return node

        with self._graph.inserting_before(reader):
            gain = self._graph.get_attr(f"{name}.weight")
            gain.meta = {"val": self._model.get_parameter(f"{name}.weight"), "nn_module_stack": stack}
            exact = torch.promote_types(value.dtype, torch.float32)
            wide = x if value.dtype == exact else made(aten._to_copy.default, x, dtype=exact)
            if value.shape[axis] != operand.width:
                wide = made(
                    aten.view.default,
                    wide,
                    [*value.shape[:axis], -1, operand.width, *value.shape[len(value.shape) + axis + 1 :]],
                )
            mean = made(aten.mean.dim, made(aten.mul.Tensor, wide, wide), [axis], True)
            root = made(aten.rsqrt.default, made(aten.add.Tensor, mean, self._eps))
            normed = made(aten.mul.Tensor, wide, root)
            if value.dtype != exact:
                normed = made(aten._to_copy.default, normed, dtype=value.dtype)
            if value.dtype != gain.meta["val"].dtype:
                gain = made(aten._to_copy.default, gain, dtype=value.dtype)
            if axis != -1:
                gain = made(aten.view.default, gain, [-1] + [1] * (-axis - 1))
            normed = made(aten.mul.Tensor, normed, gain)
            if value.shape[axis] != operand.width:
                normed = made(aten.view.default, normed, list(value.shape))

        reader.replace_input_with(x, normed)
