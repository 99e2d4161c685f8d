"""Methods to compare QuacK with: each against its formula written out for one model, and against plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
from per_head import HEADS, LAYOUT, Model, PerHead, assert_same, batch, train
from test_distributed import LAYOUT as CUT
from test_distributed import Model as Cut
from test_distributed import batch as cut_batch
from test_distributed import data_parallel, fsdp, mesh, run_in_processes, tensor_parallel, whole
from test_max_logits import by_hand, loud
from test_zero_start import WIDTH, Lora
from tiny_models import CASES, Case
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import SGD, AdamW, Optimizer

from quack_fx import QuacK, find_qk_pairs
from quack_fx.errors import OptimizerError
from quack_fx.layout import QKLayout
from quack_fx.train.logits import MaxLogits

METHODS = ["quack", "constant", "qk-clip", "compositional", "none"]


def pair(make: Callable[[], Case]) -> tuple[Case, Case]:
    """The same case twice."""
    torch.manual_seed(0)
    case = loud(make())
    return case, Case(copy.deepcopy(case.model), case.inputs, case.layout)


def step(case: Case, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    out = case.model(**case.inputs)
    out = next(iter(out.values())) if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
    out.float().square().mean().backward()
    optimizer.step()


# ---- QK-Clip ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def clip_llama(model: Any, largest: Tensor, threshold: float) -> None:
    """Grouped queries: the query head takes all of gamma."""
    for layer, own in zip(model.model.layers, largest.view(2, 4), strict=True):
        for h in range(4):
            gamma = min(1.0, threshold / max(float(own[h]), 1e-9))
            layer.self_attn.q_proj.weight[8 * h : 8 * h + 8] *= gamma


@torch.no_grad()
def clip_gpt2(model: Any, largest: Tensor, threshold: float) -> None:
    """Weights [in, out], queries and keys side by side; their biases are clipped with them."""
    for layer, own in zip(model.transformer.h, largest.view(2, 4), strict=True):
        for h in range(4):
            gamma = min(1.0, threshold / max(float(own[h]), 1e-9))
            for start in (8 * h, 32 + 8 * h):
                layer.attn.c_attn.weight[:, start : start + 8] *= gamma**0.5
                layer.attn.c_attn.bias[start : start + 8] *= gamma**0.5


@torch.no_grad()
def clip_deepseek(model: Any, largest: Tensor, threshold: float) -> None:
    """As in Kimi K2: parts without rotation by the root, rotated queries by gamma, the shared rotated key stays."""
    for layer, own in zip(model.model.layers, largest.view(2, 4), strict=True):
        q_up, kv_up = layer.self_attn.q_b_proj.weight, layer.self_attn.kv_b_proj.weight
        for h in range(4):
            gamma = min(1.0, threshold / max(float(own[h]), 1e-9))
            q_up[12 * h : 12 * h + 8] *= gamma**0.5
            q_up[12 * h + 8 : 12 * h + 12] *= gamma
            kv_up[16 * h : 16 * h + 8] *= gamma**0.5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "clip"), [("llama", clip_llama), ("gpt2", clip_gpt2), ("deepseek_v3", clip_deepseek)])
def test_qk_clip_is_the_reference_step_by_step(name: str, clip: Any, attention: str) -> None:
    mine, reference = pair(getattr(tiny_models, name))
    mine.model.set_attn_implementation(attention)  # type: ignore[operator]
    threshold = float(by_hand(mine).median())
    optimizers = [SGD(case.model.parameters(), lr=0.2, momentum=0.9) for case in (mine, reference)]
    QuacK(optimizers[0], mine.model, mine.layout, method="qk-clip", threshold=threshold)
    clipped = set[bool]()
    for _ in range(6):
        largest = by_hand(reference)
        clipped |= set((largest > threshold).tolist())
        for case, optimizer in zip((mine, reference), optimizers, strict=True):
            step(case, optimizer)
        clip(reference.model, largest, threshold)
        for (at, a), b in zip(mine.model.named_parameters(), reference.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=at)
    assert clipped == {False, True}


def own_bias(name: str) -> bool:
    """Whether something is added to the products of queries and keys, which stays when those are scaled."""
    return name in ("bloom", "t5")


PLAIN = [
    name
    for name in CASES
    if not own_bias(name) and name not in ("fusion", "swin", "olmo2", "cross_covariance", "joint")
]


@pytest.mark.parametrize("name", PLAIN)
def test_logits_become_gamma_times_as_large(name: str) -> None:
    """On the same inputs of each attention, exactly: multi-head, grouped, one key head, latent, called twice."""
    case = loud(CASES[name]())
    names = {site.name for site in case.layout.sites}
    calls: list[tuple[nn.Module, Any, Any]] = []
    kept = [
        module.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)  # type: ignore[arg-type, func-returns-value]
        for at, module in case.model.named_modules()
        if at in names
    ]
    watch = MaxLogits(case.model, case.layout)
    case.model(**case.inputs)
    before = watch.take()
    for hook in kept:
        hook.remove()
    normed = torch.tensor([bool(site.qk_norm) for site in case.layout.sites for _ in range(site.query_heads)])
    threshold = float(before.abs().median())
    if bool(normed.all()):
        pytest.skip("QK norm: there is nothing to scale")
    optimizer = SGD(case.model.parameters(), lr=0.0)
    QuacK(optimizer, case.model, case.layout, method="qk-clip", threshold=threshold)
    case.model(**case.inputs)
    watch.take()
    optimizer.step()
    for module, args, kwargs in calls:
        module(*args, **kwargs)
    gamma = torch.where(before > threshold, threshold / before, 1.0)
    assert (gamma < 0.99).any() and (gamma == 1).any()
    torch.testing.assert_close(watch.take(), before * gamma, rtol=1e-5, atol=1e-5)


def assert_clipped(model: nn.Module, layout: QKLayout, inputs: dict[str, Tensor]) -> None:
    """A step of no length with QK-Clip leaves the largest logits at the threshold, and the others as they are."""
    watch = MaxLogits(model, layout)
    model(**inputs)
    before = watch.take()
    threshold = float(before.mean())
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    QuacK(optimizer, model, layout, method="qk-clip", threshold=threshold)
    model(**inputs)
    optimizer.step()
    watch.take()
    model(**inputs)
    torch.testing.assert_close(watch.take(), before.clamp_max(threshold))
    assert (before > 1.01 * threshold).any()


def test_joint_attention_has_the_same_rule() -> None:
    """Two kinds of tokens, each with projections of their own: every product becomes gamma times as large."""
    case = tiny_models.joint()
    for stream in ("image", "text"):
        for part in ("q", "k"):
            setattr(case.model, f"{stream}_{part}_norm", nn.Identity())
    assert_clipped(case.model, QKLayout((replace(case.layout.sites[0], qk_norm=()),)), case.inputs)


def test_adapters_have_the_same_rule() -> None:
    """The frozen weight's rows and those of B beside it; what is frozen cannot be scaled."""
    model = Lora(b=1.0)
    x = torch.randn(2, 5, WIDTH)
    layout = find_qk_pairs(model, x)
    with pytest.raises(OptimizerError, match=r"scales '[qk].w.weight' of '', which is frozen \(requires_grad=False\)"):
        assert_clipped(model, layout, {"x": x})
    model.requires_grad_()
    down = [model.q.a.weight.clone(), model.k.a.weight.clone()]
    assert_clipped(model, layout, {"x": x})
    assert torch.equal(down[0], model.q.a.weight) and torch.equal(down[1], model.k.a.weight)


