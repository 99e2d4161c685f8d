"""torch.distributed with one rank and no network, for models that need a process group.

Out: a context in which `init_process_group` makes a group of one rank, whatever its backend, and collectives do to
tensors, fake ones included, what they do on one rank. The group ends with the context. In a process that has a group
already, nothing is changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

_VARIABLES = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
_VARIABLES |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@contextmanager
def one_rank(ready: bool) -> Iterator[None]:
    """Context in which torch.distributed works with one rank; with `ready`, as torchrun would have started it."""
    if not dist.is_available() or dist.is_initialized():
        yield
        return
    initialise = dist.init_process_group

    def init_process_group(*args: Any, **kwargs: Any) -> None:
        if not dist.is_initialized():
            store = dist.HashStore()  # type: ignore[attr-defined]
            initialise("gloo", store=store, rank=0, world_size=1)

    collectives = {name: stand_in for name, stand_in in _COLLECTIVES.items() if hasattr(dist, name)}
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(dist, init_process_group=init_process_group, **collectives))
        stack.callback(_leave)
        if ready:
            stack.enter_context(patch.dict(os.environ, {n: v for n, v in _VARIABLES.items() if n not in os.environ}))
            init_process_group()
        yield


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class _Done:
    """The handle of a finished collective."""

    def wait(self, *args: Any) -> bool:
        """Return at once."""
        return True

    is_completed = wait


def _in_place(*args: Any, **kwargs: Any) -> Any:
    """A collective that leaves its tensor as it is on one rank."""
    return _Done() if kwargs.get("async_op") else None


def _copied(output: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
    """A collective that copies on one rank: from a tensor, or the only one of a list, to another."""
    target, source = (x if isinstance(x, Tensor) else x[0] for x in (output, given))
    target.copy_(source.reshape(target.shape))
    return _in_place(**kwargs)


def _gather(tensor: Tensor, outputs: Sequence[Tensor] | None = None, *args: Any, **kwargs: Any) -> Any:
    return _copied(outputs, tensor, **kwargs) if outputs else _in_place(**kwargs)


def _scatter(output: Tensor, given: Sequence[Tensor] | None = None, *args: Any, **kwargs: Any) -> Any:
    return _copied(output, given, **kwargs) if given else _in_place(**kwargs)


def _gather_object(outputs: list[Any], given: Any, *args: Any, **kwargs: Any) -> None:
    outputs[0] = given


_COLLECTIVES: dict[str, Any] = {
    **dict.fromkeys(("all_reduce", "reduce", "broadcast", "barrier", "broadcast_object_list"), _in_place),
    **dict.fromkeys(("all_gather", "all_gather_into_tensor", "_all_gather_base", "reduce_scatter"), _copied),
    **dict.fromkeys(("reduce_scatter_tensor", "_reduce_scatter_base", "all_to_all_single", "all_to_all"), _copied),
    "all_gather_object": _gather_object,
    "gather": _gather,
    "scatter": _scatter,
}
