"""`timm:vit_base_patch16_224` -> that model of timm, without its weights, and an image of its `input_size`."""

from __future__ import annotations

from torch import nn

from quack_fx.errors import TargetError
from quack_fx.targets.adapters.base import Adapted, Adapter, package
from quack_fx.targets.files import Namespace, nearest
from quack_fx.targets.inputs.values import BATCH, Inputs, named, noise
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
    return [named((noise(BATCH, *size),), {})] if size else []


ADAPTER = Adapter("timm:NAME", _open, prefix="timm")
