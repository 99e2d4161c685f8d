"""Specs of example values, the values themselves, and Python expressions for them.

In: a `Spec` of one argument, and the number of tokens that all arguments of a call share. Out: the value. `shown`
describes a value in a few words, `expression` writes Python that makes it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

BATCH, TOKENS = 2, 4
_T = TypeVar("_T")

Kind = Literal["float", "ids", "index", "bool", "half", "complex", "ones", "zeros", "padding", "count"]
Size = int | str
"""A number, or "B" or "T": the batch size and the number of tokens that all arguments of a call share."""


def numbers(shape: Iterable[Size], tokens: int = TOKENS) -> tuple[int, ...]:
    """A shape in numbers."""
    known = {"B": BATCH, "T": tokens}
    return tuple(known[size] if isinstance(size, str) else size for size in shape)


@dataclass(frozen=True)
class Array:
    """A tensor or, with `numpy`, an array of which the forward makes a tensor.

    Attributes:
        kind: "float" is noise, "ids" are below `high`, "index" counts along the last axis, "bool" is all true, "half"
            is true in every other entry of the last axis, "padding" is all false, "count" is the number of tokens.
        shape: Its sizes.
        high: Number of different ids.
        dtype: Its dtype, where the kind does not determine it.
        numpy: Whether it is a numpy array.
        tokens: The number of tokens, where it must differ from that of other arguments.
    """

    kind: Kind
    shape: tuple[Size, ...]
    high: int = 2
    dtype: torch.dtype = torch.float32
    numpy: bool = False
    tokens: int | None = None

    def count(self, tokens: int) -> int:
        """Its number of elements."""
        return math.prod(numbers(self.shape, self.tokens or tokens))

    def make(self, tokens: int) -> Any:
        """The value."""
        tokens = self.tokens or tokens
        value = fill(self.kind, numbers(self.shape, tokens), tokens if self.kind == "count" else self.high, self.dtype)
        if not self.numpy:
            return value
        # Without numpy a list, which torch.LongTensor takes as well.
        return value.numpy() if importlib.util.find_spec("numpy") else value.tolist()


@dataclass(frozen=True)
class Constant:
    """A value that is not a tensor: None, a flag, a number."""

    value: Any

    def count(self, tokens: int) -> int:
        """Its number of elements."""
        return 1

    def make(self, tokens: int) -> Any:
        """The value."""
        return self.value


@dataclass(frozen=True)
class Group:
    """Several values in one argument: a dict, a namespace, a tuple or a list."""

    form: Literal["dict", "namespace", "tuple", "list"]
    parts: tuple[tuple[str, Spec], ...]

    def count(self, tokens: int) -> int:
        """Its number of elements."""
        return sum(spec.count(tokens) for _, spec in self.parts)

    def make(self, tokens: int) -> Any:
        """The value."""
        made = {name: spec.make(tokens) for name, spec in self.parts}
        if self.form == "namespace":
            return SimpleNamespace(**made)
        return made if self.form == "dict" else tuple(made.values()) if self.form == "tuple" else list(made.values())


@dataclass(frozen=True)
class CausalBlocks:
    """A causal `BlockMask` of torch's flex attention."""

    def count(self, tokens: int) -> int:
        """Its number of elements."""
        return tokens**2

    def make(self, tokens: int) -> Any:
        """The value."""
        return causal_blocks(tokens, tokens)


def causal_blocks(queries: int, keys: int) -> Any:
    """A causal `BlockMask` for these numbers of queries and keys."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(_is_causal, None, None, queries, keys, device="cpu")


def is_blocks(value: Any) -> bool:
    """Whether a value is a `BlockMask`."""
    return type(value).__name__ == "BlockMask" and hasattr(value, "seq_lengths")


def _is_causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


Spec = Array | Constant | Group | CausalBlocks


def fill(kind: Kind, shape: tuple[int, ...], high: int, dtype: torch.dtype) -> Tensor:
    """A tensor of a kind. The global random state is not used."""
    if kind == "ids":
        return torch.arange(1, math.prod(shape) + 1).remainder(max(high, 1)).view(shape)
    if kind == "count":
        return torch.full(shape, high)
    if kind == "index":
        return torch.arange(shape[-1]).expand(shape)
    if kind == "half":
        return torch.arange(shape[-1]).remainder(2).bool().repeat(*shape[:-1], 1)
    if kind in ("bool", "padding"):
        return torch.full(shape, kind == "bool")
    if kind in ("ones", "zeros"):
        return torch.full(shape, int(kind == "ones"), dtype=dtype)
    return torch.polar(torch.ones(shape), noise(*shape)) if kind == "complex" else noise(*shape).to(dtype)


def noise(*shape: int) -> Tensor:
    """Standard normal numbers, the same in every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments of one forward call, and a text for them: "idx=int64[2, 4]"."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    text: str
    names: tuple[str, ...] = field(default=(), kw_only=True)
    """Parameters of the positional arguments, "" where not known."""

    def map(self, change: Callable[[Any], Any]) -> Inputs:
        """These inputs with every argument changed."""
        args = tuple(map(change, self.args))
        return named(args, {name: change(value) for name, value in self.kwargs.items()}, self.names)

    def expression(self) -> str:
        """A Python expression for inputs like these, which a user may edit."""
        args = ", ".join(expression(value) for value in self.args)
        kwargs = f"dict({', '.join(f'{name}={expression(value)}' for name, value in self.kwargs.items())})"
        if not self.kwargs:
            # A single dict would be taken for keyword arguments, a single tuple for several arguments.
            alone = len(self.args) == 1 and not isinstance(self.args[0], tuple | Mapping)
            return args if alone else f"({args},)" if len(self.args) == 1 else f"({args})"
        return kwargs if not self.args else f"(({args},), {kwargs})"


