"""Builds the model, and finds inputs for which its forward runs.

In: recipes, likeliest first, and the namespace of expressions. Out: a `Target`. Each recipe is tried on the meta device
and then, if memory allows, on the CPU with real numbers. The first recipe whose forward runs is taken.
"""

from __future__ import annotations

import re
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from quack_fx.errors import CaptureError, TargetError
from quack_fx.graph.capture import Capture, capture
from quack_fx.graph.forward.machine import available_memory
from quack_fx.targets.adapters.base import Examples
from quack_fx.targets.failure import cause_of
from quack_fx.targets.files import Namespace, evaluate, kind_of, one_line, without
from quack_fx.targets.inputs import Attempts, Budget, Inputs, infer, with_optional
from quack_fx.targets.inputs.longer import long_enough
from quack_fx.targets.inputs.made import call_on_all, named_in_error, set_up
from quack_fx.targets.memory import AtMost, TooLarge
from quack_fx.targets.pick import Recipe
from quack_fx.targets.sizes.ready import plainly
from quack_fx.targets.world import StandInUsed, World
from quack_fx.targets.world.inert import InertModule
from quack_fx.targets.world.tables import TablesForReal

RETRY_LIMIT_BYTES = 1 << 30
"""Bytes of parameters above which a model whose forward fails on the meta device is not built for real."""

STAND_INS_USED, SAME_FAILURES = 3, 12
"""How many inputs may need an inert stand-in before no others are tried; how many may fail with the same error before
only inputs for measuring sizes are tried."""


@dataclass(frozen=True, eq=False)
class Target:
    """A model and the arguments of one forward call.

    Attributes:
        model: The model, in training mode as its constructor left it, often on the meta device.
        args: Positional arguments of the forward call.
        kwargs: Keyword arguments of the forward call.
        title: What was built: "GPT(GPTConfig()) of examples/gpt.py".
        source: The file, module or config as the user typed it.
        how: How the model was built and where the inputs come from: "built on the meta device; inputs
            idx=int64[2, 4] (inferred)".
        recording: The recorded graph of a forward on these inputs.
        assumed: Arguments of the constructor that were made up, by name.
        build: The --build expression for this model; "" where no argument was found or assumed.
        notes: Further lines for the report: pairs of a heading and a sentence.
        again: Builds the model again, for real; works only while the environment of the target is open.
        modules: Modules of the target's files by name; they leave sys.modules when that environment closes.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    title: str
    source: str
    how: str
    recording: Capture | None = None
    assumed: Mapping[str, Any] = field(default_factory=dict)
    build: str = ""
    notes: tuple[tuple[str, str], ...] = ()
    again: Callable[[], nn.Module] | None = None
    modules: Mapping[str, ModuleType] = field(default_factory=dict)

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Context in which the target's files are in sys.modules, where torch.compile looks modules up."""
        added = {name: module for name, module in self.modules.items() if name not in sys.modules}
        sys.modules.update(added)
        try:
            yield
        finally:
            for name in added:
                sys.modules.pop(name, None)

    def with_numbers(self) -> nn.Module:
        """The model on the CPU, so that its masks and tables have values; the same model where that cannot be built."""
        if self.again is None or not any(p.is_meta for p in self.model.parameters()):
            return self.model
        try:
            return self.again()
        except Exception:  # the model can be built on meta only
            return self.model

    def check_sizes(self, allow: str) -> None:
        """Refuse a model whose sizes were assumed; `allow` is the option that allows it, for the error."""
        if self.assumed:
            raise TargetError(
                f"the sizes {_listed(self.assumed)} of {self.title} are assumed, so what is written would fit no model "
                f"of yours; give them with --build {shlex.quote(self.build)}, or add {allow}"
            )


def given(expression: str, namespace: Namespace) -> Recipe:
    """The recipe of a --build expression."""

    def make() -> Any:
        model = evaluate(expression, "--build", namespace)
        if not isinstance(model, nn.Module):
            hint = "; call it" if callable(model) else ""
            raise TargetError(f"--build {expression!r} gives {kind_of(model)}, not an nn.Module{hint}")
        return model

    return Recipe(expression, make)


