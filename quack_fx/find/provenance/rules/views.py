"""View ops, run on labels, and getitem nodes, which take one of several results."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.fx import Node

from quack_fx.find.provenance.flow import Flow, merged_flow
from quack_fx.find.provenance.labels import NOTHING, UNKNOWN, shrink
from quack_fx.find.provenance.rules.reductions import pooled, reduction
from quack_fx.find.provenance.rules.step import Step
from quack_fx.find.provenance.views import run_view


def view(step: Step) -> Flow:
    """Rule for view ops: the same features at other indices."""
    df, node, labels = step.df, step.node, step.labels
    name = df.op[node].name
    given = node.all_input_nodes[:1] if name.endswith("_as") else node.all_input_nodes  # the other only gives a shape
    sources = [step.input(n) for n in given if _is_data(step, n)]
    if name == "view_as_complex":
        label = step.input(node.args[0]).label  # type: ignore[arg-type]
        return replace(sources[0], label=labels.union_along(label, [-1]).squeeze(-1))
    if name == "view_as_real":
        label = step.input(node.args[0]).label  # type: ignore[arg-type]
        return replace(sources[0], label=label.unsqueeze(-1).expand(df.shape(node)))
    if name in ("real", "imag", "_conj", "conj"):
        return sources[0]
    if isinstance(df.value(node), list | tuple):
        return replace(merged_flow(sources), label=step.full(NOTHING))  # `part` handles its results
    try:
        alias = df.group[node] in df.writes and df.group[node] is not node
        label = run_view(df, node, lambda n: step.input(n).label, UNKNOWN, alias)
    except (RuntimeError, TypeError, IndexError, ValueError):
        return step.unknown()
    if not isinstance(label, Tensor) or label.shape != df.shape(node):
        return step.unknown()
    if df.group[node] not in df.writes:
        label = shrink(label)
    return replace(merged_flow(sources), label=label)


def _is_data(step: Step, node: Node) -> bool:
    """Whether an argument is the data of a view op rather than an index."""
    return node in step.df.activation or step.df.group[node] in step.df.writes


def part(step: Step) -> Flow:
    """Rule for getitem: one of several results."""
    df, node = step.df, step.node
    whole: Node = node.args[0]  # type: ignore[assignment]
    i: int = node.args[1]  # type: ignore[assignment]
    if df.op[whole].kind == "view":
        parts = run_view(df, whole, lambda n: step.input(n).label, UNKNOWN, df.group[whole] in df.writes)
        return replace(step.input(whole), label=parts[i])
    if df.op[whole].kind == "norm" and i == 0:
        return step.input(whole)
    if df.op[whole].name in ("native_dropout", "_fused_dropout") and i == 0:
        return step.input(whole)
    if df.op[whole].kind == "reduction" and whole in step.flows:
        return reduction(step, whole, i)
    if df.op[whole].kind == "pooling" and i == 0:
        return pooled(step, whole)
    if df.op[whole].kind == "elementwise" and whole in step.flows:
        if step.input(whole).empty:
            return step.nothing()
        if i == 0 and step.input(whole).label.shape == df.shape(node):
            return step.input(whole)
    return step.unknown() if whole in step.flows else Flow(step.full(step.outside))
