"""Norms: single ops, and features multiplied with or divided by a statistic of themselves."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor
from torch.fx import Node

from quack_fx.find.provenance.flow import Flow, NormOp, NormTag, Statistic, merged_flow
from quack_fx.find.provenance.labels import UNKNOWN, shrink
from quack_fx.find.provenance.rules.step import Step
from quack_fx.find.provenance.rules.weights import with_weights
from quack_fx.layout import NormKind

ADDING = frozenset("add sub rsub cat stack where lerp addcmul copy index_put".split())
LINEAR = frozenset(
    "add sub neg mul div rsub where masked_fill dropout native_dropout lerp addcmul addcdiv positive clone".split()
)
_NORM_INDEX = {"layer_norm": "layer", "rms_norm": "rms", "group_norm": "layer", "batch_norm": "batch"}
_BOUNDS = frozenset("clamp clamp_min clamp_max minimum maximum".split())


def norm_op(step: Step) -> Flow:
    """Rule for a norm that is a single op."""
    df, node = step.df, step.node
    x = step.input(node.args[0])  # type: ignore[arg-type]
    name = df.op[node].name
    kind: NormKind = next((k for mark, k in _NORM_INDEX.items() if mark in name), "other")  # type: ignore[misc]
    shape = x.label.shape
    if kind in ("layer", "rms") and "group" not in name:
        width = math.prod(node.args[1])  # type: ignore[arg-type]
    else:
        width = shape[1:].numel() if len(shape) > 1 else 1
    gain = next((n for n in node.args[1:] if isinstance(n, Node) and df.is_weight(n)), None)
    here = (*x.centring, NormOp(node, node.args[0]))  # type: ignore[arg-type]
    features = frozenset(step.labels.features(x.label))
    tag = NormTag(kind, int(width), _module_of(step, x), _weight_name(step, gain), features, here)
    return replace(x, norms=(*x.norms, tag), statistic=None, centring=())


def of_statistics(step: Step, name: str, flows: list[Flow]) -> Flow:
    """Flow of an op on statistics only; a sum may still be used as features."""
    shape = step.df.shape(step.node)
    statistics = [f.statistic for f in flows if f.statistic is not None]
    joined = Statistic(
        frozenset().union(*(s.features for s in statistics)),
        frozenset({"clip" if _clips(step, name) else name}).union(*(s.ops for s in statistics)),
        max(s.width for s in statistics),
    )
    apart = len(flows) == 1 or name in ADDING
    label = step.labels.union([f.label for f in flows], shape) if apart else step.full(UNKNOWN)
    if UNKNOWN in step.labels.features(label):
        return Flow(step.full(UNKNOWN), statistic=joined)
    result = replace(merged_flow(flows), label=shrink(label), statistic=joined)
    return with_weights(step, name, result if name in LINEAR else replace(result, ops=result.ops | {name}), None)


def with_statistics(
    step: Step, name: str, flow: Flow, statistics: list[Statistic], features: frozenset[int], x: Node | None
) -> Flow:
    """Combine features with statistics.

    Multiplying or dividing by their own statistic is a norm, or a clip if the statistic is clamped. Adding or
    subtracting their own is centering, and another's makes them unknown. So does multiplying by a statistic of other
    projections alone, which is a gate. Any other op makes the scale unknown.
    """
    here = NormOp(step.node, x)
    for statistic in statistics:
        own = statistic.features <= features
        if name in ("add", "sub", "rsub") and statistic.ops & {"cumsum", "cumprod"}:
            flow = replace(flow, label=step.full(UNKNOWN))  # a running sum of other logits, not a maximum or mean
        elif name in ("add", "sub", "rsub"):
            if own:
                flow = replace(flow, ops=flow.ops | {"centre"}, centring=(*flow.centring, here))
            else:
                flow = replace(flow, label=step.full(UNKNOWN))
        elif own and name in ("mul", "div") and "clip" in statistic.ops:
            flow = replace(flow, scale=None, ops=flow.ops | {"clip"})
        elif own and name in ("mul", "div"):
            kind = _kind(statistic.ops, flow.ops)
            ops = (*flow.centring, here)
            tag = NormTag(kind, statistic.width, _module_of(step, flow), features=statistic.features, ops=ops)
            flow = replace(flow, norms=(*flow.norms, tag), ops=flow.ops - {"centre"}, centring=())
        elif name in ("mul", "div") and not statistic.features & (features | {UNKNOWN}):
            flow = replace(flow, label=step.full(UNKNOWN))
        else:
            flow = replace(flow, scale=None)
    return flow


def _clips(step: Step, name: str) -> bool:
    """Whether a statistic is clamped by more than an epsilon, so that short vectors are left unchanged."""
    if name not in _BOUNDS:
        return False
    given = [*step.node.args[1:], *step.node.kwargs.values()]
    known = [step.df.constant(b) if isinstance(b, Node) else b for b in given]
    bounds = [float(b) for b in known if isinstance(b, int | float) or (isinstance(b, Tensor) and b.numel() == 1)]
    return any(1e-2 < abs(bound) < 1e2 for bound in bounds)


def _module_of(step: Step, x: Flow) -> str | None:
    """Module that computes the norm: the innermost one, if it does not also run the projection."""
    df = step.df
    around: set[str] = set()
    for feature in step.labels.features(x.label) - {UNKNOWN}:
        if step.outside == UNKNOWN:
            around.update(df.modules(step.projections.by_feature(feature)[0].node))
        break
    own = [m for m in df.modules(step.node) if m not in around]
    return own[-1] if own else None


def _weight_name(step: Step, node: Node | None) -> str | None:
    names = step.projections.weight_names(node) if node is not None else ()
    return names[0] if len(names) == 1 else None


def _kind(statistic: frozenset[str], ops: frozenset[str]) -> NormKind:
    """Kind of norm that a product with a statistic is."""
    if statistic & {"var", "std", "var_mean", "std_mean"} or "centre" in ops or "centre" in statistic:
        return "layer"
    if statistic & {"linalg_vector_norm", "norm"}:
        return "l2"
    if "mean" in statistic:
        return "rms"
    return "l2" if "sum" in statistic else "other"