def test_a_clip_counts_all_passes_since_the_last_step() -> None:
    model, once = Model(), Model()
    x = torch.cat([batch(0), 3 * batch(1)])
    for net, parts in ((model, x.split(2)), (once, [x])):
        optimizer = SGD(net.parameters(), lr=0.0)
        QuacK(optimizer, net, LAYOUT, method="qk-clip", threshold=0.5)
        for part in parts:
            net(part).sum().backward()
        optimizer.step()
    for a, b in zip(model.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_logits_that_are_not_finite_clip_nothing(value: float) -> None:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.0)
    quack = QuacK(optimizer, model, LAYOUT, method="qk-clip", threshold=0.01)
    before = copy.deepcopy(model)
    held = {name: param.detach() for name, param in model.named_parameters() if ".q." in name or ".kv." in name}
    quack.method.after_step(held, torch.full((2 * HEADS,), value))
    assert_same(model, before)


def test_two_optimizers_clip_their_own_rows() -> None:
    model, one = Model(), Model()
    both = [SGD([p for n, p in model.named_parameters() if (".q." in n) == own], lr=0.1) for own in (True, False)]
    optimizers = {model: both, one: [SGD(one.parameters(), lr=0.1)]}
    for net, own in optimizers.items():
        for optimizer in own:
            QuacK(optimizer, net, LAYOUT, method="qk-clip", threshold=0.5)
        train(net, *own, steps=range(4))
    assert_same(model, one)


