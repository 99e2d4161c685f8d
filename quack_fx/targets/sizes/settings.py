"""A config object whose fields get their values when a constructor reads them.

In: a function from the name of a field to its value. Out: `Settings` for the constructor; afterwards, the expression
for a plain object with the fields that were read.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Give = Callable[[str], Any]
"""Gives the value of a field; called once for each."""


class Settings:
    """A config that has every field that is read: `give` gives its value. Fields in `given` exist from the start; only
    these count for `hasattr`, `in` and `**config`."""

    def __init__(self, give: Give, given: dict[str, Any]) -> None:
        self.__dict__.update(_give=give, _given=given, _read={}, _by_key=False, _by_name=False, _counted=False)

    def _value(self, name: str) -> Any:
        if name not in self._read:
            self._read[name] = self._given[name] if name in self._given else self._give(name)
        return self._read[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (name not in self._given and name not in self._read and _only_asks(1)):
            raise AttributeError(name)
        self.__dict__["_by_name"] = True
        return self._value(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self._read[name] = value

    __setattr__ = __setitem__

    def __getitem__(self, name: str) -> Any:
        if not isinstance(name, str):
            raise KeyError(name)
        self.__dict__["_by_key"] = True
        return self._value(name)

    def __contains__(self, name: str) -> bool:
        return name in self._given or name in self._read

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        if self._given:
            return len(self._given)
        # The object is a vocabulary, whose length is its number of tokens.
        self.__dict__["_counted"] = True
        return int(self._value("vocab_size"))

    def __bool__(self) -> bool:
        return True

    def keys(self) -> list[str]:
        """Names of the given fields."""
        self.__dict__["_by_key"] = True
        return list(self._given)

    def items(self) -> list[tuple[str, Any]]:
        """The given fields."""
        return [(name, self._value(name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        """A given field, or the default."""
        self.__dict__["_by_key"] = True
        return self._value(name) if name in self else default

    def copy(self) -> Settings:
        """Itself, so that what is read of the copy is recorded here."""
        return self

    def _expression(self) -> str:
        """The expression for an object with the fields that were read."""
        named = all(name.isidentifier() for name in self._read)
        fields = ", ".join(f"{name}={expression(value)}" for name, value in self._read.items() if name.isidentifier())
        keys = ", ".join(f"{name!r}: {expression(value)}" for name, value in self._read.items())
        given = fields if named else f"{{{keys}}}"
        if self._by_key and self._by_name:
            return f'type("Config", (dict,), {{"__getattr__": dict.__getitem__}})({given})'
        if self._counted:
            return f'type("Config", (SimpleNamespace,), {{"__len__": lambda self: self.vocab_size}})({fields})'
        if self._by_key:
            return f"dict({fields})" if named else given
        return f"SimpleNamespace({fields})"


class Guess(int):
    """An integer for a field of unknown meaning. If the code reads fields of it, it is a sub-config with these."""

    _part: Settings
    _give: Give

    @classmethod
    def of(cls, value: int, give: Give) -> Guess:
        """A guess; `give` gives the values of its fields, if any are read."""
        guess = cls(value)
        guess._give = give
        return guess

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or _only_asks(1):
            raise AttributeError(name)
        part = self._as_part()
        part.__dict__["_by_name"] = True
        return part._value(name)

    def __getitem__(self, name: str) -> Any:
        return self._as_part()[name]

    def _as_part(self) -> Settings:
        if "_part" not in self.__dict__:
            self._part = Settings(self._give, {})
        return self._part

    def _expression(self) -> str:
        return self._part._expression() if "_part" in self.__dict__ else repr(int(self))


def expression(value: Any) -> str:
    """The expression for a value."""
    own = getattr(type(value), "_expression", None)
    return str(own(value)) if own is not None else repr(value)


def _only_asks(depth: int) -> bool:
    """Whether the caller only tests for an attribute, with `hasattr` or a `getattr` that has a default."""
    frame: FrameType = sys._getframe(depth + 1)
    return not dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("LOAD")
