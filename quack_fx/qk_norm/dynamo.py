"""A torch.compile backend that removes QK norms from Dynamo's graphs.

In: a Dynamo graph and its example inputs. Out: the graph without its QK norms, compiled by another backend (Inductor by
default). Installed as a `torch_dynamo_backends` entry point:

    torch.compile(model, backend="quack_fx")
    torch.compile(model, backend="quack_fx", options={"backend": "aot_eager", "gain": "keep", "scale": "keep"})

A graph without QK norms is passed on unchanged. The logger "quack_fx" logs what was removed from each graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from quack_fx.errors import StripError, first_line
from quack_fx.find import own_parameters
from quack_fx.qk_norm.report import StripReport
from quack_fx.qk_norm.strip.graph import strip_graph

_CHOICES = {"gain": ("drop", "keep"), "scale": ("restore", "keep")}
_log = logging.getLogger("quack_fx")


def quack_fx(
    graph_module: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a Dynamo graph without its QK norms.

    Arguments:
        graph_module: The graph; weights are among its inputs.
        example_inputs: Its inputs.
        options: "backend": the backend that compiles the graph, "inductor" by default. "gain" and "scale": as in
            `strip_qk_norm`. All others are passed to that backend.

    Returns:
        The compiled graph.

    Raises:
        StripError: An option is unknown, or the graph cannot be analysed, so that a norm could go undetected.
    """
    rest = dict(options or {})
    backend = rest.pop("backend", "inductor")
    chosen = {name: rest.pop(name, choices[0]) for name, choices in _CHOICES.items()}
    for name, choice in chosen.items():
        if choice not in _CHOICES[name]:
            known = " or ".join(map(repr, _CHOICES[name]))
            raise StripError(f"option {name}={choice!r} of the backend quack_fx is not known; use {known}")
    report = _strip(graph_module, example_inputs, chosen)
    for note in (*(f"{one.site!r} keeps its QK norms: {one.reason}" for one in report.left), *report.notes):
        _log.warning("%s", note)
    if report.removed:
        _log.info("took %d QK norms out of a graph of %d nodes", len(report.removed), len(graph_module.graph.nodes))
    compiler = torch._dynamo.lookup_backend(backend)
    stripped: Any = report.model if report.removed else graph_module
    return compiler(stripped, list(example_inputs), **({"options": rest} if rest else {}))


def _strip(graph_module: GraphModule, example_inputs: Sequence[Any], chosen: Mapping[str, str]) -> StripReport:
    """Trace a graph to ATen ops, before autograd, and remove its norms."""
    if any(isinstance(x, torch.SymInt) for x in example_inputs):
        raise StripError("the backend quack_fx needs fixed shapes; use torch.compile(..., dynamic=False)")
    try:
        # Dynamo's own fake tensors: new ones would have symbolic sizes.
        given = zip(graph_module.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
        fakes = [node.meta.get("example_value", x) for node, x in given]
        aten = make_fx(graph_module, tracing_mode="fake", pre_dispatch=True)(*fakes)
    except Exception as error:
        raise StripError(f"a graph of the model cannot be written in ATen ops: {first_line(error)}") from error
    given = zip(aten.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
    weights = {node: node.name for node, x in given if isinstance(x, nn.Parameter)}
    return strip_graph(
        aten,
        weights=weights | own_parameters(aten),
        keep_gain=chosen["gain"] == "keep",
        restore_scale=chosen["scale"] == "restore",
    )


__all__ = ["quack_fx"]
