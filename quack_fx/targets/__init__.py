"""What a user types -> a model and the example inputs of one forward call.

In: a target, one of

    path/model.py               the file's model: a zero-argument factory (`build_model`), a module that the file
                                made, or the one nn.Module class that no other class of the file contains
    path/model.py:NAME          that factory, module or class
    package.module[:NAME]       the same for anything importable
    path/config.json            a Hugging Face config, or the folder that holds it
    path/model.pt2, model.pt    a program of torch.export, or a pickled module
    timm:NAME and the like      a model of another library, by the name it has there

and, where the defaults do not do, expressions that build the model or its inputs. Out: a `Target`. Models are built on
the meta device when that works, so size does not matter. What this machine lacks is stood in for while the target is
open. A target that is not clear is refused, with what to type.

    packages.py  where a file lies: its module name, the folders of its imports
    world/       what the user's files find around them: stand-ins for what is not installed, no GPU, one rank
    files.py     a Python file or module becomes a namespace, its own errors become one line
    outline.py   what a file defines, and what uses what
    pick.py      the model among the names of a namespace
    sizes/       values for constructors that ask for some: found in the repository, or assumed
    settle.py    a model is built, and inputs are found for which it runs
    adapters/    every other kind of target, one a file
    hf.py        models of transformers: how they are built, and their inputs
    shrink.py    a small config with the structure of a large one
    inputs/      example inputs from the forward's signature, its source and its layers
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
from quack_fx.targets.settle import ForwardFails, Target, given, settle
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
    """The model and the example inputs that `target` stands for.

    Arguments:
        target: A file, a file and a name, a module and a name, or what an adapter takes (a Hugging Face config,
            timm:NAME); see the docstring of this package.
        build: Expression that makes the model, evaluated in the file's namespace (torch, nn, SimpleNamespace and
            `changed(config, field=value)` are there too).
        inputs: Expression that makes the inputs, evaluated there too (with `model`): a tuple holds positional
            arguments, a dict keyword arguments, a pair of a tuple and a dict both; anything else is the one argument.
        real: Build the model for real, with the numbers that its constructor gives it, as training needs it.
        progress: Called with a few words before each thing that takes time.

    Returns:
        The target, with inputs for which the forward runs.

    Raises:
        TargetError: No model, more than one, or no inputs; in one line that says what was tried and what to type.

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
    """`resolve`, with the world that the target's files run in: its forward may need it again.

    Where the target does not get as far as a forward pass, it is tried again in a world with more in it: a process
    group, stand-ins for packages that its files would do without.
    """
    say = progress or (lambda _: None)
    worlds, first = [World()], None
    for world in worlds:
        with ExitStack() as stack:
            stack.enter_context(world.open())
            try:
                with bounded_memory():
                    resolved = _in_world(target, build, inputs, real, say, world)
            except TargetError as error:
                # What needs a package that is missing says less than what the code does without it, and an error of
                # a constructor less than one of the forward behind it.
                further = isinstance(error, ForwardFails) and not isinstance(first, ForwardFails)
                first = error if first is None or isinstance(first, StandInUsed) or further else first
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
