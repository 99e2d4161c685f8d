"""Small copies of configs: every kind of layer, the ratios of heads and widths, and the attentions that were there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quack_fx import find_qk_pairs
from quack_fx.layout import QKLayout
from quack_fx.targets.adapters.hf import build_model
from quack_fx.targets.inputs.pretrained import pretrained_inputs
from quack_fx.targets.shrink import shrunk

transformers = pytest.importorskip("transformers")

SMALL = 10_000_000


def small_model(config: Any, cls: str) -> tuple[Any, dict[str, Any]]:
    """The first small model that can be built and run, with inputs."""
    failures = []
    for small in shrunk(config):
        try:
            model = build_model(getattr(transformers, cls), small).eval()
        except (ValueError, TypeError) as error:
            failures.append(error)
            continue
        for kwargs in pretrained_inputs(model, 2, 5):
            try:
                with torch.no_grad():
                    model(**kwargs)
                return model, kwargs
            except Exception as error:
                failures.append(error)
    raise AssertionError(f"no small form of {cls} runs: {failures}")


def kinds(layout: QKLayout) -> set[tuple[object, ...]]:
    """The kinds of sites there are: what sets them apart but for sizes."""
    return {
        (
            site.kind,
            site.cross,
            site.query_heads // site.key_heads,
            tuple(sorted({block.role for side in (site.query, site.key) for block in side})),
            tuple(sorted({(norm.side, norm.kind) for norm in site.qk_norm})),
            bool(site.latent_norm),
        )
        for site in layout.sites
    }


def default(name: str, **fields: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**fields)


LARGE: dict[str, tuple[Callable[[], Any], str, set[str]]] = {
    "gqa": (
        default("LlamaConfig", num_hidden_layers=80, hidden_size=8192, num_attention_heads=64, num_key_value_heads=8),
        "LlamaModel",
        {"gqa"},
    ),
    "heads wider than the hidden size": (
        default("Qwen3Config", hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128),
        "Qwen3Model",
        {"gqa"},
    ),
    "mla": (default("DeepseekV3Config"), "DeepseekV3Model", {"mla"}),
    "experts": (default("Qwen3MoeConfig", num_experts=128), "Qwen3MoeModel", {"gqa"}),
    "encoder and decoder": (default("T5Config"), "T5Model", {"mha"}),
    "speech": (default("WhisperConfig"), "WhisperModel", {"mha"}),
    "windows": (default("SwinConfig"), "SwinModel", {"mha"}),
    "two towers": (default("CLIPConfig"), "CLIPModel", {"mha"}),
    "linear and full attention": (default("Qwen3NextConfig"), "Qwen3NextModel", {"gqa"}),
    "mamba and attention": (default("JambaConfig"), "JambaModel", {"gqa"}),
    "multi-query": (default("FalconConfig", num_attention_heads=32, hidden_size=2048), "FalconModel", {"mqa"}),
}


@pytest.mark.parametrize("name", LARGE)
def test_small_model_runs_and_has_the_attentions_of_the_large_one(name: str) -> None:
    make, cls, expected = LARGE[name]
    model, kwargs = small_model(make(), cls)
    assert sum(p.numel() for p in model.parameters()) < SMALL
    layout = find_qk_pairs(model, **kwargs)
    assert {site.kind for site in layout.sites} == expected
    for site in layout.sites:
        assert site.query_heads > 1, f"one head hides which rows belong to which: {site.name}"
        assert site.head_dim >= 8


@pytest.mark.parametrize("name", LARGE)
def test_config_is_left_as_it_is(name: str) -> None:
    config = LARGE[name][0]()
    before = config.to_dict()
    forms = [small.to_dict() for small in shrunk(config)]
    assert config.to_dict() == before
    assert forms
    assert all(type(small) is type(config) for small in shrunk(config))
    assert all(a != b for i, a in enumerate(forms) for b in forms[:i]), "the same form twice"


@pytest.mark.parametrize("name", ["gqa", "experts", "mla", "linear and full attention"])
def test_a_model_with_few_layers_has_the_sites_that_its_small_copy_has(name: str) -> None:
    make, cls, _ = LARGE[name]
    config = make()
    fewer = {key: 16 for key in ("num_local_experts", "n_routed_experts") if hasattr(config, key)}
    if name == "mla":
        fewer |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    layers = 4 if getattr(config, "layer_types", None) else 2
    config = type(config).from_dict({**config.to_dict(), **fewer, "num_hidden_layers": layers, "layer_types": None})
    with torch.device("meta"):
        large = build_model(getattr(transformers, cls), config).eval()
    ids = torch.arange(1, 11).view(2, 5)
    small, _ = small_model(config, cls)
    assert kinds(find_qk_pairs(large, input_ids=ids)) == kinds(find_qk_pairs(small, input_ids=ids))


def test_names_of_parameters_are_those_of_the_large_model() -> None:
    config = transformers.DeepseekV3Config(first_k_dense_replace=3)
    with torch.device("meta"):
        large = transformers.DeepseekV3Model(config)
        small = transformers.DeepseekV3Model(next(iter(shrunk(config))))
    assert {name for name, _ in small.named_parameters()} <= {name for name, _ in large.named_parameters()}
    experts = Counter("experts" in name for name, _ in small.named_parameters())
    assert experts[True] and experts[False]


def test_every_kind_of_layer_stays() -> None:
    types = ["sliding_attention"] * 5 + ["full_attention"]
    config = transformers.Gemma3TextConfig(num_hidden_layers=48, layer_types=types * 8)
    small = next(iter(shrunk(config)))
    assert set(small.layer_types) == set(types)
    assert len(small.layer_types) == small.num_hidden_layers < 10


def test_layers_before_the_first_experts_stay() -> None:
    small = next(iter(shrunk(transformers.DeepseekV3Config(first_k_dense_replace=3, num_hidden_layers=61))))
    assert 3 < small.num_hidden_layers < 10
    assert small.first_k_dense_replace == 3


def test_layers_of_cross_attention_stay() -> None:
    text = {"num_hidden_layers": 40, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38]}
    small = next(iter(shrunk(transformers.MllamaConfig(text_config=text)))).text_config
    assert small.cross_attention_layers
    assert max(small.cross_attention_layers) < small.num_hidden_layers < 10


@pytest.mark.parametrize("name", ["gqa", "heads wider than the hidden size", "experts"])
def test_ratios_of_heads_and_widths_stay(name: str) -> None:
    config = LARGE[name][0]()
    small = next(iter(shrunk(config)))
    assert small.num_attention_heads > small.num_key_value_heads > 1
    assert small.hidden_size < config.hidden_size
    dim, large_dim = (getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads for c in (small, config))
    assert dim not in (small.num_attention_heads, small.num_key_value_heads), (
        "which of the two an axis counts is hidden"
    )
    assert dim * small.num_attention_heads / small.hidden_size == (
        large_dim * config.num_attention_heads / config.hidden_size
    )


def test_widths_of_mla_stay_apart() -> None:
    small = next(iter(shrunk(transformers.DeepseekV3Config())))
    widths = (small.qk_nope_head_dim, small.qk_rope_head_dim, small.q_lora_rank, small.kv_lora_rank)
    assert len(set(widths)) == 4
    assert small.qk_rope_head_dim % 2 == 0
    assert small.hidden_size > small.q_lora_rank > small.kv_lora_rank


def test_configs_inside_a_config_are_made_small() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = transformers.Qwen2VLConfig(text_config={"rope_parameters": rope})
    small = next(iter(shrunk(config)))
    assert small.text_config.hidden_size < config.text_config.hidden_size
    assert small.vision_config.embed_dim < config.vision_config.embed_dim
    sections = small.text_config.rope_parameters["mrope_section"]
    text = small.text_config
    assert sum(sections) == text.hidden_size // text.num_attention_heads // 2


def test_sections_of_rotary_embeddings_that_are_equal_stay_so() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [22, 22, 20]}
    small = next(iter(shrunk(transformers.Qwen2VLTextConfig(rope_parameters=rope))))
    height, width, time = small.rope_parameters["mrope_section"]
    assert height == width > 0 < time
    assert height + width + time == small.hidden_size // small.num_attention_heads // 2 < 64


def test_a_part_that_is_built_by_the_name_of_a_model_is_as_large_as_that() -> None:
    config = transformers.Gemma3nConfig()
    small = next(iter(shrunk(config)))
    assert small.vision_config.to_dict() == config.vision_config.to_dict()
    assert small.text_config.hidden_size < config.text_config.hidden_size


def test_widths_of_single_layers_are_made_small() -> None:
    config = transformers.Gemma3nTextConfig()
    small = next(iter(shrunk(config)))
    assert len(small.intermediate_size) == small.num_hidden_layers
    assert max(small.intermediate_size) < min(config.intermediate_size)


def test_fields_that_list_no_layers_are_not_taken_for_such() -> None:
    config = transformers.TextNetConfig()
    small = next(iter(shrunk(config)))
    assert small.conv_layer_kernel_sizes == config.conv_layer_kernel_sizes
    channels = transformers.PPOCRV5MobileDetConfig().layer_list_out_channels
    small = next(iter(shrunk(transformers.PPOCRV5MobileDetConfig())))
    assert len(small.layer_list_out_channels) == len(channels)


def test_what_comes_after_a_layer_comes_after_one_that_is_left() -> None:
    small = next(iter(shrunk(transformers.MiniCPMV4_6VisionConfig(insert_layer_id=6))))
    assert 0 <= small.insert_layer_id < small.num_hidden_layers < 6


def test_pictures_are_made_small_where_widths_cannot_be() -> None:
    config = transformers.ViTConfig()
    forms = [(form.hidden_size, form.image_size) for form in shrunk(config)]
    assert (config.hidden_size, 4 * config.patch_size) in forms
    assert forms.index((config.hidden_size, 4 * config.patch_size)) < forms.index((config.hidden_size, 224))


def test_stages_keep_their_number_and_their_growth() -> None:
    config = transformers.SwinConfig(depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], embed_dim=128)
    small = next(iter(shrunk(config)))
    assert len(small.depths) == len(small.num_heads) == 4
    assert all(math.isclose(b / a, 2) for a, b in zip(small.num_heads, small.num_heads[1:], strict=False))
    assert small.depths[2] < 18
    assert small.embed_dim % small.num_heads[0] == 0


def test_latents_and_what_is_seen_are_made_small_alike() -> None:
    config = transformers.PerceiverConfig()
    small = next(iter(shrunk(config)))
    assert small.d_latents / small.d_model == config.d_latents / config.d_model
    assert small.num_self_attends_per_block < 5
    assert (small.d_latents // small.num_self_attention_heads) % 2 == 0


def test_layers_that_share_keys_stay_beside_those_that_have_them() -> None:
    config = transformers.Gemma3nTextConfig()
    small = next(iter(shrunk(config)))
    own = small.layer_types[: small.num_hidden_layers - small.num_kv_shared_layers]
    shared = small.layer_types[len(own) :]
    assert set(own) == set(shared) == set(config.layer_types)


def test_fields_of_single_layers_follow_their_layers() -> None:
    small = next(iter(shrunk(transformers.Gemma4TextConfig())))
    assert set(small.layer_types) == {"sliding_attention", "full_attention"}
    assert small.num_hidden_layers < 13


def test_special_tokens_are_inside_the_vocabulary() -> None:
    small = next(iter(shrunk(transformers.LlamaConfig(vocab_size=128256, bos_token_id=128000, eos_token_id=128001))))
    assert small.vocab_size <= 512
    assert 0 <= small.bos_token_id < small.vocab_size
    assert 0 <= small.eos_token_id < small.vocab_size
