"""Configurations of model types: the type's default, with missing values filled in.

In: a model type. Out: a config. Some defaults do not give a model: values are missing, or parts do not fit each other.
Others leave out the interesting parts of the type, such as the attention layers of a hybrid.
"""

from __future__ import annotations

from typing import Any

import transformers

_MULTI = {"rope_type": "default", "rope_theta": 10000.0}
_GLM_ROPE = {"rope_parameters": _MULTI | {"partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}}
_QWEN_ROPE = {"rope_parameters": _MULTI | {"mrope_section": [16, 24, 24]}}
_EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_SERIES = {"prediction_length": 4, "context_length": 8, "num_time_features": 2, "feature_size": 11}
_HUNYUAN = {
    **{"head_dim": 128, "num_key_value_heads": 8},
    "rope_parameters": _MULTI | {"mrope_section": [16, 16, 16, 16]},
}
_REPVIT = {
    "architecture": "repvit_m1",
    "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
}
_INDEXER = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256},
    **{"indexer_budget": 64, "indexer_compress_ratio": 4},
}
_SAM = {
    "vision_config": {"image_size": 256},
    "prompt_encoder_config": {"image_size": 256, "image_embedding_size": 16},
}
_FEATURES = {"backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]]}
_SAM2 = {
    "vision_config": {"backbone_config": {"image_size": [256, 256]}} | _FEATURES,
    "prompt_encoder_config": {"image_size": 256},
}
_VIDEO = _SAM2 | {"image_size": 256, "memory_attention_rope_feat_sizes": [16, 16]}
_EDGE = {"backbone_config": _REPVIT} | _FEATURES
_SAM3_TRACKER: dict[str, Any] = {
    **{"image_size": 252, "prompt_encoder_config": {"image_size": 252}},
    "memory_attention_rope_feat_sizes": [18, 18],
    "vision_config": {
        "backbone_feature_sizes": [[72, 72], [36, 36], [18, 18]],
        "backbone_config": {
            **{"image_size": 252, "pretrain_image_size": 84, "window_size": 6},
            **{"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
            **{"num_hidden_layers": 2, "global_attn_indexes": [1]},
        },
    },
}
_SQUARE = {7: "long", 5: "mid", 3: "short"}
_INTRACLASS = {
    **{"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0]},
    **{f"vertical_long_to_small_conv_{s}ratio": [[k, 1], [1, 1], [k // 2, 0]] for k, s in _SQUARE.items()},
    **{f"horizontal_small_to_long_conv_{s}ratio": [[1, k], [1, 1], [0, k // 2]] for k, s in _SQUARE.items()},
    **{f"symmetric_conv_long_{s}ratio": [[k, k], [1, 1], [k // 2, k // 2]] for k, s in _SQUARE.items()},
}
_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "out_indices": [1, 2, 3, 4]}
_LCNET = _STAGES | {  # the default halves only the height, as for lines of text
    "block_configs": [
        *([[3, 96, 96, 1, True]], [[3, 96, 96, 2, False], [3, 96, 96, 1, False]]),
        *([[3, 96, 192, 2, False], [3, 192, 192, 1, True]], [[3, 192, 384, 2, False], [3, 384, 384, 1, True]]),
    ]
}
_PYRAMID = {
    **{"kernel_list": [3, 2, 2], "scale_factor_list": [1, 2, 4, 8], "intraclass_block_config": _INTRACLASS},
    "backbone_config": _STAGES,
}
_EFFICIENTNET = {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}
_TIMM_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 28, "patch_size": 14}

_FILLED_IN: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES | {"label_length": 4},
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "align": {"vision_config": _EFFICIENTNET, "projection_dim": 160},
    "efficientnet": _EFFICIENTNET,
    "aya_vision": {"vision_config": {"num_attention_heads": 12}},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "blip-2": {"image_token_index": 50},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "emu3": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5}},
    "clvp": {"speech_config": {"vocab_size": 8194}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": _MULTI | {"mrope_section": [24, 20, 20]}}}
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _MULTI | {"mrope_section": [24, 20, 20]}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 4, "clip_qkv": 8.0}, "n_heads": 16},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense"] + ["sparse"] * 31, "num_experts_per_tok": 2}},
    "deepseek_v2": _EXPERTS | {"topk_method": "greedy", "first_k_dense_replace": 1},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 512}},
    "dots1": _EXPERTS | {"first_k_dense_replace": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "depth_pro": {"patch_size": 56}
    | {f"{part}_model_config": {"image_size": 56} for part in ("image", "patch", "fov")},
    "edgetam": {"vision_config": _EDGE, "prompt_encoder_config": {"image_size": 256}},
    "edgetam_video": _VIDEO | {"memory_attention_rope_k_sizes": [16, 16]},
    "edgetam_vision_model": {"backbone_config": _REPVIT},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _MULTI | {"mrope_section": [22, 22, 20]}}},
    "fast_vlm": {
        "vision_config": {
            "model_args": {"inference_mode": True, "layers": [1] * 5, "embed_dims": [32, 64, 128, 256, 512]},
            "hidden_size": 1024,
        }
    },
    "fastspeech2_conformer_with_hifigan": {"model_config": {"speaking_speed": 8.0}},  # several frames for each token
    "gemma3n": {"vision_config": {"model_args": {"channel_multiplier": 0.25}}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 15}},
    "glm46v": {"text_config": _GLM_ROPE},
    "glm4v": {"text_config": _GLM_ROPE},
    "glm4v_moe": {"text_config": {"head_dim": 128, **_GLM_ROPE}},
    "glm4v_moe_text": {"head_dim": 128, **_GLM_ROPE},
    "glm4v_text": _GLM_ROPE,
    "glm_image": {"text_config": _GLM_ROPE},
    "glm_image_text": _GLM_ROPE,
    "glmga": {"text_config": _GLM_ROPE},
    "granite4_vision": {
        **{"deepstack_layer_map": [[-1, 0]], "use_spatial_sampling": False, "downsample_rate": "1/2"},
    },
    "higgs_audio_v2_tokenizer": {  # the same frame rate as its other half
        "acoustic_model_config": {f"{way}sampling_ratios": [8, 5, 4, 2, 3] for way in ("down", "up")}
    },
    "hunyuan_v1_dense": {"head_dim": 128, "num_key_value_heads": 8},
    "hunyuan_v1_moe": {"head_dim": 128, "num_key_value_heads": 8},
    "hunyuan_vl": {"text_config": _HUNYUAN},
    "hunyuan_vl_text": _HUNYUAN,
    "instructblip": {"image_token_index": 50},
    "instructblipvideo": {"video_token_index": 50},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "levit": {"image_size": 128},
    "lw_detr": {"projector_scale_factors": [1.0], "num_feature_levels": 1},
    "ministral": {"head_dim": 128},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "omdet-turbo": {"backbone_config": {"img_size": 64}},
    "pe_audio_video": {"audio_video_config": {"video_config": {"vision_config": {"model_args": _TIMM_VIT}}}},
    "pe_audio_video_encoder": {"video_config": {"vision_config": {"model_args": _TIMM_VIT}}},
    "pe_video": {"video_config": {"vision_config": {"model_args": _TIMM_VIT}}},
    "pe_video_encoder": {"vision_config": {"model_args": _TIMM_VIT}},
    "perception_lm": {"vision_config": {"architecture": "vit_tiny_patch16_224", "model_args": _TIMM_VIT}},
    "pp_doclayout_v2": {
        **{"class_thresholds": [0.5, 0.5], "class_order": [0, 1], "id2label": {0: "text", 1: "title"}},
        "anchor_image_size": None,
    },
    "pp_ocrv5_server_det": _PYRAMID,
    "pp_ocrv6_medium_det": _PYRAMID | {"backbone_config": _LCNET},
    "pp_ocrv6_small_det": {"backbone_config": _LCNET, "layer_list_out_channels": [96, 96, 192, 384]},
    "qwen2_5_omni": {
        "thinker_config": {"vision_start_token_id": 151652, "text_config": _QWEN_ROPE},
        "talker_config": _QWEN_ROPE,
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151652, "text_config": _QWEN_ROPE},
    "qwen3_omni_moe": {
        "talker_config": {"text_config": {"shared_expert_intermediate_size": 384}, "spatial_merge_size": 2}
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "sam": _SAM,
    "sam_hq": _SAM,
    "sam2": _SAM2,
    "sam2_video": _VIDEO,
    "sam3_tracker": {key: _SAM3_TRACKER[key] for key in ("prompt_encoder_config", "vision_config")},
    "sam3_tracker_video": _SAM3_TRACKER,
    "sam3_video": {  # thresholds at which everything is detected
        **{"score_threshold_detection": -1.0, "new_det_thresh": -1.0, "det_nms_thresh": 0.0, "fill_hole_area": 0},
        **{"assoc_iou_thresh": -1.0, "trk_assoc_iou_thresh": -1.0},
        **{"low_res_mask_size": 72, "tracker_config": _SAM3_TRACKER},
        "detector_config": {
            "vision_config": _SAM3_TRACKER["vision_config"],
            "detr_decoder_config": {"num_queries": 2},
        },
    },
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "step3p7": {"text_config": {"sliding_window": 4}},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "timm_backbone": {"backbone": "resnet10t"},
    "tvp": {"max_img_size": 96, "visual_prompt_size": 16, "num_frames": 2},
    "uvdoc": {
        "backbone_config": {
            "out_features": [f"stage{number}" for number in range(1, 7)],
            "out_indices": [1, 2, 3, 4, 5, 6],
        }
    },
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["hybrid", "hybrid", "linear_attention"]},
    "qwen2_5_vl": {"text_config": _QWEN_ROPE, "vision_config": {"out_hidden_size": 8192}},
    "qwen2_5_vl_text": _QWEN_ROPE,
    "qwen2_vl": {"text_config": _QWEN_ROPE, "vision_config": {"hidden_size": 8192}},
    "qwen2_vl_text": _QWEN_ROPE,
}


_TWO = {"backbone_out_indices": [0, 1], "neck_hidden_sizes": [96, 192], "reassemble_factors": [2, 1]}
_SAPIENS = {"upsample_out_channels": [16], "conv_out_channels": [16]}

_FILLED_IN_FOR: dict[str, dict[str, Any]] = {
    "BeitForSemanticSegmentation": _STAGES,
    "DPTForDepthEstimation": _TWO,
    "DPTForSemanticSegmentation": _TWO,
    "HieraForPreTraining": {"decoder_hidden_size": 64, "decoder_depth": 2, "decoder_num_heads": 4},
    "Llama4VisionModel": {"hidden_size": 1408, "num_attention_heads": 16},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "PerceiverForImageClassificationFourier": {"d_model": 261, "num_cross_attention_heads": 1},
    "PerceiverForImageClassificationConvProcessing": {"d_model": 322, "num_cross_attention_heads": 1},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    **{
        f"Sapiens2For{task}": {"head_config": _SAPIENS | {"scale_conv_out_channels": [16], "scale_final_dim": 16}}
        for task in ("ImageMatting", "NormalEstimation", "PointmapEstimation", "PoseEstimation", "SemanticSegmentation")
    },
}
"""Additional values for individual classes."""


def config_of(cls: Any, family: str) -> Any:
    """The configuration of a model type.

    Arguments:
        cls: The class to build.
        family: The model type.

    Returns:
        A config of full size that the class takes.
    """
    make = transformers.CONFIG_MAPPING[family]
    own = getattr(cls, "config_class", None)
    if isinstance(own, type) and not issubclass(make, own):
        # The class is one of several models in the type's config, or belongs to another type.
        family = own.model_type if own.model_type in _FILLED_IN else family
        make = own
    missing = _FILLED_IN.get(family, {}) | _FILLED_IN_FOR.get(cls.__name__, {})
    if not missing:
        return make()
    try:
        fields = make().to_dict()
    except Exception:
        fields = {}  # even the default config cannot be built
    return make.from_dict(_merged(fields, missing))


def _merged(fields: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    parts = {
        k: _merged(fields[k], v) for k, v in others.items() if isinstance(v, dict) and isinstance(fields.get(k), dict)
    }
    return fields | others | parts
