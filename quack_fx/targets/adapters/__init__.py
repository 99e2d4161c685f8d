"""Targets that are neither a Python file nor a module. One adapter a file, and this registry.

In: a target as typed. Out: `Adapted` (a `Namespace`, a `Recipe`, maybe example inputs), or None where no adapter takes
it, and it is a file or a module.

    hf.py           hf:CONFIG, or a config.json or its folder as it stands: a model of transformers
    timm.py         timm:NAME
    litgpt.py       litgpt:NAME
    torchtitan.py   torchtitan:MODEL/FLAVOR
    exported.py     model.pt2: a program that torch.export saved
    pickled.py      model.pt, model.pth: a module that torch.save saved; reading it runs code, as running a .py does
    base.py         what an adapter is, and what they share

To add one: write a file that makes an `Adapter` named ADAPTER, and put it into `ADAPTERS` below. Its `open` gets what
follows the prefix and the whole target. It imports its package through `base.package`, so that nothing is imported for
other targets; puts the package and what it made into the namespace, for --build and --inputs; and leaves building to
the recipe, which is called with the meta device as the default device first, and with the CPU where that fails. What it
cannot open it refuses with a `TargetError` of one line that quotes the target and says what to type. Then add a line
above and rows to tests/test_adapters.py.
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
    """What the adapter of a target makes of it, or None where it has none.

    Raises:
        TargetError: It has one, which refuses it.
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
