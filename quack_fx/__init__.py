"""quack-fx: find the query/key pairs of any PyTorch model, and train it with QuacK learning-rate scaling.

The public names, loaded on first use: reading a layout or asking for help does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "QKLayout": "layout",
    "capture": "graph.capture",
    "find_qk_pairs": "find",
    "insert_qk_norm": "qk_norm.insert",
    "verify_qk_pairs": "prove",
    "strip_qk_norm": "qk_norm.strip",
    "QuacK": "train.hooks",
    "compile_train_step": "train.step",
    "convert": "train.convert",
    "inline_quack": "train.inline",
    "StepBackend": "train.inline",
    "RunLog": "train.record",
    "QuackError": "errors",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from quack_fx.errors import QuackError
    from quack_fx.find import find_qk_pairs
    from quack_fx.graph.capture import capture
    from quack_fx.layout import QKLayout
    from quack_fx.prove import verify_qk_pairs
    from quack_fx.qk_norm.insert import insert_qk_norm
    from quack_fx.qk_norm.strip import strip_qk_norm
    from quack_fx.train.convert import convert
    from quack_fx.train.hooks import QuacK
    from quack_fx.train.inline import StepBackend, inline_quack
    from quack_fx.train.record import RunLog
    from quack_fx.train.step import compile_train_step


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"quack_fx.{_HOME[name]}"), name)
    raise AttributeError(f"module 'quack_fx' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
