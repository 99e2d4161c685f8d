"""The examples that a loss function feeds its model.

In: a model, maybe a loss function, and a batch. Out: the arguments that the model gets for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quack_fx.errors import StepError

LossFn = Callable[..., Any]
"""`loss_fn(model, *batch, **batch)`; what it returns is read as a model's own output is."""


class _Seen(Exception):
    """Carries the arguments of the model's first call out of a loss function."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args_of_model, self.kwargs_of_model = args, kwargs


def model_inputs(
    model: nn.Module, loss_fn: LossFn | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that the model gets for a batch.

    Without a loss function they are the batch. With one, it runs up to its first call of the model. Random numbers that
    it draws are given back, so that training does not depend on whether the layout was looked for.

    Raises:
        StepError: The loss function never called the model.
    """
    if loss_fn is None:
        return args, kwargs

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Seen(args, kwargs)

    device = next(model.parameters()).device
    handle = model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            loss_fn(model, *args, **kwargs)
    except _Seen as seen:
        return seen.args_of_model, seen.kwargs_of_model
    finally:
        handle.remove()
    raise StepError("loss_fn did not call the model it was given, so its inputs are unknown; pass layout=...")
