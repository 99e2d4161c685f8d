"""Writes and runs the program of a given model, and creates the object that computes the scales of its rows.

In: a model and its layout. Out: the program as a module, whose source is in `linecache`, so that tracebacks and
debuggers show it; and its `QuacK` for the model's weights.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import count
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_fx.errors import FactorError, OptimizerError
from quack_fx.find import dump
from quack_fx.layout import QKLayout
from quack_fx.layout.fit import with_bare_names
from quack_fx.train.program.source import write_program
from quack_fx.train.program.zeros import from_zero

if TYPE_CHECKING:
    from quack_fx.train.program.parts.quack import QuacK as Scaling

NormName = Literal["frobenius", "spectral"]

_numbers = count(1)


def scaling_of(
    model: nn.Module, layout: QKLayout, tau: float | Tensor, norm: NormName, optimizers: Sequence[Optimizer] = ()
) -> Scaling:
    """The scales of a model's query and key rows.

    Arguments:
        model: The model with its initial weights, plain, wrapped or sharded.
        layout: Its layout.
        tau: Learning rate of queries and keys at the start of training, relative to that of the other weights.
        norm: "frobenius" or "spectral".
        optimizers: Optimizers whose state may contain the initial factors of a resumed run.

    Raises:
        LayoutError: The layout does not fit the model.
        OptimizerError: A weight is on the meta device.
        FactorError: `norm` is unknown, or an initial norm is not finite, or a head is zero on both sides.
    """
    program = _loaded(program_text(model, layout), check_norm(norm))
    scaling: Scaling = with_factor_error(program.QuacK, model, tau, optimizers)
    return scaling


def program_text(
    model: nn.Module, layout: QKLayout, optimizers: Sequence[str] = (), features: Collection[str] = ()
) -> str:
    """The source of the program for a model.

    Arguments:
        model: The model.
        layout: Its layout.
        optimizers: As in `write_program`.
        features: As in `write_program`; "sharded" is added if the model is sharded.

    Raises:
        LayoutError: The layout does not fit the model.
        OptimizerError: A weight is on the meta device.
    """
    layout, params = with_bare_names(layout, model)
    if meta := [name for name, param in params.items() if param.is_meta]:
        raise OptimizerError(f"{meta[0]!r} is on the meta device; give the model real weights before attaching QuacK")
    shapes = {name: tuple(param.shape) for name, param in params.items()}
    sharded = {"sharded"} if any(map(is_sharded, model.parameters())) else set[str]()
    return write_program(layout, shapes, type(model).__name__, optimizers, features=sharded.union(features))


def check_norm(norm: str) -> NormName:
    """Check the name of a norm.

    Raises:
        FactorError: The norm is unknown.
    """
    if norm not in get_args(NormName):
        raise FactorError(f"norm is {norm!r}; use 'frobenius' or 'spectral'")
    return norm  # type: ignore[return-value]


def execute(source: str) -> ModuleType:
    """Run the source of a program.

    Each call creates a new module, because torch.compile limits recompilations per code object.

    Arguments:
        source: The source, from `write_program`.

    Returns:
        The module; `inspect.getsource` returns its source.

    Example:
        >>> program = execute(write_program(layout, shapes, "GPT"))
        >>> program.TrainStep(model, optimizer)
    """
    dump("program", ".py", lambda: source)
    name = f"quack_fx_program_{next(_numbers)}"
    module = ModuleType(name)
    module.__file__ = f"<{name}>"
    linecache.cache[module.__file__] = len(source), None, source.splitlines(keepends=True), module.__file__
    exec(compile(source, module.__file__, "exec"), vars(module))
    return module


def run_program(text: str, norm: NormName) -> ModuleType:
    """Run a program; its `QuacK` uses the given norm."""
    program = execute(text)
    if norm == "spectral":
        program.QuacK = _spectral(program)  # type: ignore[attr-defined]
    program.QuacK = from_zero(program)  # type: ignore[attr-defined]
    return program


_loaded = lru_cache(maxsize=32)(run_program)


def with_factor_error(make: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of a program; raise its ValueError as a FactorError."""
    try:
        return make(*args, **kwargs)
    except ValueError as error:
        raise FactorError(str(error)) from None


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. Imports nothing: if DTensor was never imported, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory; call it under no_grad."""
    here: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return here


def _whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if it is sharded."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def _spectral(program: ModuleType) -> Any:
    """The program's `QuacK` with spectral norms (largest singular values) of heads. Waits for the device."""

    program.KINDS = [kind._replace(mark=kind.mark + 1) for kind in program.KINDS]  # type: ignore[attr-defined]

    class Spectral(program.QuacK):  # type: ignore[name-defined, misc]
        @torch.no_grad()
        def norms(self) -> list[Any]:
            found = []
            for stacks, rows in zip(self.stacks, self.rows, strict=True):
                # Of each weight, its part of every attention and the axis of the rows.
                whole = {name: [(_whole(weight), axis) for weight in own] for name, (own, axis) in stacks.items()}
                blocks = []
                for index, *names in rows:
                    attentions = zip(*(whole[name] for name in names), strict=True)
                    blocks.append(torch.stack([_top(index, parts) for parts in attentions]))
                found.append(type(rows)(*blocks))
            return found

    return Spectral


def _top(index: Tensor, parts: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Largest singular value of the rows of each head, [heads], from the smaller Gram matrix, in double precision."""
    # Behind the rows of each head, [heads, rows], a weight has columns, and a bias has one.
    rows = torch.cat([part.double().movedim(axis, 0)[index].unsqueeze(-1).flatten(2) for part, axis in parts], -1)
    wide = rows if rows.shape[1] <= rows.shape[2] else rows.mT
    top: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)[:, -1].clamp_min(0).sqrt()
    return top
