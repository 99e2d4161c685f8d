"""Tiny models with QK norm of every make, and the same with their norms replaced by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from diffusers import FluxTransformer2DModel
from tiny_models import hugging_face
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

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


def levit() -> Built:
    """Batch norms behind fused projections, which serve the values, too."""
    config = transformers.LevitConfig(
        image_size=32, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
        key_dim=[4, 4, 4], attention_ratio=[2, 2, 2], mlp_ratio=[2, 2, 2],
        down_ops=[["Subsample", 4, 4, 4, 2, 2], ["Subsample", 4, 6, 4, 2, 2]],
    )  # fmt: skip
    model = transformers.LevitModel(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias)
                module.running_mean.uniform_()
                module.running_var.uniform_(0.5, 1.5)
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


def timm_vit() -> Built:
    """Where timm is installed (`make strip`); its torchvision wants a torch of its own."""
    timm = pytest.importorskip("timm")
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.models.VisionTransformer(qk_norm=True, **size), {"x": torch.randn(1, 3, 16, 16)}


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
    "timm vit": (timm_vit, ("q_norm", "k_norm")),
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


INLINE: dict[str, tuple[Callable[[], Built], str, Any]] = {
    "swinv2": (swin_v2, "torch.nn.functional.normalize", lambda x, *_, **__: x),
    "x-transformers": (x_transformer, "x_transformers.x_transformers.l2norm", lambda x, *_, **__: x),
}
"""Models with inline norms: what makes them, and what stands for it by hand."""
