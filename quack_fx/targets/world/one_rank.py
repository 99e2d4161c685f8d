"""torch.distributed for models that ask for a process group: a group of one rank, without a network.

In: nothing. Out: a context in which `init_process_group` makes (or, with `ready`, has made) a group of one rank,
whatever backend is asked for, and collectives do to tensors what they do on one rank, fake tensors included. The group
is gone afterwards. A process that has a group of its own keeps it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

_VARIABLES = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@contextmanager
def one_rank(ready: bool) -> Iterator[None]:
    """Context with a world of one rank.

    Arguments:
        ready: Whether the group and the variables of torchrun are there from the start.
    """
    if not dist.is_available() or dist.is_initialized():
        yield
        return
    with ExitStack() as stack:
        initialise = dist.init_process_group

        def init_process_group(*args: Any, **kwargs: Any) -> None:
            if not dist.is_initialized():
                store = dist.HashStore()  # type: ignore[attr-defined]
                initialise("gloo", store=store, rank=0, world_size=1)

        stack.enter_context(patch.object(dist, "init_process_group", init_process_group))
        for name, stand_in in _COLLECTIVES.items():
            if hasattr(dist, name):
                stack.enter_context(patch.object(dist, name, stand_in))
        stack.callback(_leave)
        if ready:
            stack.enter_context(patch.dict(os.environ, {n: v for n, v in _VARIABLES.items() if n not in os.environ}))
            init_process_group()
        yield


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class _Done:
    """The handle of a collective that has ended."""

    def wait(self, *args: Any) -> bool:
        """Wait for nothing."""
        return True

    def is_completed(self) -> bool:
        """Say that it has ended."""
        return True


def _handle(kwargs: dict[str, Any]) -> Any:
    return _Done() if kwargs.get("async_op") else None


def _in_place(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _handle(kwargs)


def _nothing(*args: Any, **kwargs: Any) -> Any:
    return _handle(kwargs)


def _into(output: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
    output.copy_(given.reshape(output.shape))
    return _handle(kwargs)


def _into_list(outputs: Sequence[Tensor], given: Tensor, *args: Any, **kwargs: Any) -> Any:
    outputs[0].copy_(given)
    return _handle(kwargs)


def _from_list(output: Tensor, given: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    output.copy_(given[0])
    return _handle(kwargs)


def _scatter(output: Tensor, given: Sequence[Tensor] | None = None, *args: Any, **kwargs: Any) -> Any:
    if given:
        output.copy_(given[0])
    return _handle(kwargs)


def _objects(outputs: list[Any], given: Any, *args: Any, **kwargs: Any) -> None:
    outputs[0] = given


def _gather(tensor: Tensor, outputs: Sequence[Tensor] | None = None, *args: Any, **kwargs: Any) -> Any:
    if outputs:
        outputs[0].copy_(tensor)
    return _handle(kwargs)


_COLLECTIVES: dict[str, Any] = {
    "all_reduce": _in_place,
    "reduce": _in_place,
    "broadcast": _in_place,
    "barrier": _nothing,
    "broadcast_object_list": _nothing,
    "all_gather": _into_list,
    "all_gather_object": _objects,
    "all_gather_into_tensor": _into,
    "_all_gather_base": _into,
    "reduce_scatter": _from_list,
    "reduce_scatter_tensor": _into,
    "_reduce_scatter_base": _into,
    "all_to_all_single": _into,
    "all_to_all": lambda outputs, given, *args, **kwargs: _into_list(outputs, given[0], **kwargs),
    "gather": _gather,
    "scatter": _scatter,
}
