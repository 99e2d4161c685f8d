"""`timm:vit_base_patch16_224` -> that model of timm, without its weights, and an image of its size.

In: a name that `timm.list_models()` knows. Out: `Adapted`; the image has the `input_size` of the model's `default_cfg`.
"""

from __future__ import annotations

import torch
from torch import nn

from quack_fx.errors import TargetError
from quack_fx.targets.adapters.base import Adapted, Adapter, nearest, package
from quack_fx.targets.files import Namespace
from quack_fx.targets.inputs.values import BATCH, Inputs, named
from quack_fx.targets.pick import Recipe


def _open(name: str, typed: str) -> Adapted:
    timm = package("timm", typed)
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models(), "timm.list_models() names them")
        raise TargetError(f"timm {timm.__version__} has no model {name!r}; {hint}")
    recipe = Recipe("", lambda: timm.create_model(name, pretrained=False))
    return Adapted(Namespace(typed, {"timm": timm, "name": name}), recipe, _images)


def _images(model: nn.Module) -> list[Inputs]:
    size = (getattr(model, "default_cfg", None) or {}).get("input_size")
    return [named((torch.randn(BATCH, *size, generator=torch.Generator().manual_seed(0)),), {})] if size else []


ADAPTER = Adapter("timm:NAME", _open, prefix="timm")
