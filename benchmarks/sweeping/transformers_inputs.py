"""Inputs of transformers models, for which the inferred inputs of the command line are not enough.

In: a model. Out: keyword arguments, those that reach most of the model first: images with placeholder tokens, patches
with their grid, and entries of a table for unusual forwards. Sizes that could be confused are different.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.targets.inputs.pretrained import pretrained_inputs

BATCH, TOKENS = 2, 5
Inputs = dict[str, Any]


def inputs(model: nn.Module) -> Iterator[Inputs]:
    """Keyword arguments to try, in this order."""
    config: Any = model.config
    kinds = (_OF_CLASSES.get(type(model).__name__), _SPECIAL.get(config.model_type or type(config).__name__))
    special = [make(config) for make in kinds if make is not None]
    yield from special
    names = inspect.signature(model.forward).parameters
    for name in ("hidden_states", "pixel_values"):
        if name in names and "grid_thw" in names:
            yield _patches(config, name, "grid_thw")
    if "pixel_values" in names and "image_grid_thw" in names and "input_ids" not in names:
        yield _patches(config, "pixel_values", "image_grid_thw")
    yield from _with_pictures(model, names)
    guesses = pretrained_inputs(model, BATCH, TOKENS)
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "model_type"))]
    if all(_first(part, "image_size") is None for part in parts):  # any image size works: use a small one
        yield from (guess | {"pixel_values": noise(BATCH, 3, 64, 96)} for guess in guesses if "pixel_values" in guess)
    yield from (_masked(guess, names) for guess in guesses)
    yield from guesses
    if "input_values" in names:
        yield {"input_values": noise(BATCH, 1, 3840)}
    yield from (other for guess in [*special, *guesses] for other in _of_tasks(config, guess, names))


def ids(config: Any, batch: int = BATCH, tokens: int = TOKENS) -> Tensor:
    """Distinct token ids, none of them special."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 32
    return torch.arange(3, 3 + batch * tokens).remainder(vocabulary).view(batch, tokens)


