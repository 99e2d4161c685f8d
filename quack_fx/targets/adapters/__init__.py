"""Targets that are neither a Python file nor a module: one adapter a file, and this registry.

In: a target as typed. Out: `Adapted` (a `Namespace`, a `Recipe`, optional example inputs), or None for a Python file or
module.

    hf.py           hf:CONFIG, or a config.json or its folder as it stands: a model of transformers
    timm.py         timm:NAME
    litgpt.py       litgpt:NAME
    torchtitan.py   torchtitan:MODEL/FLAVOR
    exported.py     model.pt2: a program that torch.export saved
    pickled.py      model.pt, model.pth: a module that torch.save saved; reading it runs code, as running a .py does
    base.py         what an adapter is, and what they share

To add one, write a file that defines an `Adapter` named ADAPTER and add it to `ADAPTERS` below, a line above, and rows
to tests/test_adapters.py. Its `open` gets what follows the prefix, and the whole target. It imports its package with
`base.package`, so that other targets do not; puts the package and what it made of the target into the namespace, for
--build and --inputs; and lets the recipe build the model, which runs with meta as the default device first, and on the
CPU where that fails. What it cannot open it refuses with a `TargetError` that quotes the target and says what to type.
"""

from __future__ import annotations

from quack_fx.errors import TargetError
from quack_fx.targets.adapters import exported, hf, litgpt, pickled, timm, torchtitan
from quack_fx.targets.adapters.base import Adapted, Adapter

__all__ = ["ADAPTERS", "Adapted", "Adapter", "adapt"]

ADAPTERS: tuple[Adapter, ...] = (
    hf.ADAPTER,
    timm.ADAPTER,
    litgpt.ADAPTER,
    torchtitan.ADAPTER,
    exported.ADAPTER,
    pickled.ADAPTER,
)


def adapt(target: str) -> Adapted | None:
    """The result of the adapter for a target; None where no adapter takes it.

    Raises:
        TargetError: The adapter refuses it.
    """
    prefix, colon, rest = target.partition(":")
    for adapter in ADAPTERS:
        if colon and adapter.prefix and prefix == adapter.prefix:
            if not rest.strip():
                raise TargetError(f"{target!r} names nothing; type {adapter.form}")
            return adapter.open(rest.strip(), target)
    for adapter in ADAPTERS:
        if adapter.takes is not None and adapter.takes(target):
            return adapter.open(target, target)
    return None
