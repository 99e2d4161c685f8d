"""From the error of a forward to inputs that avoid it.

In: a model, inputs for which its forward failed, and the error. Out: changed inputs, likeliest first. What to change
follows from the failed statement, whose sides are evaluated in its frame (`T % self.block == 0` gives the multiple),
from the layer that failed, and from the message, in which torch writes the two sizes that differ. A wrong size changes
on every axis that has it, in all arguments.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from fractions import Fraction
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.targets import failure
from quack_fx.targets.inputs import layers
from quack_fx.targets.inputs.changes import LARGEST, Change, changed, only, refilled, reshape, resize, sizes, with_rank
from quack_fx.targets.inputs.measure import Answer, Budget, Search, mismatch
from quack_fx.targets.inputs.values import TOKENS, Inputs, causal_blocks, is_blocks
from quack_fx.targets.source import names_in

FIRST, REPAIRS, EACH = 3, 12, 4
"""How many candidates are tried before any repair; the most repairs in all; the most repairs of one failure."""

SAME_RATIO = 3
"""How many inputs of different sizes may fail in one view with the same ratio of elements before trying ends."""

More = Callable[[nn.Module, Inputs, BaseException], list[Inputs]]


class Attempts:
    """Inputs in the order in which to try them: the likeliest, those that measure sizes, repairs, the others.

    Where the forward fails on inputs that were yielded, call `failed` before the next ones. `more` gives inputs with
    one more argument for a failure; `budget` is shared by all models that are built for a target.
    """

    def __init__(
        self, model: nn.Module, candidates: list[Inputs], more: More | None = None, budget: Budget | None = None
    ) -> None:
        self.model = model
        self.likely, self.others = deque(candidates[:FIRST]), deque(candidates[FIRST:])
        self.repairs: deque[Inputs] = deque()
        self.inferred = {candidate.text for candidate in candidates}
        self.seen = set(self.inferred)
        self.left, self.added = REPAIRS, 0
        self._more: More = more or (lambda *_: [])
        self._search = Search(model, budget or Budget())
        self._running: Generator[Inputs, Answer, None] | None = None
        self._measured: Answer = None
        self._missed: dict[Any, dict[tuple[int, ...], Fraction]] = defaultdict(dict)
        self.measuring = False
        """Whether the inputs that were yielded last are for measuring."""

    def __iter__(self) -> Iterator[Inputs]:
        given: set[str] = set()
        while not self._is_hopeless():
            self.measuring = False
            if self.likely:
                inputs = self.likely.popleft()
            elif (measure := self._measurement()) is not None:
                inputs = measure
            elif self.repairs and self.left > 0:
                self.left -= 1
                inputs = self.repairs.popleft()
            elif self.others:
                inputs = self.others.popleft()
            else:
                return
            if inputs.text not in given:
                given.add(inputs.text)
                yield inputs

    def _measurement(self) -> Inputs | None:
        """Inputs for measuring; `failed` has recorded the result of the last ones."""
        if self._running is None:
            self._running, self._measured = self._search.run(), None
        try:
            one = self._running.send(self._measured)
        except StopIteration:
            self._running = None
            return None
        self.measuring = True
        return one

    def _is_hopeless(self) -> bool:
        """Whether a view fails with the same ratio of elements whatever the sizes: the model's own sizes do not fit."""
        missed = self._missed.values()
        return any(len(found) >= SAME_RATIO and len(set(found.values())) == 1 for found in missed)

    def guess_no_more(self) -> None:
        """Drop all inputs but those for measuring."""
        for queue in (self.likely, self.repairs, self.others):
            queue.clear()
        self.left, self.added = 0, REPAIRS

    def failed(self, inputs: Inputs, error: BaseException) -> None:
        """Record that the forward failed with this error, which must still have its traceback."""
        sizes = mismatch(error)
        self._search.note(inputs, sizes)
        if sizes is not None and (ratio := sizes.ratio) not in (None, 1):
            self._missed[sizes.place][sizes.numbers] = ratio
        if self.measuring:
            self._measured = sizes
            self._add(self._more(self.model, inputs, error) if sizes is None else [])
            return
        if sizes is not None:
            self._search.start(inputs, sizes)
        more = self._more(self.model, inputs, error)
        certain = asks_for_more(error)
        self._add([*_with_blocks(inputs, error), *(more if certain else [])])
        found: list[Inputs] = []
        for repaired in [*retry(self.model, inputs, error), *([] if certain else more)]:
            if repaired.text not in self.seen:
                self.seen.add(repaired.text)
                found.append(repaired)
        # Repairs of a repair come next; repairs of a candidate come after those of earlier candidates.
        if inputs.text in self.inferred:
            self.repairs.extend(found)
        else:
            self.repairs.extendleft(reversed(found))

    def _add(self, more: list[Inputs]) -> None:
        """Put inputs at the front, in this order."""
        new: list[Inputs] = []
        for one in more:
            # Inferred inputs may still be among the others.
            if (one.text not in self.seen or one.text in self.inferred) and self.added < REPAIRS:
                self.seen.add(one.text)
                self.added += 1
                new.append(one)
        self.likely.extendleft(reversed(new))


