"""`torchtitan:llama3/debugmodel` -> that flavor of that model of torchtitan 0.3, and tokens with its masks.

The attention is flex attention, which every language model there supports; other kernels use the same weights. The
model makes the block mask, for one document a sequence.
"""

from __future__ import annotations

import inspect
import pkgutil
from types import ModuleType
from typing import Any

import torch

from quack_fx.errors import TargetError
from quack_fx.targets.adapters.base import Adapted, Adapter, package
from quack_fx.targets.files import Namespace, name_and_text, nearest
from quack_fx.targets.inputs.values import BATCH, TOKENS, Inputs, named
from quack_fx.targets.pick import Recipe

_FORM = "torchtitan:MODEL/FLAVOR"


def _open(rest: str, typed: str) -> Adapted:
    torchtitan, models = package("torchtitan", typed), package("torchtitan.models", typed)
    name, _, flavor = rest.partition("/")
    known = [m.name for m in pkgutil.iter_modules(models.__path__) if m.ispkg and m.name != "common"]
    if name not in known:
        hint = nearest(name, known, f"it has {', '.join(known)}")
        raise TargetError(f"torchtitan has no model {name!r}; {hint}")
    module = package(f"torchtitan.models.{name}", typed)
    if not hasattr(module, "model_registry"):
        raise TargetError(f"{typed!r} needs the model_registry of torchtitan 0.3: pip install --upgrade torchtitan")
    flavors = _flavors(module)
    every = ", ".join(flavors)
    if not flavor:
        raise TargetError(f"{typed!r} names no flavor of {name}, which has {every}; type {_FORM}")
    if flavor not in flavors:
        hint = nearest(flavor, flavors, f"it has {every}")
        raise TargetError(f"torchtitan's {name} has no flavor {flavor!r}; {hint}")
    try:
        backends = inspect.signature(module.model_registry).parameters.keys() & {"attn_backend"}
        config = module.model_registry(flavor, **dict.fromkeys(backends, "flex")).model
    except Exception as error:
        raise TargetError(f"{typed!r} is refused by torchtitan: {name_and_text(error)}") from error
    names = {"torchtitan": torchtitan, "config": config}
    return Adapted(Namespace(typed, names), Recipe("", lambda: _built(config)), _tokens)


ADAPTER = Adapter(_FORM, _open, prefix="torchtitan")


def _flavors(module: ModuleType) -> list[str]:
    """Flavors of a model, from the tables `*_configs` in the module of its `model_registry`."""
    tables = [v for n, v in vars(module).items() if n.endswith("_configs") and isinstance(v, dict)]
    return [flavor for table in tables for flavor in table]


def _built(config: Any) -> Any:
    model = config.build()
    if not any(p.is_meta for p in model.parameters()):
        model.init_states()  # constructors leave the weights uninitialised
    return model


def _tokens(model: Any) -> list[Inputs]:
    """Token ids, one document a sequence, and the other arguments that torchtitan's trainer passes."""
    parameters = inspect.signature(model.forward).parameters
    if not {"tokens", "positions", "attention_masks"} <= {*parameters}:
        return []
    tokens = torch.arange(1, BATCH * TOKENS + 1).view(BATCH, TOKENS)
    positions = torch.arange(TOKENS).expand(BATCH, TOKENS)
    try:
        with torch.compiler.set_stance("force_eager"):  # compiling takes longer than this small mask
            masks = model.get_attention_masks(positions)
    except Exception as error:
        raise TargetError(
            f"the masks of {type(model).__name__} cannot be made: {name_and_text(error)}; give inputs with --inputs"
        ) from error
    return [named((tokens,), {"positions": positions, "attention_masks": masks})]
