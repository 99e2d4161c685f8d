"""QuacK and the methods it is compared with, on the same layout.

In: the name of a method, a model and its layout. Out: a `Method`, which the hooks of `QuacK` call before and after each
step.

    method.py          the interface, and the base class, which changes nothing: "none";
                       learning rates by the rule, relative to the start of training: "quack";
                       one learning rate for all query and key rows: "constant"
    qk_clip.py         scales heads with large logits down after the step: "qk-clip"
    compositional.py   learning rates by the partner's absolute norm: "compositional"
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

from torch import nn

from quack_fx.errors import OptimizerError
from quack_fx.layout import QKLayout
from quack_fx.train.rivals.compositional import Compositional
from quack_fx.train.rivals.method import Constant, Method, Quack
from quack_fx.train.rivals.qk_clip import QKClip

if TYPE_CHECKING:
    from quack_fx.train.program.parts.quack import QuacK as Scaling

MethodName = Literal["quack", "constant", "qk-clip", "compositional", "none"]

THRESHOLD = 100.0
"""Default threshold of QK-Clip, as in Kimi K2."""


def check_method(method: str, tau: object, norm: str, threshold: float) -> None:
    """Raise for an unknown method, and for arguments that the method does not use.

    Raises:
        OptimizerError: The method is unknown; `tau`, a threshold or a norm was given to a method that does not use it;
            the threshold is not a positive number.
    """
    if method not in get_args(MethodName):
        raise OptimizerError(f"method is {method!r}; use one of {', '.join(map(repr, get_args(MethodName)))}")
    if method in ("qk-clip", "none") and not (isinstance(tau, int | float) and tau == 1):
        raise OptimizerError(f"tau is {tau!r}, and method {method!r} leaves learning rates as they are; leave tau at 1")
    if isinstance(threshold, bool) or not (isinstance(threshold, int | float) and 0 < threshold < math.inf):
        raise OptimizerError(f"threshold is {threshold!r}; need a positive number, for example {THRESHOLD}")
    if method != "qk-clip" and threshold != THRESHOLD:
        raise OptimizerError(f"threshold is {threshold!r}, and method {method!r} has none; it is of method='qk-clip'")
    if method == "compositional" and norm == "spectral":
        raise OptimizerError("norm is 'spectral', and method 'compositional' is by Frobenius norms; leave norm out")


def method_of(name: str, scaling: Scaling, model: nn.Module, layout: QKLayout, threshold: float) -> Method:
    """Create the method with the given name, which `check_method` has accepted.

    Arguments:
        name: Name of the method.
        scaling: Norms, factors and rows of the model's heads.
        model: The model.
        layout: Its layout.
        threshold: The threshold of "qk-clip".

    Raises:
        OptimizerError: The method does not support this layout.
    """
    if name == "qk-clip":
        return QKClip(scaling, model, layout, threshold)
    if name == "compositional":
        return Compositional(scaling, model, layout)
    return {"quack": Quack, "constant": Constant, "none": Method}[name](scaling)
