"""A slice of the tape, run again with gradients.

In: a tape, the wanted values, and where the slice begins. Out: a `Replay`: the same values, computed by the same ops,
with every parameter and every chosen value a leaf of autograd. Code that a model hides from autograd (`no_grad`, the
forward of an autograd.Function) has gradients here, and no gradient flows past the beginning of the slice.

By default, the statistics of norms are constants. A mean or a root mean square over many features would make every
feature depend on every other. With constant statistics, a norm scales and shifts each feature separately, and a seed on
one head reaches only the rows of that head's features. This hides no wrong row: a row that acts through a statistic
alone is not a row of that head.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from quack_fx.prove.opaque import is_opaque
from quack_fx.prove.tape import Op, Tape, Value

Target = tuple[Value, Op | None]
"""A value as an op reads it; without an op, as it is at the end."""


class Replay:
    """A slice of a tape that ran again.

    Arguments:
        tape: The tape.
        targets: Values to compute again.
        cuts: Values at which the slice begins; they are constants.
        stops: Ops that do not run again; their results are constants.
        leaves: Further cuts, with given values, whose gradients are wanted.
        statistics: Reductions and norms whose statistics are constants.
        live: Whether these statistics carry gradients instead.
        biases: Factor on one-dimensional parameters, which shrinks biases; gains only change by the same factor.
        through_detach: Whether gradients pass `detach`.
    """

    def __init__(
        self,
        tape: Tape,
        targets: Iterable[Target],
        *,
        cuts: Set[Value] = frozenset(),
        stops: Set[Op] = frozenset(),
        leaves: Mapping[Value, Tensor] | None = None,
        statistics: Set[Op] = frozenset(),
        live: bool = False,
        biases: float = 1.0,
        through_detach: bool = False,
    ) -> None:
        self._tape, self._cuts, self._stops = tape, set(cuts) | set(leaves or ()), stops
        self._statistics, self._live, self._through_detach = statistics, live, through_detach
        self._of_statistics: set[Value] = set()
        self._biases = biases
        self._tensors: dict[Value, Tensor] = {}
        self.params: dict[str, Tensor] = {}
        self.opaque: list[Op] = []
        """Ops of unknown meaning that have no gradient."""
        ops = self._slice(targets)
        self._written = {v.storage for op in ops for v in op.outputs if op in tape.writes.get(v.storage, ())}
        self._leaves = {leaf: numbers.clone().requires_grad_() for leaf, numbers in (leaves or {}).items()}
        with torch.enable_grad():
            for leaf, numbers in self._leaves.items():
                self._tensors[leaf] = numbers.clone() if leaf.storage in self._written else numbers
            for op in ops:
                self._run(op)

    def __getitem__(self, value: Value) -> Tensor:
        """The value, computed again."""
        if value not in self._tensors:
            self._tensors[value] = self._constant(value)
        return self._tensors[value]

    def start(self, value: Value) -> Tensor:
        """A value before any in-place write to it, if it is a leaf."""
        return self._leaves.get(value, self[value])

    def gradients(self, value: Value, seed: Tensor) -> dict[str, Tensor]:
        """Gradient of each parameter of the slice that a seed on a value reaches."""
        return dict(self._gradients(value, seed, self.params))

    def gradients_at(self, value: Value, seed: Tensor, values: Iterable[Value]) -> dict[Value, Tensor]:
        """Gradient of each given value, leaf or not, that a seed on a value reaches."""
        inside = {one: self.start(one) for one in values}
        return dict(self._gradients(value, seed, {p: t for p, t in inside.items() if t.requires_grad}))

    def changes(self, value: Value, directions: Mapping[Value, Tensor]) -> Tensor:
        """Jacobian-vector product: how a value changes for given changes of others."""
        root = self[value]
        sources = {on: self.start(on) for on in directions if self[on].requires_grad}
        if not root.requires_grad or not sources:
            return torch.zeros_like(root)
        # The vector-Jacobian product is linear in the seed; its derivative by the seed is the Jacobian-vector product.
        seed = torch.zeros_like(root, requires_grad=True)
        arrived = torch.autograd.grad([root], list(sources.values()), [seed], create_graph=True, allow_unused=True)
        linear = [(g, directions[on]) for on, g in zip(sources, arrived, strict=True) if g is not None]
        linear = [(g, d) for g, d in linear if g.requires_grad]
        if not linear:
            return torch.zeros_like(root)
        (change,) = torch.autograd.grad([g for g, _ in linear], [seed], [d for _, d in linear], allow_unused=True)
        return torch.zeros_like(root) if change is None else change

    def _gradients(self, value: Value, seed: Tensor, leaves: Mapping[Any, Tensor]) -> Iterable[tuple[Any, Tensor]]:
        root = self[value]
        if not root.requires_grad or not leaves:
            return
        arrived = torch.autograd.grad([root], list(leaves.values()), [seed], retain_graph=True, allow_unused=True)
        yield from ((name, g) for name, g in zip(leaves, arrived, strict=True) if g is not None)

    # -- which ops -----------------------------------------------------------------------------------------------------

    def _slice(self, targets: Iterable[Target]) -> list[Op]:
        """The ops to run, in order.

        An op that depends on neither inputs nor parameters is constant, unless its result is written in place later:
        the storage then has to be computed again.
        """
        chosen: set[Op] = set()
        idle: set[Op] = set()
        todo: list[tuple[Op | None, Sequence[Value]]] = [(before, (value,)) for value, before in targets]
        while todo:
            reader, values = todo.pop()
            for op in (o for v in values if v not in self._cuts for o in self._tape.behind(v, reader)):
                if op in chosen or op in self._stops:
                    continue
                if op.data or op.weight:
                    chosen.add(op)
                    todo.append((op, op.inputs))
                else:
                    idle.add(op)
            if not todo:
                written = {v.storage for op in chosen for v in op.outputs if op in self._tape.writes.get(v.storage, ())}
                again = [op for op in idle - chosen if any(v.storage in written for v in op.outputs)]
                chosen.update(again)
                todo += [(op, op.inputs) for op in again]
        return sorted(chosen, key=operator.attrgetter("index"))

    # -- running them --------------------------------------------------------------------------------------------------

    def _constant(self, value: Value) -> Tensor:
        """The tensor of a value at which the slice begins; a parameter becomes a leaf."""
        if value.param is not None and value not in self._cuts:
            tensor = value.tensor.detach()
            if self._biases != 1.0 and tensor.ndim == 1:
                tensor = tensor * self._biases
            self.params[value.param] = tensor.requires_grad_() if tensor.is_floating_point() else tensor
            return self.params[value.param]
        tensor = value.tensor.detach()
        return tensor.clone() if value.storage in self._written else tensor

    def _run(self, op: Op) -> None:
        args, kwargs = self._given(op.args), {name: self._given(x) for name, x in op.kwargs.items()}
        func: Callable[..., Any] = op.func
        if op.name == "detach" and self._through_detach:
            func = torch.ops.aten.alias.default
        elif (op in self._statistics or (op.weight and not op.data and op.name in _SIZES)) and not self._live:
            func = partial(_FROZEN.get(op.name, _held), op.func)
        elif op.name.rstrip("_") in _POINTWISE and not self._is_of_statistics(op):
            func = partial(_unclipped, op.func)
        result = func(*args, **kwargs)
        results = (result,) if isinstance(result, Tensor) else [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for value, tensor in zip(op.outputs, results, strict=True):
            if value not in self._cuts:
                self._tensors[value] = tensor
        if self._is_of_statistics(op):
            self._of_statistics.update(op.outputs)
        if is_opaque(op.func) and not any(t.requires_grad for t in results):
            self.opaque.append(op)

    def _is_of_statistics(self, op: Op) -> bool:
        """Whether an op makes statistics that carry gradients, or computes with such statistics alone."""
        if op in self._statistics:
            return self._live and op.name not in NORM_OPS
        rest = [v for v in op.inputs if v not in self._of_statistics]
        return len(rest) < len(op.inputs) and all(v.tensor.numel() == 1 for v in rest)

    def _given(self, x: Any) -> Any:
        if isinstance(x, Value):
            return self[x]
        return type(x)(map(self._given, x)) if type(x) in (list, tuple) else x


# ---- norms with constant statistics ----------------------------------------------------------------------------------


def _held(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A reduction with a constant result."""
    with torch.no_grad():
        return func(*args, **kwargs)


