"""Real tables in a model that is built on the meta device, for constructors that read them.

Example: `rates = [x.item() for x in torch.linspace(0, 0.1, depth)]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_TABLES = {torch.arange, torch.linspace, torch.logspace, torch.tensor}


class TablesForReal(TorchFunctionMode):
    """Function mode that makes tables on the CPU, unless another device is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TABLES and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)