def retry(model: nn.Module, candidate: Inputs, error: BaseException) -> list[Inputs]:
    """Inputs that avoid the error of a forward, likeliest first. It, or its cause, must still have its traceback."""
    cause = failure.cause_of(error)
    found: dict[str, Inputs] = {}
    with suppress(Exception):  # the user's expressions may raise anything
        for change in itertools.islice(_changes(model, candidate, cause), 12):
            made = changed(candidate, change)
            if made.text != candidate.text:
                found.setdefault(made.text, made)
    return list(found.values())[:EACH]


def _changes(model: nn.Module, candidate: Inputs, error: BaseException) -> Iterator[Change]:
    if (found := failure.users_frame(error)) is not None:
        yield from _statement(*found, str(error))
    yield from _layer(model, error)
    yield from _message(str(error), sizes(candidate))


def _with_blocks(inputs: Inputs, error: BaseException) -> list[Inputs]:
    """Inputs with block masks of the sizes that an error of flex attention names."""
    wanted = re.search(r"got q_len=(\d+) and kv_len=(\d+)", str(failure.cause_of(error)))
    if wanted is None:
        return []
    mask = causal_blocks(int(wanted[1]), int(wanted[2]))
    return [inputs.map(lambda value: mask if is_blocks(value) else value)]


def asks_for_more(error: BaseException) -> bool:
    """Whether a forward failed because an argument is None, by the message or by the condition that it checks."""
    cause = failure.cause_of(error)
    return "None" in str(cause) or bool(unmet_names(cause))


def unmet_names(error: BaseException) -> set[str]:
    """Names that are None in the condition with which a forward checks its arguments, and refuses them."""
    for frame, line in list(failure.frames_of(error))[-1:]:
        if (condition := failure.condition_of(failure.statements_at(frame, line))) is not None:
            return {name for name in names_in(condition[0]) if frame.f_locals.get(name, 0) is None}
    return set()


def failing_names(error: BaseException) -> set[str]:
    """Names that are None in the line where a forward failed, and in the lines that called it."""
    return {name for frame, line in failure.frames_of(error) for name in failure.none_names(frame, line)}


def _replaced(given: Tensor, new: Callable[[Tensor], Tensor], exact: bool = True) -> Change:
    """A change of the tensors with the shape and dtype of one; unless `exact`, with a dtype of the same kind."""

    def change(x: Tensor) -> Tensor | None:
        same = x.dtype == given.dtype if exact else x.is_floating_point() == given.is_floating_point()
        return new(x) if same and x.shape == given.shape else None

    return change


def _of_named(named: list[Tensor], message: str) -> Iterator[Change]:
    """Changes of the tensors in the failed statement."""
    if "Boolean value of Tensor with more" in message:
        yield from (_replaced(v, lambda x: torch.ones((), dtype=torch.int64)) for v in named)
    if re.search(r"dtype int32/int64 for index|tensors used as indices", message):
        floats = [v for v in named if v.is_floating_point()]
        yield from (_replaced(v, lambda x: torch.zeros(x.shape, dtype=torch.int64), exact=False) for v in floats)
    if "same number of dimensions" in message and named:
        rank = max(v.dim() for v in named)
        yield from (_replaced(v, lambda x: x[(..., *[None] * (rank - x.dim()))]) for v in named if v.dim() < rank)