# ---- constant and none -----------------------------------------------------------------------------------------------


def test_none_changes_nothing() -> None:
    model, plain = Model(), Model()
    optimizers = [AdamW(net.parameters(), lr=0.02) for net in (model, plain)]
    quack = QuacK(optimizers[0], model, LAYOUT, method="none", logits=True)
    train(model, optimizers[0])
    train(plain, optimizers[1])
    assert_same(model, plain)
    found = quack.metrics()
    assert found["attention/layers.0/q/lr_scale/max"] == found["attention/layers.0/k/lr_scale/min"] == 1.0
    assert found["attention/layers.0/growth/max"] > 1.0
    assert found["attention/layers.0/max_attn_logit/max"] > found["attention/layers.0/max_attn_logit/min"]


@pytest.mark.parametrize("tau", [0.1, 2.0])
def test_constant_is_a_group_of_its_own(tau: float) -> None:
    """Every head a parameter of its own, in a group with its own learning rate: torch does the rest."""
    model = Model().double()
    heads = PerHead(model).double()
    groups = heads.groups()
    for group in groups[:-1]:
        group["lr"] = 0.02 * tau
    one, other = AdamW(model.parameters(), lr=0.02), AdamW(groups, lr=0.02)
    quack = QuacK(one, model, LAYOUT, tau=tau, method="constant")
    train(model, one)
    train(heads, other)
    for layer in range(2):
        for a, b in zip(
            (model.layers[layer].q.weight, model.layers[layer].q.bias, model.layers[layer].kv.weight),
            heads.weights(layer),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    assert {value for name, value in quack.metrics().items() if "lr_scale" in name} == {tau}
    assert set(quack.factors()["layers.0"].values()) == {tau}


def test_tau_may_change_between_steps_and_quack_begins_as_constant() -> None:
    model, other = Model(), Model()
    quacks = []
    for net, method in ((model, "quack"), (other, "constant")):
        optimizer = SGD(net.parameters(), lr=0.1)
        quacks.append(QuacK(optimizer, net, LAYOUT, tau=0.3, method=method))  # type: ignore[arg-type]
        train(net, optimizer, steps=range(1))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    quacks[1].tau = 0.7
    assert quacks[1].metrics()["attention/layers.1/k/lr_scale/max"] == pytest.approx(0.7)


# ---- compositional ---------------------------------------------------------------------------------------------------


def test_compositional_is_its_formula() -> None:
    """Of every head of GPT-2, whose weights are [in, out] with biases; rows of values are as without it."""
    mine, reference = pair(tiny_models.gpt2)
    optimizers = [SGD(case.model.parameters(), lr=0.5) for case in (mine, reference)]
    QuacK(optimizers[0], mine.model, mine.layout, tau=3.0, method="compositional")
    for _ in range(4):
        before = copy.deepcopy(reference.model)
        for case, optimizer in zip((mine, reference), optimizers, strict=True):
            step(case, optimizer)
        with torch.no_grad():
            for now, old in zip(reference.model.transformer.h, before.transformer.h, strict=True):
                w, b, w0, b0 = *now.attn.c_attn.parameters(), *old.attn.c_attn.parameters()
                for h in range(4):
                    q, k = (slice(start + 8 * h, start + 8 * h + 8) for start in (0, 32))
                    for own, partner in ((q, k), (k, q)):
                        norm = w0[:, partner].square().sum() + b0[partner].square().sum()
                        scale = 3.0 / 2 / (norm / 8 + 0.01).sqrt()
                        w[:, own] = w0[:, own] + scale * (w[:, own] - w0[:, own])
                        b[own] = b0[own] + scale * (b[own] - b0[own])
        for (at, a), c in zip(mine.model.named_parameters(), reference.model.named_parameters(), strict=True):
            torch.testing.assert_close(a, c[1], rtol=1e-5, atol=1e-6, msg=at)


# ---- the same for all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if m != "compositional"])
@pytest.mark.parametrize("kind", [AdamW, lambda p, lr: SGD(p, lr=lr, momentum=0.9)])
def test_a_resumed_run_is_the_uninterrupted_one(method: Any, kind: Any) -> None:
    def run(net: nn.Module, state: Any = None) -> tuple[Optimizer, QuacK]:
        optimizer = kind(net.parameters(), lr=0.02)
        quack = QuacK(optimizer, net, LAYOUT, method=method, **({"threshold": 0.5} if method == "qk-clip" else {}))
        if state is not None:
            optimizer.load_state_dict(state)
        return optimizer, quack

    model = Model()
    optimizer, quack = run(model)
    train(model, optimizer, steps=range(5))
    other = copy.deepcopy(model)
    for module in other.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    theirs, again = run(other, copy.deepcopy(optimizer.state_dict()))
    for net, own in ((model, optimizer), (other, theirs)):
        train(net, own, steps=range(5, 9))
    assert_same(model, other)
    assert quack.metrics() == again.metrics()


@pytest.mark.parametrize("method", METHODS[:3] + METHODS[4:])
def test_after_detach_the_optimizer_is_as_before(method: Any) -> None:
    model, plain = Model(), Model()
    optimizers = [AdamW(net.parameters(), lr=0.02) for net in (model, plain)]
    quack = QuacK(optimizers[0], model, LAYOUT, method=method)
    quack.detach()
    train(model, optimizers[0], steps=range(3))
    train(plain, optimizers[1], steps=range(3))
    assert_same(model, plain)
    assert optimizers[0].state_dict().keys() == optimizers[1].state_dict().keys()
    assert all("quack_init" not in state for state in optimizers[0].state.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "qkclip"},
            "method is 'qkclip'; use one of 'quack', 'constant', 'qk-clip', 'compositional', 'none'",
        ),
        ({"method": None}, "method is None; use one of"),
        ({"method": "qk-clip", "threshold": 0.0}, r"threshold is 0.0; need a positive number, for example 100.0"),
        ({"method": "qk-clip", "threshold": float("nan")}, "threshold is nan; need a positive number"),
        ({"method": "qk-clip", "threshold": "30"}, "threshold is '30'; need a positive number"),
        ({"method": "qk-clip", "threshold": True}, "threshold is True; need a positive number"),
        ({"threshold": 30.0}, "threshold is 30.0, and method 'quack' has none; it is of method='qk-clip'"),
        ({"method": "qk-clip", "tau": 0.1}, "tau is 0.1, and method 'qk-clip' leaves learning rates as they are"),
        ({"method": "none", "tau": torch.tensor(0.1)}, r"tau is tensor\(0.1000\), and method 'none' leaves"),
        ({"method": "constant", "tau": -1.0}, "tau is -1.0; need a positive number"),
        ({"logits": "no"}, "logits is 'no'; give True or False"),
        ({"method": "compositional", "norm": "spectral"}, "norm is 'spectral', and method 'compositional' is by"),
        ({"method": "compositional"}, "'layers.0' has rows that several heads use; use method='quack'"),
    ],
)
def test_bad_input_is_told_in_one_line(options: Any, message: str) -> None:
    model = Model()
    with pytest.raises(OptimizerError, match=message) as error:
        QuacK(SGD(model.parameters()), model, LAYOUT, **options)
    assert len(str(error.value).splitlines()) == 1
    assert not any(module._forward_hooks for module in model.modules())
    QuacK(SGD(model.parameters()), model, LAYOUT)


