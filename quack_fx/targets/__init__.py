"""DOOR: what a user types -> a model and the example inputs of one forward call.

In: a target, one of

    path/model.py               the file's model: a zero-argument factory (`build_model`), a module that the file
                                made, or the one nn.Module class that no other class of the file contains
    path/model.py:NAME          that factory, module or class
    package.module[:NAME]       the same for anything importable
    path/config.json            a Hugging Face config, or the folder that holds it

and, where the defaults do not do, expressions that build the model or its inputs. Out: a `Target`. Models are built on
the meta device when that works, so size does not matter. A target that is not clear is refused, with what to type.

    files.py    a Python file or module becomes a namespace, its own errors become one line
    pick.py     the model among the names of a namespace
    hf.py       a Hugging Face config becomes a model; the inputs of such models
    inputs/     example inputs from the forward's signature and source and from the model's layers
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from quack_fx.errors import CaptureError, TargetError
from quack_fx.recording import Capture, capture
from quack_fx.targets import hf
from quack_fx.targets.files import Namespace, evaluate, load, one_line
from quack_fx.targets.inputs import Attempts, Inputs, infer
from quack_fx.targets.pick import Recipe, pick

__all__ = ["Target", "resolve", "settle"]

RETRY_LIMIT_BYTES = 1 << 30
"""Largest model, in bytes of parameters, that is built for real when its forward failed on the meta device."""


@dataclass(frozen=True, eq=False)
class Target:
    """A model and the arguments of one forward call.

    Attributes:
        model: The model, in training mode as its constructor left it, often on the meta device.
        args: Positional arguments of the forward call.
        kwargs: Keyword arguments of the forward call.
        title: What was built, in a few words: "GPT(GPTConfig()) of examples/gpt.py".
        source: The file, module or config that it came from, as the user typed it.
        how: How the model was built and where the inputs come from: "built on the meta device; inputs
            idx=int64[2, 4] (inferred)".
        recording: The recording made while the inputs were tried, or None where they were not tried.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    title: str
    source: str
    how: str
    recording: Capture | None = None


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
        target: A file, a file and a name, a module and a name, or a Hugging Face config; see the docstring of
            this package.
        build: Expression that makes the model, evaluated in the file's namespace (torch and nn are there too).
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
    say = progress or (lambda _: None)
    config = hf.config_path(target)
    say(f"loading {target}")
    if config is not None:
        namespace = hf.namespace(config, target)
        recipe = _given(build, namespace) if build else hf.recipe(namespace)
    else:
        namespace, name = load(target)
        if build and name:
            raise TargetError(f"{target!r} names {name!r} and --build {build!r} is given too; give one of them")
        recipe = _given(build, namespace) if build else pick(namespace, name)
    return settle(recipe, namespace, inputs, real, say)


def _given(expression: str, namespace: Namespace) -> Recipe:
    """Recipe of a --build expression."""

    def make() -> Any:
        model = evaluate(expression, "--build", namespace)
        if not isinstance(model, nn.Module):
            hint = "; call it" if callable(model) else ""
            raise TargetError(f"--build {expression!r} gives {_kind(model)}, not an nn.Module{hint}")
        return model

    return Recipe(expression, make)


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def settle(recipe: Recipe, namespace: Namespace, inputs: str | None, real: bool, say: Callable[[str], None]) -> Target:
    """Build the model, on meta if that works, and find inputs for which its forward runs.

    Arguments:
        recipe: How the model is made.
        namespace: What the recipe and the expression for the inputs may name.
        inputs: Expression that gives the inputs; None to infer them.
        real: Whether to build on real numbers only.
        say: Called with a few words before what takes time.

    Returns:
        The target.

    Raises:
        TargetError: The model cannot be built, or no inputs fit.
    """
    refusal: TargetError | None = None
    for device, model in _builds(recipe, namespace, real, say):
        where = "as the file made it" if recipe.made else "on the meta device" if device == "meta" else "for real"
        try:
            chosen, recording = _try(model, namespace, inputs, say)
        except TargetError as error:
            refusal = error  # that of the last build: it has the most real numbers
            continue
        origin = "given" if inputs else "inferred"
        return Target(
            model=model,
            args=chosen.args,
            kwargs=chosen.kwargs,
            title=f"{recipe.text or type(model).__name__} of {namespace.source}",
            source=namespace.source,
            how=f"built {where}; inputs {chosen.text} ({origin})",
            recording=recording,
        )
    assert refusal is not None  # the last build either raised or was tried
    raise refusal