def _statement(frame: FrameType, line: int, message: str) -> Iterator[Change]:
    """Changes that the failed statement asks for."""
    around, value = failure.statements_at(frame, line), failure.evaluator(frame)
    if not around:
        return
    statement = around[-1]
    if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
        read = [frame.f_locals.get(n.id) for n in ast.walk(statement) if isinstance(n, ast.Name)]
        yield from _of_named([v for v in read if isinstance(v, Tensor)], message)
    if (condition := failure.condition_of(around)) is not None:
        yield from _condition(*condition, value)
    elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Tuple):
        source = statement.value.func if isinstance(statement.value, ast.Call) else statement.value
        if isinstance(source, ast.Attribute) and source.attr in ("shape", "size"):
            data, count = value(source.value), len(statement.targets[0].elts)
            if isinstance(data, Tensor):
                yield with_rank(data.dim(), count)
                yield from (only(index, with_rank(data.dim(), count)) for index in range(2))


def _condition(test: ast.expr, holds: bool, value: Callable[[ast.expr], Any]) -> Iterator[Change]:
    """Changes that make a condition hold, or not hold."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _condition(test.operand, not holds, value)
    if isinstance(test, ast.BoolOp):
        for part in test.values:
            yield from _condition(part, holds, value)
    if not isinstance(test, ast.Compare):
        if isinstance(test, ast.BinOp) and isinstance(test.op, ast.Mod) and not holds:
            yield from _multiple(test, value)
        return
    left, right = test.left, test.comparators[0]
    if isinstance(left, ast.BinOp) and isinstance(left.op, ast.Mod):
        yield from _multiple(left, value)
    have, want = value(left), value(right)
    if isinstance(have, tuple | list) and isinstance(want, tuple | list):
        if len(have) == len(want):
            for old, new in zip(have, want, strict=True):
                yield resize(old, new)
            # The inputs may have this size times a stride or a patch.
            for old, new in zip(have, want, strict=True):
                if isinstance(old, int) and isinstance(new, int) and old != new and old > 0:
                    yield from (resize(old * times, new * times) for times in (2, 4, 8))
        return
    if not isinstance(have, int) or not isinstance(want, int) or isinstance(have, bool):
        return
    if re.search(r"\.(ndim|dim\(\))|len\(.*(shape|size\(\))\)", ast.unparse(left)):
        yield with_rank(have, want)
        return
    if re.search(r"^len\(", ast.unparse(left)):  # a list of axes
        for rank in range(1, 5):
            yield with_rank(rank, rank + want - have)
    op = test.ops[0]
    strict = (ast.Lt, ast.Gt) if holds else (ast.LtE, ast.GtE)
    less = isinstance(op, ast.Lt | ast.LtE) == holds and not isinstance(op, ast.Eq | ast.NotEq)
    step = (-1 if less else 1) if isinstance(op, strict) else 0
    yield resize(have, want + step)
    yield resize(want, have - step)


def _multiple(node: ast.BinOp, value: Callable[[ast.expr], Any]) -> Iterator[Change]:
    size, factor = value(node.left), value(node.right)
    if isinstance(size, int) and isinstance(factor, int) and factor:
        yield resize(size, math.ceil(size / factor) * factor)


def _layer(model: nn.Module, error: BaseException) -> Iterator[Change]:
    """Inputs of the layer that failed, in place of each argument of the shape that it got."""
    for frame, _ in reversed(list(failure.frames_of(error))):
        layer = frame.f_locals.get("self")
        if frame.f_code.co_name != "forward" or not isinstance(layer, nn.Module):
            continue
        first = frame.f_code.co_varnames[1] if frame.f_code.co_argcount > 1 else ""
        given = frame.f_locals.get(first)
        if not isinstance(given, Tensor):
            return
        if isinstance(layer, nn.Embedding) and not given.is_floating_point():
            yield _below(layer.num_embeddings)
        for array in layers.taken_by(layer, model):
            if array.count(TOKENS) > LARGEST:
                continue
            made = array.make(TOKENS)
            same_rank = made.dim() == given.dim()
            if same_rank and made.dim() < 4 and array.kind == "float":
                # Change only the width, and keep the number of tokens.
                made = refilled(made, (*given.shape[:-1], array.shape[-1]))  # type: ignore[arg-type]
            yield _replaced(given, lambda x, made=made: made, exact=False)  # type: ignore[misc]
        return


def _below(number: int) -> Change:
    """Ids below a number."""
    return lambda x: None if x.is_floating_point() or x.dtype == torch.bool else x % number


def _message(text: str, known: set[int]) -> Iterator[Change]:
    """Changes for the sizes and dtypes in a message."""
    yield from _dtypes(text)
    yield from _viewed(text)
    for given, wanted in itertools.pairwise(failure.shapes_in(text)):
        if len(given) == len(wanted):
            yield reshape(given, wanted)
    if (factors := failure.factors_in(text)) is not None:
        old, new = factors
        yield resize(old, new, last=True)
        yield resize(old, new)
        yield from _scaled(old, new, known)
    if rank := re.search(r"[Ee]xpected (\d)D.*?got (\d)D", text):
        yield with_rank(int(rank[2]), int(rank[1]))
    if padded := re.search(r"Padding size \d+ is not supported for (\d)D input", text):
        yield with_rank(int(padded[1]), int(padded[1]) - 1)
    if beside := re.search(r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\).*dimension 1", text):
        # An embedding for each sequence is added to those of tokens: give an integer for each token.
        for length, batch in itertools.permutations(map(int, beside.groups())):
            ids = torch.empty(batch, dtype=torch.int64, device="meta")
            yield _replaced(ids, partial(refilled, shape=(batch, length)), exact=False)
    written = re.findall(r"(?<![\w.])\d+(?![\w.]*[a-zA-Z])", re.sub(r"dimension -?\d+", "", text))
    pairs = list(itertools.islice(itertools.permutations(dict.fromkeys(map(int, written)), 2), 12))
    for old, new in pairs:
        if old in known and 0 < new < 1 << 16:
            yield resize(old, new)
    for old, new in pairs[:6]:
        yield from _scaled(old, new, known)


def _viewed(text: str) -> Iterator[Change]:
    """Changes for a failed view whose shape has a -1: its other sizes are those of a token, or of a sequence."""
    found = re.search(r"shape '\[([-\d, ]+)\]' is invalid for input of size (\d+)", text)
    if found is None or "-1" not in found[1]:
        return
    wanted, count = [int(n) for n in found[1].split(",")], int(found[2])
    for lead in (2, 1):

        def change(x: Tensor, inner: list[int], lead: int = lead) -> Tensor | None:
            if x.numel() != count or (x.dim() <= lead and lead > 1):
                return None
            return refilled(x, (*x.shape[:lead], *inner))

        inner = [n for n in wanted[1:] if n > 0]
        yield partial(change, inner=[math.prod(inner)])
        yield partial(change, inner=inner)


def _dtypes(text: str) -> Iterator[Change]:
    """Changes for messages about dtypes."""
    if "bool tensor" in text:  # 1 - mask
        yield lambda x: x.float() if x.dtype == torch.bool else None
    if re.search(r"invert|only implemented on integer|boolean|Bool", text):
        yield lambda x: x > 0 if x.is_floating_point() and x.dim() < 5 else None
    names = {"BFloat16": torch.bfloat16, "Half": torch.half, "Double": torch.double, "Float": torch.float}
    names |= {"c10::" + name: dtype for name, dtype in names.items()}
    for name in re.findall(r"BFloat16|Half|Double|Float", text) if "dtype" in text or "type" in text else []:
        wanted = names[name]
        yield lambda x, wanted=wanted: x.to(wanted) if x.is_floating_point() else None  # type: ignore[misc]
    if re.search(r"'indices'|scalar types: Long|expected.*Long|tensors used as indices", text):
        yield lambda x: torch.zeros(x.shape, dtype=torch.int64) if x.is_floating_point() else None
    if re.search(r"from Long|Long to|not implemented for 'Long'|only Tensors of floating|floating point", text):
        yield lambda x: x.float() if x.dtype == torch.int64 else None


def _scaled(old: int, new: int, known: set[int]) -> Iterator[Change]:
    """Changes of an image's sides, for a size that counts pixels or patches, perhaps with a class token."""
    for extra in (0, 1):
        if old - extra <= 0 or new - extra <= 0:
            continue
        for power in (0.5, 1.0):
            ratio = ((new - extra) / (old - extra)) ** power
            for size in sorted(known, reverse=True)[:2]:
                other = size * ratio
                if size > TOKENS and abs(other - round(other)) < 1e-6 and 1 < round(other) < 4096:
                    yield resize(size, round(other))