def test_tau_of_a_method_without_one_cannot_be_set() -> None:
    model = Model()
    quack = QuacK(SGD(model.parameters()), model, LAYOUT, method="none")
    with pytest.raises(OptimizerError, match=r"tau is 0.5, and method 'none' leaves learning rates as they are"):
        quack.tau = 0.5
    assert quack.tau == 1.0


@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_compositional_is_refused_where_it_has_no_formula(name: str) -> None:
    case = CASES[name]()
    with pytest.raises(OptimizerError, match="is for heads with one query and one key projection of their own"):
        QuacK(SGD(case.model.parameters()), case.model, case.layout, method="compositional")


def test_qk_clip_refuses_rows_that_it_cannot_scale() -> None:
    model = Model()
    model.layers[0].q.bias.requires_grad_(False)
    with pytest.raises(OptimizerError, match=r"scales 'layers.0.q.bias' of 'layers.0', which is frozen"):
        QuacK(SGD(model.parameters()), model, LAYOUT, method="qk-clip")
    case = CASES["fusion"]()
    with pytest.raises(OptimizerError, match="cannot scale the logits of head 0 of '' alone"):
        QuacK(SGD(case.model.parameters()), case.model, case.layout, method="qk-clip")


# ---- several ranks ---------------------------------------------------------------------------------------------------

