"""USER: the arithmetic of each optimizer that the compiled step knows.

In: an optimizer. Out: its `UpdateRule`, or None.

    rule.py     what an update is to the step
    adam.py     Adam and AdamW of torch.optim
    sgd.py      SGD of torch.optim
    muon.py     Muon of torch.optim
    lion.py     Lion, of any package

To teach the compiled step another optimizer: write its `UpdateRule` and add it to `_RULES`.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from quack_fx.step.rules.adam import AdamRule, AdamWRule
from quack_fx.step.rules.lion import LionRule, is_lion
from quack_fx.step.rules.muon import MuonRule
from quack_fx.step.rules.rule import Flags, Gate, Group, State, Tensors, UpdateRule
from quack_fx.step.rules.sgd import SGDRule

__all__ = ["Flags", "Gate", "Group", "State", "Tensors", "UpdateRule", "rule_of"]

_RULES: dict[type[Optimizer], UpdateRule] = {
    torch.optim.Adam: AdamRule(),
    torch.optim.AdamW: AdamWRule(),
    torch.optim.SGD: SGDRule(),
    torch.optim.Muon: MuonRule(),
}
"""By exact class: a subclass may differ."""


def rule_of(optimizer: Optimizer) -> UpdateRule | None:
    """The rule of an optimizer, or None where the step has none for it, or for weights that are sharded or complex.

    Example:
        >>> rule_of(torch.optim.SGD([torch.zeros(2)])).name
        'SGD'
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if any(isinstance(p, DTensor) or p.is_complex() for p in params):
        return None
    known = _RULES.get(type(optimizer))
    return LionRule() if known is None and is_lion(optimizer) else known
