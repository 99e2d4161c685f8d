"""`quack-fx tune TARGET`: short training runs of a model as it is, with QuacK, and with QK norm.

In: a target, and text or batches to train it on. Out: on stdout, the losses on held-out batches and advice; on stderr,
the growing table during the runs. Exit status 1 if there is no attention, or no run ended with a finite loss.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live

from quack_fx.errors import TargetError, first_line

from .common import Finding, check_output, find, note, nothing_to, prints_on_stderr, show, write_whole
from .options import BuildOption, DebugOption, ForceOption, InputsOption, TableOption, TargetArgument

if TYPE_CHECKING:
    from torch import nn

    from quack_fx.bench.tune import Batch, Models, Outcome, Plan, Task

_LRS = {"adamw": "3e-4,1e-3,3e-3,1e-2", "muon": "3e-3,1e-2,3e-2,1e-1"}


def tune(
    target: TargetArgument,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Text for a language model, read byte by byte; without it, Python's own sources.",
        ),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(
            "--batches",
            metavar="FILE.py:NAME",
            help="Function of a seed, in a file or package.module, that yields batches as --inputs has them, for which "
            "the model gives its loss; the first 8 are not trained on, and those of seed 0 are measured on.",
        ),
    ] = None,
    optimizer: Annotated[
        str, typer.Option("--optimizer", metavar="adamw|muon", help="Optimizer; beside Muon, AdamW has the rest.")
    ] = "adamw",
    lr: Annotated[
        str | None,
        typer.Option("--lr", metavar="NUMBERS", help="Learning rates; by default four, half a decade apart."),
    ] = None,
    tau: Annotated[str, typer.Option("--tau", metavar="NUMBERS", help="Values of QuacK's tau.")] = "0.1,1",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of a run.")] = 100,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Seeds; their spread tells what is chance.")] = 3,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.01, help="Time for all runs; what is not run by then is left out.")
    ] = 8.0,
    output: TableOption = None,
    build: BuildOption = None,
    inputs: InputsOption = None,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> int:
    """Find out in minutes whether QuacK helps a model, and with which tau and learning rate.

    Trains copies of the model for some steps: as it is, with QK norm, and with QuacK at each tau, at each learning
    rate, seed by seed. A language model is trained on bytes; any other one wants --batches.
    """
    if optimizer not in _LRS:
        raise TargetError(f"--optimizer {optimizer!r}: choose from {', '.join(_LRS)}")
    if data is not None and batches is not None:
        raise TargetError("--data and --batches are both given; give one of them")
    lrs, taus = _numbers("--lr", lr or _LRS[optimizer]), _numbers("--tau", tau)
    check_output(output, force)
    # Read when torch is loaded. On a busy machine, waiting threads that spin cost a multiple of the work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    source = None if batches is None else _function(batches)
    import torch

    torch.manual_seed(0)
    finding = find(target, build, inputs, real=True)
    if nothing_to("tune", finding):
        return 1
    from quack_fx.bench.tune import Plan, arms_of, models_of
    from quack_fx.bench.tune_advice import advice, markdown, table

    task = _task(finding, _model(finding, target, build, inputs), data, source, inputs is not None)
    models = models_of(task, 0)
    if isinstance(models.bare, str):
        raise TargetError(f"{finding.facts.title} cannot be trained without its QK norm: {models.bare}")
    if isinstance(models.normed, str):
        note(f"no runs with QK norm: {models.normed}")
    arms = [arm for arm in arms_of(taus) if not isinstance(models.of(arm), str)]
    plan = Plan(arms, lrs, seeds, steps, optimizer, 60 * minutes)
    outcomes = _outcomes(task, plan, models)
    runs = f"{len(outcomes)} of {len(list(plan.points()))} runs of {steps} steps"
    setting = f"{finding.facts.title}: {runs}, {optimizer}"
    show(setting, table(outcomes, plan), *advice(outcomes, plan))
    if output is not None:
        write_whole(output, f"# {finding.facts.title} tuned\n\n{setting}\n\n{markdown(outcomes, plan)}")
    return 0 if any(math.isfinite(outcome.loss) for outcome in outcomes) else 1


def _task(
    finding: Finding,
    model: Callable[[int], nn.Module],
    data: Path | None,
    source: Callable[[int], Iterator[Batch]] | None,
    given: bool,
) -> Task:
    """What is trained: any model on the user's batches (`source`), or a language model on bytes."""
    from itertools import islice

    from quack_fx.bench.tune import HELD_OUT, Task
    from quack_fx.bench.tune_text import language_model, text_of

    first = finding.target.model
    if source is not None:
        held_out = list(islice(source(0), HELD_OUT))
        if len(held_out) < HELD_OUT:
            raise TargetError(
                f"--batches ends after {len(held_out)}; {HELD_OUT} are held out, and more are to train on"
            )
        _try(first, held_out[0])
        return Task(model, finding.layout, None, lambda seed: islice(source(seed), HELD_OUT, None), held_out)
    reads = language_model(first, finding.target.args, finding.target.kwargs, given)
    training, held_out_text = text_of(data, reads.shape[1])
    if reads.vocabulary < 256:
        note(f"the model knows {reads.vocabulary} tokens: it reads bytes modulo that")
    return Task(
        model, finding.layout, reads.loss, lambda seed: reads.batches(training, seed), reads.held_out(held_out_text)
    )