def _layer_norm(
    func: Callable[..., Any], x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    _, mean, rstd = _held(func, x, shape, weight, bias, eps)
    return _affine((x - mean) * rstd, weight, bias), mean, rstd


def _rms_norm(func: Callable[..., Any], x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> Any:
    _, rstd = _held(func, x, shape, weight, eps)
    return _affine(x * rstd, weight, None), rstd


def _group_norm(
    func: Callable[..., Any],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    c: int,
    rest: int,
    groups: int,
    eps: float,
) -> Any:
    _, mean, rstd = _held(func, x, weight, bias, n, c, rest, groups, eps)
    y = ((x.reshape(n, groups, -1) - mean[..., None]) * rstd[..., None]).reshape(n, c, rest)
    weight, bias = (None if p is None else p[:, None] for p in (weight, bias))
    return _affine(y, weight, bias).reshape(x.shape), mean, rstd


def _batch_norm(
    func: Callable[..., Any], x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any, **kwargs: Any
) -> Any:
    _, mean, rstd, *more = _held(func, x, weight, bias, *rest, **kwargs)
    if not mean.numel():  # evaluation mode: the statistics are buffers, so the op is affine
        return func(x, weight, bias, *rest, **kwargs)

    def by_channel(p: Tensor) -> Tensor:
        return p.view(-1, *[1] * (x.ndim - 2))

    weight, bias = (None if p is None else by_channel(p) for p in (weight, bias))
    return _affine((x - by_channel(mean)) * by_channel(rstd), weight, bias), mean, rstd, *more


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).contiguous()  # like the op's own result: a view op may follow


def _unclipped(func: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """An elementwise function with derivative 1: a feature that it clips still belongs to its head."""
    with torch.no_grad():
        change: Tensor = func(x.clone(), *args, **kwargs) - x
    return x + change


_SIZES = frozenset("linalg_vector_norm norm var std var_mean std_mean".split())
"""Of parameters, the size scales something and is made of no single row."""

_POINTWISE = frozenset(
    """clamp clamp_max clamp_min elu gelu hardsigmoid hardswish hardtanh leaky_relu relu sigmoid silu softplus tanh
    threshold""".split()
)

_FROZEN: dict[str, Callable[..., Any]] = {
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "native_group_norm": _group_norm,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
}
NORM_OPS = frozenset(_FROZEN)
