"""Python source of a module while it is being written, and tensors in it whose axes have names.

In: decisions. Out: the lines of `__init__` and `forward`. An axis is one letter; its size stands in `Draft.sizes`. A
`Value` is a variable of `forward` with the letters of its axes, so that every step can ask for the arrangement that it
needs and `arrange` writes one of the many ways to get there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .choices import Choices


@dataclass(frozen=True)
class Value:
    """A variable of `forward` and its axes, one letter each."""

    name: str
    axes: str

    @property
    def hint(self) -> str:
        """The name without its number."""
        return self.name.rstrip("0123456789")

    def axis(self, letter: str) -> int:
        """Place of an axis."""
        return self.axes.index(letter)

    def renamed(self, old: str, new: str) -> Value:
        """The same variable, an axis called by another letter."""
        return replace(self, axes=self.axes.replace(old, new))


class Draft:
    """A module being written.

    Attributes:
        sizes: Size of each axis by its letter.
        init: Lines of `__init__`.
        lines: Lines of `forward`.
        may_refuse: Whether something was written whose rows the finder may refuse to tell, by design.
    """

    def __init__(self, choices: Choices, sizes: dict[str, int]) -> None:
        self.choices = choices
        self.sizes = dict(sizes)
        self.init: list[str] = []
        self.lines: list[str] = []
        self.may_refuse = False
        self._taken = {"x", "y"}

    # ---- names -------------------------------------------------------------------------------------------------------

    def fresh(self, hint: str) -> str:
        """A name that nothing has yet."""
        name, n = hint, 2
        while name in self._taken:
            name, n = f"{hint}{n}", n + 1
        self._taken.add(name)
        return name

    def letter(self, size: int) -> str:
        """A new axis."""
        letter = next(c for c in "fghijklmnopqruvwzABCDEFGHIJKLMNOPQRUVWZ" if c not in self.sizes)
        self.sizes[letter] = size
        return letter

    def shape(self, axes: str) -> tuple[int, ...]:
        """Sizes of axes."""
        return tuple(self.sizes[a] for a in axes)

    def dims(self, axes: str) -> str:
        """Sizes of axes as source text."""
        return ", ".join(str(n) for n in self.shape(axes))

    # ---- lines -------------------------------------------------------------------------------------------------------

    def module(self, hint: str, code: str) -> str:
        """Add a submodule; its name without "self."."""
        name = self.fresh(hint)
        self.init.append(f"self.{name} = {code}")
        return name

    def parameter(self, hint: str, *shape: int) -> str:
        """Add a parameter; its name without "self."."""
        return self.module(hint, f"nn.Parameter(torch.randn({', '.join(map(str, shape))}))")

    def buffer(self, hint: str, code: str) -> str:
        """Add a buffer; its name without "self."."""
        name = self.fresh(hint)
        self.init.append(f'self.register_buffer("{name}", {code})')
        return name

    def let(self, hint: str, code: str, axes: str) -> Value:
        """Assign an expression to a variable."""
        name = self.fresh(hint)
        self.lines.append(f"{name} = {code}")
        return Value(name, axes)

    # ---- movement ----------------------------------------------------------------------------------------------------

    def arrange(self, value: Value, axes: str) -> Value:
        """The same tensor with its axes in another order."""
        if value.axes == axes:
            return value
        assert sorted(value.axes) == sorted(axes), (value, axes)
        order = [value.axes.index(a) for a in axes]
        moved = [i for i, o in enumerate(order) if i != o]
        ways = ["permute", "rearrange", "einsum", "movedim", "transposes"]
        way = self.choices.pick("arrange", ways)
        name = value.name
        if way == "transposes" or (way == "permute" and len(moved) == 2 and self.choices.chance("transpose", 2)):
            now, code = list(value.axes), name
            for i, a in enumerate(axes):
                if now[i] != a:
                    j = now.index(a)
                    now[i], now[j] = now[j], now[i]
                    code += f".transpose({i}, {j})"
        elif way == "permute":
            code = f"{name}.permute({', '.join(map(str, order))})"
        elif way == "rearrange":
            code = f'rearrange({name}, "{" ".join(value.axes)} -> {" ".join(axes)}")'
        elif way == "einsum":
            code = f'torch.einsum("{value.axes}->{axes}", {name})'
        else:
            code = f"{name}.movedim({tuple(order)}, {tuple(range(len(order)))})"
        return self.let(value.hint, code, axes)

    def fold(self, value: Value, axes: str) -> tuple[Value, str]:
        """Neighbouring axes flattened into one new axis."""
        i = value.axes.index(axes)
        size = 1
        for a in axes:
            size *= self.sizes[a]
        letter = self.letter(size)
        new = value.axes.replace(axes, letter)
        way = self.choices.pick("fold", ["reshape", "flatten"])
        shape = self.dims(new)
        code = f"{value.name}.reshape({shape})"
        if way == "flatten" and len(axes) > 1:
            code = f"{value.name}.flatten({i}, {i + len(axes) - 1})"
        return self.let(value.hint, code, new), letter

    def unfold(self, value: Value, letter: str, axes: str) -> Value:
        """One axis split into several."""
        i = value.axis(letter)
        new = value.axes.replace(letter, axes)
        way = self.choices.pick("unfold", ["view", "unflatten", "rearrange"])
        if way == "view":
            code = f"{value.name}.reshape({self.dims(new)})"
        elif way == "unflatten":
            code = f"{value.name}.unflatten({i}, ({self.dims(axes)},))"
        else:
            left = " ".join(a if a != letter else f"({' '.join(axes)})" for a in value.axes)
            known = "".join(f", {a}={self.sizes[a]}" for a in axes[1:])
            code = f'rearrange({value.name}, "{left} -> {" ".join(new)}"{known})'
        return self.let(value.hint, code, new)

    def take(self, value: Value, letter: str, start: int, stop: int, new: str) -> Value:
        """A range of an axis; `new` names the shorter axis."""
        i = value.axis(letter)
        way = self.choices.pick("take", ["slice", "narrow"])
        code = f"{value.name}.narrow({i}, {start}, {stop - start})"
        if way == "slice":
            from_end = len(value.axes) - i - 1
            tail = f"[..., {start}:{stop}]" if not from_end else f"[{':, ' * i}{start}:{stop}]"
            code = f"{value.name}{tail}"
        return self.let(value.hint, code, value.axes.replace(letter, new))

    def split(self, value: Value, letter: str, parts: Sequence[tuple[str, str]]) -> list[Value]:
        """An axis cut into parts: a hint and an axis each; all of it."""
        i = value.axis(letter)
        sizes = [self.sizes[a] for _, a in parts]
        equal = len(set(sizes)) == 1
        way = self.choices.pick("split", ["split", "slices", "tensor_split", *(["chunk"] if equal else [])])
        if way == "slices":
            starts = [sum(sizes[:n]) for n in range(len(sizes))]
            return [
                self.take(value, letter, start, start + size, new)
                for (_, new), start, size in zip(parts, starts, sizes, strict=True)
            ]
        names = [self.fresh(hint) for hint, _ in parts]
        cuts = [sum(sizes[: n + 1]) for n in range(len(sizes) - 1)]
        arguments = {"split": f"{sizes}, {i}", "chunk": f"{len(sizes)}, {i}", "tensor_split": f"{cuts}, {i}"}[way]
        self.lines.append(f"{', '.join(names)} = {value.name}.{way}({arguments})")
        axes = [value.axes.replace(letter, new) for _, new in parts]
        return [Value(name, a) for name, a in zip(names, axes, strict=True)]
