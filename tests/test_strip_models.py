"""QK norms of real models, taken out: bitwise what the same model computes with its norms replaced by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import by_hand
import pytest
import torch
import transformers
from diffusers import FluxTransformer2DModel
from tiny_models import CASES, hugging_face
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

import quack_fx
from quack_fx.errors import CaptureError
from quack_fx.find import find_in_graph, find_qk_pairs
from quack_fx.strip import strip_qk_norm

Built = tuple[nn.Module, dict[str, Any]]


def language(kind: str, **config: Any) -> Callable[[], Built]:
    def build() -> Built:
        case = hugging_face(kind, [], **{"num_key_value_heads": 4, **config})
        return case.model, dict(case.inputs)

    return build


def flux() -> Built:
    model = FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), guidance_embeds=False,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 6, 8), "encoder_hidden_states": torch.randn(1, 4, 12),
        "pooled_projections": torch.randn(1, 10), "timestep": torch.tensor([0.5]),
        "img_ids": torch.arange(18.0).view(6, 3), "txt_ids": torch.zeros(4, 3), "return_dict": False,
    }  # fmt: skip
    return model, inputs


def x_transformer() -> Built:
    layers = Decoder(dim=32, depth=1, heads=4, attn_dim_head=8, attn_qk_norm=True, attn_qk_norm_dim_scale=True)
    return TransformerWrapper(num_tokens=64, max_seq_len=16, attn_layers=layers), {"x": torch.arange(8).view(1, 8)}


def swin_v2() -> Built:
    config = transformers.Swinv2Config(
        image_size=16, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4
    )
    return transformers.Swinv2Model(config), {"pixel_values": torch.randn(1, 3, 16, 16)}


GLM = {"use_qk_norm": True, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
       "first_k_dense_replace": 2, "head_dim": 8, "partial_rotary_factor": 0.5}  # fmt: skip
LLAMA4 = {"use_qk_norm": True, "num_local_experts": 2, "intermediate_size_mlp": 32, "head_dim": 8,
          "interleave_moe_layer_step": 3, "no_rope_layers": [1, 1]}  # fmt: skip

MODULES: dict[str, tuple[Callable[[], Built], tuple[str, ...]]] = {
    "qwen3": (language("qwen3", head_dim=8), ("q_norm", "k_norm")),
    "gemma3": (language("gemma3_text", head_dim=8), ("q_norm", "k_norm")),
    "olmo2": (language("olmo2"), ("q_norm", "k_norm")),
    "llama4": (language("llama4_text", **LLAMA4), ("qk_norm",)),
    "cohere": (language("cohere", use_qk_norm=True), ("q_norm", "k_norm")),
    "persimmon": (language("persimmon", qk_layernorm=True), ("q_layernorm", "k_layernorm")),
    "glm4_moe": (language("glm4_moe", **GLM), ("q_norm", "k_norm")),
    "stablelm, one a head": (language("stablelm", qk_layernorm=True), ("q_layernorm.norms.*", "k_layernorm.norms.*")),
    "hunyuan, after RoPE": (language("hunyuan_v1_dense", head_dim=8), ("query_layernorm", "key_layernorm")),
    "flux": (flux, ("norm_q", "norm_k", "norm_added_q", "norm_added_k")),
}
"""Models with norm modules, and what those are called."""


def without(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Replace submodules of these names by hand."""
    replaced = []
    for name, _ in list(model.named_modules()):
        if any(name.endswith(f".{end}") or ("*" in end and f".{end[:-1]}" in name) for end in names):
            model.set_submodule(name, nn.Identity())
            replaced.append(name)
    return replaced


def first_tensor(output: Any) -> Tensor:
    return next(t for t in torch.utils._pytree.tree_flatten(output)[0] if isinstance(t, Tensor))


def with_other_gains(built: Built) -> Built:
    """Gains of one would hide a norm that is only half gone."""
    model, inputs = built
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand(parameter.shape) * 0.5)
            elif "q_proj" in name or "k_proj" in name:
                parameter.mul_(10)
    return model.eval(), inputs


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
    assert torch.allclose(first_tensor(in_graph.model(**inputs)), after, atol=1e-6, rtol=1e-5)
    assert {(s.query, s.key) for s in in_graph.layout.sites} == {(s.query, s.key) for s in layout.sites}


INLINE: dict[str, tuple[Callable[[], Built], str, Any]] = {
    "swinv2": (swin_v2, "torch.nn.functional.normalize", lambda x, *_, **__: x),
    "x-transformers": (x_transformer, "x_transformers.x_transformers.l2norm", lambda x, *_, **__: x),
}
"""Models with inline norms: what makes them, and what stands for it by hand."""


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
