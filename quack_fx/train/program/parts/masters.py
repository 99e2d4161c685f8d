"""Updates half-precision parameters through fp32 copies, their masters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Masters:
    """The masters of an optimizer's parameters, kept in its state as "master_param"; the moments are fp32 as well.

    Create it before loading a checkpoint, because Optimizer.load_state_dict casts state to the dtype of its parameter.

    Arguments:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.seen: dict[Tensor, tuple[int, int]] = {}
        self.loading: dict[Tensor, dict[str, Tensor]] = {}
        optimizer.register_load_state_dict_pre_hook(self.before_load)
        optimizer.register_load_state_dict_post_hook(self.after_load)

    def refresh(self) -> None:
        """Create missing masters, and copy parameters that were written to since the last step."""
        for param in self.params():
            state = self.optimizer.state[param]
            master = state.get("master_param")
            if master is None or master.dtype != torch.float32:
                state["master_param"] = param.detach().float()
            elif self.seen.get(param) != (param._version, param.data_ptr()):
                # Elements that still round to the parameter stay as they are.
                master.copy_(torch.where(master.to(param.dtype) == param, master, param.float()))

    def round(self) -> None:
        """Round the masters into their parameters."""
        params = self.params()
        torch._foreach_copy_(params, [self.optimizer.state[param]["master_param"] for param in params])
        self.seen = {param: (param._version, param.data_ptr()) for param in params}

    def params(self) -> list[Tensor]:
        """The parameters in half precision that have a gradient."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        return [p for p in params if p.dtype in (torch.bfloat16, torch.float16) and p.grad is not None]

    def before_load(self, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Remember the exact state, because loading casts it."""
        groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
        pairs = [pair for ours, saved in groups for pair in zip(ours["params"], saved["params"], strict=False)]
        exact = ((param, state_dict["state"].get(key, {})) for param, key in pairs)
        self.loading = {param: state for param, state in exact if "master_param" in state}

    def after_load(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore the exact state."""
        for param, exact in self.loading.items():
            state, fp32 = optimizer.state[param], torch.float32
            kept = {k: x for k, x in exact.items() if isinstance(x, Tensor) and x.dtype == fp32 and k in state}
            state.update({name: x.to(state[name].device, copy=True) for name, x in kept.items()})
        self.loading = {}
