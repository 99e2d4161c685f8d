"""Inputs for models of transformers, from their configs."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.targets.inputs.values import noise

_SUB_CONFIGS = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "backbone_config")


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model has the attributes of a model of transformers."""
    return isinstance(getattr(model, "main_input_name", None), str) and hasattr(model, "config")


def pretrained_inputs(model: nn.Module, batch: int, tokens: int) -> list[dict[str, Any]]:
    """Keyword arguments that the forward of a transformers model may take, likeliest first."""
    config, main = model.config, str(model.main_input_name)
    known = inspect.signature(model.forward).parameters
    vocabulary = _field(config, "vocab_size") or 32
    ids = torch.arange(1, batch * tokens + 1).remainder(vocabulary).view(batch, tokens)
    data: dict[str, list[Tensor]] = {
        "input_ids": [ids],
        "pixel_values": _videos(config, batch) if _field(config, "num_frames") else _images(config, batch),
        "pixel_values_videos": _videos(config, batch),
        "input_features": _spectrograms(config, batch),
        "input_values": [*_waves(config, batch)],
    }
    needed = [n for n, p in known.items() if n in data and p.default is p.empty and n != main]
    names = [main, *needed] if main in known or not needed else needed
    base = [dict(zip(names, values, strict=True)) for values in itertools.product(*(data.get(n, [ids]) for n in names))]
    if "decoder_input_ids" in known and (getattr(config, "is_encoder_decoder", False) or main != "input_ids"):
        with_decoder = [{**kwargs, "decoder_input_ids": ids} for kwargs in base]
        base = [*with_decoder, *base]
    other = [n for n in ("pixel_values", "input_features") if n in known and n not in names]
    both = [{**kwargs, name: value} for kwargs in base for name in other for value in data[name]]
    # A model with a config for images or audio gets them along with tokens first; any other model gets them last.
    parts = {"pixel_values": "vision_config", "input_features": "audio_config"}
    return [*both, *base] if any(hasattr(config, parts[n]) for n in other) else [*base, *both]


def config_parts(config: Any) -> list[Any]:
    """A config and its sub-configs."""
    return [config, *(getattr(config, name, None) for name in _SUB_CONFIGS)]


def _field(config: Any, *names: str) -> Any:
    """The value of the first of these fields that the config or one of its sub-configs has."""
    return next(
        (v for part in config_parts(config) for name in names if (v := getattr(part, name, None)) is not None), None
    )


def _images(config: Any, batch: int) -> list[Tensor]:
    size, channels = _field(config, "image_size"), _field(config, "num_channels") or 3
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    sizes = [(height, width)] if isinstance(height, int) else [(224, 224), (64, 64)]
    return [noise(batch, channels, h, w) for h, w in sizes]


def _videos(config: Any, batch: int) -> list[Tensor]:
    frames = _field(config, "num_frames") or 4
    return [noise(batch, frames, *image.shape[1:]) for image in _images(config, batch)]


def _spectrograms(config: Any, batch: int) -> list[Tensor]:
    bins = _field(config, "num_mel_bins", "input_feat_per_channel") or 80
    positions = _field(config, "max_source_positions")
    frames = [2 * positions] if isinstance(positions, int) else [64]
    return [noise(batch, bins, n) for n in frames] + [noise(batch, 64, bins)]


def _waves(config: Any, batch: int) -> list[Tensor]:
    bins, length = _field(config, "num_mel_bins"), _field(config, "max_length")
    spectrogram = [noise(batch, length, bins)] if isinstance(bins, int) and isinstance(length, int) else []
    return [*spectrogram, noise(batch, 4000)]
