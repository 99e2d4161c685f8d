"""Chooses a value for each parameter of a class or factory that has no default: the first of these that there is.

    an object of its config class, by its annotation or name
    the default config that a method of the class returns
    a config with the fields of one source in the repository, filled in when they are read
    what a call in the repository passes, or an option or class of a file that mentions the callable
    a value made up from its name

Where the call with these values fails, further calls replace the most doubtful ones: sizes that are negative or None,
and strings that the code compares with.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import itertools
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from quack_fx.errors import TargetError
from quack_fx.targets.packages import repository_of
from quack_fx.targets.sizes.call import Account, Call, Value, evaluated, written
from quack_fx.targets.sizes.made_up import by_name, made_up
from quack_fx.targets.sizes.ready import is_abstract, naming, part_class, ready_made
from quack_fx.targets.sizes.settings import Guess, Settings
from quack_fx.targets.sizes.signatures import hints_of, inner_hint, is_users_class, parameters, plain_type, required
from quack_fx.targets.sizes.sources import Source, sources
from quack_fx.targets.sizes.uses import Uses
from quack_fx.targets.source import tree_of

_CONFIG = re.compile(r"(\w*_)?(config|configs|cfg|conf|args|arguments|opts?|options|hparams?|hps?|params|settings)$")
_MANY = 6
_TRIES = 10
"""The most calls that are tried."""


def calls(
    name: str, function: Callable[..., Any], names: Mapping[str, Any], file: Path | None, own_files: Sequence[Path]
) -> Iterator[Call]:
    """Calls of a class or factory, likeliest first.

    `name` is its name in the target's `file`, `names` are the global names there, and `own_files` are the imported
    files of the repository.
    """
    planner = Planner(name, function, names, file, own_files)
    for change in itertools.islice(planner.changes(), _TRIES):
        yield (call := Call(name, function, partial(planner.plan, change=change)))
        while call.lacked and planner.give_also(call.lacked):
            yield (call := Call(name, function, partial(planner.plan, change=change)))


def needs_nothing(name: str, function: Callable[..., Any], names: Mapping[str, Any]) -> bool:
    """Whether the only required arguments of a callable are configs, which themselves require none."""
    planner = Planner(name, function, names, None, ())
    configs = [planner.config_class(parameter) for parameter in required(function)]
    return all(config is not None and not required(config[1]) for config in configs)


Change = Mapping[str, Any]
"""Values of fields and parameters that differ from those of the first call."""

NEAR: Change = {}
"""No change of values, but only files that mention the callable are used."""

WITHOUT = object()
"""Marks a field whose own value is replaced with a made-up one."""


class Planner:
    """Plans the calls of one callable."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        names: Mapping[str, Any],
        file: Path | None,
        own_files: Sequence[Path],
        depth: int = 0,
    ) -> None:
        self._depth, self._far = depth, False
        self._with_fields: set[str] = set()
        self._name, self._function, self._names, self._file = name, function, names, file
        self._required = required(function)
        self._hints = hints_of(function)
        self._own_files = own_files

    @cached_property
    def _trees(self) -> list[ast.Module]:
        return [tree_of(path) for path in self._own_files]

    @cached_property
    def _uses(self) -> Uses:
        return Uses(self._trees)

    @cached_property
    def _sources(self) -> list[Source]:
        if self._file is None:
            return []
        name, configs = self._function.__name__, self._config_classes()
        callables: list[Callable[..., Any]] = [self._function, *configs]
        callees = {made.__name__: tuple(p.name for p in parameters(made)) for made in callables}
        words = {*self._required, *(field for made in configs for field in callees[made.__name__])}
        words.update(*(self._fields_read(n) | set(self._unpacked(n)) for n in self._required if self._is_config(n)))
        return sources(repository_of(self._file), self._file, name, callees, words)

    def give_also(self, names: Mapping[str, bool]) -> bool:
        """From now on give values to these parameters, too, although they have a default; True marks configs. Returns
        whether any of them is new."""
        new = [n for n in names if n not in self._required]
        self._required += new
        self._with_fields |= {n for n in new if names[n]}
        return bool(new)

    # ---- one call ----------------------------------------------------------------------------------------------------

    def plan(self, account: Account, change: Change) -> dict[str, Value]:
        """A value for each parameter that needs one."""
        given = self._passed_somewhere(anywhere=change is not NEAR)
        names = self._required + [n for n in given if n not in self._required]
        return {name: self._value(name, account, change, given) for name in names}

    def _value(self, name: str, account: Account, change: Change, given: Mapping[str, tuple[Any, str]]) -> Value:
        hint = self._hints.get(name)
        if name not in given:
            config = self.config_class(name)
            if config is not None:
                return self._constructed(*self._concrete(*config), account, change)
            if (default := self._default_config()) is not None and self._is_config(name):
                return self._changed(*default, account, change)
            if isinstance(hint, type) and issubclass(hint, nn.Module):
                return self._part(name, hint, account)
            if self._is_config(name):
                return self._ready(name, account, change) or self._filled(name, account, change)
        return self._plain(name, hint, account, change, given)

    def _plain(
        self, name: str, hint: Any, account: Account, change: Change, given: Mapping[str, tuple[Any, str]]
    ) -> Value:
        if name in given and name not in change:
            value, _ = account.found[name] = given[name]
        else:
            value = self._assumed(name, account, change, hint)
        return Value(lambda: value, lambda: repr(value))

    def _assumed(self, name: str, account: Account, change: Change, hint: Any = None) -> Any:
        """The changed value of a name, or a made-up one."""
        value = change.get(name, WITHOUT)
        value = account.assumed[name] = self._made_up(name, hint) if value is WITHOUT else value
        return value

    def _made_up(self, name: str, hint: Any = None) -> Any:
        """A made-up value for a name, by how the code uses it."""
        words = self._uses.words.get(name)
        if words and hint not in (int, float, bool):
            return next(iter(words))
        value = made_up(name, plain_type(hint))
        if hint is None and name in self._uses.flags and by_name(name) is None:
            return False
        if typing.get_origin(hint) in (list, tuple) or (hint is None and name in self._uses.lists and value != ""):
            item = made_up(name) if not isinstance(value, list | tuple) else 4
            return [item or 4, item or 4]
        return value

    def _part(self, name: str, kind: type, account: Account) -> Value:
        """A module that is passed to the model, built like a model."""
        made = self._named_like(name) if kind is nn.Module else part_class(kind, self._is_own_file)
        if made is None or self._depth > 2:
            taker = self._function.__name__
            raise TargetError(
                f"{taker} is given a module as {name!r} ({kind.__name__}), which cannot be made up; say what it is: "
                f"--build '{taker}({name}=...)'"
            )
        text, file = naming(made, self._names), inspect.getsourcefile(made)
        planner = Planner(text, made, self._names, Path(file) if file else None, self._own_files, self._depth + 1)
        inner = Account()
        values = planner.plan(inner, {})
        account.found |= {f"{name}.{n}": v for n, v in inner.found.items()}
        account.assumed |= {f"{name}.{n}": v for n, v in inner.assumed.items()}
        return Value(lambda: made(**evaluated(values)), lambda: f"{text}({written(values)})")

    def _named_like(self, parameter: str) -> type | None:
        """The module of the file that the name of a parameter means: MemoryAttentionLayer for `layer`. None if there
        are several."""
        owner, word = self._function.__name__, parameter.replace("_", "").lower().removesuffix("s")
        own = {v for v in self._names.values() if isinstance(v, type) and issubclass(v, nn.Module)}
        fitting = [
            v for v in own if v.__name__.lower().endswith(word) and v is not self._function and not is_abstract(v)
        ]
        like_owner = [v for v in fitting if v.__name__.startswith(owner)]
        found = like_owner or fitting
        return found[0] if len(found) == 1 else None

    def _concrete(self, name: str, config: type) -> tuple[str, type]:
        """The class itself or, if it is abstract, the one that fills in what it leaves open."""
        made = part_class(config, self._is_own_file) if is_abstract(config) else config
        return (name, config) if made is None or made is config else (naming(made, self._names), made)

    def _is_own_file(self, file: str) -> bool:
        return Path(file) in self._own_files

    # ---- configs -----------------------------------------------------------------------------------------------------

    def config_class(self, parameter: str) -> tuple[str, type] | None:
        """The config class of a parameter: its annotation, the model's `config_class`, or the file's only dataclass."""
        hint = self._hints.get(parameter)
        declared: Any = getattr(self._function, "config_class", None) if parameter == "config" else None
        if hint is None and is_users_class(declared):
            return f"{self._name}.config_class", declared
        for option in (hint, *typing.get_args(hint)):
            if is_users_class(option):
                return next((n for n, v in self._names.items() if v is option), option.__name__), option
        if hint is not None or len(self._required) > 1 or self._unpacked(parameter):
            return None
        classes = {n: v for n, v in self._names.items() if is_users_class(v)}
        found: list[tuple[str, Any]] = [(n, v) for n, v in classes.items() if dataclasses.is_dataclass(v)]
        if len(found) > 1:
            found = [(n, v) for n, v in found if n.startswith(self._function.__name__)]
        return found[0] if len(found) == 1 else None

    def _config_classes(self) -> list[type]:
        return [config[1] for config in map(self.config_class, self._required) if config is not None]

    def _constructed(self, name: str, config: type, account: Account, change: Change) -> Value:
        """An object of a config class, with values for its own required fields."""
        needed, hints = required(config), hints_of(config)
        # Reading the repository takes seconds, so it is read only where a field is required.
        elsewhere = [s for s in self._sources if s.of != config.__name__ or s.kind == "call"] if needed else []
        source = self._best_source(set(needed), elsewhere)
        arguments: dict[str, Any] = {}
        defaults = {p.name: p.default for p in parameters(config)}
        for entry in dict.fromkeys([*needed, *(n for n in change if n in defaults)]):
            if source is not None and entry in source.values and entry not in change:
                arguments[entry], _ = account.found[entry] = (source.values[entry], source.where)
            else:
                arguments[entry] = self._assumed(entry, account, change, inner_hint(hints.get(entry)))
        text = f"{name}({', '.join(f'{n}={v!r}' for n, v in arguments.items())})"
        return Value(lambda: config(**arguments), lambda: text)

    def _default_config(self) -> tuple[str, Callable[[], Any]] | None:
        """A method of the class that returns a config and has no required arguments: `GPT.get_default_config`."""
        if not isinstance(self._function, type):
            return None
        for name, method in inspect.getmembers(self._function, callable):
            needs_object = inspect.isfunction(inspect.getattr_static(self._function, name))
            owner = next(cls for cls in self._function.__mro__ if name in vars(cls))
            if owner.__module__.split(".")[0] != self._function.__module__.split(".")[0]:
                continue  # of a base class in another package
            is_default = re.search(r"default_?(config|cfg|args|params)|get_config", name) and not needs_object
            if is_default and not required(method):
                return f"{self._name}.{name}()", method
        return None

    def _changed(self, text: str, make: Callable[[], Any], account: Account, change: Change) -> Value:
        made: dict[str, Any] = {}

        def build() -> Any:
            config = make()
            for name in change:
                if hasattr(config, name):
                    made[name] = self._assumed(name, account, change)
                    setattr(config, name, made[name])
            return config

        def shown() -> str:
            fields = "".join(f", {n}={v!r}" for n, v in made.items())
            return f"changed({text}{fields})" if fields else text

        return Value(build, shown)

    def _is_config(self, name: str) -> bool:
        """Whether a parameter is a config: the code reads fields of it, or its name says so."""
        hint = self._hints.get(name)
        if hint in (int, float, bool, str):
            return False
        told = name in self._with_fields or bool(_CONFIG.fullmatch(name))
        return told or bool(self._fields_read(name)) or hint is dict

    def _fields_read(self, name: str) -> set[str]:
        """Attributes and keys that the files read of variables with this name; none where they are all methods."""
        found = self._uses.attributes[name] | self._uses.keys[name]
        return found if not found <= _METHODS else set()

    def _unpacked(self, name: str) -> list[str]:
        """Required parameters of the class that a config is unpacked into: `Config(**config)`."""
        targets = map(self._names.get, self._uses.unpacked[name])
        return next((required(target) for target in targets if isinstance(target, type)), [])

    def _ready(self, name: str, account: Account, change: Change) -> Value | None:
        """A config object of the file, unless some source in the repository has more of the fields."""
        attributes = self._uses.attributes[name] - _METHODS
        keys = self._uses.keys[name] - _METHODS | set(self._unpacked(name))
        ready = ready_made(self._names, attributes, keys) if attributes | keys and not change else None
        if ready is None:
            return None
        source = self._best_source(attributes | keys, self._sources)
        if source is not None and len(source.has(attributes | keys)) > len(ready.fields):
            return None
        where = f"{ready.text} in {self._file.name}" if self._file else ready.text
        plain = (bool, int, float, str, list, tuple)
        account.found |= {n: (v, where) for n, v in sorted(ready.fields.items()) if isinstance(v, plain)}
        return Value(lambda: copy.deepcopy(ready.config), lambda: ready.text)

    def _filled(self, name: str, account: Account, change: Change) -> Value:
        """A config that is filled in when it is read, from the best source in the repository."""
        unpacked = self._unpacked(name)
        wanted = self._fields_read(name) - _METHODS | set(unpacked)
        source = self._best_source(wanted, self._sources)
        values = dict(source.values) if source is not None else {}
        # A field that is None may be set later by a script.
        later = self._set_later({n for n, v in values.items() if v is None and n in wanted})
        values |= {n: v for n, (v, _) in later.items()}
        known = {n: v for n, v in values.items() if n not in change and not (v is None and by_name(n))}

        def give(entry: str) -> Any:
            value = change.get(entry, WITHOUT)
            if value is not WITHOUT:
                account.assumed[entry] = value
                return value
            value = self._made_up(entry)
            plain = isinstance(value, int) and not isinstance(value, bool) and not self._uses.words.get(entry)
            if plain and (by_name(entry) is None or self._fields_read(entry)):
                value = Guess.of(value, give)
            account.assumed[entry] = value
            return value

        given = {**known, **{n: give(n) for n in unpacked if n not in known}}
        settings = Settings(give, given)

        def text() -> str:
            for entry in settings._read:
                if source is not None and entry in known:
                    account.found[entry] = later.get(entry, (known[entry], source.where))
            return settings._expression()

        return Value(lambda: settings, text)

    def _set_later(self, undecided: set[str]) -> dict[str, tuple[Any, str]]:
        """Values that assignments in one file give to fields that are None at first."""
        assigned = [s for s in self._sources if s.kind == "assignments" and s.of]
        best = self._best_source(undecided, assigned)
        return {n: (best.values[n], best.where) for n in best.has(undecided)} if best is not None else {}

    # ---- sources -----------------------------------------------------------------------------------------------------

    def _best_source(self, wanted: set[str], among: Sequence[Source]) -> Source | None:
        """The source with most of the wanted names, at least half of them (a third of many); the first among equals."""
        best, most = None, 0.0
        for source in among:
            has = len(source.has(wanted))
            share = has / max(len(wanted), 1)
            usable = share + 0.1 * source.mentions
            if share >= (0.5 if len(wanted) < 8 else 0.34) and has > 1 and usable > most:
                best, most = source, usable
        return best

    def _passed_somewhere(self, anywhere: bool = True) -> dict[str, tuple[Any, str]]:
        """Values for parameters that are no configs, from a call in the repository or from options and classes; with
        `anywhere` also from files that do not mention the callable."""
        plain = {n for n in self._required if self.config_class(n) is None and not self._is_config(n)}
        if not plain:
            return {}
        known = [p.name for p in parameters(self._function)]
        found: dict[str, tuple[Any, str]] = {}
        passing = [s for s in self._sources if s.kind == "call" and s.of == self._function.__name__ and s.has(plain)]
        if passing:
            source = max(passing, key=lambda s: len(s.has(plain)))
            found = {n: (v, source.where) for n, v in source.values.items() if n in known}
        others = [s for s in self._sources if s.kind != "call"]
        best = self._best_source(plain - found.keys(), [s for s in others if s.mentions])
        if best is None and anywhere and len(plain) >= _MANY:
            # So many of the names in one source are no coincidence.
            best = max(others, key=lambda s: len(s.has(plain)), default=None)
            if best is not None and len(best.has(plain)) < 0.75 * len(plain):
                best = None
            self._far = best is not None
        if best is not None:
            # A source that has little else, or nearly all parameters, counts for optional ones, too.
            its = len(best.has(set(known)))
            all_its = (best.kind == "file" and its == len(best.values)) or its >= max(_MANY, 0.8 * len(known))
            wanted = [n for n in (known if all_its else self._required) if n in best.values and n not in found]
            found |= {n: (best.values[n], best.where) for n in wanted if all_its or n in plain}
        return {n: v for n, v in found.items() if v[0] is not None}

    # ---- further calls -----------------------------------------------------------------------------------------------

    def changes(self) -> Iterator[Change]:
        """Changes for the calls to try; the first is empty."""
        yield {}
        if empty := self._empty():
            yield dict.fromkeys(empty, WITHOUT)
        undefined: Change = dict.fromkeys(self._undefined(), WITHOUT)
        if undefined:
            yield undefined
        for name, words in self._uses.words.items():
            if name in self._chosen():
                for word in words:
                    yield {**undefined, name: word}
        if stated := self._stated():
            yield {**undefined, **stated}
        if self._far:
            yield NEAR
        absent = self._absent()
        if not set(absent) <= undefined.keys():
            yield {**undefined, **dict.fromkeys(absent, WITHOUT)}

    def _defaults(self) -> dict[str, Any]:
        """Fields of the config with their defaults; empty without a config."""
        for config in self._config_classes():
            return {p.name: p.default for p in parameters(config) if p.default is not p.empty}
        default = self._default_config()
        if default is None:
            return {}
        try:
            return dict(vars(default[1]()))
        except Exception:
            return {}

    def _stated(self) -> dict[str, Any]:
        """Values in the repository for fields of the config, where they differ from the defaults."""
        defaults = self._defaults()
        own = {config.__name__ for config in self._config_classes()}
        best = self._best_source(set(defaults), [s for s in self._sources if s.of not in own])
        stated = best.values if best is not None else {}
        return {n: v for n, v in stated.items() if n in defaults and v is not None and v != defaults[n]}

    def _undefined(self) -> list[str]:
        """Fields of the config that must be set: negative, or None although the code asserts that they are not None."""
        return [
            n
            for n, v in self._defaults().items()
            if (isinstance(v, int) and not isinstance(v, bool) and v < 0 and by_name(n) not in (None, False, 0))
            or (v is None and n in self._uses.needed)
        ]

    def _empty(self) -> list[str]:
        """Fields of the config that are 0 although by their name they must not be."""
        some = re.compile(r"batch|vocab|len(gth)?$|n_ctx|block_size|width|(^|_)dim$|heads?$")
        return [n for n, v in self._defaults().items() if v == 0 and type(v) is int and some.search(n)]

    def _absent(self) -> list[str]:
        """Fields of the config that are None although by their name they are sizes."""
        return [n for n, v in self._defaults().items() if v is None and isinstance(by_name(n), int)]

    def _chosen(self) -> set[str]:
        """Fields and parameters that may be a string with which the code compares."""
        fields = {n for n, v in self._defaults().items() if isinstance(v, str) or v is None}
        for name in self._required:
            if self._is_config(name):
                fields |= self._fields_read(name)
        return fields | set(self._required)


_METHODS = frozenset("get keys values items copy update pop to_dict __dict__ shape size device dtype T".split())
_METHODS |= frozenset("split strip lower upper startswith endswith format replace append".split())
