"""The gain of each QK norm, per row of the projection before it.

In: a model and example inputs. Out: for each norm module, the factor and the offset that its gain and bias apply to the
feature of each weight row; or the reason why there are none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from quack_fx.find import Attentions, NormOp, NormTag, Projection, attentions_of
from quack_fx.graph.dataflow import Dataflow
from quack_fx.graph.ops import arguments_of, channels_first, op_of
from quack_fx.graph.walk import walk
from quack_fx.qk_norm.report import Left

Place = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A weight row: its parameter, the axes that count rows, its index along each."""


@dataclass(frozen=True, slots=True)
class RowGain:
    """What a norm does to the feature of one row after the division by its statistic: factor and offset.

    `bias` is the bias of the projection, or None.
    """

    factor: float
    offset: float
    bias: str | None


def gain_rows(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, dict[Place, RowGain] | str]:
    """The gains of every QK norm module by weight row, or the reason why a module has none."""
    attentions, found = attentions_of(model, args, kwargs), dict[str, dict[Place, RowGain] | str]()
    for _, _, heads in attentions.understood():
        for tags in heads.norms:
            for tag in tags:
                known = found.setdefault(str(tag.module), {})
                if isinstance(known, str):
                    continue
                try:
                    if len({t.module for t in tags if t.features & tag.features}) > 1:
                        raise Left("more than one norm follows its projection")
                    _add(known, _rows(attentions, attentions.tracer.df, tag))
                except Left as reason:
                    found[str(tag.module)] = str(reason)
    return found


def _add(known: dict[Place, RowGain], rows: dict[Place, RowGain]) -> None:
    for place, gain in rows.items():
        if known.setdefault(place, gain) != gain:
            raise Left(f"a row of {place[0]!r} meets two different gains")


def _rows(attentions: Attentions, df: Dataflow, tag: NormTag) -> dict[Place, RowGain]:
    """The rows whose features a norm normalises, and the gain of each."""
    last = tag.ops[-1]
    if last.x is None:
        raise Left("its features come from several tensors")
    label = attentions.tracer.trace([last.x])[last.x].label
    factor, offset = torch.ones(label.shape), torch.zeros(label.shape)
    for op, value in _applied(df, last, tag.gains, label.shape):
        if op == "add":
            offset = offset + value
        else:
            factor, offset = (factor / value, offset / value) if op == "div" else (factor * value, offset * value)
    features, where = torch.unique(label.reshape(-1), return_inverse=True)
    labels, projections = attentions.tracer.labels, attentions.tracer.projections
    rows: dict[Place, RowGain] = {}
    met: dict[int, tuple[Projection, set[int]]] = {}
    numbers = torch.stack((factor.reshape(-1), offset.reshape(-1)))
    low = numbers.new_full((2, len(features)), float("inf")).scatter_reduce(1, where.expand(2, -1), numbers, "amin")
    high = numbers.new_full((2, len(features)), -float("inf")).scatter_reduce(1, where.expand(2, -1), numbers, "amax")
    for i, feature in enumerate(features.tolist()):
        members = labels.members(feature)
        if len(members) != 1:
            raise Left("its features are mixed before its gain, by a rotation for example")
        if not torch.equal(low[:, i], high[:, i]):
            raise Left("a feature meets two different gains")
        projection, index = projections.by_feature(next(iter(members)))
        met.setdefault(id(projection), (projection, set()))[1].add(projection.first + index)
        place = (projection.names[index], projection.axes, tuple(projection.rows[index].tolist()))
        rows[place] = RowGain(float(low[0, i]), float(low[1, i]), projection.biases[index])
    for projection, own in met.values():
        if not attentions.uses.pass_all(projection, frozenset(own), {op.node for op in tag.ops}):
            raise Left(f"rows of {projection.names[0]!r} serve something else, too")
    return rows


def _applied(df: Dataflow, last: NormOp, gains: Sequence[NormOp], shape: torch.Size) -> list[tuple[str, Tensor]]:
    """The ops ("mul", "div", "add") on features after the division by the statistic, each with its other operand."""
    done: list[tuple[str, Tensor]] = []
    node = last.node
    if df.op[node].kind == "norm":
        given = arguments_of(node)
        for name, op in (("weight", "mul"), ("bias", "add")):
            weight = given.get(name)
            if isinstance(weight, Node):
                value = _constant(df, weight)
                value = value.view(-1, *[1] * (len(shape) - 2)) if channels_first(node) else value
                done.append((op, value.expand(shape)))
    for gain in gains:
        others = [n for n in gain.node.all_input_nodes if n is not gain.x]
        if gain.x is None or len(others) != 1:
            raise Left("its gain is applied to several tensors at once")
        done.append((op_of(gain.node).name, _constant(df, others[0]).expand(shape)))
    return done


def _constant(df: Dataflow, node: Node) -> Tensor:
    """The value of a node that depends on parameters only."""
    known: dict[Node, Tensor] = {}
    for one in sorted(walk([node], lambda n: n.all_input_nodes), key=df.index.__getitem__):
        if one.op == "get_attr":
            made = attrgetter(str(one.target))(one.graph.owning_module)
        else:
            constant = df.constant(one)
            args, kwargs = map_arg((one.args, dict(one.kwargs)), known.__getitem__)
            made = one.target(*args, **kwargs) if constant is None else constant  # type: ignore[operator]
        if not isinstance(made, Tensor) or made.is_meta:
            raise Left("its gain has no numbers")
        known[one] = made.detach()
    return known[node].float()
