"""USER: weights in half precision that are updated in single precision.

In: an optimizer over parameters in bfloat16 or float16. Out: for each of them its master, an fp32 copy that the update
reads and writes; the parameter is the master rounded. Masters are part of the optimizer's state (`MASTER`), and so of
its checkpoints. `Optimizer.load_state_dict` rounds all state to the type of its parameter; here it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from quack_fx.optim import state_keys

MASTER = "master_param"
"""Name of a master in the state of its parameter; that of other packages with such optimizers."""

_HALF = (torch.bfloat16, torch.float16)


class Masters:
    """The masters of one optimizer's parameters.

    Arguments:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._n_groups, self._held = 0, set[int]()
        self._seen: dict[Tensor, tuple[int, int]] = {}
        self._loading: dict[Tensor, dict[str, Tensor]] = {}
        optimizer.register_load_state_dict_pre_hook(self._before_load)
        optimizer.register_load_state_dict_post_hook(self._after_load)

    @torch.no_grad()
    def of(self, param: Tensor) -> Tensor:
        """What an update reads and writes for a parameter: its master, or itself in full precision.

        Where somebody else has written into the parameter since (a checkpoint was loaded), its new elements are taken
        over; a master that still rounds to its parameter is kept to the bit.
        """
        if param.dtype not in _HALF:
            return param.detach()
        state = self._optimizer.state[param]
        master: Tensor | None = state.get(MASTER)
        if master is None or master.dtype != torch.float32:
            master = state[MASTER] = param.detach().float()
        elif self._seen.get(param) != _writes(param):
            master.copy_(torch.where(master.to(param.dtype) == param, master, param.float()))
        self._seen[param] = _writes(param)
        return master

    def hold(self, param: Tensor) -> bool:
        """Whether a parameter is the optimizer's."""
        if self._n_groups != len(self._optimizer.param_groups):  # a group was added
            self._n_groups = len(self._optimizer.param_groups)
            self._held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        return id(param) in self._held

    def written(self, params: Sequence[Tensor]) -> None:
        """Take note that parameters were written together with their masters."""
        self._seen |= {param: _writes(param) for param in params}

    def _before_load(self, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Keep what is about to be rounded."""
        keys = state_keys(optimizer, state_dict)
        self._loading = {}  # of a loading that failed
        for param in (p for group in optimizer.param_groups for p in group["params"]):
            state = state_dict["state"].get(keys.get(id(param)), {})
            if param.dtype in _HALF and MASTER in state:
                self._loading[param] = {
                    name: x for name, x in state.items() if isinstance(x, Tensor) and x.dtype == torch.float32
                }

    def _after_load(self, optimizer: Optimizer) -> None:
        """Put it in place of what was rounded."""
        for param, exact in self._loading.items():
            state = optimizer.state[param]
            state.update({name: x.to(state[name].device, copy=True) for name, x in exact.items() if name in state})
        self._loading = {}


def weight_of(param: Tensor, masters: Sequence[Masters]) -> Tensor:
    """What an update reads and writes for a parameter, by the masters of all optimizers; none without."""
    held = next((own for own in masters if own.hold(param)), None)
    return param.detach() if held is None else held.of(param)


def _writes(param: Tensor) -> tuple[int, int]:
    return param._version, param.data_ptr()