def settle(
    recipes: Iterable[Recipe],
    namespace: Namespace,
    inputs: str | None,
    real: bool,
    say: Callable[[str], None],
    world: World | None = None,
    examples: Examples | None = None,
) -> Target:
    """Build the model, on the meta device if that works, and find inputs for which its forward runs.

    Arguments:
        recipes: How the model may be built, likeliest first.
        namespace: The names for expressions.
        inputs: Expression for the inputs; None to infer them.
        real: Whether to build on the CPU only.
        say: Called with a few words before each step that takes time.
        world: The environment of the model's files; by default a new one.
        examples: Gives inputs for the model in place of inferred ones.

    Returns:
        The target of the first recipe whose forward runs.

    Raises:
        TargetError: The model cannot be built, or no inputs fit.
    """
    task = _Task(namespace, inputs, examples, say, world or World())
    first: TargetError | None = None
    try:
        for recipe, devices in _with_devices(recipes, real):
            try:
                return _settled(recipe, devices, task)
            except TargetError as error:
                first = to_report(first, error)
                if task.world.is_late():
                    break
    except TargetError as error:  # no recipe is left, or there was none
        first = first or error
    assert first is not None  # there is at least one recipe
    raise first


def to_report(first: TargetError | None, error: TargetError) -> TargetError:
    """The error to report: the first, but one of a forward rather than one of the constructor before it."""
    is_further = isinstance(error, ForwardFails) and not isinstance(first, ForwardFails)
    return error if first is None or is_further else first


Devices = tuple[Literal["meta", "cpu"], ...]
"""Devices on which a model is built, one after the other until its forward runs."""


def _with_devices(recipes: Iterable[Recipe], real: bool) -> Iterator[tuple[Recipe, Devices]]:
    """Recipes with their devices. Those with assumed arguments are all tried on meta, which is fast, before the CPU."""
    again: list[Recipe] = []
    for recipe in recipes:
        if recipe.made or recipe.call is None or real:
            yield recipe, ("cpu",) if recipe.made or real else ("meta", "cpu")
        else:
            again.append(recipe)
            yield recipe, ("meta",)
    for recipe in again:
        yield recipe, ("cpu",)


@dataclass(frozen=True)
class _Task:
    """What is known when a target is settled. Inputs come from an expression, or else from the adapter's examples, or
    else they are inferred."""

    namespace: Namespace
    expression: str | None
    examples: Examples | None
    say: Callable[[str], None]
    world: World
    budget: Budget = field(default_factory=Budget)

    def candidates(self, model: nn.Module) -> tuple[str, list[Inputs]]:
        """Inputs to try for a model, and their origin in a word."""
        if self.expression is not None:
            return "given", [_given_inputs(self.expression, self.namespace, model)]
        own = self.examples(model) if self.examples else []
        return ("its own", own) if own else ("inferred", infer(model, type(model).__name__))


def _settled(recipe: Recipe, devices: Devices, task: _Task) -> Target:
    refusal: TargetError | None = None
    settled: Target | None = None
    try:
        for device, model in _builds(recipe, devices, task):
            try:
                settled = _with_inputs(model, device, recipe, task)
            except TargetError as error:
                refusal = error  # the error of the last build is reported: it had real numbers
                continue
            if settled.recording is not None and not settled.recording.canned:
                break  # otherwise the next build has the values that the forward asked for
    except TargetError as error:
        refusal = error
    if settled is not None:
        return settled
    assert refusal is not None  # the last build either raised or was tried
    raise refusal


