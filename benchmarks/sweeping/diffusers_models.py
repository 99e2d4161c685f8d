"""SOURCE: diffusers. Transformers, UNets and autoencoders of image, video and audio generators, with small arguments.

In: nothing. Out: candidates. Every model has a different signature, so a table lists the arguments of each constructor
and forward: a tuple is the shape of a random tensor; anything else is passed unchanged.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sweeping.candidate import Candidate

Options = dict[str, Any]

HEADS: Options = {"num_attention_heads": 4, "attention_head_dim": 8}
WIDE_HEADS: Options = {"num_attention_heads": 4, "attention_head_dim": 12}
ROPE_2D: Options = {"axes_dims_rope": (2, 2, 4)}
TEXT = (2, 5, 16)
TIME = torch.tensor([3, 5])
TEXT_MASK = torch.ones(2, 5, dtype=torch.long)
LATENT = (2, 4, 8, 8)
VIDEO = (2, 4, 2, 8, 8)
FRAMES = (2, 4, 2, 4, 4)
PACKED = (2, 9, 4)


def _ids(tokens: int, axes: int = 3) -> Tensor:
    return torch.arange(tokens).float()[:, None].expand(tokens, axes).contiguous()


_FLUX: Options = {
    **{"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16},
    **HEADS,
    **ROPE_2D,
}
_FLUX_CALL: Options = {
    **{"hidden_states": PACKED, "encoder_hidden_states": TEXT, "timestep": TIME / 10},
    **{"img_ids": _ids(9), "txt_ids": _ids(5)},
}
_WAN: Options = {
    **{"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2},
    **WIDE_HEADS,
}
_WAN_CALL: Options = {"hidden_states": VIDEO, "timestep": TIME, "encoder_hidden_states": TEXT}
_CONDITIONED: Options = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
_BLOCKS_2D: Options = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
_UNET_CALL: Options = {"sample": (2, 4, 4, 4), "timestep": TIME, "encoder_hidden_states": TEXT}
_ENCODERS: Options = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    **_CONDITIONED,
}

_MODELS: dict[str, tuple[Options, Options]] = {
    "DiTTransformer2DModel": (
        {**HEADS, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 10},
        {"hidden_states": LATENT, "timestep": TIME, "class_labels": torch.tensor([1, 2])},
    ),
    "PixArtTransformer2DModel": (
        {**HEADS, "num_layers": 2, "sample_size": 8, "cross_attention_dim": 32, "caption_channels": 16},
        {
            **{"hidden_states": LATENT, "encoder_hidden_states": TEXT, "timestep": TIME},
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "Transformer2DModel": (
        {**HEADS, "in_channels": 32, "num_layers": 2, "cross_attention_dim": 16, "norm_num_groups": 4},
        {"hidden_states": (2, 32, 4, 4), "encoder_hidden_states": TEXT},
    ),
    "TransformerTemporalModel": (
        {**HEADS, "in_channels": 32, "num_layers": 2, "norm_num_groups": 4},
        {"hidden_states": (4, 32, 3, 3), "num_frames": 2},
    ),
    "DualTransformer2DModel": (
        {**HEADS, "in_channels": 32, "cross_attention_dim": 16, "norm_num_groups": 4},
        {"hidden_states": (2, 32, 4, 4), "encoder_hidden_states": (2, 77 + 257, 16)},
    ),
    "SD3Transformer2DModel": (
        {
            **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16},
            **{"caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8, **HEADS},
        },
        {"hidden_states": LATENT, "encoder_hidden_states": TEXT, "pooled_projections": (2, 16), "timestep": TIME},
    ),
    "SD3Transformer2DModel, qk norm, dual attention": (
        {
            **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16},
            **{"caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8, **HEADS},
            **{"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
        },
        {"hidden_states": LATENT, "encoder_hidden_states": TEXT, "pooled_projections": (2, 16), "timestep": TIME},
    ),
    "FluxTransformer2DModel": (
        {**_FLUX, "pooled_projection_dim": 16},
        {**_FLUX_CALL, "pooled_projections": (2, 16)},
    ),
    "Flux2Transformer2DModel": (
        {**_FLUX, "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 16},
        {**_FLUX_CALL, "img_ids": _ids(9, 4), "txt_ids": _ids(5, 4), "guidance": torch.ones(2)},
    ),
    "ChromaTransformer2DModel": (
        {**_FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        _FLUX_CALL,
    ),
    "BriaTransformer2DModel": ({**_FLUX, "axes_dims_rope": [2, 2, 4]}, _FLUX_CALL),
    "OvisImageTransformer2DModel": ({**_FLUX, "out_channels": 4}, _FLUX_CALL),
    "LongCatImageTransformer2DModel": ({**_FLUX, "pooled_projection_dim": 16}, _FLUX_CALL),
    "QwenImageTransformer2DModel": (
        {"in_channels": 4, "out_channels": 1, "num_layers": 2, "joint_attention_dim": 16, **HEADS, **ROPE_2D},
        {
            **{"hidden_states": PACKED, "encoder_hidden_states": TEXT, "encoder_hidden_states_mask": TEXT_MASK},
            **{"timestep": TIME / 10, "img_shapes": [[(1, 3, 3)]] * 2},
        },
    ),
    "AuraFlowTransformer2DModel": (
        {
            **{"sample_size": 8, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1, **HEADS},
            **{"joint_attention_dim": 16, "caption_projection_dim": 32, "pos_embed_max_size": 16},
        },
        {"hidden_states": LATENT, "encoder_hidden_states": TEXT, "timestep": TIME / 10},
    ),
    "WanTransformer3DModel": (_WAN, _WAN_CALL),
    "WanTransformer3DModel, image": (
        {**_WAN, "image_dim": 16, "added_kv_proj_dim": 48},
        {**_WAN_CALL, "encoder_hidden_states_image": (2, 257, 16)},
    ),
    "WanVACETransformer3DModel": (
        {**_WAN, "vace_layers": [0], "vace_in_channels": 4},
        {**_WAN_CALL, "control_hidden_states": VIDEO},
    ),
    "SkyReelsV2Transformer3DModel": (_WAN, _WAN_CALL),
    "ChronoEditTransformer3DModel": ({**_WAN, "rope_temporal_skip_len": 2}, _WAN_CALL),
    "AnyFlowTransformer3DModel": (
        _WAN,
        {
            **_WAN_CALL,
            "hidden_states": (2, 2, 4, 8, 8),
            **{name: TIME[:, None].expand(2, 2) for name in ("timestep", "r_timestep")},
        },
    ),
    "CogVideoXTransformer3DModel": (
        {
            **{"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 2},
            **{"sample_width": 8, "sample_height": 8, "sample_frames": 8, "max_text_seq_length": 5, **HEADS},
        },
        {"hidden_states": (2, 2, 4, 8, 8), "encoder_hidden_states": TEXT, "timestep": TIME},
    ),
    "CogView3PlusTransformer2DModel": (
        {
            **{"in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 16, "time_embed_dim": 8},
            **{"condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8, **HEADS},
        },
        {
            **{"hidden_states": LATENT, "encoder_hidden_states": TEXT, "timestep": TIME},
            **{name: torch.tensor([[8.0, 8.0]] * 2) for name in ("original_size", "target_size", "crop_coords")},
        },
    ),
    "CogView4Transformer2DModel": (
        {
            **{"in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 16, "time_embed_dim": 8},
            **{"condition_dim": 4, "sample_size": 8, "rope_axes_dim": (8, 8), **HEADS},
        },
        {
            **{"hidden_states": LATENT, "encoder_hidden_states": TEXT, "timestep": TIME},
            **{name: torch.tensor([[8.0, 8.0]] * 2) for name in ("original_size", "target_size", "crop_coords")},
        },
    ),
    "AllegroTransformer3DModel": (
        {
            **{"cross_attention_dim": 48, "caption_channels": 16, "num_layers": 2, "sample_height": 8},
            **{"sample_width": 8, "sample_frames": 2, **WIDE_HEADS},
        },
        {
            **{"hidden_states": VIDEO, "encoder_hidden_states": (2, 1, 5, 16), "timestep": TIME},
            **{"attention_mask": torch.ones(2, 2, 8, 8), "encoder_attention_mask": torch.ones(2, 1, 5)},
            "image_rotary_emb": (
                tuple((torch.rand(4, 4), torch.rand(4, 4)) for _ in range(3)),
                tuple(torch.zeros(1, 32, dtype=torch.long) for _ in range(3)),
            ),
        },
    ),
    "LatteTransformer3DModel": (
        {
            **{"in_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2, "video_length": 2, **HEADS},
            **{"cross_attention_dim": 32, "caption_channels": 16, "norm_type": "ada_norm_single"},
            "norm_elementwise_affine": False,
        },
        {"hidden_states": VIDEO, "timestep": TIME, "encoder_hidden_states": TEXT},
    ),
    "HunyuanDiT2DModel": (
        {
            **{"in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": 32, "num_layers": 2, **HEADS},
            **{"cross_attention_dim": 16, "cross_attention_dim_t5": 16, "pooled_projection_dim": 16},
            **{"text_len": 5, "text_len_t5": 6, "use_style_cond_and_image_meta_size": False},
        },
        {
            **{"hidden_states": LATENT, "timestep": TIME.float(), "encoder_hidden_states": TEXT},
            **{"text_embedding_mask": TEXT_MASK, "encoder_hidden_states_t5": (2, 6, 16)},
            **{"text_embedding_mask_t5": torch.ones(2, 6, dtype=torch.long)},
            "image_rotary_emb": (torch.rand(16, 8), torch.rand(16, 8)),
        },
    ),
    "HunyuanVideoTransformer3DModel": (
        {
            **{"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
            **{"text_embed_dim": 16, "pooled_projection_dim": 16, "rope_axes_dim": (2, 2, 4), **HEADS},
        },
        {
            **{"hidden_states": VIDEO, "timestep": TIME, "encoder_hidden_states": TEXT},
            **{"encoder_attention_mask": TEXT_MASK, "pooled_projections": (2, 16), "guidance": TIME.float()},
        },
    ),
    "HunyuanImageTransformer2DModel": (
        {
            **{"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
            **{"text_embed_dim": 16, "rope_axes_dim": (4, 4), **HEADS},
        },
        {
            **{"hidden_states": LATENT, "timestep": TIME.float(), "encoder_hidden_states": TEXT},
            "encoder_attention_mask": TEXT_MASK,
        },
    ),
    "LTXVideoTransformer3DModel": (
        {
            **{"in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 2},
            **{"caption_channels": 16, **HEADS},
        },
        {
            **{"hidden_states": (2, 8, 4), "encoder_hidden_states": TEXT, "timestep": TIME},
            **{"encoder_attention_mask": TEXT_MASK, "num_frames": 2, "height": 2, "width": 2},
        },
    ),
    "MochiTransformer3DModel": (
        {
            **{"in_channels": 4, "num_layers": 2, "pooled_projection_dim": 16, "text_embed_dim": 16},
            **{"time_embed_dim": 8, "max_sequence_length": 5, **HEADS},
        },
        {
            **{"hidden_states": VIDEO, "encoder_hidden_states": TEXT, "timestep": TIME},
            "encoder_attention_mask": TEXT_MASK,
        },
    ),
    "SanaTransformer2DModel": (
        {
            **{"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 4, **HEADS},
            **{"cross_attention_head_dim": 8, "cross_attention_dim": 32, "caption_channels": 16, "sample_size": 8},
        },
        {"hidden_states": LATENT, "encoder_hidden_states": TEXT, "timestep": TIME},
    ),
    "SanaVideoTransformer3DModel": (
        {
            **{"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 4, **WIDE_HEADS},
            **{"cross_attention_head_dim": 12, "cross_attention_dim": 48, "caption_channels": 16, "sample_size": 8},
        },
        {"hidden_states": VIDEO, "encoder_hidden_states": TEXT, "timestep": TIME},
    ),
    "Lumina2Transformer2DModel": (
        {
            **{"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1},
            **{"num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 8, "axes_dim_rope": (2, 2, 2)},
            **{"axes_lens": (32, 32, 32), "cap_feat_dim": 16},
        },
        {
            **{"hidden_states": LATENT, "timestep": TIME / 10, "encoder_hidden_states": TEXT},
            "encoder_attention_mask": TEXT_MASK.bool(),
        },
    ),
    "LuminaNextDiT2DModel": (
        {
            **{"sample_size": 8, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2},
            **{"multiple_of": 8, "cross_attention_dim": 16},
        },
        {
            **{"hidden_states": LATENT, "timestep": TIME / 10, "encoder_hidden_states": TEXT},
            **{
                "encoder_mask": TEXT_MASK.bool(),
                "image_rotary_emb": torch.polar(torch.ones(16, 16, 4), torch.rand(16, 16, 4)),
            },
            "cross_attention_kwargs": {},
        },
    ),
    "HiDreamImageTransformer2DModel": (
        {
            **{"patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, **HEADS},
            **{"caption_channels": [16, 16], "text_emb_dim": 16, "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8)},
            **{"llama_layers": [0, 0], "num_routed_experts": 2, "num_activated_experts": 1},
        },
        {
            **{"hidden_states": LATENT, "timesteps": TIME, "encoder_hidden_states_t5": TEXT},
            **{"encoder_hidden_states_llama3": (1, 2, 5, 16), "pooled_embeds": (2, 16)},
        },
    ),
    "PRXTransformer2DModel": (
        {
            **{"in_channels": 4, "context_in_dim": 16, "hidden_size": 32, "num_heads": 4, "depth": 2},
            "axes_dim": [4, 4],
        },
        {"hidden_states": LATENT, "timestep": TIME / 10, "encoder_hidden_states": TEXT},
    ),
    "Kandinsky5Transformer3DModel": (
        {
            **{"in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16, "model_dim": 32, "ff_dim": 64},
            **{"num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 2, 2)},
        },
        {
            **{"hidden_states": (1, 2, 8, 8, 4), "encoder_hidden_states": (1, 5, 16), "timestep": torch.ones(1)},
            **{"pooled_projections": (1, 16), "text_rope_pos": torch.arange(5)},
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        },
    ),
    "ZImageTransformer2DModel": (
        {
            **{"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4},
            **{"cap_feat_dim": 16, "axes_dims": [4, 2, 2], "axes_lens": [64, 16, 16]},
        },
        {"x": [torch.randn(4, 1, 8, 8)], "t": torch.ones(1), "cap_feats": [torch.randn(5, 16)]},
    ),
    "PriorTransformer": (
        {**HEADS, "num_layers": 2, "embedding_dim": 16, "num_embeddings": 5, "additional_embeddings": 4},
        {"hidden_states": (2, 16), "timestep": TIME, "proj_embedding": (2, 16), "encoder_hidden_states": TEXT},
    ),
    "StableAudioDiTModel": (
        {
            **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 4},
            **{"attention_head_dim": 8, "num_key_value_attention_heads": 2, "cross_attention_dim": 16},
            **{"time_proj_dim": 8, "global_states_input_dim": 16, "cross_attention_input_dim": 16},
        },
        {
            **{"hidden_states": (2, 4, 8), "timestep": TIME / 10, "encoder_hidden_states": TEXT},
            "global_hidden_states": (2, 1, 16),
        },
    ),
    "StableAudio3DiTModel": (
        {
            **{"io_channels": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "cond_token_dim": 16},
            **{"global_cond_dim": 16, "local_add_cond_dim": 6, "timestep_features_dim": 8, "num_memory_tokens": 2},
        },
        {
            **{"hidden_states": (2, 4, 8), "timestep": TIME / 10, "encoder_hidden_states": TEXT},
            **{"global_hidden_states": (2, 16), "local_add_cond": (2, 6, 8)},
        },
    ),
    "AceStepTransformer1DModel": (
        {
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"num_key_value_heads": 2, "head_dim": 8, "in_channels": 12, "audio_acoustic_hidden_dim": 4},
            **{"sliding_window": 4, "encoder_hidden_size": 16},
        },
        {
            **{"hidden_states": (2, 8, 4), "timestep": TIME / 10, "timestep_r": TIME / 10},
            **{"encoder_hidden_states": TEXT, "context_latents": (2, 8, 8)},
        },
    ),
    "OmniGenTransformer2DModel": (
        {
            **{"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64},
            **{"num_layers": 2, "vocab_size": 40, "pad_token_id": 0, "pos_embed_max_size": 8, "time_step_dim": 8},
            "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        },
        {
            **{"hidden_states": LATENT, "timestep": TIME / 10, "input_ids": torch.ones(2, 5, dtype=torch.long)},
            **{"input_img_latents": [], "input_image_sizes": {}, "attention_mask": torch.ones(2, 1, 22, 22)},
            "position_ids": torch.arange(22).expand(2, -1),
        },
    ),
    "CosmosTransformer3DModel": (
        {
            **{"in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 16, "adaln_lora_dim": 4},
            **{"max_size": (4, 8, 8), "encoder_hidden_states_channels": 16, **WIDE_HEADS},
        },
        {
            **{"hidden_states": VIDEO, "timestep": TIME, "encoder_hidden_states": TEXT, "fps": 24},
            "padding_mask": torch.zeros(1, 1, 8, 8),
        },
    ),
    "T5FilmDecoder": (
        {"input_dims": 8, "targets_length": 6, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 64},
        {
            "encodings_and_masks": [(torch.randn(2, 5, 32), torch.ones(2, 5))],
            **{"decoder_input_tokens": (2, 6, 8), "decoder_noise_time": torch.tensor([0.3, 0.5])},
        },
    ),
    "UNet2DConditionModel": ({**_BLOCKS_2D, **_CONDITIONED}, _UNET_CALL),
    "UNet2DConditionModel, linear projections, two layers": (
        {**_BLOCKS_2D, **_CONDITIONED, "use_linear_projection": True, "transformer_layers_per_block": 2},
        _UNET_CALL,
    ),
    "UNet2DConditionModel, cross attention alone": (
        {**_BLOCKS_2D, **_CONDITIONED, "only_cross_attention": True},
        _UNET_CALL,
    ),
    "UNet2DConditionModel, added keys and values": (
        {
            **_BLOCKS_2D,
            **_CONDITIONED,
            "down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
        },
        _UNET_CALL,
    ),
    "UNet2DModel": (
        {
            **_CONDITIONED,
            **{"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 4},
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        {"sample": (2, 3, 8, 8), "timestep": TIME},
    ),
    "UNet1DModel": (
        {"sample_size": 32, "block_out_channels": (32, 32, 64), "extra_in_channels": 64},
        {"sample": (2, 2, 32), "timestep": TIME},
    ),
    "UNet3DConditionModel": (
        {
            **{"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4},
            **{"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "cross_attention_dim": 16},
            **{"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 4},
        },
        {**_UNET_CALL, "sample": FRAMES},
    ),
    "UNetSpatioTemporalConditionModel": (
        {
            **{"block_out_channels": (32, 64), "layers_per_block": 1, "num_attention_heads": (2, 4)},
            **{"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")},
            **{"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")},
            **{"cross_attention_dim": 16, "num_frames": 2, "in_channels": 4},
            **{"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24},
        },
        {
            **{"sample": (2, 2, 4, 4, 4), "timestep": TIME, "encoder_hidden_states": (2, 1, 16)},
            "added_time_ids": (2, 3),
        },
    ),
    "I2VGenXLUNet": (
        {
            **{"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4},
            **{"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "cross_attention_dim": 16},
            **{"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 4},
        },
        {
            **{**_UNET_CALL, "sample": FRAMES, "fps": torch.tensor([8, 8]), "image_latents": FRAMES},
            "image_embeddings": (2, 16),
        },
    ),
    "Kandinsky3UNet": (
        {
            **{"time_embedding_dim": 16, "groups": 4, "attention_head_dim": 8, "layers_per_block": 2},
            **{"block_out_channels": (8, 16, 16, 16), "cross_attention_dim": 16, "encoder_hid_dim": 16},
        },
        {**_UNET_CALL, "sample": (2, 4, 16, 16), "encoder_attention_mask": torch.ones(2, 5)},
    ),
    "StableCascadeUNet": (
        {
            **{"in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 16},
            **{"block_out_channels": (16, 16), "num_attention_heads": (2, 2), "down_num_layers_per_block": (1, 1)},
            **{"up_num_layers_per_block": (1, 1), "clip_text_pooled_in_channels": 16, "clip_text_in_channels": 16},
            **{"clip_image_in_channels": 16, "clip_seq": 2},
        },
        {
            **{"sample": LATENT, "timestep_ratio": torch.rand(2), "clip_text_pooled": (2, 1, 16)},
            **{"clip_text": TEXT, "clip_img": (2, 1, 16)},
        },
    ),
    "UVit2DModel": (
        {
            **{"hidden_size": 32, "cond_embed_dim": 16, "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 20},
            **{"encoder_hidden_size": 16, "vocab_size": 32, "codebook_size": 24, "in_channels": 16},
            **{"block_out_channels": 16, "num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "intermediate_size": 64, "sample_size": 8},
        },
        {
            **{"input_ids": torch.randint(0, 24, (2, 8, 8)), "encoder_hidden_states": TEXT},
            **{"pooled_text_emb": (2, 16), "micro_conds": torch.rand(2, 5)},
        },
    ),
    "ControlNetModel": (
        {
            **_CONDITIONED,
            **{"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 16},
            **{"attention_head_dim": 4, "conditioning_embedding_out_channels": (8, 8)},
        },
        {**_UNET_CALL, "controlnet_cond": (2, 3, 8, 8)},
    ),
    "AutoencoderKL": (_ENCODERS, {"sample": (2, 3, 16, 16)}),
    "VQModel": (_ENCODERS, {"sample": (2, 3, 16, 16)}),
    "AutoencoderKLWan": (
        {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]},
        {"sample": (1, 3, 5, 16, 16)},
    ),
    "AutoencoderDC": (
        {
            **{"latent_channels": 4, "attention_head_dim": 4},
            **{"encoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 16)},
            **{"decoder_block_types": ("ResBlock", "EfficientViTBlock"), "decoder_block_out_channels": (8, 16)},
            **{"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)},
            **{"encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,))},
        },
        {"sample": (2, 3, 16, 16)},
    ),
}


def candidates() -> Iterator[Candidate]:
    """One candidate for each entry of the table."""
    for name in _MODELS:
        model_class = name.partition(",")[0]
        yield Candidate("diffusers", model_class, name, partial(_build, model_class, *_MODELS[name]))


def _build(model_class: str, options: Options, call: Options) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    made: Callable[..., nn.Module] | None = getattr(importlib.import_module("diffusers"), model_class, None)
    if made is None:
        made = getattr(importlib.import_module("diffusers.models.transformers.dual_transformer_2d"), model_class)
    model = made(**options).eval()
    kwargs = {name: _value(value) for name, value in call.items()}
    with torch.no_grad():
        model(**kwargs)
    return model, (), kwargs


def _value(value: Any) -> Any:
    """A random tensor for a shape; other values are returned unchanged."""
    is_shape = isinstance(value, tuple) and all(isinstance(one, int) for one in value)
    return torch.randn(value) if is_shape else value
