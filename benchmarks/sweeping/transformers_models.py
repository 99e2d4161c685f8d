"""SOURCE: transformers. The base model of every model type of the AutoModel mappings, or a task class if it has none.

In: nothing. Out: candidates. Configs are the types' defaults, shrunk; inputs are inferred as the command line does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto

from benchmarks.sweeping.candidate import Candidate, CannotBeRunError
from benchmarks.sweeping.transformers_configs import config_of
from benchmarks.sweeping.transformers_inputs import inputs
from benchmarks.sweeping.transformers_videos import Tracking, follows_objects, video
from quack_fx.targets import hf
from quack_fx.targets.shrink import shrunk

_MAPPINGS = (
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES",
)
_CANNOT_RUN = {
    "gemma4_assistant": "its config wants layers that all share their keys, its layers want some that do not",
}
PARAMETERS = 100_000_000
"""Parameters of a model that is still worth running."""


def candidates() -> Iterator[Candidate]:
    """The base class of each model type, or its first task class where it has none."""
    for family in sorted(auto.MODEL_MAPPING_NAMES | _task_classes()):
        named = []
        for mapping in _MAPPINGS:
            names = getattr(auto, mapping, {}).get(family, ())
            named += [names] if isinstance(names, str) else list(names)
        distinct = list(dict.fromkeys(named))
        for name in distinct[:1]:
            yield Candidate("transformers", family, name, functools.partial(_build, family, name))


def _task_classes() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mapping in _MAPPINGS:
        found.update(getattr(auto, mapping, {}))
    return found


def _build(family: str, name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    transformers.utils.logging.set_verbosity_error()
    cls = getattr(transformers, name, None)
    if cls is None:
        raise CannotBeRunError(f"transformers has no {name}, which its own mapping names")
    if family in _CANNOT_RUN:
        raise CannotBeRunError(f"{name} cannot be built: {_CANNOT_RUN[family]}")
    if cls.forward is nn.Module.forward:
        raise CannotBeRunError(f"{name} has no forward: its parts are run one by one")
    config = config_of(cls, family)
    first: Exception | None = None
    for small in shrunk(config):
        try:
            return _working(cls, small)
        except Exception as error:
            first = first or error
    raise first if first is not None else ValueError(f"no smaller config of {family}")


def _working(cls: Any, config: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model with the first inputs for which its forward runs."""
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size:,} parameters in the smallest form found")
    torch.manual_seed(0)
    model: nn.Module = hf.build_model(cls, config).eval()
    trials = inputs(model)
    if follows_objects(config):
        model, trials = Tracking(model), iter([video(config)])
    first: Exception | None = None
    for kwargs in trials:
        try:
            with torch.no_grad():
                model(**kwargs)
            return model, (), kwargs
        except Exception as error:
            first = first or error
    raise first if first is not None else ValueError("no inputs")