def _with_inputs(model: nn.Module, device: str, recipe: Recipe, task: _Task) -> Target:
    """The target of one build, with inputs for which its forward runs."""
    if isinstance(model, InertModule):
        raise StandInUsed(model.stands_for)
    prepared, first = _prepared(model, device, task.world), ""
    try:
        found = _try(model, task, recipe.made)
    except ForwardFails as error:
        first = named_in_error(model, str(error))
        if not first or not (called := _prepared(model, "cpu", task.world, first)):
            raise
        prepared += called
        found = _try(model, task, recipe.made)
    chosen, origin, recording, cast = found
    if origin == "inferred":
        chosen, recording = long_enough(model, chosen, recording, partial(_record, model))
    where = {"meta": "on the meta device", "cpu": "for real"}[device]
    source, call = task.namespace.source, recipe.call
    return Target(
        model=model,
        args=chosen.args,
        kwargs=chosen.kwargs,
        title=f"{_short(recipe) or type(model).__name__} of {source}",
        source=source,
        how=f"built {'as the file made it' if recipe.made else where}{prepared}{cast}; inputs {chosen.text} ({origin})",
        recording=recording,
        assumed=call.account.assumed if call else {},
        build=call.text if call and (call.account.assumed or call.account.found) else "",
        notes=tuple(_notes(recipe, task.world)),
        again=None if recipe.made else partial(_for_real, recipe, task.world, bool(prepared), first, bool(cast)),
    )


