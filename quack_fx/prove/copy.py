"""A copy of a model that a proof can run, with random weights in float32.

In: a model, possibly on meta, and its inputs. Out: the copy in evaluation mode, and the inputs in float32.
"""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from quack_fx.errors import VerifyError, first_line
from quack_fx.graph.forward.machine import available_memory


class CannotRun(VerifyError):
    """The proof cannot run: the model is too large to copy, or its copy fails."""


class TooLarge(CannotRun):
    """The model is too large to copy."""


SIZE_LIMIT = 500_000_000
"""Most parameters of a model that is copied and run, however much memory there is."""


def random_copy(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy in evaluation mode, on real float32 tensors, with random weights."""
    total = sum(p.numel() for p in model.parameters())
    tensors = list(chain(model.parameters(), model.buffers()))
    # deepcopy keeps the precision of the model, then float() copies again; half of the memory is left for the run.
    needed = sum(t.numel() * (t.element_size() + 4) for t in tensors)
    room = available_memory() // 2
    if total > SIZE_LIMIT or needed > room:
        why = (
            f"has {total:,} parameters, a proof copies at most {SIZE_LIMIT:,}"
            if total > SIZE_LIMIT
            else f"takes {needed / 2**30:.1f} GiB to copy, and a proof takes at most half of what memory is left"
        )
        raise TooLarge(
            f"{type(model).__name__} {why}; verify the same architecture with fewer layers and a smaller width"
        )
    try:
        copy = deepcopy(model).eval()
    except Exception as error:
        raise CannotRun(f"{type(model).__name__} cannot be copied: {first_line(error)}") from error
    if any(t.is_meta for t in (*copy.parameters(), *copy.buffers())):
        copy = copy.to_empty(device="cpu")
        for buffer in copy.buffers():
            buffer.copy_(_plausible(buffer, generator))
    for module in copy.modules():
        for name, value in vars(module).items():  # tensors that are plain attributes
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, name, _plausible(value, generator))
    copy = copy.float()  # complex tensors (rotations) stay complex
    kernels = {id(m.weight) for m in copy.modules() if isinstance(m, _ConvNd)}
    with torch.no_grad():
        for parameter in copy.parameters():
            if parameter.is_floating_point():
                parameter.copy_(_random(parameter, id(parameter) in kernels, generator))
    return copy


def _random(parameter: Tensor, kernel: bool, generator: torch.Generator) -> Tensor:
    """Weights scaled by 1/sqrt(fan-in) to keep activations near 1; gains, biases and scalars between 0.5 and 1.5."""
    if parameter.ndim < 2:
        return torch.rand(parameter.shape, generator=generator) + 0.5
    fan_in = parameter[0].numel() if kernel or parameter.ndim > 3 else parameter.shape[-1]
    return torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in)


def _plausible(buffer: Tensor, generator: torch.Generator) -> Tensor:
    """Values for a buffer on meta: positive numbers, complex rotations, 1 for a scalar, index 0, a mask of all True."""
    if buffer.is_complex():
        angles = torch.rand(buffer.shape, generator=generator)
        return torch.polar(torch.ones(buffer.shape), angles).to(buffer.dtype)
    if buffer.is_floating_point():
        return torch.rand(buffer.shape, generator=generator) + 0.5
    return torch.full(buffer.shape, not buffer.ndim or buffer.dtype == torch.bool, dtype=buffer.dtype)


def as_float32(value: Any) -> Any:
    """Cast a leaf of the inputs to float32 if it is a floating-point tensor."""
    if isinstance(value, Tensor) and value.is_meta:
        raise CannotRun("an example input is on meta; a proof on real numbers needs real inputs")
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(torch.float32)
    return value
