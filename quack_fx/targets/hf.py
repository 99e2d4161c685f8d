"""DOOR: a Hugging Face config -> its model at full size on meta; the inputs that such models take.

In: a config.json or the folder that holds it. Out: a `Recipe`. The class is the one that the config's `architectures`
names, so that parameters have the names they have in its checkpoints. transformers is imported here, and only for such
a target. No weights are read and no code that a config points at is run.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.errors import TargetError
from quack_fx.targets.files import Namespace, name_and_text
from quack_fx.targets.pick import Recipe

_SUB_CONFIGS = ("text_config", "vision_config", "audio_config", "encoder", "decoder", "backbone_config")


def config_path(target: str) -> Path | None:
    """The config file that a target names, or None where it names something else."""
    path = Path(target).expanduser()
    if path.is_dir() and (path / "config.json").exists():
        return path / "config.json"
    return path if path.suffix == ".json" and not path.is_dir() else None


def namespace(path: Path, typed: str) -> Namespace:
    """Names for the expressions of a config target: `config`, `transformers`.

    Raises:
        TargetError: The file is no config, its model is unknown, or transformers is missing.
    """
    fields = _read(path, typed)
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            f'{typed!r} is a Hugging Face config and needs transformers: pip install "quack-fx[hf]"'
        ) from error
    kind = fields["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        remote = " (its own code, named in auto_map, is not run)" if "auto_map" in fields else ""
        raise TargetError(
            f"{typed!r} has model_type {kind!r}, which transformers {transformers.__version__} does not know{remote}; "
            "build the model in a Python file and give that"
        )
    try:
        with _quiet(transformers):
            config = transformers.CONFIG_MAPPING[kind].from_dict(fields)
    except Exception as error:
        raise TargetError(f"{typed!r} is refused by transformers: {name_and_text(error)}") from error
    return Namespace(typed, {"config": config, "transformers": transformers})


def recipe(space: Namespace) -> Recipe:
    """How to build the model of a config."""
    config, transformers = space.names["config"], space.names["transformers"]
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    cls = getattr(transformers, named, None)

    return Recipe(named if cls is not None else "", lambda: build_model(cls or transformers.AutoModel, config))


def build_model(cls: Any, config: Any) -> Any:
    """Model of a config, by a class of transformers or by `AutoModel`, with an attention that is installed here."""
    import transformers

    make = cls.from_config if cls is transformers.AutoModel else cls
    _without_cache(config)
    with _quiet(transformers):
        try:
            return make(config)
        except (ValueError, ImportError, NotImplementedError):
            config._attn_implementation = "eager"  # what the model's own default asks for is not to be had
            return make(config)


def is_pretrained(model: nn.Module) -> bool:
    """Whether a model is one of transformers', by what it offers."""
    return isinstance(getattr(model, "main_input_name", None), str) and hasattr(model, "config")


def inputs(model: nn.Module, batch: int, tokens: int) -> list[dict[str, Any]]:
    """Keyword arguments that the forward of a transformers model may take, most likely first."""
    config, main = model.config, str(model.main_input_name)
    known = inspect.signature(model.forward).parameters
    vocabulary = _look(config, "vocab_size") or 32
    ids = torch.arange(1, batch * tokens + 1).remainder(vocabulary).view(batch, tokens)
    data: dict[str, list[Tensor]] = {
        "input_ids": [ids],
        "pixel_values": _videos(config, batch) if _look(config, "num_frames") else _images(config, batch),
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
    # A model with a part for the other kind is shown both at once if it can take them; any other only if it must.
    return [*both, *base] if any(_has_part(config, n) for n in other) else [*base, *both]


def _read(path: Path, typed: str) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise TargetError(f"no file {typed!r} (seen from {Path.cwd()})") from error
    except OSError as error:
        raise TargetError(f"{typed!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TargetError(f"{typed!r} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        name = fields.get("_class_name") if isinstance(fields, dict) else None
        library = f" (it is that of {name} in diffusers)" if name else ""
        raise TargetError(
            f'{typed!r} is not a Hugging Face config: it has no "model_type"{library}; '
            "give a transformers config.json, or build the model in a Python file"
        )
    return fields


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the remarks that transformers logs about configs."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _without_cache(config: Any) -> None:
    """A training step keeps no keys and values for later."""
    for part in (config, *(getattr(config, name, None) for name in _SUB_CONFIGS)):
        if hasattr(part, "use_cache"):
            part.use_cache = False


def _look(config: Any, *names: str) -> Any:
    """The first of these fields that the config or a part of it has."""
    parts = [config, *(getattr(config, name, None) for name in _SUB_CONFIGS)]
    return next((v for part in parts for name in names if (v := getattr(part, name, None)) is not None), None)


def _has_part(config: Any, name: str) -> bool:
    return hasattr(config, "vision_config" if name == "pixel_values" else "audio_config")


def _images(config: Any, batch: int) -> list[Tensor]:
    size, channels = _look(config, "image_size"), _look(config, "num_channels") or 3
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    sizes = [(height, width)] if isinstance(height, int) else [(224, 224), (64, 64)]
    return [_noise(batch, channels, h, w) for h, w in sizes]


def _videos(config: Any, batch: int) -> list[Tensor]:
    frames = _look(config, "num_frames") or 4
    return [_noise(batch, frames, *image.shape[1:]) for image in _images(config, batch)]


def _spectrograms(config: Any, batch: int) -> list[Tensor]:
    bins = _look(config, "num_mel_bins", "input_feat_per_channel") or 80
    positions = _look(config, "max_source_positions")
    frames = [2 * positions] if isinstance(positions, int) else [64]
    return [_noise(batch, bins, n) for n in frames] + [_noise(batch, 64, bins)]


def _waves(config: Any, batch: int) -> list[Tensor]:
    bins, length = _look(config, "num_mel_bins"), _look(config, "max_length")
    spectrogram = [_noise(batch, length, bins)] if isinstance(bins, int) and isinstance(length, int) else []
    return [*spectrogram, _noise(batch, 4000)]


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
