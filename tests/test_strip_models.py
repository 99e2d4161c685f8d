"""QK norms of real models, taken out: bitwise what the same model computes with its norms replaced by hand."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import by_hand
import pytest
import torch
from normed_models import INLINE, MODULES, first_tensor, language, levit, with_other_gains, without
from tiny_models import CASES
from torch import Tensor, nn

import quack_fx
from quack_fx.errors import CaptureError
from quack_fx.find import find_in_graph, find_qk_pairs
from quack_fx.qk_norm.strip import strip_qk_norm


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_out_as_if_by_hand(name: str) -> None:
    torch.manual_seed(0)
    build, names = MODULES[name]
    model, inputs = with_other_gains(build())
    layout = find_qk_pairs(model, **inputs)
    reference = copy.deepcopy(model)
    replaced = without(reference, names)
    before = first_tensor(model(**inputs))
    graph = quack_fx.capture(model, (), inputs, executable=True).graph_module
    in_graph = strip_qk_norm(graph, scale="keep")
    report = strip_qk_norm(model, layout, scale="keep")
    after = first_tensor(model(**inputs))
    assert {norm.module for norm in report.removed} == set(replaced) and not report.left
    assert torch.equal(after, first_tensor(reference(**inputs)))
    assert not torch.equal(after, before)
    assert list(model.state_dict()) == list(reference.state_dict())
    found = find_qk_pairs(model, **inputs)
    assert found.sites == report.layout.sites and not any(site.qk_norm for site in found.sites)
    assert [(s.query, s.key, s.terms) for s in found.sites] == [(s.query, s.key, s.terms) for s in layout.sites]
    # The graph way, from the same weights.
    assert not in_graph.left
    parameters = [p for p in model.parameters() if p.requires_grad]
    by_graph = first_tensor(in_graph.model(**inputs))
    assert torch.allclose(by_graph, after, atol=1e-6)
    gradients = (torch.autograd.grad(one.square().mean(), parameters, allow_unused=True) for one in (by_graph, after))
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None) or not (one if other is None else other).any()
        assert one is None or other is None or (one - other).abs().max() <= 1e-6 * max(1.0, float(other.abs().max()))
    assert {(s.query, s.key) for s in in_graph.layout.sites} == {(s.query, s.key) for s in layout.sites}


@pytest.mark.parametrize("name", INLINE)
def test_inline_norms_are_out_as_if_by_hand(name: str) -> None:
    torch.manual_seed(0)
    build, function, instead = INLINE[name]
    model, inputs = build()
    model.eval()
    graph = quack_fx.capture(model, (), inputs, executable=True).graph_module
    report = strip_qk_norm(graph, gain="keep", scale="keep")
    with patch(function, instead):
        expected = first_tensor(model(**inputs))
    assert torch.equal(first_tensor(report.model(**inputs)), expected)
    assert not torch.equal(first_tensor(model(**inputs)), expected)
    assert report.removed and not report.left
    assert not any(site.qk_norm for site in find_in_graph(report.model).sites)  # type: ignore[arg-type]
    assert strip_qk_norm(model, find_qk_pairs(model, **inputs)).left[0].reason.endswith("a graph of the model")


@pytest.mark.parametrize("training", [False, True])
def test_batch_norms_of_levit_stay_for_its_values_alone(training: bool) -> None:
    torch.manual_seed(0)
    model, inputs = levit()
    model.train(training)
    layout = find_qk_pairs(model, **inputs)
    assert all({norm.kind for norm in site.qk_norm} == {"batch"} for site in layout.sites)
    graph = quack_fx.capture(copy.deepcopy(model), (), inputs, executable=True).graph_module
    report = strip_qk_norm(graph, scale="keep")
    assert not report.left and len(report.notes) == len(layout.sites) == 5
    found = find_in_graph(report.model)  # type: ignore[arg-type]
    assert [(s.query, s.key, s.terms) for s in found.sites] == [(s.query, s.key, s.terms) for s in layout.sites]
    assert not any(site.qk_norm for site in found.sites)

    def without(features: int, heads: int) -> Any:
        """Hand on what the norm of a projection is given, but for what comes after some features of each head."""

        def hook(module: Any, given: Any, normed: Tensor) -> Tensor:
            ours, bare = (y.unflatten(-1, (heads, -1)) for y in (normed, module.linear(*given)))
            return torch.cat((bare[..., :features], ours[..., features:]), -1).flatten(-2)

        return hook

    for module in model.modules():
        for name, count in (("queries_keys_values", 2), ("keys_values", 1), ("queries", 1)):
            if hasattr(module, name):
                hook = without(count * module.key_dim, module.num_attention_heads)
                getattr(module, name).register_forward_hook(hook)
    ours, theirs = first_tensor(report.model(**inputs)), first_tensor(model(**inputs))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    own = dict(report.model.named_parameters())
    expected = torch.autograd.grad(theirs.square().sum(), [p for _, p in parameters], allow_unused=True)
    for (name, _), gradient in zip(parameters, expected, strict=True):
        if name in own and gradient is not None:
            (mine,) = torch.autograd.grad(ours.square().sum(), own[name], retain_graph=True)
            assert (mine - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp_min(1), name


def test_stripped_qwen3_is_the_model_that_never_had_the_norm() -> None:
    torch.manual_seed(0)
    model, inputs = MODULES["qwen3"][0]()
    never, _ = language("llama", head_dim=8)()
    strip_qk_norm(model, find_qk_pairs(model, **inputs))
    never.load_state_dict(model.state_dict())
    assert torch.equal(first_tensor(model.eval()(**inputs)), first_tensor(never.eval()(**inputs)))
    assert find_qk_pairs(model, **inputs).sites == find_qk_pairs(never, **inputs).sites


PLAIN = {f"tiny-{n}": n for n in CASES} | {f"hand-{n}": n for n in by_hand.CASES}


@pytest.mark.parametrize("name", PLAIN)
def test_models_without_qk_norm_come_back_untouched(name: str) -> None:
    """Same modules, same parameters, same numbers; the same graph object."""
    model, args, kwargs = _zoo(name)
    layout = find_qk_pairs(model, *args, **kwargs)
    if any(site.qk_norm for site in layout.sites):
        pytest.skip("it has a QK norm")
    modules, state = dict(model.named_modules()), dict(model.state_dict(keep_vars=True))
    report = strip_qk_norm(model, layout)
    assert (report.removed, report.left, report.notes, report.layout) == ((), (), (), layout)
    assert all(module is modules[n] for n, module in model.named_modules())
    assert {n: t is state[n] for n, t in model.state_dict(keep_vars=True).items()} == dict.fromkeys(state, True)
    with suppress(CaptureError):  # not every model is one graph
        graph = quack_fx.capture(model, args, kwargs, executable=True).graph_module
        assert strip_qk_norm(graph).model is graph


def _zoo(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    torch.manual_seed(0)
    if name.startswith("tiny-"):
        case = CASES[PLAIN[name]]()
        return case.model.eval(), (), dict(case.inputs)
    model, inputs, _ = by_hand.CASES[PLAIN[name]]()
    return model.eval(), inputs, {}