def noise(*shape: int) -> Tensor:
    """A tensor of random numbers, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def ones(*shape: int) -> Tensor:
    """A mask of ones."""
    return torch.ones(shape, dtype=torch.long)


# ---- pictures --------------------------------------------------------------------------------------------------------


def _patches(config: Any, name: str, grid: str) -> Inputs:
    """Two images, split into patches that are the rows of one matrix."""
    vision = getattr(config, "vision_config", config)
    merge = _first(vision, "spatial_merge_size", "merge_size") or 2
    side = merge[0] if isinstance(merge, list | tuple) else merge
    thw = torch.tensor([[1, 2 * side, 4 * side]] * BATCH)
    channels = _first(vision, "in_channels", "in_chans", "num_channels") or 3
    numbers = channels * (_first(vision, "temporal_patch_size", "patch_temporal") or 1) * vision.patch_size**2
    return {name: noise(int(thw.prod(-1).sum()), numbers), grid: thw}


def _with_pictures(model: nn.Module, names: Any) -> Iterator[Inputs]:
    """Text and images, with as many placeholder tokens per image as the model computes features for it."""
    config: Any = model.config
    token = _first(config, "image_token_id", "image_token_index")
    parts: list[Any] = [model, *model.children()]
    features = next((part.get_image_features for part in parts if hasattr(part, "get_image_features")), None)
    if token is None or features is None or not {"input_ids", "pixel_values"} <= set(names):
        return
    if "image_grid_thw" in names:
        seen = [_patches(config, "pixel_values", "image_grid_thw")]
    else:
        seen = [guess for guess in pretrained_inputs(model, BATCH, TOKENS) if "pixel_values" in guess]
        seen = [{"pixel_values": guess["pixel_values"]} for guess in seen][:2]
        seen += [{"pixel_values": _picture(config, BATCH, 1)}]  # each image as a list of tiles
    for pictures in seen:
        try:
            with torch.no_grad():
                count = _rows(features(**pictures))
        except Exception:
            continue  # the model needs images in another format
        tokens = _around(ids(config), token, count // BATCH)
        found = {"input_ids": tokens, **pictures, "attention_mask": torch.ones_like(tokens)}
        types = {"mm_token_type_ids": (tokens == token).int()} if "mm_token_type_ids" in names else {}
        answer = {"decoder_input_ids": ids(config)} if "decoder_input_ids" in names else {}
        yield found | types | answer


def _around(text: Tensor, token: int, count: int) -> Tensor:
    """Text with placeholder tokens for an image inserted."""
    return torch.cat([text[:, :2], torch.full((len(text), count), token), text[:, 2:]], 1)


def _rows(features: Any) -> int:
    """Number of feature vectors of images."""
    features = getattr(features, "pooler_output", features)
    if isinstance(features, Tensor):
        return features.numel() // features.shape[-1]
    return sum(_rows(part) for part in features if part is not None)


def _masked(guess: Inputs, names: Any) -> Inputs:
    """Add the feature masks that some forwards require."""
    found = dict(guess)
    for data in ("input_features", "audio_mel"):
        mask = f"{data}_mask"
        if mask in names and data in guess:
            found[mask] = torch.ones(guess[data].shape[:2], dtype=torch.bool)
    return found


def _of_tasks(config: Any, guess: Inputs, names: Any) -> Iterator[Inputs]:
    """Variants for tasks: texts with an end token, several answers, a text to answer in, one sample, longer audio."""
    if "decoder_input_ids" in names and "decoder_input_ids" not in guess:
        yield guess | {"decoder_input_ids": ids(config)}
    tokens = guess.get("input_ids")
    if tokens is not None and (end := _first(config.get_text_config(), "eos_token_id", "eos_id")) is not None:
        yield guess | {
            "input_ids": torch.cat([tokens[:, :-1].clamp_min(end + 1), torch.full((len(tokens), 1), end)], 1)
        }
    if tokens is not None:
        yield guess | {"input_ids": torch.stack((tokens, tokens.flip(1)), 1)}
        # Answers of one sample, for models with one row per text.
        yield {name: value[:1] for name, value in guess.items()} | {"input_ids": tokens[None, :1]}
    yield {name: value[:1] for name, value in guess.items()}
    if "input_values" in guess:
        yield guess | {"input_values": noise(BATCH, 16000)}
    if "input_features" in guess:
        yield guess | {"input_features": noise(BATCH, 512, guess["input_features"].shape[-1])}


def _first(config: Any, *names: str) -> Any:
    return next((v for name in names if (v := getattr(config, name, None)) is not None), None)


def _side(config: Any) -> int:
    vision = getattr(config, "vision_config", config)
    named = getattr(vision, "model_args", None) or {}
    size = _first(config, "image_size") or _first(vision, "image_size") or named.get("img_size") or 64
    return int(size[0] if isinstance(size, list | tuple) else size)


def _picture(config: Any, *before: int) -> Tensor:
    return noise(*before, 3, _side(config), _side(config))


# ---- forwards that are like no other ---------------------------------------------------------------------------------


def _series(c: Any) -> Inputs:
    past = c.context_length + max(c.lags_sequence)
    known = c.num_time_features
    return {
        "past_values": noise(BATCH, past),
        "past_time_features": noise(BATCH, past, known),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": noise(BATCH, c.prediction_length),
        "future_time_features": noise(BATCH, c.prediction_length, known),
    }


def _decisions(c: Any) -> Inputs:
    return {
        **{"states": noise(BATCH, 3, c.state_dim), "actions": noise(BATCH, 3, c.act_dim)},
        **{"rewards": noise(BATCH, 3, 1), "returns_to_go": noise(BATCH, 3, 1)},
        **{"timesteps": torch.arange(3).expand(BATCH, 3), "attention_mask": ones(BATCH, 3)},
    }


def _flat_patches(c: Any) -> Inputs:
    """NaFlex: padded patches of images of any shape."""
    vision = getattr(c, "vision_config", c)
    found = {
        "pixel_values": noise(BATCH, 6, 3 * vision.patch_size**2),
        "pixel_attention_mask": ones(BATCH, 6),
        "spatial_shapes": torch.tensor([[2, 3]] * BATCH),
    }
    return {"input_ids": ids(c), **found} if hasattr(c, "text_config") else found


def _boxes(c: Any) -> Tensor:
    corners = torch.rand(BATCH, TOKENS, 4, generator=torch.Generator().manual_seed(0))
    return corners.sort(-1).values[..., [0, 1, 2, 3]]


def _kosmos(c: Any) -> Inputs:
    text = ids(c, tokens=TOKENS + c.latent_query_num)
    places = torch.arange(text.shape[1]).expand(text.shape) < c.latent_query_num
    return {"input_ids": text, "pixel_values": _picture(c, BATCH), "image_embeds_position_mask": places}


def _qformer(c: Any) -> Inputs:
    return {
        "query_embeds": noise(BATCH, 7, c.hidden_size),
        "encoder_hidden_states": noise(BATCH, 9, c.encoder_hidden_size),
    }


def _pix2struct(c: Any) -> Inputs:
    patches = noise(BATCH, 7, c.vision_config.patch_embed_hidden_size + 2)
    patches[..., :2] = torch.arange(1, 8)[:, None]  # row and column
    return {"flattened_patches": patches, "attention_mask": torch.ones(BATCH, 7), "decoder_input_ids": ids(c)}


def _pair(channels: int) -> Callable[[Any], Inputs]:
    return lambda c: {"pixel_values": torch.rand(1, 2, channels, 64, 96, generator=torch.Generator().manual_seed(0))}


def _sound(name: str = "input_values") -> Callable[[Any], Inputs]:
    return lambda c: {name: noise(1, 1, 3840)}


def _spectrogram(bins: str, frames: int = 64) -> Callable[[Any], Inputs]:
    def make(c: Any) -> Inputs:
        parts = [c, *(value for value in vars(c).values() if hasattr(value, "model_type"))]
        width = next(getattr(part, bins) for part in parts if hasattr(part, bins))
        found = {"input_features": noise(BATCH, frames, width)}
        return found | ({"decoder_input_ids": ids(c)} if getattr(c, "is_encoder_decoder", False) else {})

    return make


def _instructions(c: Any) -> Inputs:
    """Text with a placeholder token for each query that attends to the image."""
    tokens = _around(ids(c), _first(c, "image_token_index", "video_token_index"), c.num_query_tokens)
    return {"pixel_values": _picture(c, BATCH), "qformer_input_ids": ids(c), "input_ids": tokens}


def _actions(c: Any) -> Inputs:
    """Images of two cameras, text, and actions."""
    vlm, cameras = c.vlm_config, 2
    vision = vlm.vision_config
    places = (vision.image_size // vision.patch_size) ** 2 * cameras
    tokens = _around(ids(vlm), vlm.image_token_id, places)
    return {
        **{"action_embeds": noise(BATCH, 6, c.dit_config.hidden_size), "input_ids": tokens},
        **{"attention_mask": torch.ones_like(tokens), "pixel_attention_mask": ones(BATCH, cameras)},
        "pixel_values": noise(BATCH, cameras, 3, vision.image_size, vision.image_size),
    }


def _packed(c: Any) -> Inputs:
    """Patches of two images in one row."""
    sizes = torch.tensor([[4, 8]] * BATCH)
    return {
        "pixel_values": noise(1, 3, c.patch_size, c.patch_size * int(sizes.prod(-1).sum())),
        "target_sizes": sizes,
    }


def _drafts(c: Any) -> Inputs:
    """Inputs of a draft model: hidden states, keys and values of the model that it drafts for."""
    text, seen = c.get_text_config(), {}
    for number, kind in enumerate(text.layer_types):
        layer = text.per_layer_config[number]
        seen[kind] = tuple(noise(BATCH, layer.num_key_value_heads, 7, layer.head_dim) for _ in "kv")
    return {"inputs_embeds": noise(BATCH, TOKENS, 2 * c.backbone_hidden_size), "shared_kv_states": seen}


def _codes(c: Any) -> Inputs:
    codes = ids(c.decoder, BATCH * c.decoder.num_codebooks)
    return {"input_ids": ids(c.text_encoder), "decoder_input_ids": codes}


def _with_one_of(c: Any, token: int, count: int) -> Inputs:
    """Text with `count` copies of a special token."""
    text = ids(c, tokens=2 * count + 4)
    text[:, 1 : 2 * count : 2] = token
    return {"input_ids": text}


def _tiles(c: Any) -> Inputs:
    """Image tiles, and the id of their aspect ratio."""
    mask = torch.ones(BATCH, 1, c.max_num_tiles, dtype=torch.long)
    picture = noise(BATCH, 1, c.max_num_tiles, 3, c.image_size, c.image_size)
    return {
        "pixel_values": picture,
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": mask,
    }


def _picture_and_text(c: Any) -> Inputs:
    side = c.vision_config.image_size
    return {"pixel_values": noise(BATCH, 3, side, side), "input_ids": ids(c)}


def _sound_and_text(c: Any) -> Inputs:
    return {"input_features": noise(BATCH, 64, c.feature_projection_input_dim), "decoder_input_ids": ids(c)}


def _large_picture(_: Any) -> Inputs:
    return {"inputs": noise(1, 3, 224, 224)}


_OF_CLASSES: dict[str, Callable[[Any], Inputs]] = {
    "JevForDecision": lambda c: {
        **{"input_ids": ids(c, 1), "marks": torch.tensor([[1, 3]]), "num_options": torch.tensor([[2, 2]])},
        "question_type_ids": torch.tensor([[0, 0]]),
    },
    "MllamaVisionModel": _tiles,
    "MusicgenForConditionalGeneration": _codes,
    "MusicgenMelodyForConditionalGeneration": _codes,
    "PerceiverForImageClassificationFourier": _large_picture,
    "PerceiverForImageClassificationConvProcessing": _large_picture,
    "PerceiverForImageClassificationLearned": _large_picture,
    "PI0ForConditionalGeneration": lambda c: _actions(c) | {"state": noise(BATCH, c.max_state_dim)},
    "SuperGlueForKeypointMatching": _pair(3),
    "VideoMAEForPreTraining": lambda c: {
        "pixel_values": noise(1, c.num_frames, 3, c.image_size, c.image_size),
        "bool_masked_pos": torch.arange(c.num_frames // c.tubelet_size * (c.image_size // c.patch_size) ** 2)[None] % 2
        == 0,
    },
    "SpeechT5ForTextToSpeech": lambda c: {
        **{"input_ids": ids(c), "decoder_input_values": noise(BATCH, 7, c.num_mel_bins)},
        "speaker_embeddings": noise(BATCH, c.speaker_embedding_dim),
    },
    "SplinterForPreTraining": lambda c: _with_one_of(c, c.question_token_id, 1),
    "LongformerForQuestionAnswering": lambda c: _with_one_of(c, c.sep_token_id, 3),
    "SeamlessM4TForSpeechToText": _sound_and_text,
    "SeamlessM4Tv2ForSpeechToText": _sound_and_text,
    "BlipForConditionalGeneration": _picture_and_text,
    "Blip2ForImageTextRetrieval": lambda c: _picture_and_text(c) | {"attention_mask": ones(BATCH, TOKENS)},
}
"""Inputs of individual classes."""

_SPECIAL: dict[str, Callable[[Any], Inputs]] = {
    "autoformer": _series,
    "informer": _series,
    "time_series_transformer": _series,
    "patchtst": lambda c: {"past_values": noise(BATCH, c.context_length, c.num_input_channels)},
    "patchtsmixer": lambda c: {"past_values": noise(BATCH, c.context_length, c.num_input_channels)},
    "timesfm": lambda c: {
        **{
            "past_values": noise(BATCH, 3 * c.patch_length),
            "past_values_padding": torch.zeros(BATCH, 3 * c.patch_length),
        },
        "freq": torch.zeros(BATCH, 1, dtype=torch.long),
    },
    "timesfm2_5": lambda c: {"past_values": noise(BATCH, 3 * c.patch_length)},
    "decision_transformer": _decisions,
    "siglip2": _flat_patches,
    "siglip2_vision_model": _flat_patches,
    "canine": lambda c: {"input_ids": ids(c, tokens=6 * c.downsampling_rate)},
    "dia": lambda c: {
        "input_ids": ids(c),
        "decoder_input_ids": ids(c.decoder_config, tokens=7 * c.decoder_config.num_channels).view(BATCH, 7, -1),
    },
    "bros": lambda c: {"input_ids": ids(c), "bbox": _boxes(c)},
    "udop": lambda c: {
        **{"input_ids": ids(c), "bbox": _boxes(c), "pixel_values": _picture(c, BATCH), "decoder_input_ids": ids(c)}
    },
    "kosmos-2": _kosmos,
    "blip_2_qformer": _qformer,
    "lxmert": lambda c: {
        **{"input_ids": ids(c), "visual_feats": noise(BATCH, 6, c.visual_feat_dim), "visual_pos": noise(BATCH, 6, 4)}
    },
    "perceiver": lambda c: {"inputs": noise(BATCH, 9, c.d_model)},
    "pix2struct": _pix2struct,
    "idefics": lambda c: {
        **{"input_ids": ids(c), "pixel_values": _picture(c, BATCH, 1), "image_attention_mask": ones(BATCH, TOKENS, 1)}
    },
    "lightglue": _pair(3),
    "efficientloftr": _pair(1),
    "seggpt": lambda c: {
        name: noise(BATCH, 3, c.image_size[0] // 2, c.image_size[1])
        for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    },
    "oneformer": lambda c: {"pixel_values": noise(BATCH, 3, 64, 96), "task_inputs": ids(c, tokens=c.task_seq_len)},
    "tvp": lambda c: {
        "input_ids": ids(c, 1),
        "pixel_values": noise(1, c.num_frames, 3, c.max_img_size, c.max_img_size),
        "attention_mask": ones(1, TOKENS),
    },
    "xmod": lambda c: {"input_ids": ids(c), "lang_ids": torch.zeros(BATCH, dtype=torch.long)},
    "speecht5": lambda c: {
        **{"input_values": noise(BATCH, 9, c.hidden_size), "decoder_input_values": noise(BATCH, 7, c.hidden_size)}
    },
    "wav2vec2-bert": lambda c: {"input_features": noise(BATCH, 9, c.feature_projection_input_dim)},
    "granite_speech5_encoder": lambda c: {"input_features": noise(BATCH, 64, 4 * c.num_mel_bins)},
    "granite_speech5_ctc": lambda c: {"input_features": noise(BATCH, 64, 4 * c.encoder_config.num_mel_bins)},
    "canary": _spectrogram("num_mel_bins"),
    "cohere_asr": _spectrogram("num_mel_bins"),
    "nemotron3_5_transcribe_audio": _spectrogram("num_mel_bins"),
    "nemotron3_5_transcribe_word_timestamp": lambda c: {"inputs_embeds": noise(BATCH, 9, c.hidden_size)},
    "fun_asr_nano_encoder": lambda c: {
        **{"input_features": noise(BATCH, 64, 560), "input_features_mask": torch.ones(BATCH, 64, dtype=torch.bool)}
    },
    "qwen3_asr_encoder": lambda c: {
        "input_features": noise(BATCH, c.num_mel_bins, 200),
        "input_features_mask": torch.ones(BATCH, 200, dtype=torch.bool),
    },
    "gemma3n_audio": lambda c: {
        "audio_mel": noise(BATCH, 64, c.input_feat_size),
        "audio_mel_mask": torch.zeros(BATCH, 64, dtype=torch.bool),  # True marks what is masked out
    },
    "gemma4_vision": lambda c: {
        "pixel_values": torch.rand(BATCH, 36, 3 * c.patch_size**2, generator=torch.Generator().manual_seed(0)),
        "pixel_position_ids": torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(BATCH, 36, 2),
    },
    "instructblip": _instructions,
    "instructblipvideo": lambda c: _instructions(c) | {"pixel_values": _picture(c, BATCH, 1)},
    "blip-2": lambda c: {name: value for name, value in _instructions(c).items() if name != "qformer_input_ids"},
    "kyutai_speech_to_text": lambda c: {"input_ids": ids(c, tokens=5 * 33).view(BATCH, 5, 33)},
    "kimi_k25_vision": lambda c: {
        "pixel_values": noise(64, 3, c.patch_size, c.patch_size),
        "grid_thw": torch.tensor([[1, 4, 8]] * BATCH),
    },
    "video_llama_3_vision": lambda c: {
        **_patches(c, "pixel_values", "grid_thw"),
        "merge_sizes": torch.tensor([2] * BATCH),
    },
    "sam2": lambda c: {"pixel_values": noise(1, 3, 256, 256)},
    "pe_video_encoder": lambda c: {"pixel_values_videos": noise(BATCH, 3, 3, 28, 28)},
    "pe_video": lambda c: {"input_ids": ids(c), "pixel_values_videos": noise(BATCH, 3, 3, 28, 28)},
    "pe_audio_video_encoder": lambda c: {
        **{"input_values": noise(BATCH, 1, 7680), "pixel_values_videos": noise(BATCH, 3, 3, 28, 28)}
    },
    "pe_audio_video": lambda c: {
        **{"input_ids": ids(c), "input_values": noise(BATCH, 1, 7680)},
        "pixel_values_videos": noise(BATCH, 3, 3, 28, 28),
    },
    "sam3": lambda c: {"pixel_values": _picture(c, BATCH), "input_ids": ids(c)},
    "sam3_lite_text": lambda c: {"pixel_values": _picture(c, BATCH), "input_ids": ids(c)},
    "sam3_lite_text_text_model": lambda c: {"input_ids": ids(c)},
    "inkling2_vision": lambda c: {
        "pixel_values": noise(12, c.spatial_merge_size * c.patch_size, c.spatial_merge_size * c.patch_size, 3),
        "image_grid_thw": torch.tensor([[1, 2, 3]] * BATCH),
    },
    "gemma4_unified_assistant": _drafts,
    "minicpm_ocr_vision": _packed,
    "minicpmv4_6_vision": _packed,
    "minicpmv4_7_vision": _packed,
    "muse_glimmer_assistant": lambda c: {
        "noise_embeds": noise(BATCH, TOKENS, c.hidden_size),
        "context_hidden_states": noise(BATCH, 7, c.hidden_size * len(c.target_layer_ids)),
    },
    "pi0": _actions,
    "voxtral_realtime": lambda c: {
        "input_ids": ids(c, tokens=8),
        "input_features": noise(BATCH, c.audio_config.num_mel_bins, 8 * c.audio_length_per_tok),
    },
    "voxtral_realtime_text": lambda c: {"input_ids": ids(c), "t_cond": noise(1, 1, c.hidden_size)},
    "fine_acoustics": lambda c: {"codebook_idx": 2, "input_ids": ids(c, BATCH, TOKENS * 8).view(BATCH, TOKENS, 8)},
    "qwen2_5_omni_talker": lambda c: {
        "input_ids": ids(c),
        "thinker_reply_part": noise(BATCH, TOKENS, c.embedding_size),
    },
    "qwen2_5_omni_token2wav": lambda c: {
        **{"code": ids(c, 1), "conditioning": noise(1, c.dit_config.enc_emb_dim), "num_steps": 2},
        "reference_mel": noise(1, 12, c.dit_config.mel_dim),
    },
    "Qwen3OmniMoeTalkerConfig": lambda c: {"inputs_embeds": noise(BATCH, TOKENS, c.text_config.hidden_size)},
    "Qwen3OmniMoeCode2WavConfig": lambda c: {"codes": ids(c, tokens=c.num_quantizers * TOKENS).view(BATCH, -1, TOKENS)},
    "lw_detr": lambda c: {"pixel_values": noise(BATCH, 3, 128, 192)},
    "edgetam": lambda c: {"pixel_values": noise(1, 3, 256, 256)},
    "muse_spark_audio": lambda c: {"input_values": noise(BATCH, 3840)},
    "musicgen_decoder": lambda c: {"input_ids": ids(c, BATCH * c.num_codebooks)},
    "musicgen_melody_decoder": lambda c: {"input_ids": ids(c, BATCH * c.num_codebooks)},
    "neucodec": lambda c: {"input_values": noise(BATCH, 1, 3840), "input_features": noise(BATCH, 12, 160)},
    "xcodec2": lambda c: {"input_values": noise(BATCH, 1, 3840), "input_features": noise(BATCH, 12, 160)},
    "speech-encoder-decoder": lambda c: {"input_values": noise(BATCH, 4000), "decoder_input_ids": ids(c)},
    "ernie4_5_vl_moe": lambda c: {
        "input_ids": ids(c),
        "moe_mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1]] * BATCH, dtype=torch.int),
    },
    "vibevoice_acoustic_tokenizer_encoder": lambda c: {"hidden_states": noise(BATCH, 1, 6400)},
    "vibevoice_acoustic_tokenizer_decoder": lambda c: {"hidden_states": noise(BATCH, c.hidden_size, 7)},
    "depth_pro": lambda c: {"pixel_values": noise(1, 3, 4 * c.patch_size, 4 * c.patch_size)},
    "lasr_ctc": _spectrogram("num_mel_bins"),
    "encodec": _sound(),
    "dac": _sound(),
    "mimi": _sound(),
    "mimi_encoder": _sound(),
    "pe_audio": lambda c: {"input_ids": ids(c), "input_values": noise(BATCH, 1, 3840)},
    "pe_audio_encoder": _sound(),
    "xcodec": _sound(),
    "higgs_audio_v2_tokenizer": _sound(),
    "pocket_tts_audio_tokenizer": _sound(),
    "pocket_tts_audio_tokenizer_encoder": _sound(),
    "mimi_decoder": lambda c: {"latents": noise(BATCH, c.hidden_size, 7)},
    "pocket_tts_audio_tokenizer_decoder": lambda c: {"latents": noise(BATCH, c.hidden_size, 7)},
    "clap": lambda c: {
        **{"input_ids": ids(c), "input_features": noise(BATCH, 1, 1001, 64)},
        "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool),
    },
    "fastspeech2_conformer_with_hifigan": lambda c: {"input_ids": ids(c.model_config, tokens=12)},
    "clvp": lambda c: {"input_ids": ids(c), "input_features": noise(BATCH, c.decoder_config.feature_size, 64)},
    "omdet-turbo": lambda c: {
        **{
            "pixel_values": noise(BATCH, 3, 64, 64),
            "classes_input_ids": ids(c, 6),
            "classes_attention_mask": ones(6, 5),
        },
        **{
            "tasks_input_ids": ids(c),
            "tasks_attention_mask": ones(BATCH, 5),
            "classes_structure": torch.tensor([3, 3]),
        },
    },
}