RIVALS: list[dict[str, Any]] = [
    {"method": "none", "logits": True},
    {"method": "constant", "tau": 0.3},
    {"method": "qk-clip", "threshold": 0.4},
    {"method": "compositional", "tau": 2.0},
]


def parts(model: nn.Module) -> list[Tensor]:
    return [whole(p).detach() for p in model.parameters()]


def one_step(model: nn.Module, x: Tensor, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def ranks_are_one_process(shard: Callable[[Any], nn.Module]) -> None:
    """Each rank has its own half of the batch, and heads whose largest logit is in the other half are clipped, too."""
    for options in RIVALS:
        torch.manual_seed(0)
        alone, shared = Cut(), shard(Cut())
        optimizers = [AdamW(net.parameters(), lr=0.02) for net in (alone, shared)]
        quacks = [
            QuacK(optimizer, net, CUT, **options) for optimizer, net in zip(optimizers, (alone, shared), strict=True)
        ]
        for number in range(4):
            x = torch.cat([cut_batch(2 * number, torch.float32), 2 * cut_batch(2 * number + 1, torch.float32)])
            one_step(alone, x, optimizers[0])
            one_step(shared, x.chunk(2)[dist.get_rank()], optimizers[1])
            for a, b in zip(parts(alone), parts(shared), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            expected, found = (quack.metrics(heads=True) for quack in quacks)
            assert found == pytest.approx(expected, rel=1e-4)
            assert any("max_attn_logit" in name for name in found) == (options["method"] in ("none", "qk-clip"))


def half_precision(model: Any) -> nn.Module:
    return fully_shard(model, mesh=mesh(2), mp_policy=MixedPrecisionPolicy(torch.bfloat16))


def logits_of_half_precision_are_read() -> None:
    """What FSDP2 gives the forward are copies of the weights in bfloat16."""
    alone, shared = Cut(), half_precision(Cut())
    x = cut_batch(0, torch.float32)
    found = []
    for net in (alone, shared):
        optimizer = SGD(net.parameters(), lr=0.1)
        quack = QuacK(optimizer, net, CUT, method="qk-clip", threshold=0.4)
        one_step(net, x, optimizer)
        found.append({name: value for name, value in quack.metrics(heads=True).items() if "max_attn_logit" in name})
    assert found[1] == pytest.approx(found[0], rel=0.05, abs=0.02) and found[0] != found[1]


def a_step_sends_one_message_more() -> None:
    """All heads of all attentions at once."""
    sent = []
    reduce = dist.all_reduce

    def counted(tensor: Tensor, op: Any = dist.ReduceOp.SUM, **more: Any) -> Any:
        sent.append((op, tensor.numel()))
        return reduce(tensor, op=op, **more)

    model = data_parallel(Cut())
    optimizer = SGD(model.parameters(), lr=0.1)
    QuacK(optimizer, model, CUT, method="qk-clip")
    model(cut_batch(0, torch.float32)).square().mean().backward()
    dist.all_reduce = counted
    try:
        optimizer.step()
    finally:
        dist.all_reduce = reduce
    assert sent == [(dist.ReduceOp.MAX, sum(site.query_heads for site in CUT.sites))]


def tensor_parallel_logits_are_refused() -> None:
    model = tensor_parallel(Cut())
    optimizer = SGD(model.parameters(), lr=0.1)
    QuacK(optimizer, model, CUT, logits=True)
    model(cut_batch(0, torch.float32)).square().mean().backward()
    with pytest.raises(OptimizerError, match="DTensor"):
        optimizer.step()


def methods_that_differ_are_refused() -> None:
    model = data_parallel(Cut())
    with pytest.raises(OptimizerError, match="different norms or methods; give all the same"):
        QuacK(SGD(model.parameters()), model, CUT, method=METHODS[1 + dist.get_rank()])  # type: ignore[arg-type]


TOGETHER: dict[str, Callable[[], None]] = {
    "data parallel": lambda: ranks_are_one_process(data_parallel),
    "FSDP2": lambda: ranks_are_one_process(fsdp),
    "bfloat16": logits_of_half_precision_are_read,
    "messages": a_step_sends_one_message_more,
    "tensor parallel": tensor_parallel_logits_are_refused,
    "differ": methods_that_differ_are_refused,
}


def cases_of(world: int) -> dict[str, Callable[[], None]]:
    return TOGETHER


def test_several_ranks(tmp_path: Path) -> None:
    run_in_processes(2, tmp_path, cases_of)
