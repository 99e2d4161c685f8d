"""From what a user types to a model and example inputs for one call of its forward.

In: a target as docs/targets.md describes it, and optional expressions for the model and its inputs. Out: a `Target`.
`files.py` imports the file in a `world`, `pick.py` chooses a model there, `sizes` finds arguments for its constructor;
`adapters` opens all other targets. `settle.py` builds the model and finds `inputs` for which its forward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from quack_fx.errors import TargetError
from quack_fx.graph.forward.machine import bounded_memory
from quack_fx.targets.adapters import adapt
from quack_fx.targets.files import load
from quack_fx.targets.pick import pick
from quack_fx.targets.settle import Target, given, settle, to_report
from quack_fx.targets.world import StandInUsed, World

__all__ = ["Target", "opened", "resolve", "settle"]


def resolve(
    target: str,
    *,
    build: str | None = None,
    inputs: str | None = None,
    real: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Target:
    """The model and the example inputs of a target.

    Arguments:
        target: `path/model.py` or `package.module`, each with or without `:NAME`, or what an adapter takes (a Hugging
            Face config, a .pt2 or .pt file, `timm:NAME`).
        build: Expression that makes the model. It may use the file's names, torch, nn, SimpleNamespace and
            `changed(config, field=value)`.
        inputs: Expression that makes the inputs; it may also use `model`. A tuple is positional arguments, a dict
            keyword arguments, a pair of a tuple and a dict both; anything else is the only argument.
        real: Whether to build the model on the CPU with initialised weights, as training needs it. By default it is
            built on the meta device where that works, so that its size does not matter.
        progress: Called with a few words before each step that takes time.

    Returns:
        The target, with inputs for which the forward runs.

    Raises:
        TargetError: There is no model, more than one, or no inputs; in one line with what was tried and what to type.

    Example:
        >>> target = resolve("examples/gpt.py", build="GPT(GPTConfig(layers=2))")
        >>> target.title
        'GPT(GPTConfig(layers=2)) of examples/gpt.py'
    """
    with opened(target, build=build, inputs=inputs, real=real, progress=progress) as resolved:
        return resolved


@contextmanager
def opened(
    target: str,
    *,
    build: str | None = None,
    inputs: str | None = None,
    real: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Iterator[Target]:
    """`resolve` as a context, in which the environment of the target's files stays open for further forwards.

    Where no forward runs, the target is tried again with more in its environment: a process group, stand-ins for
    packages whose absence its files handle.
    """
    say = progress or (lambda _: None)
    worlds = [World()]
    first: TargetError | None = None
    for world in worlds:
        with ExitStack() as stack:
            stack.enter_context(world.open())
            try:
                with bounded_memory():
                    resolved = _in_world(target, build, inputs, real, say, world)
            except TargetError as error:
                # An error of the code itself says more than one about a stand-in.
                first = error if isinstance(first, StandInUsed) else to_report(first, error)
                worlds += world.others()
                if world is worlds[-1] or len(worlds) > 4:
                    raise first from first.__cause__
                continue
            yield replace(resolved, modules=world.modules)
            return


def _in_world(
    target: str, build: str | None, inputs: str | None, real: bool, say: Callable[[str], None], world: World
) -> Target:
    say(f"loading {target}")
    if (adapted := adapt(target)) is not None:
        recipe = given(build, adapted.namespace) if build else adapted.recipe
        return settle([recipe], adapted.namespace, inputs, real, say, world, adapted.examples)
    namespace, name = load(target, world)
    if build and name:
        raise TargetError(f"{target!r} names {name!r} and --build {build!r} is given too; give one of them")
    recipes = [given(build, namespace)] if build else pick(namespace, name, world)
    return settle(recipes, namespace, inputs, real, say, world)
