"""Stand-ins that compute nothing, for names of packages that are not installed.

In: the dotted name of something in a missing package. Out: an `Inert`. While a target's files are imported and its
model is built, it can be called, subclassed, used as a decorator (which returns what it decorates), compared and
calculated with; attributes and results are inert, too. Once the forward runs, using one raises an error that names it,
so that no part of a graph is left out silently.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from quack_fx.errors import TargetError


class StandInUsed(TargetError):
    """The forward needs something of a package that is not installed."""

    def __init__(self, name: str) -> None:
        package = name.split(".")[0]
        super().__init__(
            f"the forward needs {name}, and {package} cannot be imported here; install it, or give a variant of the "
            "model that does without it (--build)"
        )
        self.name = name


class Phase:
    """Whether the forward is running, so that using an inert object is an error."""

    strict = False


class Inert:
    """Stands in for `name`. `known` gives stand-ins that compute, by dotted name."""

    def __init__(self, name: str, known: Callable[[str], Any] | None = None) -> None:
        self.__dict__["_name"], self.__dict__["_known"] = name, known

    def __repr__(self) -> str:
        return f"<stand-in for {self._name}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy, inspect and pickle look for
            raise AttributeError(name)
        # It may be a module that was never imported by itself: `xformers.ops.fmha`.
        found = self._known(f"{self._name}.{name}") if self._known is not None else None
        return Inert(f"{self._name}.{name}", self._known) if found is None else found

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what is decorated; otherwise an inert object, which is a module where the name is that of a class."""
        self._use()
        if len(args) == 1 and not kwargs and callable(args[0]) and not isinstance(args[0], Inert | nn.Module):
            return args[0]
        is_class = self._name.rpartition(".")[2][:1].isupper()
        return InertModule(self._name) if is_class else Inert(f"{self._name}()")

    def __eq__(self, other: object) -> bool:
        if other is not self:
            self._use()
        return other is self

    def __hash__(self) -> int:
        return id(self)

    def __float__(self) -> float:
        self._use()
        raise TypeError(f"{self._name} cannot be imported here, so it is no number")

    __int__ = __float__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A function of torch uses its arguments."""
        given = [*args, *(kwargs or {}).values()]
        one = next((value for value in given if isinstance(value, Inert)), None)
        if one is None:
            raise TypeError(f"{func} is given something that cannot be imported here")
        one._use()
        return one

    def __exit__(self, *exc: Any) -> None:
        return None

    def __instancecheck__(self, instance: Any) -> bool:
        return False

    __subclasscheck__ = __instancecheck__

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        """The base class of a class that is derived from inert objects, once for all of them."""
        return (InertBase,) if next(b for b in bases if isinstance(b, Inert)) is self else ()

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def _use(self) -> None:
        """Raise where the value would matter."""
        if Phase.strict:
            raise StandInUsed(self._name)


def _using(result: Callable[[], Any] | None = None) -> Callable[..., Any]:
    """A method that counts as use and gives `result()`; the object itself without one."""

    def method(self: Inert, *_: Any) -> Any:
        self._use()
        return self if result is None else result()

    return method


_ARITHMETIC = "add sub mul truediv floordiv mod pow lshift rshift and xor matmul".split()
_OTHERS = "neg pos abs invert getitem enter".split()
_RESULTS: dict[str, Callable[[], Any] | None] = {
    **dict.fromkeys([*_ARITHMETIC, *(f"r{name}" for name in _ARITHMETIC), *_OTHERS]),
    **dict.fromkeys("lt le gt ge contains".split(), bool),
    **{"len": int, "bool": lambda: True, "iter": lambda: iter(()), "setitem": dict},
}
for _name, _result in _RESULTS.items():
    setattr(Inert, f"__{_name}__", _using(_result))


class _WithForward(ABCMeta):
    """Makes a class whose base class is missing an nn.Module if it has a forward."""

    def __new__(mcs, name: str, bases: tuple[type, ...], body: dict[str, Any], **kwargs: Any) -> Any:
        if "forward" in body and not any(issubclass(base, nn.Module) for base in bases):
            bases = (*bases, nn.Module)
        return super().__new__(mcs, name, bases, body)

    def __init__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(name, bases, body)


class InertBase(metaclass=_WithForward):
    """The base class in place of one that is missing; it takes any arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        following = super().__init__
        if getattr(following, "__func__", None) in (None, nn.Module.__init__):
            super().__init__()
        else:  # another base class, which is the user's
            following(*args, **kwargs)


class InertModule(nn.Module):
    """An object of a missing class. It can be part of a model, as long as its forward does not run."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.stands_for = name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return Inert(f"{self.stands_for}.{name}")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: the forward needs what is missing."""
        raise StandInUsed(self.stands_for)


class _AsWanted(str):
    """The version of a missing package: it passes every comparison but a strict one."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str)

    def __ne__(self, other: object) -> bool:
        return not isinstance(other, str)

    __le__ = __ge__ = __eq__
    __lt__ = __gt__ = __ne__

    __hash__ = str.__hash__

    def startswith(self, *args: Any) -> bool:
        """Always true."""
        return True


class InertPackage(ModuleType):
    """Stands in for a module. Its names are what `known` gives for them, or inert."""

    def __init__(self, name: str, known: Callable[[str], Any]) -> None:
        super().__init__(name)
        self.__path__: list[str] = []  # submodules can be asked for
        self.__version__ = _AsWanted("0")
        self._known = known

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        found = self._known(full)
        value = Inert(full, self._known) if found is None else found
        setattr(self, name, value)
        return value
