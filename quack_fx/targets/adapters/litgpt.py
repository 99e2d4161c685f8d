"""`litgpt:pythia-14m` -> the GPT of that config of LitGPT, without its weights. Its inputs are inferred."""

from __future__ import annotations

from quack_fx.errors import TargetError
from quack_fx.targets.adapters.base import Adapted, Adapter, package
from quack_fx.targets.files import Namespace, nearest
from quack_fx.targets.pick import Recipe


def _open(name: str, typed: str) -> Adapted:
    litgpt = package("litgpt", typed)
    known = package("litgpt.config", typed).name_to_config
    try:
        config = litgpt.Config.from_name(name)
    except ValueError as error:
        hint = nearest(name, known, "litgpt.config.name_to_config lists them")
        raise TargetError(f"litgpt has no config {name!r}; {hint}") from error
    return Adapted(Namespace(typed, {"litgpt": litgpt, "config": config}), Recipe("", lambda: litgpt.GPT(config)))


ADAPTER = Adapter("litgpt:NAME", _open, prefix="litgpt")
