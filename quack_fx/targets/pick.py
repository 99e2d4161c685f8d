"""Chooses the model among the names of a file.

In: a `Namespace` and an optional name. Out: `Recipe`s that build the model, likeliest first. Without a name, the first
of these that the file has is taken: a factory without arguments, a module that the file has built, the one nn.Module
class that no other class contains, a factory with arguments. Among several, the one that the repository uses most.
"""

from __future__ import annotations

import itertools
import re
import sys
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn

from quack_fx.errors import TargetError
from quack_fx.targets import outline
from quack_fx.targets.files import Namespace, kind_of, nearest, without
from quack_fx.targets.packages import files_of, python_files, repository_of
from quack_fx.targets.sizes import Call, calls
from quack_fx.targets.sizes.plans import needs_nothing
from quack_fx.targets.sizes.ready import named_in
from quack_fx.targets.sizes.signatures import required
from quack_fx.targets.sizes.sources import DATA_FILES
from quack_fx.targets.source import text_of
from quack_fx.targets.world import STOPS, World

_FACTORY = re.compile(
    r"(build|make|create|get|init|load)(_\w+)?_(model|net|network|transformer|lm)|(build|model|make_model)"
)
"""Names of functions that are taken for factories; a function whose return annotation is a model class is one, too."""


@dataclass(frozen=True)
class Recipe:
    """How the model is built.

    `text` is the expression for it, "" where reports show the name of its class. `made` tells whether the model exists
    already, so that `make` only returns it. `call` is the call that builds it, where arguments were found or assumed;
    `note` is what the report says about the choice.
    """

    text: str
    make: Callable[[], Any]
    made: bool = False
    call: Call | None = None
    note: str = ""


def pick(namespace: Namespace, name: str | None, world: World) -> Iterator[Recipe]:
    """Recipes for the model of a file, likeliest first; `name` is the name after the colon."""
    if name is not None:
        yield from _recipes(namespace, name, _lookup(namespace, name), world)
        return
    own = outline.own_names(namespace)
    factories = [n for n, v in own.items() if isinstance(v, FunctionType) and _makes_model(n, v)]
    ready = [n for n in factories if not required(own[n])]
    whole = outline.roots(namespace)
    ready_roots = [n for n in whole if needs_nothing(n, own[n], namespace.names)] or whole
    made = outline.makers(namespace)
    unnamed = [n for n in made if not required(namespace.names[n])] or list(made)
    for names in (ready, outline.instances(namespace), ready_roots, factories, unnamed):
        chosen = _most_used(namespace, names)
        if names is ready_roots:
            chosen = _meant(namespace, whole, chosen)
        alike = len({made[n] for n in chosen}) == 1 if names is unnamed else outline.sizes_of_one(namespace, chosen)
        if names and alike:
            chosen = chosen[:1]
        if len(chosen) == 1:
            note = _taken(chosen[0], f"models in {namespace.source}", names)
            yield from _recipes(namespace, chosen[0], namespace.names[chosen[0]], world, note)
            yield from _by_makers(namespace, chosen[0])
            yield from _by_makers_elsewhere(namespace, chosen[0], world)
            if names is ready:
                yield from _by_others(namespace, chosen[0], [n for n in factories if required(own[n])], world)
            return
        if names:
            typed = " or ".join(f"{namespace.source}:{n}" for n in names[:4])
            raise TargetError(f"{namespace.source} has {len(names)} models ({_list(names)}); type {typed}")
    models = {n: v for n, v in namespace.names.items() if outline.is_model_class(v)}
    foreign = [n for n, v in models.items() if v.__module__.split(".")[0] != "torch"]
    hint = f"it imports {_list(foreign)}: type {namespace.source}:{foreign[0]}" if foreign else "type --build EXPR"
    raise TargetError(
        f"no model in {namespace.source}: neither a zero-argument factory (build_model) nor an nn.Module"
        f"{without(world)}; {hint}"
    )


def _by_others(namespace: Namespace, first: str, factories: list[str], world: World) -> Iterator[Recipe]:
    """Recipes with the factory that has required arguments. `first`, which has none, may need weights or data that do
    not exist here."""
    chosen = _most_used(namespace, factories)
    if len(chosen) == 1:
        note = f"{chosen[0]} was taken, since {first} does not work here"
        yield from _recipes(namespace, chosen[0], namespace.names[chosen[0]], world, note)


_MAKERS_TRIED = 3
"""How many functions that return a model of the chosen class are tried."""


def _by_makers(namespace: Namespace, name: str) -> Iterator[Recipe]:
    """Recipes with functions of the file that return a model of a class and have no required arguments, the most used
    first: the class may need other arguments than its defaults.
    """
    able = [n for n in outline.makers(namespace, name) if not required(namespace.names[n])]
    used = _uses_elsewhere(namespace, able) if len(able) > 1 else {}
    for maker in sorted(able, key=lambda n: -used.get(n, 0))[:_MAKERS_TRIED]:
        note = _taken(maker, f"functions that make a {name}", able)
        yield Recipe(f"{maker}()", partial(_checked, namespace.names[maker], maker, namespace), note=note)


