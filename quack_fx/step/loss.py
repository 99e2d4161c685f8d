"""USER: the loss of one batch as a single function, and the examples that a loss function feeds its model.

In: a model and maybe a loss function. Out: `loss(*batch, **batch)` that gives a scalar tensor, or says in words what
came instead: the choice is made inside the compiled graph, so that outputs which the loss does not need are never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.errors import StepError
from quack_fx.step.compiling import own_code

LossFn = Callable[..., Any]
"""`loss_fn(model, *batch, **batch)`; what it returns is read as a model's own output is, see `pick_loss`."""


def make_loss(model: nn.Module, loss_fn: LossFn | None) -> Callable[..., Tensor | str]:
    """The function from a batch to its loss.

    Arguments:
        model: Called as `model(*batch, **batch)` where there is no `loss_fn`.
        loss_fn: Called as `loss_fn(model, *batch, **batch)`.

    Returns:
        A function whose result is the scalar loss, or a description of what the model returned instead.
    """
    if loss_fn is None:

        def loss(*args: Any, **kwargs: Any) -> Tensor | str:
            return pick_loss(model(*args, **kwargs))
    else:

        def loss(*args: Any, **kwargs: Any) -> Tensor | str:
            return pick_loss(loss_fn(model, *args, **kwargs))

    return own_code(loss)


def pick_loss(output: Any) -> Tensor | str:
    """The scalar loss in what a model returned.

    Arguments:
        output: A scalar tensor; a mapping with a "loss" or an object with `.loss` that is one; or a tuple or list with
            exactly one scalar among its entries.

    Returns:
        The loss, or a description of the output where there is no loss to be had.
    """
    found: list[Tensor]
    if isinstance(output, Tensor):
        found = [output]
    elif isinstance(output, Mapping) and "loss" in output:
        found = [output["loss"]]
    elif hasattr(output, "loss"):
        found = [output.loss]
    elif isinstance(output, (tuple, list)):
        found = [entry for entry in output if isinstance(entry, Tensor) and entry.ndim == 0]
    else:
        found = []
    if len(found) == 1 and isinstance(found[0], Tensor) and found[0].ndim == 0 and found[0].is_floating_point():
        return found[0]
    return _describe(output)


def _describe(output: Any) -> str:
    """What a model returned, in a few words."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {list(output.shape)} and {output.dtype}"
    if isinstance(output, (tuple, list)):
        return f"({', '.join(_describe(entry) for entry in output)})"
    if (isinstance(output, Mapping) and "loss" in output) or hasattr(output, "loss"):
        loss = output["loss"] if isinstance(output, Mapping) else output.loss
        return f"{type(output).__name__} whose loss is {_describe(loss)}"
    return "None" if output is None else type(output).__name__


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
