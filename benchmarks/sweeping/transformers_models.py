"""SOURCE: transformers. Every class in the AutoModel mappings, for every model type.

In: nothing. Out: candidates. Configs are the types' defaults, reduced; inputs are inferred as on the command line.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto as auto

from benchmarks.sweeping.candidate import Candidate, CannotBeRunError
from benchmarks.sweeping.count import chooses
from benchmarks.sweeping.transformers_configs import config_of
from benchmarks.sweeping.transformers_inputs import Inputs, inputs
from benchmarks.sweeping.transformers_videos import Tracking, follows_objects, video
from quack_fx.targets.adapters.hf import build_model
from quack_fx.targets.shrink import shrunk

_CANNOT_RUN = {
    "gemma4_assistant": "its config wants layers that all share their keys, its layers want some that do not",
}
PARAMETERS = 200_000_000
"""Maximum number of parameters of a model."""


def candidates() -> Iterator[Candidate]:
    """Every class in an AutoModel mapping, once for each model type."""
    for family, names in sorted(_named().items()):
        for name in names:
            yield Candidate("transformers", family, name, functools.partial(_build, family, name))


def _named() -> dict[str, list[str]]:
    """Classes of each model type, the base class first."""
    mappings = [auto.MODEL_MAPPING_NAMES]
    mappings += [v for k, v in sorted(vars(auto).items()) if k.startswith("MODEL_FOR_") and k.endswith("MAPPING_NAMES")]
    found: dict[str, list[str]] = {}
    for mapping in mappings:
        for family, names in mapping.items():
            known = found.setdefault(family, [])
            known += [n for n in ([names] if isinstance(names, str) else names) if n not in known]
    return found


def _build(family: str, name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    transformers.utils.logging.set_verbosity_error()
    cls = _class(family, name)
    if cls is None:
        raise CannotBeRunError(f"transformers has no {name}, which its own mapping names")
    if family in _CANNOT_RUN:
        raise CannotBeRunError(f"{name} cannot be built: {_CANNOT_RUN[family]}")
    config = config_of(cls, family)
    first: Exception | None = None
    built = None
    for small in shrunk(config):
        try:
            made = _working(cls, small)
        except Exception as error:
            first = first or error
            continue
        built = built or made
        if chooses(*made):
            return made
    if built is not None:
        return built
    raise first if first is not None else ValueError(f"no smaller config of {family}")


def _class(family: str, name: str) -> Any:
    """A class of transformers; some classes in the mappings can only be imported from their module."""
    home = transformers.CONFIG_MAPPING[family].__module__.replace(".configuration_", ".modeling_")
    return getattr(transformers, name, None) or getattr(importlib.import_module(home), name, None)


def _working(cls: Any, config: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model with the first inputs for which its forward runs."""
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{size:,} parameters in the smallest form found")
    torch.manual_seed(0)
    model: nn.Module = build_model(cls, config).eval()
    if cls.forward is nn.Module.forward:
        whole = InParts(model)
        if not whole.parts:
            raise CannotBeRunError(f"{cls.__name__} has no forward, and no parts that have one")
        return whole, (), {name: _first_that_runs(part, inputs(part)) for name, part in whole.parts.items()}
    if follows_objects(config):
        model = Tracking(model)
        return model, (), _first_that_runs(model, iter([video(config)]))
    return model, (), _first_that_runs(model, inputs(model))


def _first_that_runs(model: nn.Module, trials: Iterator[Inputs]) -> Inputs:
    """The first inputs with which the forward runs."""
    first: Exception | None = None
    for kwargs in trials:
        try:
            with torch.no_grad():
                model(**kwargs)
            return kwargs
        except Exception as error:
            first = first or error
    raise first if first is not None else ValueError("no inputs")


class InParts(nn.Module):
    """Runs the parts of a model without a forward, one after the other.

    Arguments:
        model: The whole model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The submodels, by name."""
        return {n: part for n, part in self.model.named_children() if isinstance(part, transformers.PreTrainedModel)}

    def forward(self, **inputs: Inputs) -> list[Any]:
        """The output of each part for its own inputs."""
        return [getattr(self.model, name)(**kwargs) for name, kwargs in inputs.items()]