def _taken(chosen: str, among: str, names: Sequence[str]) -> str:
    """A note on the choice of one of several names; "" where there was none."""
    others = [name for name in names if name != chosen]
    return f"{chosen} was taken of the {among}; others: {_list(others)}" if others else ""


def _by_makers_elsewhere(namespace: Namespace, name: str, world: World) -> Iterator[Recipe]:
    """Recipes with functions of other files that return a model of a class of this file, the nearest file first."""
    if namespace.file is None:
        return
    count = 0
    for path in python_files(repository_of(namespace.file), namespace.file):
        text = text_of(path) if path != namespace.file else ""
        module = world.module_of(path) if f"{name}(" in text and namespace.file.stem in text else ""
        for maker in outline.makers_in(text, name) if module else ():
            try:
                with world.building("cpu"):
                    function = getattr(world.import_own(module), maker)
            except STOPS:  # the file may read data or need a GPU
                break
            shown = named_in(module, maker)
            note = f"{name} is made by {maker} of {path.name}"
            for call in itertools.islice(calls(shown, function, vars(sys.modules[module]), path, world.own_files()), 2):
                yield Recipe(call.text, partial(_checked, call, maker, namespace), call=call, note=note)
            count += 1
        if count >= _MAKERS_TRIED:
            return


def _meant(namespace: Namespace, whole: list[str], chosen: list[str]) -> list[str]:
    """The base class of all candidates, if the repository uses it as often as any of them; else the names so far."""
    bases = outline.varied(namespace, whole)
    if not bases:
        return chosen
    used = _uses_elsewhere(namespace, [*whole, *bases])
    most = max(used[n] for n in whole)
    first = [n for n in bases if used[n] >= max(most, 1)]
    return first if len(first) == 1 else chosen


def _lookup(namespace: Namespace, name: str) -> Any:
    first, *rest = name.split(".")
    if first not in namespace.names:
        hint = nearest(first, (n for n in namespace.names if not n.startswith("_")))
        raise TargetError(f"no name {first!r} in {namespace.source}{'; ' if hint else ''}{hint}")
    value = namespace.names[first]
    for part in rest:
        if not hasattr(value, part):
            raise TargetError(f"{first!r} of {namespace.source} has no attribute {part!r}")
        value = getattr(value, part)
    return value


def _recipes(namespace: Namespace, name: str, value: Any, world: World, note: str = "") -> Iterator[Recipe]:
    """Recipes for a module, a model class or a factory."""
    if isinstance(value, nn.Module):
        yield Recipe(name, lambda: value, made=True, note=note)
        return
    if not callable(value) or (isinstance(value, type) and not outline.is_model_class(value)):
        raise TargetError(
            f"{name!r} of {namespace.source} is {kind_of(value)}, not an nn.Module, a class of one or a factory"
        )
    if not required(value):
        yield Recipe(f"{name}()", partial(_checked, value, name, namespace), note=note)
        return
    for call in calls(name, value, namespace.names, namespace.file, world.own_files()):
        yield Recipe(call.text, partial(_checked, call, name, namespace), call=call, note=note)


def _checked(make: Callable[[], Any], name: str, namespace: Namespace) -> Any:
    """The model that a class or factory makes."""
    model = make()
    if not isinstance(model, nn.Module):
        raise TargetError(f"{name}() of {namespace.source} gives a {type(model).__name__}, not an nn.Module")
    return model


def _most_used(namespace: Namespace, names: list[str]) -> list[str]:
    """The names that are left after preferring one like the name of the file, then the one that most files of the
    repository use, then the one that contains most definitions of the file."""
    if len(names) < 2:
        return names
    stem = namespace.file.stem if namespace.file is not None else ""
    used = _uses_elsewhere(namespace, names)

    def parts(name: str) -> int:
        value = namespace.names[name]
        return len(outline.contains(namespace, name)) if isinstance(value, type) else 0

    def called_alike(name: str) -> bool:
        return name.replace("_", "").lower() == stem.replace("_", "").replace("-", "").lower()

    for measure in (called_alike, used.__getitem__, parts):
        best = max(map(measure, names))
        first = [n for n in names if measure(n) == best]
        if len(first) == 1 and best:
            return first
        names = first
    return names


def _uses_elsewhere(namespace: Namespace, names: list[str]) -> Counter[str]:
    """In how many other Python files and configs of the repository each name occurs."""
    found: Counter[str] = Counter()
    if namespace.file is None:
        return found
    words = {name: re.compile(rf"\b{re.escape(name)}\b") for name in names}
    repository = repository_of(namespace.file)
    others = itertools.islice(files_of(repository, ".yaml", ".yml", ".json", ".gin"), DATA_FILES)
    for path in (*python_files(repository, namespace.file), *others):
        text = text_of(path) if path != namespace.file else ""
        if namespace.file.stem in text:
            found.update(name for name, word in words.items() if word.search(text))
    return found


def _makes_model(name: str, function: FunctionType) -> bool:
    if _FACTORY.fullmatch(name):
        return True
    try:
        return outline.is_model_class(typing.get_type_hints(function).get("return"))
    except Exception:
        return False


def _list(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
