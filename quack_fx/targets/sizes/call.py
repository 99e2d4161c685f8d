"""A call of a class or factory, with a record of where its arguments come from."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quack_fx.targets.failure import frames_of, none_names
from quack_fx.targets.sizes.signatures import parameters


@dataclass
class Account:
    """Where the arguments of a call come from: values found in the repository, each with its source ("run.py:12"), and
    values that were made up."""

    found: dict[str, tuple[Any, str]] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)


class Call:
    """A call of a class or factory, of which `name` is the name in the target's file. `plan` gives a value for each
    parameter, and fills in the account."""

    def __init__(self, name: str, function: Callable[..., Any], plan: Callable[[Account], dict[str, Value]]) -> None:
        self._name, self.function, self._plan = name, function, plan
        self.account = Account()
        self.text = f"{name}(...)"
        self.lacked: dict[str, bool] = {}
        """Optional parameters that made building fail because they are None; True for those that need fields."""

    def __call__(self) -> Any:
        """Build the model, and set `text` and `account`."""
        account = Account()
        values = self._plan(account)
        try:
            return self.function(**evaluated(values))
        except Exception as error:
            self.lacked = lacking(error, {p.name for p in parameters(self.function) if p.default is None})
            raise
        finally:
            self.account = account
            first = [p.name for p in parameters(self.function) if p.kind is not p.KEYWORD_ONLY][:1]
            arguments = values[first[0]].text() if first and list(values) == first else written(values)
            self.text = f"{self._name}({arguments})"


@dataclass(frozen=True)
class Value:
    """The value of a parameter, and the expression for it, which is complete after `make`."""

    make: Callable[[], Any]
    text: Callable[[], str]


def evaluated(values: Mapping[str, Value]) -> dict[str, Any]:
    """Arguments of a call by name."""
    return {name: value.make() for name, value in values.items()}


def written(values: Mapping[str, Value]) -> str:
    """The expressions for the arguments of a call."""
    return ", ".join(f"{name}={value.text()}" for name, value in values.items())


def lacking(error: BaseException, optional: set[str]) -> dict[str, bool]:
    """For an error about None, the optional parameters that are None in the failed lines; True where the line reads an
    attribute or an item of one."""
    found: dict[str, bool] = {}
    asked = re.search("not subscriptable|has no attribute", str(error)) is not None
    for frame, number in frames_of(error) if "NoneType" in str(error) else ():
        line = linecache.getline(frame.f_code.co_filename, number)
        absent = none_names(frame, number) & optional
        with_fields = {w for w in absent if re.search(rf"\b{w}\s*[\[.]", line)}
        found |= {w: w in with_fields for w in sorted(absent) if not asked or not with_fields or w in with_fields}
    return found
