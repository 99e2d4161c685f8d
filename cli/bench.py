"""`quack-fx bench TARGET`: times a training step of a model with and without QuacK, on this machine.

In: a target. Out: on stdout, the table of all ways to take the step, and the ratios of interest. Each round times every
way once, so that a change in the machine's speed affects all of them. Exit status 1 if there is no attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quack_fx.errors import TargetError

from .common import check_output, find, nothing_to, progress, show, write_whole
from .options import BuildOption, DebugOption, ForceOption, InputsOption, TableOption, TargetArgument

if TYPE_CHECKING:
    from torch import Tensor, nn

_WAYS = "a,b,c,d,e,f,plain,quack"


def bench(
    target: TargetArgument,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds in which each way takes a step.")] = 10,
    ways: Annotated[
        str,
        typer.Option(
            "--ways",
            metavar="NAMES",
            help="a: eager, fused AdamW; b: compiled model; c: compiled optimizer, too; d: c with a loop over heads; "
            "e: QK norm in the model, compiled; f: the same eager; plain, quack: the step of quack-fx without and with "
            "QuacK.",
        ),
    ] = _WAYS,
    output: TableOption = None,
    build: BuildOption = None,
    inputs: InputsOption = None,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> int:
    """Time an AdamW step of a model in several ways, QuacK's among them.

    The inferred inputs are tiny, so QuacK takes a larger part of the step than in real training; give a real batch
    with --inputs. Each way trains a copy of the model.
    """
    names = list(dict.fromkeys(name.strip() for name in ways.split(",")))
    unknown = [name for name in names if name not in _WAYS.split(",")]
    if unknown:
        raise TargetError(f"--ways: there is no way {unknown[0]!r}; choose from {_WAYS}")
    check_output(output, force)
    finding = find(target, build, inputs, real=True)
    if nothing_to("time", finding):
        return 1
    with progress() as say:
        from quack_fx.bench import Case, compare, findings, legend, markdown, setting, terminal

        found = finding.target
        case = Case(found.model, finding.layout, _loss, tuple(found.args), dict(found.kwargs))
        comparison = compare(case, names, rounds, say)
    show(*setting(comparison), terminal(comparison), legend(comparison), *findings(comparison))
    if output is not None:
        write_whole(output, f"# A training step of {finding.facts.title}\n\n{markdown(comparison)}")
    return 0


def _loss(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The mean square of the model's largest output; any loss would do, as all ways have the same."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    output = model(*args, **kwargs)
    leaves = tree_leaves(dict(output) if hasattr(output, "keys") else output)
    outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    largest = outputs[0]
    for leaf in outputs:  # torch.compile does not support max() with a key
        largest = leaf if leaf.numel() > largest.numel() else largest
    return largest.float().square().mean()