def _for_real(recipe: Recipe, world: World, prepared: bool, first: str, cast: bool) -> nn.Module:
    """Build the model of a recipe on the CPU, and prepare it as the first build was."""
    with torch.random.fork_rng(devices=[]), world.building("cpu"), AtMost(available_memory() // 4):
        model: nn.Module = recipe.make()
    if prepared:
        _prepared(model, "cpu", world)
    if first:
        _prepared(model, "cpu", world, first)
    return model.float() if cast else model


def _prepared(model: nn.Module, device: str, world: World, first: str = "") -> str:
    """Call what the model needs before its forward, or the method `first`; returns the calls for the report."""
    try:
        with world.building(device), torch.device(device):
            if first:
                call_on_all(model, first)
            done = [f"{first}()"] if first else set_up(model)
    except Exception:  # the error of its forward is reported then
        return ""
    return f", {', '.join(done)} called" if done else ""


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _short(recipe: Recipe) -> str:
    """The expression that builds the model, without its arguments if they are long."""
    text = plainly(recipe.call.text) if recipe.call else recipe.text
    return text if len(text) <= 80 or not recipe.call else f"{recipe.call.function.__name__}(...)"


def _notes(recipe: Recipe, world: World) -> Iterator[tuple[str, str]]:
    """Lines of the report about how the model was built."""
    call = recipe.call
    if call is not None and call.account.assumed:
        yield "assumed", _listed(call.account.assumed)
    if call is not None and call.account.found:
        places: dict[str, list[str]] = {}
        for name, (value, where) in call.account.found.items():
            places.setdefault(where, []).append(f"{name}={value!r}")
        yield "taken", "; ".join(f"{', '.join(values)} from {where}" for where, values in places.items())
    if call is not None and call.account.assumed:
        yield "edit", f"--build {shlex.quote(call.text)}"
    if world.missing:
        yield "missing", f"{', '.join(world.missing)} cannot be imported here and had stand-ins"
    for text in (*world.notes, *filter(None, [recipe.note])):
        yield "loaded", text


def _builds(recipe: Recipe, devices: Devices, task: _Task) -> Iterator[tuple[str, nn.Module]]:
    """The model on each of these devices, with the device."""
    namespace, world = task.namespace, task.world
    if recipe.made:
        with world.building("cpu"):
            model = recipe.make()
        yield "cpu", model
        return
    what = _short(recipe) or "the model"
    on_meta_fails = ""
    if "meta" in devices:
        task.say(f"building {what} on the meta device")
        try:
            with _build_errors(recipe, task), world.building("meta"), torch.device("meta"):
                model = _made_on_meta(recipe)
        except BuildFails as error:
            # A constructor that reads values fails on meta only; the build on the CPU shows whether there is an error.
            if "cpu" not in devices:
                raise
            reason = one_line(error.__cause__ or error, namespace)
            on_meta_fails = f", and on the meta device, where size does not matter, it fails: {reason}"
        else:
            yield "meta", model
            if sum(p.numel() * p.element_size() for p in model.parameters()) > RETRY_LIMIT_BYTES:
                return
    if "cpu" in devices:
        task.say(f"building {what} for real")
        try:
            with _build_errors(recipe, task), world.building("cpu"), AtMost(limit := available_memory() // 4):
                model = recipe.make()
        except TooLarge as error:
            raise TargetError(
                f"building {what} of {namespace.source} takes more than {limit / 2**30:.0f} GiB{on_meta_fails}; "
                "build a smaller one with --build"
            ) from error
        yield "cpu", model


def _made_on_meta(recipe: Recipe) -> nn.Module:
    """The model on the meta device, with tables on the CPU if its constructor reads them."""
    model: nn.Module
    try:
        model = recipe.make()
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        with TablesForReal():
            model = recipe.make()
    return model


@contextmanager
def _build_errors(recipe: Recipe, task: _Task) -> Iterator[None]:
    """Context in which errors of a constructor become a `BuildFails`."""
    try:
        yield
    except (TargetError, TooLarge):
        raise
    except (Exception, SystemExit) as error:
        what, reason = _short(recipe) or "the model", one_line(error, task.namespace)
        hint = f"; say what it is: --build {shlex.quote(recipe.call.text)}" if recipe.call else ""
        source = task.namespace.source
        raise BuildFails(f"building {what} of {source} fails: {reason}{without(task.world)}{hint}") from error


class BuildFails(TargetError):
    """A constructor raised."""


class ForwardFails(TargetError):
    """A model was built, and its forward runs on no inputs."""


def _try(model: nn.Module, task: _Task, keep: bool) -> tuple[Inputs, str, Capture, str]:
    """The first inputs for which the forward runs, their origin, the recording, and in words how the model was cast,
    which `keep` forbids."""
    name, world, cast = type(model).__name__, task.world, ""
    try:
        origin, candidates = task.candidates(model)
    except TargetError as error:
        raise TargetError(f"{error}{without(world)}") from error
    first: BaseException | None = None
    failures: Counter[str] = Counter()
    stand_ins = 0
    attempts = Attempts(model, candidates, with_optional, task.budget)
    for candidate in attempts if origin == "inferred" else candidates:
        task.say(f"recording the forward of {name} on {candidate.text}")
        try:
            try:
                return candidate, origin, _record(model, candidate), cast
            except CaptureError as error:
                if keep or cast or not _is_about_dtypes(model, error):
                    raise
                # Layers of several dtypes run under autocast only; cast to one dtype they compute the same function.
                model.float()
                cast = " and cast to float32, since its layers have several types"
                return candidate, origin, _record(model, candidate), cast
        except CaptureError as error:
            attempts.failed(candidate, error)
            reason = cause_of(error)
            if first is None or isinstance(reason, StandInUsed):
                first = reason
            failures[one_line(reason, task.namespace)] += not attempts.measuring
            stand_ins += isinstance(reason, StandInUsed)
            for failure in filter(None, (error, error.__cause__)):
                traceback.clear_frames(failure.__traceback__)  # the frames keep the recording and its tensors alive
        if max(failures.values()) >= SAME_FAILURES:
            attempts.guess_no_more()
        if world.is_late() or stand_ins >= STAND_INS_USED:
            break
    assert first is not None  # there is at least one candidate
    if isinstance(first, StandInUsed):
        raise StandInUsed(first.name) from first
    reason_text = str(first) if isinstance(first, CaptureError) else one_line(first, task.namespace)
    reason_text += without(world)
    tried = "; ".join(c.text for c in candidates[:3]) + (f"; {len(candidates) - 3} more" if len(candidates) > 3 else "")
    if origin == "given":
        raise ForwardFails(f"the forward of {name} fails on --inputs {task.expression!r}: {reason_text}") from first
    if origin == "its own":
        raise ForwardFails(f"the forward of {name} fails on its own inputs ({tried}): {reason_text}") from first
    raise ForwardFails(
        f"the forward of {name} fails on every input inferred for it (tried {tried}): {reason_text}; "
        f'give them, for example --inputs "{candidates[0].expression()}"'
    ) from first


def _record(model: nn.Module, inputs: Inputs) -> Capture:
    return capture(model, inputs.args, inputs.kwargs, layers_once=True)


def _is_about_dtypes(model: nn.Module, error: CaptureError) -> bool:
    """Whether a forward failed because its layers have several dtypes."""
    floating = {p.dtype for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()}
    return len(floating) > 1 and re.search("dtype|scalar type|same type", str(error)) is not None


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