def named(args: tuple[Any, ...], kwargs: dict[str, Any], names: Iterable[str] = ()) -> Inputs:
    """Inputs with their text; `names` are the parameters of the positional arguments."""
    names = tuple(names) or ("",) * len(args)
    parts = [f"{name}={shown(value)}" if name else shown(value) for name, value in zip(names, args, strict=True)]
    parts += [f"{name}={shown(value)}" for name, value in kwargs.items()]
    return Inputs(args, kwargs, ", ".join(parts) or "nothing", names=names)


def expression(value: Any) -> str:
    """A Python expression for a value like this one; it may use torch and SimpleNamespace."""
    if (text := _compound(value, expression, "SimpleNamespace")) is not None:
        return text
    if is_array(value):
        return f"{expression(torch.from_numpy(value))}.numpy()"
    if is_blocks(value):
        flex = "__import__('torch.nn.attention.flex_attention', fromlist=['*'])"
        sizes = ", ".join(map(str, value.seq_lengths))
        return f"{flex}.create_block_mask(lambda b, h, q, k: q >= k, None, None, {sizes}, device='cpu')"
    if not isinstance(value, Tensor):
        return repr(value)
    sizes = ", ".join(map(str, value.shape)) or "()"
    dtype = "" if value.dtype == torch.float32 else f", dtype={value.dtype}"
    if value.is_floating_point() or value.is_complex():
        return f"torch.randn({sizes}{dtype})"
    if value.dtype == torch.bool and value.any() and not value.all():
        return f"torch.arange({value.shape[-1]}).remainder(2).bool().repeat({', '.join(map(str, value.shape[:-1]))}, 1)"
    if value.dtype == torch.bool:
        return f"torch.{'ones' if bool(value.all()) else 'zeros'}({sizes}, dtype=torch.bool)"
    if value.dtype != torch.int64:
        return f"torch.ones({sizes}{dtype})"
    return f"torch.randint(0, {int(value.max()) + 1 if value.numel() else 1}, {tuple(value.shape)})"


def shown(value: Any) -> str:
    """A value in a few words: "int64[2, 4]"."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, list) and len(value) > 2 and len(set(map(shown, value))) == 1:
        return f"[{shown(value[0])}] * {len(value)}"
    if (text := _compound(value, shown, "namespace")) is not None:
        return text
    if is_array(value):
        return f"numpy {value.dtype}{list(value.shape)}"
    if is_blocks(value):
        return f"BlockMask{list(value.seq_lengths)}"
    return repr(value)


def _compound(value: Any, write: Callable[[Any], str], namespace: str) -> str | None:
    """A namespace, dataclass, dict, tuple or list as text, with `write` for each part; None for any other value."""
    if isinstance(value, SimpleNamespace) or has_fields(value):
        name = namespace if isinstance(value, SimpleNamespace) else type(value).__name__
        fields = [field.name for field in dataclasses.fields(value)] if has_fields(value) else []
        names = [*vars(value)] if isinstance(value, SimpleNamespace) else fields
        return f"{name}({', '.join(f'{part}={write(getattr(value, part))}' for part in names)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {write(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(write, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(write, value))}{',' if len(value) == 1 else ''})"
    return None


def has_fields(value: Any) -> bool:
    """Whether a value is an object of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def is_array(value: Any) -> bool:
    """Whether a value is an array of numpy."""
    return type(value).__module__ == "numpy" and hasattr(value, "shape")


def cheapest_first(choices: list[list[_T]], limit: int) -> list[tuple[_T, ...]]:
    """Combinations of one entry of each list, at most `limit`; those with the smallest sum of indices first."""
    found: list[tuple[_T, ...]] = []
    for total in range(sum(len(options) - 1 for options in choices) + 1):
        for indices in _indices([len(options) for options in choices], total):
            found.append(tuple(options[index] for options, index in zip(choices, indices, strict=True)))
            if len(found) == limit:
                return found
    return found


def _indices(lengths: list[int], total: int) -> Iterator[tuple[int, ...]]:
    """Indices into lists of these lengths that add up to `total`."""
    if not lengths and total == 0:
        yield ()
    for index in range(min(lengths[0] - 1, total), -1, -1) if lengths else ():
        yield from ((index, *rest) for rest in _indices(lengths[1:], total - index))
