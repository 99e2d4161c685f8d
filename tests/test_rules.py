"""The rules by which ops change what is known of a tensor, each by itself: labels and flows are given by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from quack_fx.find import parameters_in
from quack_fx.find.provenance.flow import Flow, NormOp, NormTag, Statistic
from quack_fx.find.provenance.labels import NOTHING, UNKNOWN, Labels
from quack_fx.find.provenance.projections import Projections
from quack_fx.find.provenance.rules import RULES, Step, flow_of
from quack_fx.graph.capture import capture
from quack_fx.graph.dataflow import Dataflow
from quack_fx.graph.ops import Kind

FIRST, WIDTH = 2, 4
DATA = torch.arange(FIRST, FIRST + WIDTH).expand(3, 5, WIDTH)  # [samples, tokens, features]: each feature by its label
OWN = frozenset(range(FIRST, FIRST + WIDTH))

Op = Callable[[Tensor], Any]


class Behind(nn.Module):
    """An op behind a projection, so that what it is given is an activation."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.made, self.op, self.gain = nn.Linear(2, WIDTH, bias=False), op, nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Any:
        return self.op(self.made(x), self.gain) if self.op.__code__.co_argcount == 2 else self.op(self.made(x))


def run(op: Op, given: Flow | Tensor = DATA) -> Flow:
    """Flow of the result of an op, or of a few in a row, on data with a given flow."""
    model = Behind(op)
    graph = capture(model, [torch.randn(3, 5, 2)]).graph_module
    df, labels = Dataflow(graph, parameters_in(graph, model)), Labels()
    projections = Projections(df, labels)
    start = next(node for node in graph.graph.nodes if df.op[node].kind == "contraction")
    flow = given if isinstance(given, Flow) else Flow(given)
    flows = {start: replace(flow, label=flow.label.reshape(df.shape(start)))}
    made = projections.of(start)
    assert made is not None and torch.equal(made[1], DATA.reshape(df.shape(start)))
    (result,) = graph.graph.output_node().all_input_nodes
    for node in graph.graph.nodes:
        if node is result or (node in df.activation and df.index[node] > df.index[start]):
            flows[node] = flow_of(Step(df, labels, projections, lambda _: False, node, flows, UNKNOWN))
    return flows[result]


def test_there_is_a_rule_for_each_kind_of_op() -> None:
    assert set(RULES) == set(get_args(Kind))


@pytest.mark.parametrize(
    ("op", "label"),
    [
        (lambda x: x.transpose(0, 1), DATA.transpose(0, 1)),
        (lambda x: x.reshape(3, 5, 2, 2)[..., 1], DATA.reshape(3, 5, 2, 2)[..., 1]),
        (lambda x: torch.cat((x[..., 2:], x[..., :2]), -1), DATA.roll(2, -1)),
        (lambda x: x.chunk(2, -1)[1], DATA[..., 2:]),
        (lambda x: x.sum(1), DATA[:, 0]),
        (lambda x: x.mean(1, keepdim=True), DATA[:, :1]),
        (lambda x: x * 3 + 1, DATA),
        (lambda x: x > 0, torch.full_like(DATA, NOTHING)),
        (lambda x: x.argmax(-1), torch.full((3, 5), NOTHING)),
        (lambda x: torch.zeros_like(x), torch.full_like(DATA, NOTHING)),
        (lambda x: x.softmax(-1), DATA),
        (lambda x: x[..., :2] * x[..., 2:], torch.full((3, 5, 2), UNKNOWN)),  # features gate others
    ],
)
def test_where_features_go(op: Op, label: Tensor) -> None:
    found = run(op)
    assert found.label.shape == label.shape and torch.equal(found.label, label)


@pytest.mark.parametrize(
    ("op", "scale"),
    [
        (lambda x: x * 3 / 2, 1.5),
        (lambda x: x * 0, None),
        (lambda x: x.transpose(0, 1) * 0.5, 0.5),
        (lambda x, gain: x * gain, None),  # a learned factor
        (lambda x: x * torch.full((), 4.0), 4.0),
        (lambda x: x * torch.arange(5.0)[:, None].cos(), 1.0),  # a rotation
    ],
)
def test_plain_factors(op: Op, scale: float | None) -> None:
    assert run(op).scale == scale


@pytest.mark.parametrize(
    ("op", "kind", "width", "nodes"),
    [
        (lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(), "rms", WIDTH, 1),
        (lambda x: x / x.norm(dim=-1, keepdim=True), "l2", WIDTH, 1),
        (lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True), "layer", WIDTH, 2),
        (lambda x: nn.functional.layer_norm(x, (WIDTH,)), "layer", WIDTH, 1),
        (lambda x: nn.functional.rms_norm(x.reshape(3, 5, 2, 2), (2,)), "rms", 2, 1),
    ],
)
def test_norms(op: Op, kind: str, width: int, nodes: int) -> None:
    (norm,) = run(op).norms
    assert (norm.kind, norm.width, norm.features, len(norm.ops)) == (kind, width, OWN, nodes)
    assert norm.weight is None and norm.gains == ()


def test_a_gain_behind_a_norm_is_its_own() -> None:
    found = run(lambda x, gain: nn.functional.rms_norm(x, (WIDTH,)) * gain)
    assert found.norms[0].weight == "gain" and len(found.norms[0].gains) == 1 and found.scale == 1.0


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x * x.pow(2).mean(-1, keepdim=True).clamp(max=1.0).rsqrt(),  # only what is long is cut
        lambda x: x[..., :2] / x[..., 2:].norm(dim=-1, keepdim=True),  # the statistic of others
        lambda x: x - x.mean(-1, keepdim=True),
    ],
)
def test_what_is_no_norm(op: Op) -> None:
    assert run(op).norms == ()


def test_functions_that_bend_are_noted() -> None:
    assert run(lambda x: x * 2 + 1).ops == frozenset()
    assert run(lambda x: x.tanh()).ops == {"tanh"}
    assert "pow" in run(lambda x: x * x).ops


def test_what_is_known_already_is_kept() -> None:
    norm = NormTag("rms", WIDTH, "norm", features=OWN, ops=(NormOp(None, None),))  # type: ignore[arg-type]
    found = run(lambda x: x.tanh().transpose(0, 1) * 2, Flow(DATA, 0.5, (norm,), frozenset({"sin"})))
    assert (found.scale, found.norms, found.ops) == (1.0, (norm,), {"sin", "tanh"})


def test_a_statistic_is_no_feature_until_it_meets_them() -> None:
    found = run(lambda x: x.square().mean(-1))
    assert found.statistic == Statistic(OWN, frozenset({"pow", "mean"}), WIDTH)
    assert set(found.label.flatten().tolist()) == {UNKNOWN}


def test_data_that_is_not_known_stays_so() -> None:
    unknown = torch.tensor(UNKNOWN).expand(DATA.shape)
    for op in (lambda x: x.transpose(0, 1), lambda x: x.tanh(), lambda x: x.mean(1), lambda x: x.softmax(-1)):
        assert set(run(op, unknown).label.flatten().tolist()) == {UNKNOWN}
