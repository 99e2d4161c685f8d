"""Which ops of a tape are products, softmaxes, reshapes, norms and the statistics of norms.

In: an op and, for patterns of several ops, the ops that read its results. Out: `Product`, `Softmax`, or sets of ops.
Only names of ATen ops are matched, never names of a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from torch import Tensor

from quack_fx.prove.replay import NORM_OPS
from quack_fx.prove.tape import Op, Tape, Value

Readers = Mapping[Op, Sequence[Op]]
"""For each op, the ops that read its results."""

_PRODUCTS: dict[str, tuple[int, int, int | None]] = {
    "mm": (0, 1, None),
    "bmm": (0, 1, None),
    "mv": (0, 1, None),
    "dot": (0, 1, None),
    "addmm": (1, 2, 0),
    "addmv": (1, 2, 0),
    "baddbmm": (1, 2, 0),
    "convolution": (0, 1, 2),
    "linear": (0, 1, 2),
    "matmul": (0, 1, None),
    "_grouped_mm": (0, 1, 3),
}
"""Argument indices of an op's two factors, and of what it adds to their product."""

_SOFTMAXES = {"_softmax": 1, "_safe_softmax": 1, "_log_softmax": 1, "_masked_softmax": 2}
"""Argument index of the axis that an op runs over."""

_REDUCTIONS = frozenset({"mean", "sum", "var", "var_mean", "std", "std_mean", "linalg_vector_norm", "norm", "amax"})

_SAME_NUMBERS = frozenset(
    """_reshape_alias _to_copy _unsafe_view alias clone contiguous expand permute reshape squeeze t transpose unsqueeze
    view""".split()
)

_ELEMENTWISE = _SAME_NUMBERS.difference({"permute", "t", "transpose", "reshape"}) | frozenset(
    """abs add addcdiv addcmul clamp clamp_max clamp_min copy detach div exp lift_fresh log maximum minimum mul neg pow
    reciprocal rsqrt rsub sqrt square sub""".split()
)

_SCALING = frozenset({"mul", "div", "sub", "rsub", "addcmul", "addcdiv"})

_LINEAR = (
    _ELEMENTWISE.difference({"abs", "exp", "log", "maximum", "minimum"})
    | _SAME_NUMBERS
    | _REDUCTIONS.difference({"amax"})
    | NORM_OPS
    | frozenset(
        """_conj as_strided cat complex constant_pad_nd diagonal empty_like fill flip gather im2col imag index index_put
        index_select masked_fill narrow real repeat resolve_conj resolve_neg roll scatter select select_scatter slice
        slice_scatter split split_with_sizes stack unbind unfold unsafe_split view_as_complex view_as_real where zero
        zeros_like""".split()
    )
)

_SCATTERS = frozenset("scatter_add scatter_reduce index_add index_reduce".split())

_NEAR = 12
"""Most ops between a statistic and the features that it is computed from or applied to."""


@dataclass(eq=False, repr=False)
class Product:
    """A product of two tensors summed over an axis.

    Attributes:
        op: The op whose first result is the product.
        factors: The left and the right factor.
        added: What the op adds to the product, or None.
        reader: The op that reads the factors: `op`, or the multiplication before a sum.
        axes: The contracted axis of each factor, counted from the end; None unless each has exactly one.
    """

    op: Op
    factors: tuple[Value, Value]
    added: Value | None
    reader: Op
    axes: tuple[int, int] | None


@dataclass(eq=False, repr=False)
class Softmax:
    """A softmax.

    Attributes:
        op: The softmax op, or the exponential of a softmax written by hand.
        logits: Its input.
        dim: The axis it runs over.
        groups: The group of each entry of that axis, int64, if it runs over each group separately; else None.
    """

    op: Op
    logits: Value
    dim: int
    groups: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits."""
        return tuple(self.logits.tensor.shape)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that were running, outermost first."""
        return self.op.modules


def base_name(op: Op) -> str:
    """Name of an op without the underscore of an in-place op."""
    return op.name.rstrip("_")


def is_linear(op: Op) -> bool:
    """Whether an op rearranges, scales, shifts or normalises features."""
    return base_name(op) in _LINEAR or _is_depthwise(op)


def makes_rotation(op: Op) -> bool:
    """Whether an op computes a rotation from angles; its result holds no features."""
    return base_name(op) in ("sin", "cos", "polar")


def keeps_numbers(op: Op) -> bool:
    """Whether an op only changes shape or dtype."""
    return base_name(op) in _SAME_NUMBERS


def product_of(op: Op) -> Product | None:
    """The product that an op computes: a matrix product, a convolution, or the sum of an elementwise product."""
    if op.name in _PRODUCTS:
        left, right, added = _PRODUCTS[op.name]
        summand = op.args[added] if added is not None and added < len(op.args) else None
        one, two = op.args[left], op.args[right]
        if not isinstance(one, Value) or not isinstance(two, Value) or _is_depthwise(op):
            return None
        axes = (-1, -2) if op.name in ("mm", "bmm", "addmm", "baddbmm", "matmul") else None
        return Product(op, (one, two), summand if isinstance(summand, Value) else None, op, axes)
    if op.name != "sum" or not op.inputs or op.inputs[0].op is None or op.inputs[0].op.name != "mul":
        return None
    mul, dims = op.inputs[0].op, _dims(op)
    if len(mul.inputs) != 2 or mul.inputs[0] is mul.inputs[1] or len(dims) != 1:
        return None
    axis = dims[0] - op.inputs[0].tensor.ndim
    shapes = [v.tensor.shape for v in mul.inputs]
    if any(len(s) < 2 or len(s) + axis < 0 or s[axis] == 1 for s in shapes):
        return None  # a factor without the summed axis only scales
    return Product(op, (mul.inputs[0], mul.inputs[1]), None, mul, (axis, axis))


