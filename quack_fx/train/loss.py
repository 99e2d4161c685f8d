"""The arguments that a loss function passes to the model.

In: a model, a batch, and a loss function or None. Out: the positional and keyword arguments of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quack_fx.errors import StepError

LossFn = Callable[..., Any]
"""`loss_fn(model, *batch, **batch)`; returns a loss, or any output that contains one, as a model may."""


class _Seen(Exception):
    """Carries the arguments of the model's first call out of a loss function."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args_of_model, self.kwargs_of_model = args, kwargs


def model_inputs(
    model: nn.Module, loss_fn: LossFn | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the model for a batch.

    Without a loss function, they are the batch. A loss function is run up to its first call of the model; the state of
    the random number generators is then restored, so finding the layout does not change training.

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
