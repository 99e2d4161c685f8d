"""QK norm put into real models: what Qwen3 does, found again by structure, and out again bitwise."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CASES, qwen3
from torch import Tensor, nn

from quack_fx.errors import StripError
from quack_fx.find import find_qk_pairs
from quack_fx.insert import insert_qk_norm
from quack_fx.strip import strip_qk_norm
from quack_fx.verify import verify_qk_pairs


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    return [t for t in torch.utils._pytree.tree_flatten(model(**inputs))[0] if isinstance(t, Tensor)]


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


def test_stripped_and_inserted_again_is_qwen3() -> None:
    torch.manual_seed(0)
    case = qwen3()
    model = case.model.eval()
    expected = outputs(model, case.inputs)[0]
    stripped = strip_qk_norm(model, case.layout).layout
    report = insert_qk_norm(model, stripped, eps=model.config.rms_norm_eps)
    assert not report.left
    assert torch.allclose(outputs(model, case.inputs)[0], expected, atol=1e-6)


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


def test_tied_projections_are_left() -> None:
    case = CASES["llama"]()
    one, two = (case.model.model.layers[i].self_attn for i in range(2))
    two.q_proj.weight = one.q_proj.weight
    report = insert_qk_norm(case.model, find_qk_pairs(case.model, **case.inputs))
    assert any(
        "is also 'model.layers.1.self_attn.q_proj.weight'" in told for told in (left.reason for left in report.left)
    )


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
