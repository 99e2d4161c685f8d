"""Targets that are neither a Python file nor a module; each file but `base.py` is the `Adapter` of one form.

In: a target as typed. Out: `Adapted`, or None for a Python file or module. To add a form, write a file with an ADAPTER,
list it in `ADAPTERS`, and add rows to tests/test_adapters.py. It imports its package with `base.package`, only when
needed, and refuses what it cannot open with a `TargetError` that quotes the target and says what to type.
"""

from __future__ import annotations

from quack_fx.errors import TargetError
from quack_fx.targets.adapters import exported, hf, litgpt, pickled, timm, torchtitan
from quack_fx.targets.adapters.base import Adapted, Adapter

__all__ = ["ADAPTERS", "Adapted", "Adapter", "adapt"]

ADAPTERS: tuple[Adapter, ...] = tuple(module.ADAPTER for module in (hf, timm, litgpt, torchtitan, exported, pickled))


def adapt(target: str) -> Adapted | None:
    """What the adapter for a target makes of it; None where no adapter takes it."""
    prefix, colon, rest = target.partition(":")
    for adapter in ADAPTERS:
        if colon and adapter.prefix and prefix == adapter.prefix:
            if not rest.strip():
                raise TargetError(f"{target!r} names nothing; type {adapter.form}")
            return adapter.open(rest.strip(), target)
    taking = (adapter for adapter in ADAPTERS if adapter.takes is not None and adapter.takes(target))
    return next((adapter.open(target, target) for adapter in taking), None)