def _try(model: nn.Module, batch: Batch) -> None:
    """Refuse batches that the model cannot take, before any run."""
    from copy import deepcopy

    import torch

    args, kwargs = batch
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            deepcopy(model)(*args, **kwargs)
    except Exception as error:
        raise TargetError(f"--batches: the model fails on the first batch: {first_line(error)}") from error


def _model(finding: Finding, target: str, build: str | None, inputs: str | None) -> Callable[[int], nn.Module]:
    """Builds the model with the weights of a seed; that of seed 0 is the one that was found."""
    import torch

    from quack_fx.targets import resolve

    def model(seed: int) -> nn.Module:
        if seed == 0:
            return finding.target.model
        torch.manual_seed(seed)
        with prints_on_stderr():
            return resolve(target, build=build, inputs=inputs, real=True).model

    return model


def _outcomes(task: Task, plan: Plan, models: Models) -> list[Outcome]:
    """Do all runs, with a growing table on a terminal."""
    from quack_fx.bench.tune import tune as train
    from quack_fx.bench.tune_advice import table

    console = Console(stderr=True)
    outcomes: list[Outcome] = []
    with (
        redirect_stdout(sys.stderr),
        Live(console=console, transient=True) if console.is_terminal else nullcontext() as live,
    ):
        for outcome in train(task, plan, models):
            outcomes.append(outcome)
            if live is not None:
                live.update(Group(table(outcomes, plan), _left(outcomes, plan)))
    return outcomes


def _left(outcomes: Sequence[Outcome], plan: Plan) -> str:
    """How many runs are done, and at most how much time is left."""
    done, planned = len(outcomes), len(list(plan.points()))
    spent = sum(outcome.seconds for outcome in outcomes)
    left = min(plan.seconds - spent, spent / done * (planned - done))
    return f"{done} of {planned} runs, {max(0.0, left) / 60:.1f} minutes left at most"


def _numbers(option: str, typed: str) -> list[float]:
    """The positive numbers of an option, each once."""
    found = []
    for word in typed.split(","):
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise TargetError(f"{option} {typed!r}: {word!r} is no positive number; write for example {option} 0.1,1")
        found.append(number)
    return list(dict.fromkeys(found))


def _function(typed: str) -> Callable[[int], Iterator[Batch]]:
    """The function that --batches names: from a seed to call arguments."""
    place, _, name = typed.rpartition(":")
    if not place or not name.isidentifier():
        raise TargetError(f"--batches {typed!r}: write FILE.py:NAME or package.module:NAME")
    try:
        function = getattr(_module(place), name, None)
    except (Exception, SystemExit) as error:
        raise TargetError(f"--batches {typed!r} cannot be loaded: {first_line(error)}") from error
    if not callable(function):
        raise TargetError(f"--batches {typed!r}: {place!r} has no function {name!r}; define it there")

    def batches(seed: int) -> Iterator[Batch]:
        try:
            for batch in function(seed):
                yield _arguments(batch)
        except Exception as error:
            raise TargetError(f"--batches {typed!r} fails for seed {seed}: {first_line(error)}") from error

    return batches


def _module(place: str) -> ModuleType:
    path = Path(place).expanduser()
    if path.suffix != ".py":
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its classes look it up there
    spec.loader.exec_module(module)
    return module


def _arguments(batch: Any) -> Batch:
    """Positional and keyword arguments of a batch: a tuple, a dict, a pair of both, or the one argument."""
    if isinstance(batch, dict):
        return (), batch
    if isinstance(batch, list | tuple):
        if len(batch) == 2 and isinstance(batch[0], list | tuple) and isinstance(batch[1], dict):
            return tuple(batch[0]), batch[1]
        return tuple(batch), {}
    return (batch,), {}