def _builds(
    recipe: Recipe, namespace: Namespace, real: bool, say: Callable[[str], None]
) -> Iterator[tuple[str, nn.Module]]:
    """The model on meta, if that will do, then for real; whichever can be built and may help."""
    if recipe.made:
        yield "real", recipe.make()
        return
    what = recipe.text or "the model"
    on_meta, on_meta_fails = None, ""
    if not real:
        say(f"building {what} on the meta device")
        try:
            with torch.device("meta"):
                on_meta = recipe.make()
        except TargetError:
            raise
        except (Exception, SystemExit) as error:
            # Constructors that look at numbers cannot run on meta; the real build tells what is wrong, if anything.
            on_meta_fails = (
                f", and on the meta device, where size does not matter, it fails: {one_line(error, namespace)}"
            )
    if on_meta is not None:
        yield "meta", on_meta
        if sum(p.numel() * p.element_size() for p in on_meta.parameters()) > RETRY_LIMIT_BYTES:
            return
    say(f"building {what} for real")
    try:
        with _at_most(limit := _memory() // 4):
            model = recipe.make()
    except TargetError:
        raise
    except _TooLarge as error:
        raise TargetError(
            f"building {what} of {namespace.source} takes more than {limit / 2**30:.0f} GiB{on_meta_fails}; "
            "build a smaller one with --build"
        ) from error
    except (Exception, SystemExit) as error:
        raise TargetError(f"building {what} of {namespace.source} fails: {one_line(error, namespace)}") from error
    yield "real", model


class _TooLarge(RuntimeError):
    """A model has more weights than this machine should hold."""


@contextmanager
def _at_most(limit: int) -> Iterator[None]:
    """Context in which modules with more than `limit` bytes of parameters are not built to the end."""
    total = 0

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        total += 0 if parameter is None else parameter.numel() * parameter.element_size()
        if total > limit:
            raise _TooLarge

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _memory() -> int:
    """Bytes of memory of this machine; where the system does not say (Windows), those of a small one."""
    if not hasattr(os, "sysconf"):
        return 16 << 30
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _try(
    model: nn.Module, namespace: Namespace, inputs: str | None, say: Callable[[str], None]
) -> tuple[Inputs, Capture]:
    """The first inputs for which the forward runs, with the recording of that run."""
    name = type(model).__name__
    candidates = [_given_inputs(inputs, namespace, model)] if inputs else infer(model, name)
    first: BaseException | None = None
    attempts = Attempts(model, candidates)
    for candidate in [*candidates] if inputs else attempts:
        say(f"recording the forward of {name} on {candidate.text}")
        try:
            return candidate, capture(model, candidate.args, candidate.kwargs, layers_once=True)
        except CaptureError as error:
            first = first or error.__cause__ or error
            attempts.failed(candidate, error)
            for failure in filter(None, (error, error.__cause__)):
                traceback.clear_frames(failure.__traceback__)  # they hold the recording and its tensors
    assert first is not None  # there is at least one candidate
    reason = str(first) if isinstance(first, CaptureError) else one_line(first, namespace)
    tried = "; ".join(c.text for c in candidates[:3]) + (f"; {len(candidates) - 3} more" if len(candidates) > 3 else "")
    if inputs:
        raise TargetError(f"the forward of {name} fails on --inputs {inputs!r}: {reason}") from first
    raise TargetError(
        f"the forward of {name} fails on every input inferred for it (tried {tried}): {reason}; "
        f'give them, for example --inputs "{candidates[0].expression()}"'
    ) from first


def _given_inputs(expression: str, namespace: Namespace, model: nn.Module) -> Inputs:
    try:
        value = evaluate(expression, "--inputs", namespace, {"model": model})
    except TargetError:
        raise
    except (Exception, SystemExit) as error:
        raise TargetError(f"--inputs {expression!r} fails: {one_line(error, namespace)}") from error
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], Mapping):
        args, kwargs = value[0], dict(value[1])
    elif isinstance(value, Mapping):
        args, kwargs = (), dict(value)
    else:
        args, kwargs = value if isinstance(value, tuple) else (value,), {}
    if not all(isinstance(key, str) for key in kwargs):
        raise TargetError(f"--inputs {expression!r} gives a dict whose keys are not names of forward's parameters")
    return Inputs(args, kwargs, expression)
