"""The recorder: it leaves no trace in the model, and what it writes down is what ran."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.modules.module as module_hooks
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from quack_fx.errors import CaptureError
from quack_fx.graph.capture import REAL_LIMIT_BYTES, Capture, capture
from quack_fx.graph.capture.recorder import Recorder

aten = torch.ops.aten


def nodes(recorded: Capture, op: Any) -> list[Node]:
    """Calls of one ATen op, in order."""
    return [n for n in recorded.graph_module.graph.nodes if n.op == "call_function" and n.target is op]


def placeholders(recorded: Capture) -> list[Node]:
    return [n for n in recorded.graph_module.graph.nodes if n.op == "placeholder"]


def attributes(recorded: Capture) -> list[str]:
    return [str(n.target) for n in recorded.graph_module.graph.nodes if n.op == "get_attr"]


class Run(nn.Module):
    """A function as a model."""

    def __init__(self, run: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


# ---- nothing is changed ----------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """A model whose forward changes whatever a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(2, 4))
        self.seen: list[int] = []
        self.table: dict[str, int] = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.norm(self.linear(x)))
        self.steps += 1
        self.cache.copy_(y[:2])
        self.last = y
        self.cache2 = self.cache
        self.seen.append(len(x))
        self.table["calls"] += 1
        self.steps_replaced = random.random()
        self.register_buffer("late", torch.ones(1))
        return y + torch.rand(4)


def everything(model: nn.Module) -> dict[str, Any]:
    """What a model holds, values copied."""
    held: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            copied = value.copy() if isinstance(value, list | dict | set) else value
            held[f"{name}:{key}"] = (id(value), copied)
    return held


@pytest.mark.parametrize("training", [True, False])
def test_nothing_in_the_model_is_changed(training: bool) -> None:
    model = Restless().train(training)
    fired: list[int] = []
    model.linear.register_forward_hook(lambda *_: fired.append(1))
    tensors = {n: (id(t), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    held, x = everything(model), torch.randn(6, 4)
    given, torch_rng, python_rng = x.clone(), torch.get_rng_state(), random.getstate()

    recorded = capture(model, [x])

    assert recorded.way == "hybrid" and fired == [1]
    now = model.state_dict(keep_vars=True)
    assert list(now) == list(tensors)
    for name, (identity, value) in tensors.items():
        assert id(now[name]) == identity and torch.equal(as_bytes(now[name]), as_bytes(value)), name
    assert everything(model) == held
    assert model.training is training and model.norm.training is training
    assert torch.equal(x, given) and torch.equal(torch.get_rng_state(), torch_rng) and random.getstate() == python_rng
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def as_bytes(value: Tensor) -> Tensor:
    return value.detach().reshape(-1).view(torch.uint8)


def test_a_forward_that_fails_leaves_nothing_behind_either() -> None:
    class Fails(Restless):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ValueError("no such luck\nand more")

    model, x = Fails(), torch.randn(6, 4)
    held, state = everything(model), {n: t.clone() for n, t in model.state_dict().items()}
    fastpath, torch_rng = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
    with pytest.raises(CaptureError):
        capture(model, [x])
    assert everything(model) == held
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())
    assert torch.backends.mha.get_fastpath_enabled() is fastpath and torch.equal(torch.get_rng_state(), torch_rng)
    assert not module_hooks._global_forward_hooks and not module_hooks._global_forward_pre_hooks


def test_inputs_written_in_place_keep_their_values() -> None:
    x = torch.ones(2, 3)
    capture(Run(lambda m, x: x.mul_(2) + m.w(x), w=nn.Linear(3, 3)), [x])
    assert torch.equal(x, torch.ones(2, 3))


# ---- what the graph says ---------------------------------------------------------------------------------------------


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 5)
        self.register_buffer("shift", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + self.shift


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner(), Inner()])
        self.blocks[1].proj.weight = self.blocks[0].proj.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x) + self.blocks[1](x)


def test_parameters_are_named_by_their_first_qualified_name() -> None:
    recorded = capture(Outer(), [torch.ones(2, 3)])
    assert sorted(attributes(recorded)) == [
        "blocks.0.proj.bias",
        "blocks.0.proj.weight",
        "blocks.0.shift",
        "blocks.1.proj.bias",
        "blocks.1.shift",
    ]
    first, second = nodes(recorded, aten.addmm.default)
    assert {n.target for n in first.all_input_nodes} >= {"blocks.0.proj.bias"}
    assert {n.target for n in second.all_input_nodes} >= {"blocks.1.proj.bias"}


def test_nodes_carry_their_value_and_the_modules_that_ran() -> None:
    recorded = capture(Outer(), [torch.ones(2, 3)])
    for node in recorded.graph_module.graph.nodes:
        assert node.op == "output" or isinstance(node.meta["val"], Tensor), node
    for i, node in enumerate(nodes(recorded, aten.addmm.default)):
        stack = node.meta["nn_module_stack"]
        assert list(stack) == ["", f"blocks.{i}", f"blocks.{i}.proj"]
        assert [kind for _, kind in stack.values()] == [Outer, Inner, nn.Linear]
        assert node.meta["val"].shape == (2, 5)
    assert list(nodes(recorded, aten.add.Tensor)[-1].meta["nn_module_stack"]) == [""]


def test_weights_are_fake_and_tables_are_real() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.w(x) + torch.arange(3).cos()

    recorded = capture(Run(run, w=nn.Linear(4, 3)), [torch.ones(2, 4)])
    assert nodes(recorded, aten.addmm.default)[0].meta["val"].is_meta
    (table,) = nodes(recorded, aten.cos.default)
    assert torch.equal(table.meta["val"], torch.arange(3).cos())


