"""QK norm put into real models: what Qwen3 does, found again by structure, and out again bitwise."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import by_hand
import pytest
import torch
import torch.nn.functional as F
from normed_models import INLINE, MODULES, with_other_gains
from tiny_models import CASES
from torch import Tensor, nn

import quack_fx
from quack_fx.errors import CaptureError, StripError
from quack_fx.find import find_in_graph, find_qk_pairs
from quack_fx.layout import AttentionSite, Norm
from quack_fx.prove import verify_qk_pairs
from quack_fx.qk_norm.call import call_of
from quack_fx.qk_norm.insert import insert_qk_norm
from quack_fx.qk_norm.insert.modules import NormHeads
from quack_fx.qk_norm.strip import strip_qk_norm


def outputs(model: nn.Module, *call: Any) -> list[Tensor]:
    """Tensors that a model gives for positional arguments, named ones, or both."""
    torch.manual_seed(0)
    args, kwargs = call if len(call) == 2 else call_of(*call)
    return [t for t in torch.utils._pytree.tree_flatten(model(*args, **kwargs))[0] if isinstance(t, Tensor)]


PLAIN = ["llama", "gpt2", "gpt_neox", "bert", "albert", "falcon", "swin", "our_gpt"]


@pytest.mark.parametrize("name", PLAIN)
def test_found_again_proved_and_taken_out(name: str) -> None:
    case = CASES[name]()
    model = case.model.eval()
    before, state = outputs(model, case.inputs), list(model.state_dict())
    report = insert_qk_norm(model, find_qk_pairs(model, **case.inputs))
    assert not report.left and len(report.inserted) == 2 * len(case.layout.sites)
    found = find_qk_pairs(model, **case.inputs)
    assert found.sites == report.layout.sites
    assert verify_qk_pairs(model, found, **case.inputs).complete
    assert not all(map(torch.equal, outputs(model, case.inputs), before))
    twin = copy.deepcopy(model)
    for again in (report.restore, lambda: strip_qk_norm(twin, report.layout)):
        again()
        one = model if again == report.restore else twin
        assert all(map(torch.equal, outputs(one, case.inputs), before))
        assert list(one.state_dict()) == state


def in_any_order(site: AttentionSite) -> tuple[AttentionSite, frozenset[Norm]]:
    return replace(site, qk_norm=()), frozenset(site.qk_norm)


@pytest.mark.parametrize("name", MODULES)
def test_stripped_and_inserted_again_is_normed(name: str) -> None:
    """RMS norms on every attention, proved; out again, the model computes bitwise what it did without."""
    torch.manual_seed(0)
    model, inputs = with_other_gains(MODULES[name][0]())
    stripped = strip_qk_norm(model, find_qk_pairs(model, **inputs), scale="keep").layout
    bare = outputs(model, inputs)
    report = insert_qk_norm(model, stripped, inputs=inputs)
    assert not report.left and report.model is model
    found = find_qk_pairs(model, **inputs)
    assert [in_any_order(s) for s in found.sites] == [in_any_order(s) for s in report.layout.sites]
    assert all({(n.side, n.kind) for n in site.qk_norm} == {("query", "rms"), ("key", "rms")} for site in found.sites)
    assert not all(map(torch.equal, outputs(model, inputs), bare))
    assert verify_qk_pairs(model, found, **inputs).complete
    strip_qk_norm(model, found, scale="keep")
    assert all(map(torch.equal, outputs(model, inputs), bare))


KEY_NORMS = ("k_norm", "norm_k")


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "glm4_moe", "flux"])
def test_rms_norms_inserted_again_are_those_that_were(name: str) -> None:
    """Norms of each head right behind the projections, with gains of one."""
    torch.manual_seed(0)
    model, inputs = MODULES[name][0]()
    model.eval()
    eps = {
        m.eps if hasattr(m, "eps") else m.variance_epsilon
        for n, m in model.named_modules()
        if "norm_k" in n or "k_norm" in n
    }
    expected = outputs(model, inputs)[0]
    stripped = strip_qk_norm(model, find_qk_pairs(model, **inputs)).layout
    insert_qk_norm(model, stripped, eps=eps.pop(), inputs=inputs)
    assert torch.allclose(outputs(model, inputs)[0], expected, atol=1e-6)


def changed_inputs(x: Any) -> Any:
    """Inputs of the zoo by hand are mostly ones, which every attention hands on as they are."""
    return torch.randn_like(x) if isinstance(x, Tensor) and x.is_floating_point() else x


GRAPHS = {f"tiny-{n}": n for n in CASES} | {f"hand-{n}": n for n in by_hand.CASES} | {f"normed-{n}": n for n in INLINE}
NO_PLACE = {
    "tiny-fusion": "another attention has the same product",
    "hand-rope_matrices": "a norm before its product is not seen as a QK norm there",
    "hand-absorbed": "a norm before its product is not seen as a QK norm there",
    "hand-absorbed_together": "its logits are the sum of products with a part of the features each",
    "hand-lora": "its query features have no one scale (a learned factor, parts scaled unlike)",
    **dict.fromkeys(
        ("hand-product_then_sum", "hand-edges", "hand-edges_with_features", "hand-edges_by_index_add"),
        "its logits are sums that are written out, not a product of matrices",
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_into_a_graph_and_out_again(name: str) -> None:
    """Norms on every attention of a graph, each found as one; out again, the graph computes bitwise what it did."""
    torch.manual_seed(0)
    kind, _, case = name.partition("-")
    if kind == "hand":
        model, args, _ = by_hand.CASES[case]()
        call: tuple[Any, dict[str, Any]] = (tuple(map(changed_inputs, args)), {})
    else:
        model, inputs = INLINE[case][0]() if kind == "normed" else (CASES[case]().model, CASES[case]().inputs)
        call = ((), dict(inputs))
    try:
        graph = quack_fx.capture(model.eval(), *call, executable=True).graph_module
    except CaptureError:
        pytest.skip("it is not one graph")
    if kind == "normed":
        graph = strip_qk_norm(graph, scale="keep").model
    layout, before = find_in_graph(graph), outputs(graph, *call)
    report = insert_qk_norm(graph)
    assert {left.reason for left in report.left} <= {"it has a QK norm", NO_PLACE.get(name, "")}
    normed = [
        site
        for site in report.layout.sites
        if any(n.weight in {f"{i}.weight" for i in report.inserted} for n in site.qk_norm)
    ]
    assert len(normed) + len(report.left) == len(layout.sites) == len(report.layout.sites)
    assert [(s.query, s.key, s.logit_scale) for s in report.layout.sites] == [
        (s.query, s.key, s.logit_scale) for s in layout.sites
    ]
    if not report.inserted:
        assert report.model is graph
        return
    after = outputs(report.model, *call)
    assert name == "hand-fewer_keys_left" or not all(map(torch.equal, after, before))  # its keys are all the same
    stripped = strip_qk_norm(report.model, scale="keep")
    if not any(site.qk_norm for site in layout.sites):
        assert all(map(torch.equal, outputs(stripped.model, *call), before))
        assert find_in_graph(stripped.model).sites == layout.sites
    assert all(map(torch.equal, outputs(graph, *call), before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_of_mla_with_norms_is_blind_to_longer_queries(dtype: torch.dtype) -> None:
    """All features of a head are normed together, those with RoPE and those without."""
    torch.manual_seed(0)
    case = CASES["our_mla"]()
    model = case.model.to(dtype)
    graph = quack_fx.capture(model, (), case.inputs, executable=True).graph_module
    report = insert_qk_norm(graph, eps=0.0)
    assert not report.left
    before = outputs(report.model, case.inputs)[0]
    with torch.no_grad():
        for name in {b.param for site in report.layout.sites for b in site.query if b.role in ("uq", "qr")}:
            model.get_parameter(name).mul_(4)
    after = outputs(report.model, case.inputs)[0]
    assert before.dtype == dtype and torch.allclose(before, after, atol=1e-5 if dtype == torch.float32 else 1e-1)
    after.float().square().mean().backward()
    gains = [report.model.get_submodule(n).weight for n in report.inserted]
    assert all(g.grad is not None and g.grad.any() and g.dtype == dtype for g in gains)


def test_gain_is_trained_and_scaled_features_make_no_difference() -> None:
    case = CASES["llama"]()
    model = case.model
    report = insert_qk_norm(model, case.layout)
    before = outputs(model, case.inputs)[0]
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(3)
    after = outputs(model, case.inputs)[0]
    assert torch.allclose(before, after, atol=1e-4)
    F.cross_entropy(after.flatten(0, 1), case.inputs["input_ids"].flatten()).backward()
    gains = [model.get_submodule(n).weight for n in report.inserted]
    assert all(g.grad is not None and g.grad.any() for g in gains)


def test_what_is_left_says_why() -> None:
    reasons = {
        "our_mla": "its query heads are put together from",
        "qwen3": "it has a QK norm",
        "torch_mha": "'in_proj_weight' is not the weight of a module that multiplies with it",
        "joint": "its query heads are put together from 2 weights|it has a QK norm",
    }
    for name, reason in reasons.items():
        case = CASES[name]()
        state, layout = list(case.model.state_dict()), case.layout
        report = insert_qk_norm(case.model, layout)
        assert not report.inserted and report.layout == layout
        assert [s.name for s in layout.sites] == [left.site for left in report.left]
        for left in report.left:
            assert any(left.reason.startswith(one) for one in reason.split("|")), (name, left)
        assert list(case.model.state_dict()) == state


def test_sequences_of_unlike_length_are_normed_like_each_alone() -> None:
    projection = nn.Linear(6, 8)
    norm = projection.q_norm = nn.RMSNorm(4)
    projection.register_forward_hook(NormHeads("q_norm", "weight", torch.arange(8).view(2, 4), -1))
    parts = [torch.randn(n, 6) for n in (2, 5)]
    nested = projection(torch.nested.nested_tensor(parts, layout=torch.jagged))
    for part, found in zip(parts, nested.unbind(), strict=True):
        plain = nn.functional.linear(part, projection.weight, projection.bias)
        assert torch.allclose(found, norm(plain.unflatten(-1, (2, 4))).flatten(-2), atol=1e-6)


def test_tied_projections_share_a_norm() -> None:
    """Wherever a weight stands in the model, its features pass the same norm."""
    case = CASES["llama"]()
    one, two = (case.model.model.layers[i].self_attn for i in range(2))
    two.q_proj.weight = one.q_proj.weight
    before, state = outputs(case.model, case.inputs), list(case.model.state_dict())
    report = insert_qk_norm(case.model, find_qk_pairs(case.model, **case.inputs))
    assert not report.left and len(report.inserted) == 3
    assert two.q_proj.q_norm is one.q_proj.q_norm and two.k_proj.k_norm is not one.k_proj.k_norm
    found = find_qk_pairs(case.model, **case.inputs)
    assert found.sites == report.layout.sites and all(len(site.qk_norm) == 2 for site in found.sites)
    report.restore()
    assert all(map(torch.equal, outputs(case.model, case.inputs), before))
    assert list(case.model.state_dict()) == state


def test_layout_of_another_model_changes_nothing() -> None:
    case = CASES["llama"]()
    last = case.layout.sites[-1]
    wrong = replace(last, query=(replace(last.query[0], param="model.no.weight"),))
    before = list(case.model.state_dict())
    with pytest.raises(
        StripError, match=r"names the parameter 'model.no.weight', which LlamaForCausalLM does not have"
    ):
        insert_qk_norm(case.model, replace(case.layout, sites=(*case.layout.sites[:-1], wrong)))
    assert list(case.model.state_dict()) == before
