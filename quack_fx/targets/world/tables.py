"""Real tables in a model that is built on the meta device, for constructors that read them.

Example: `rates = [x.item() for x in torch.linspace(0, 0.1, depth)]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_TABLES = {torch.arange, torch.linspace, torch.logspace, torch.tensor}


class TablesForReal(TorchFunctionMode):
    """Function mode that makes tables on the CPU, unless another device is asked for. They become fake with others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TABLES and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "cpu"}
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "device" not in str(error):
                raise
        # Tables and tensors of the model meet: the result is fake.
        args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        return func(*args, **kwargs)
