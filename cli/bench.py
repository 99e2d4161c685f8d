"""DOOR: `quack-fx bench TARGET`: what QuacK adds to a compiled training step of a model, on this machine.

In: a target. Out: on stdout the median time of a step without and with QuacK, both compiled, and their ratio. The two
take turns, so that a machine that slows down slows both. Exit status 1 where there is no attention.
"""

from __future__ import annotations

import statistics
import time
from copy import deepcopy
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .common import BuildOption, DebugOption, InputsOption, TargetArgument, find, note, progress, show

if TYPE_CHECKING:
    from torch import Tensor, nn


def bench(
    target: TargetArgument,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps of each kind.")] = 20,
    build: BuildOption = None,
    inputs: InputsOption = None,
    debug: DebugOption = False,
) -> int:
    """Time a compiled AdamW step of a model without and with QuacK.

    The inferred inputs are tiny, so that the optimizer's share of a step, and with it QuacK's, is as large as it gets;
    give a real batch with --inputs for the cost in real training.
    """
    finding = find(target, build, inputs, real=True)
    if not finding.layout.sites:
        note(f"no attention found in {finding.facts.title}: nothing to time")
        return 1
    from quack_fx.layout import QKLayout

    with progress() as say:
        say("compiling the step without and with QuacK")
        args, kwargs = finding.target.args, finding.target.kwargs
        plain, quack = (_step(finding.target.model, layout) for layout in (QKLayout(), finding.layout))
        for step in (plain, quack) * 2:  # compiles, then runs once compiled
            step(*args, **kwargs)
        times: tuple[list[float], list[float]] = ([], [])
        for i in range(steps):
            say(f"timing step {i + 1} of {steps}")
            for step, into in zip((plain, quack), times, strict=True):
                into.append(_seconds(step, args, kwargs))
    show(_table(*times))
    return 0


def _step(model: nn.Module, layout: Any) -> Any:
    """A compiled AdamW step on a copy of the model."""
    import torch

    from quack_fx.step import compile_train_step

    copy = deepcopy(model)
    return compile_train_step(copy, torch.optim.AdamW(copy.parameters(), lr=1e-4), _loss, layout=layout)


def _loss(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The mean square of the model's largest output: any loss would do, its time is that of both steps."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    output = model(*args, **kwargs)
    leaves = tree_leaves(dict(output) if hasattr(output, "keys") else output)
    outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return max(outputs, key=lambda leaf: leaf.numel()).float().square().mean()


def _seconds(step: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Time of one step, to its end on the device."""
    import torch

    start = time.perf_counter()
    step(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _table(plain: list[float], quack: list[float]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, seconds in (("AdamW, compiled", plain), ("AdamW with QuacK, compiled", quack)):
        low, high = min(seconds), max(seconds)
        table.add_row(name, f"{1e3 * statistics.median(seconds):.2f} ms", f"{1e3 * low:.2f} to {1e3 * high:.2f}")
    ratios = sorted(b / a for a, b in zip(plain, quack, strict=True))
    quarter = len(ratios) // 4
    table.add_row("ratio", f"{statistics.median(ratios):.3f}", f"{ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}")
    return table
