"""A Hugging Face config -> its model at full size on meta, or a small one of the same structure.

In: a config.json or its folder, with or without the prefix `hf:`. The class is the one that its `architectures` names,
so parameters are named as in its checkpoints. No weights are read, nothing is downloaded, and no code that a config
points at is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quack_fx.errors import TargetError
from quack_fx.targets.adapters.base import Adapted, Adapter
from quack_fx.targets.files import Namespace, name_and_text
from quack_fx.targets.inputs.pretrained import config_parts
from quack_fx.targets.pick import Recipe
from quack_fx.targets.shrink import shrunk


def _is_config(target: str) -> bool:
    path = Path(target).expanduser()
    return (path / "config.json").exists() if path.is_dir() else path.suffix == ".json"


def _open(rest: str, typed: str) -> Adapted:
    path = Path(rest).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        raise TargetError(f"{typed!r} is a folder without a config.json; give one that has it")
    names = _names(path / "config.json" if path.is_dir() else path, typed)

    def smaller() -> Iterator[tuple[Adapted, str]]:
        for config in shrunk(names["config"]):
            yield _adapted({**names, "config": config}, typed), _size(config)

    adapted = _adapted(names, typed)
    return Adapted(adapted.namespace, adapted.recipe, smaller=smaller)


ADAPTER = Adapter("hf:CONFIG, a config.json or its folder", _open, prefix="hf", takes=_is_config)


def _names(path: Path, typed: str) -> dict[str, Any]:
    """Names for the expressions of a config target: `config`, `transformers`."""
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
    return {"config": config, "transformers": transformers}


def _adapted(names: dict[str, Any], typed: str) -> Adapted:
    config, transformers = names["config"], names["transformers"]
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    cls = getattr(transformers, named, None)
    recipe = Recipe(named if cls is not None else "", lambda: build_model(cls or transformers.AutoModel, config))
    return Adapted(Namespace(typed, names), recipe)


def build_model(cls: Any, config: Any) -> Any:
    """The model of a config, of a class of transformers or `AutoModel`, with an attention kernel that is installed."""
    import transformers

    make = cls.from_config if cls is transformers.AutoModel else cls
    for part in config_parts(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False  # training does not use the key-value cache
    with _quiet(transformers):
        try:
            return make(config)
        except (ValueError, ImportError, NotImplementedError):
            config._attn_implementation = "eager"  # the default kernel is not installed
            return make(config)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _size(config: Any) -> str:
    """ "2 layers, width 64": a config in words."""
    text = config.get_text_config()
    layers, width = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    parts = [f"{layers} layers"] * bool(layers) + [f"width {width}"] * bool(width)
    return ", ".join(parts) or "a small config"


def _read(path: Path, typed: str) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        hub = "; nothing is downloaded: give a config.json or its folder" if path.suffix != ".json" else ""
        raise TargetError(f"no file {str(path)!r} (seen from {Path.cwd()}){hub}") from error
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