def _is_depthwise(op: Op) -> bool:
    """Whether an op is a depthwise convolution, which mixes no features."""
    return op.name == "convolution" and op.args[8] > 1 and op.args[8] == op.inputs[1].tensor.shape[0]


def softmax_of(op: Op, readers: Readers) -> Softmax | None:
    """The softmax that an op computes: a softmax op, or an exponential divided by its own sum."""
    if not (op.data or op.weight) or not op.inputs or not op.inputs[0].tensor.ndim:
        return None
    logits = op.inputs[0]
    if op.name in _SOFTMAXES:
        i = _SOFTMAXES[op.name]
        dim = op.args[i] if len(op.args) > i else None
        return Softmax(op, logits, (-1 if dim is None else dim) % logits.tensor.ndim)
    if base_name(op) != "exp":
        return None
    sums = [reader for reader in readers[op] if reader.name == "sum"]
    subtracted = (source for minus in op.reads if base_name(minus) == "sub" for source in minus.reads)
    sums += [source for source in subtracted if source.name == "logsumexp"]
    over_one = [dims[0] for reduction in sums if len(dims := _dims(reduction)) == 1]
    return Softmax(op, logits, over_one[0]) if over_one else _softmax_over_groups(op, logits, readers)


def _softmax_over_groups(op: Op, logits: Value, readers: Readers) -> Softmax | None:
    """The softmax of an exponential divided by sums over groups of its entries."""
    if not any(base_name(reader) in ("div", "mul") for reader in readers[op]):
        return None
    for reader in readers[op]:
        if base_name(reader) in _SCATTERS and reader.args[3] is op.out:
            dim, index = reader.args[1] % logits.tensor.ndim, reader.args[2].tensor
            return Softmax(op, logits, dim, index if index.ndim == 1 else index.movedim(dim, 0).flatten(1)[:, 0])
    return None


def weighs_by_groups(softmax: Softmax, readers: Readers) -> Iterator[Product]:
    """Elementwise products of attention weights with values that are then summed by group."""
    todo, seen = [softmax.op], set[Op]()
    while todo:
        for reader in readers[todo.pop()]:
            if reader in seen or base_name(reader) not in _ELEMENTWISE | _SAME_NUMBERS:
                continue
            seen.add(reader)
            if base_name(reader) == "mul" and len(reader.inputs) == 2 and _is_scattered(reader, readers):
                yield Product(reader, (reader.inputs[0], reader.inputs[1]), None, reader, None)
            else:
                todo.append(reader)


def _is_scattered(op: Op, readers: Readers) -> bool:
    return any(base_name(r) in _SCATTERS or (keeps_numbers(r) and _is_scattered(r, readers)) for r in readers[op])


def statistics(tape: Tape, readers: Readers) -> frozenset[Op]:
    """Norms, and reductions of features whose result scales or shifts the same features."""
    live = (op for op in tape.ops if op.data or op.weight)
    return frozenset(op for op in live if op.name in NORM_OPS or _comes_back(tape, readers, op))


def _comes_back(tape: Tape, readers: Readers, reduction: Op) -> bool:
    """Whether the result of a reduction scales or shifts the features it was computed from."""
    if reduction.name not in _REDUCTIONS or not reduction.inputs or product_of(reduction) is not None:
        return False
    features = _near(tape, reduction, {reduction.inputs[0]})
    todo = [reduction]
    seen: set[Op] = set()
    while todo and len(seen) < _NEAR:
        op = todo.pop(0)
        for reader in readers[op]:
            if reader in seen or base_name(reader) not in _ELEMENTWISE:
                continue
            seen.add(reader)
            todo.append(reader)
            if base_name(reader) in _SCALING:
                others = {v for v in reader.inputs if op not in tape.behind(v, reader)}
                larger = {v for v in others if v.tensor.numel() > reduction.out.tensor.numel()}
                if features & _near(tape, reader, larger):
                    return True
    return False


def _near(tape: Tape, reader: Op, values: Set[Value]) -> set[Value]:
    """Some values, and those they are computed from by a few elementwise ops."""
    found, todo = set(values), [(v, reader) for v in values]
    while todo and len(found) < _NEAR:
        value, before = todo.pop(0)
        for op in tape.behind(value, before):
            if base_name(op) in _ELEMENTWISE and (op.data or op.weight):
                new = {v for v in op.inputs if v not in found and v.tensor.numel() >= value.tensor.numel()}
                found |= new
                todo += [(v, op) for v in new]
    return found


def _dims(reduction: Op) -> list[int]:
    """Axes of a reduction, counted from 0."""
    ndim = reduction.inputs[0].tensor.ndim
    given = reduction.args[1] if len(reduction.args) > 1 else None
    dims = list(range(ndim)) if given is None else [given] if isinstance(given, int) else list(given)
    return [d % ndim for d in dims] if ndim else []