def test_a_tensor_given_twice_is_one_placeholder() -> None:
    x = torch.ones(2, 4)
    model = Run(lambda m, a, b, c, other: m.w(a) + m.w(b) + c + other, w=nn.Linear(4, 4))
    recorded = capture(model, [x, x], {"c": x.clone(), "other": x})
    assert len(placeholders(recorded)) == 2
    first, second = (n.all_input_nodes for n in nodes(recorded, aten.addmm.default))
    assert set(first) & set(second) & set(placeholders(recorded))


def test_slices_written_into_an_empty_tensor_are_followed() -> None:
    """DeepSeek writes the two parts of a key into slices of `new_empty`."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.w(x)
        key = y.new_empty(2, 6)
        key[:, :4] = y
        key[:, 4:] = x[:, :2]
        return key @ key.t()

    recorded = capture(Run(run, w=nn.Linear(4, 4)), [torch.ones(2, 4)])
    assert recorded.way == "hybrid" and not recorded.canned
    made = nodes(recorded, aten.new_empty.default)
    assert len(made) == 1 and made[0].meta["val"].shape == (2, 6)
    writes = nodes(recorded, aten.copy_.default)
    assert [list(w.meta["val"].shape) for w in writes] == [[2, 4], [2, 2]]
    assert writes[0].args[1] in nodes(recorded, aten.addmm.default)
    for write in writes:
        target = write.args[0]
        while target not in made:
            target = target.args[0]  # slices of the one tensor


def test_a_view_of_a_parameter_made_before_is_known_by_its_storage() -> None:
    model = nn.Linear(4, 6)
    half = model.weight.detach()[3:]
    recorded = capture(Run(lambda m, x: F.linear(x, half), w=model), [torch.ones(2, 4)])
    (view,) = nodes(recorded, aten.as_strided.default)
    assert view.args[0].target == "w.weight" and view.args[1:] == ([3, 4], [4, 1], 12)


def test_the_graph_computes_what_the_model_computes() -> None:
    """Recorded for real, then run again as a graph."""
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
    x = torch.randn(5, 4)
    recorder = Recorder(model, "real")
    args, _ = recorder.inputs([x], {})
    with torch.no_grad(), recorder:
        output = model(*args)
    graph: GraphModule = recorder.finish(output)
    with torch.no_grad():
        assert torch.equal(graph(x)[0], model(x))


def test_outputs_of_any_form_are_outputs_of_the_graph() -> None:
    class Answer:
        def __init__(self, value: Tensor) -> None:
            self.value, self.more = value, {"list": [value + 1]}

    recorded = capture(Run(lambda m, x: Answer(m.w(x)), w=nn.Linear(4, 4)), [torch.ones(2, 4)])
    (output,) = [n for n in recorded.graph_module.graph.nodes if n.op == "output"]
    assert len(output.args[0]) == 2


# ---- how it runs -----------------------------------------------------------------------------------------------------


def test_a_model_of_any_size_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(1 << 17, 1 << 17), nn.ReLU(), nn.Linear(1 << 17, 4))
    recorded = capture(model, [torch.ones(2, 1 << 17)])
    assert recorded.way == "hybrid" and recorded.fallback_reason is None
    assert attributes(recorded) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(p.is_meta for p in model.parameters())


def test_inputs_on_meta_get_numbers() -> None:
    ids = torch.empty(2, 3, dtype=torch.int64, device="meta")
    recorded = capture(Run(lambda m, i: m.e(i), e=nn.Embedding(7, 4, device="meta")), [ids])
    (given,) = placeholders(recorded)
    assert torch.equal(given.meta["val"], torch.zeros(2, 3, dtype=torch.int64)) and ids.is_meta


def test_numbers_that_depend_on_weights_are_made_up_and_reported() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        y = m.w(x)
        return y[(y > 0).nonzero()[:, 0]]

    recorded = capture(Run(run, w=nn.Linear(4, 4)), [torch.ones(2, 4)])
    assert recorded.way == "hybrid" and "nonzero" in recorded.canned


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_forward_that_needs_numbers_of_weights_runs_for_real(device: str) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.w(x) * float((m.w.weight * 2).detach().numpy().max() > -1e9)

    model = Run(run, w=nn.Linear(4, 3, device=device))
    recorded = capture(model, [torch.ones(2, 4)])
    assert recorded.way == "real" and recorded.fallback_reason
    assert "\n" not in recorded.fallback_reason
    assert not nodes(recorded, aten.addmm.default)[0].meta["val"].is_meta
    assert model.w.weight.device.type == device


def test_too_large_to_run_for_real() -> None:
    rows = REAL_LIMIT_BYTES // 4 // 1024 + 1
    model = Run(lambda m, x: (m.w.weight * 2).numpy(), w=nn.Linear(1024, rows, bias=False, device="meta"))
    with pytest.raises(CaptureError, match="too large to run for real") as caught:
        capture(model, [torch.ones(1)])
    assert "\n" not in str(caught.value)


def test_a_forward_that_raises_is_one_line_with_its_own_words() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        raise ValueError("need 7 tokens\nsecond line")

    with pytest.raises(CaptureError) as caught:
        capture(Run(run, w=nn.Linear(4, 4)), [torch.ones(2, 4)])
    text = str(caught.value)
    assert "Run" in text and "ValueError: need 7 tokens" in text and "\n" not in text
    assert isinstance(caught.value.__cause__, ValueError)


def test_wrong_arguments_are_one_line() -> None:
    with pytest.raises(CaptureError, match="Linear fails on the example inputs: TypeError") as caught:
        capture(nn.Linear(4, 4), [torch.ones(2, 4)], {"nonsense": 1})
    assert "\n" not in str(caught.value)
