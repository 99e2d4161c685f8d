"""Config objects: dicts whose keys can be read and set as attributes.

`Fields` replaces the classes of `ml_collections`, `omegaconf`, `easydict`, `addict`, `munch`, `yacs` and the like, and
`Loader` replaces `OmegaConf`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Fields(dict[str, Any]):
    """A dict whose keys are also attributes; dicts in it become such dicts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.update(args[0] if args and args[0] is not None else {}, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        plain = isinstance(value, Mapping) and not isinstance(value, Fields)
        super().__setitem__(name, type(self)(value) if plain else value)

    __setattr__ = __setitem__

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(name)
        del self[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> Fields:
        return type(self)({name: copy.deepcopy(value, memo) for name, value in self.items()})

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set fields."""
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def clone(self) -> Fields:
        """A deep copy."""
        return copy.deepcopy(self)

    copy_and_resolve_references = clone

    def to_dict(self) -> dict[str, Any]:
        """The config as plain dicts."""
        return {name: v.to_dict() if isinstance(v, Fields) else v for name, v in self.items()}

    def lock(self, *args: Any, **kwargs: Any) -> Fields:
        """Nothing is ever locked."""
        return self

    unlock = freeze = defrost = lock

    @contextmanager
    def unlocked(self) -> Iterator[Fields]:
        """Context in which fields may be set."""
        yield self


class Loader:
    """The functions of `OmegaConf` that make configs of dicts, and dicts of configs."""

    @staticmethod
    def create(given: Any = None, *args: Any, **kwargs: Any) -> Any:
        """A config of a dict, or a list of such."""
        return [Loader.create(item) for item in given] if isinstance(given, list | tuple) else Fields(given)

    structured = create

    @staticmethod
    def merge(*configs: Any) -> Fields:
        """One config with the fields of several; later ones take precedence."""
        merged = Fields()
        for config in configs:
            for name, value in dict(config).items():
                both = isinstance(value, Mapping) and isinstance(merged.get(name), Fields)
                merged[name] = Loader.merge(merged[name], value) if both else value
        return merged

    @staticmethod
    def to_container(config: Any, *args: Any, **kwargs: Any) -> Any:
        """The config as plain dicts."""
        return config.to_dict() if isinstance(config, Fields) else config

    to_object = to_container

    @staticmethod
    def is_config(config: Any) -> bool:
        """Whether a value is such a config."""
        return isinstance(config, Fields)

    is_dict = is_config

    @staticmethod
    def set_struct(*args: Any) -> None:
        """Nothing is ever locked."""

    set_readonly = register_new_resolver = set_struct
