"""Run one op whose inputs may be a mix of fake (meta) and real tensors.

In: an op and its arguments. Out: its result. The first rule that applies is used:

1. No input is fake: the op runs on the CPU, whatever device was requested, so masks, positions and tables that depend
   on no parameter have their real values. A result that is too large is fake.
2. The result does not depend on fake values (`zeros_like`, `new_ones`, ...): it is real.
3. The op needs the values of a fake tensor (`nonzero`, `item`, boolean indexing): it returns a canned answer, which the
   recording lists. This is mostly routing, so the answers leave out no route that they can take: tokens are spread over
   all experts, and every expert has some.
4. Otherwise the op runs on meta tensors, which computes shapes and strides only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from quack_fx.graph.capture.answers import Answers
from quack_fx.graph.forward.machine import available_memory

REAL_LIMIT = 1 << 24
"""Largest real table in a hybrid recording, in elements. Larger ones are fake, to save memory."""

# empty_like and new_empty are left out: their results are about to be filled, mostly with fake values.
_LIKE = frozenset({"zeros_like", "ones_like", "full_like", "rand_like", "randn_like"})
_NEW = frozenset({"new_zeros", "new_ones", "new_full"})
_NUMBERS = frozenset({"_local_scalar_dense", "item"})
_TRUTHS = frozenset({"is_nonzero", "equal", "allclose"})
_UNIQUE = frozenset({"_unique", "_unique2", "unique_dim", "unique_consecutive"})
READS = _NUMBERS | _TRUTHS | _UNIQUE | {"nonzero", "nonzero_numpy", "argwhere", "masked_select"}
"""Ops by which a forward reads values, and may choose what it does next."""

NUMBER = "a number out of a tensor"
"""Entry of `canned` for a made-up Python number, which the forward may have used as a factor or an index."""


def run_mixed(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    taint: Callable[[Tensor], Tensor],
    canned: list[str],
    answers: Answers,
    most: int | None,
) -> Any:
    """Run `func` by the rules above.

    Arguments:
        func: The op (an OpOverload or a higher-order op).
        args: Positional arguments, with real and meta tensors in any mix.
        kwargs: Keyword arguments, likewise.
        taint: Called with a real tensor that is about to receive fake values in place; returns its fake twin.
        canned: List to which the names of ops with a canned answer are appended.
        answers: Values of fake tensors that are converted to Python numbers.
        most: Largest real result of an op without tensor inputs, in elements. Every real result is also limited to a
            part of the available memory. None: no limits.

    Returns:
        The op's result. An in-place op returns the tensor it was given (its twin after `taint`).
    """
    name = name_of(func)
    leaves = tree_leaves((args, kwargs))
    fake = any(isinstance(x, Tensor) and x.is_meta for x in leaves)
    if not isinstance(func, torch._ops.OpOverload):
        return _higher_order(func, name, args, kwargs, fake)
    if not fake:
        return _real(func, name, args, kwargs, leaves, most)
    if name in _LIKE or name in _NEW:
        return _value_free(func, name, args, kwargs)
    if name in _NUMBERS | _TRUTHS | _UNIQUE:
        canned.append(NUMBER)
        return _answer(name, args[0], answers)
    answer = _canned_answer(name, args, kwargs)
    if answer is not None:
        canned.append(name)
        return answer[0]
    args, kwargs = _host_copies(name, args, kwargs, canned)
    if func._schema.is_mutable:
        args, kwargs = _mutation_targets(func, args, kwargs, taint)
    return _on_meta(func, args, kwargs)


def name_of(func: Any) -> str:
    """Name of an op without namespace and overload: "bmm"."""
    name: str = func.name() if callable(getattr(func, "name", None)) else str(func)
    return name.split("::")[-1].split(".")[0]


def _real(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], most: int | None
) -> Any:
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    if most is not None and _may_be_large(name, leaves) and _is_large(func, args, kwargs, leaves, most):
        return _on_meta(func, args, kwargs)
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "cpu":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return func(*args, **kwargs)


def _may_be_large(name: str, leaves: list[Any]) -> bool:
    """Cheap test that rules out most ops: few results have more elements than the product of all argument sizes."""
    sizes = [x.numel() if isinstance(x, Tensor) else x if type(x) is int else 1 for x in leaves]
    return math.prod(max(1, n) for n in sizes) ** (2 if name == "eye" else 1) > REAL_LIMIT


def _is_large(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], most: int) -> bool:
    """Whether a result exceeds the limit for real tables, or what this machine can hold."""
    if func.is_view or func._schema.is_mutable:
        return False
    try:
        made = [t for t in tree_leaves(_on_meta(func, args, kwargs)) if isinstance(t, Tensor)]
    except Exception:  # its size depends on the values of an input, and is at most that input's size
        return False
    if not any(isinstance(x, Tensor) for x in leaves) and sum(t.numel() for t in made) > most:
        return True
    size = sum(t.numel() * t.element_size() for t in made)
    return size > REAL_LIMIT and size > available_memory() // 8


def _value_free(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    like = args[0]
    size = torch.Size(args[1]) if name in _NEW else like.shape
    if size.numel() > REAL_LIMIT:
        fake: Tensor = _on_meta(func, args, kwargs)
        return fake
    # One element of the right dtype stands for the fake tensor; its values are never read.
    stand_in = torch.zeros((), dtype=like.dtype).expand(like.shape)
    result: Tensor = func(stand_in, *args[1:], **{**kwargs, "device": torch.device("cpu")})
    return result


def _answer(name: str, x: Tensor, answers: Answers) -> Any:
    """Return a made-up number, truth value, or tensor in which a single value occurs."""
    if name in _NUMBERS:
        return answers.number(x)
    if name in _TRUTHS:
        return answers.truth()
    value = torch.tensor([answers.number(x)], dtype=x.dtype)
    return value, torch.zeros(x.shape, dtype=torch.long), torch.full((1,), x.numel())


def _canned_answer(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any] | None:
    """Return a made-up result in a 1-tuple, or None if the op needs none."""
    if not args or not isinstance(args[0], Tensor):
        return None
    x = args[0]
    if name == "repeat_interleave":
        return (torch.arange(x.numel()),)  # each once
    if name in ("nonzero", "nonzero_numpy", "argwhere"):
        if x.dim() == 1:
            return (torch.arange(len(x)).unsqueeze(1),)  # all: these may be experts
        return (torch.tensor([[n // 2 for n in x.shape]]).view(1, x.dim()),)  # the middle: forwards often crop borders
    if name == "masked_select":
        return (x.new_empty((1,)),)
    if name == "bincount":
        bins = max(1, kwargs.get("minlength", args[2] if len(args) > 2 else 1))
        return (torch.arange(x.numel()).remainder(bins).bincount(minlength=bins),)
    return None


def _host_copies(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], canned: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Adapt arguments that meta tensors cannot take: target devices, boolean masks, split sizes that were made up."""
    if name == "_to_copy" and kwargs.get("device") is not None:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"):
        index: list[Tensor | None] = []
        axis = 0
        for i in args[1]:
            if i is None or i.dtype not in (torch.bool, torch.uint8):
                index.append(i)
                axis += 1
                continue
            _check_mask(i, args[0], axis)
            axis += i.dim()
            if i.is_meta:
                canned.append("boolean mask")
                index.extend(torch.zeros(1, dtype=torch.long) for _ in range(i.dim()))
            else:
                index.extend(i.nonzero().unbind(1))
        args = (args[0], index, *args[2:])
        if "put" in name and not canned:
            _check_values(args[0], index, args[2])
    if name == "split_with_sizes" and sum(args[1]) != args[0].shape[args[2] if len(args) > 2 else 0]:
        sizes, dim = list(args[1]), args[2] if len(args) > 2 else 0
        canned.append("split sizes")
        sizes[-1] += args[0].shape[dim] - sum(sizes)
        args = (args[0], sizes, dim)
    return args, kwargs


def _check_mask(mask: Tensor, indexed: Tensor, start: int) -> None:
    """Raise torch's own error for a mask of the wrong shape: converted to indices, a smaller mask would pass.

    Raises:
        IndexError: The mask has another shape than the axes that it indexes.
    """
    for n, size in enumerate(mask.shape):
        if size != indexed.shape[start + n]:
            raise IndexError(
                f"The shape of the mask {list(mask.shape)} at index {n} does not match the shape of the indexed "
                f"tensor {list(indexed.shape)} at index {start + n}"
            )


def _check_values(target: Tensor, index: list[Tensor | None], values: Tensor) -> None:
    """Raise torch's own error for values of the wrong shape, which meta tensors take.

    Raises:
        RuntimeError: The values cannot be broadcast to the indexed elements.
    """
    indexed = tuple(slice(None) if i is None else i.to("meta") for i in index)
    places = target.to("meta")[indexed].shape
    try:
        values.to("meta").expand(places)
    except RuntimeError:
        raise RuntimeError(
            f"shape mismatch: value tensor of shape {list(values.shape)} cannot be broadcast to indexing result of "
            f"shape {list(places)}"
        ) from None


def _mutation_targets(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], taint: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the real tensors that this op writes fake values into by fake ones."""
    new_args, new_kwargs = list(args), dict(kwargs)
    for i, spec in enumerate(func._schema.arguments):
        if spec.alias_info is None or not spec.alias_info.is_write:
            continue
        holder: Any = new_args if i < len(args) else new_kwargs
        where: Any = i if i < len(args) else spec.name
        value = holder[where] if i < len(args) or spec.name in new_kwargs else None
        if isinstance(value, Tensor) and not value.is_meta:
            holder[where] = taint(value)
    return tuple(new_args), new_kwargs


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    args, kwargs = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to("meta"), (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("meta")}
    if "grouped_mm" in func.name():
        # Its meta kernel accepts only bfloat16; on some devices the op accepts other dtypes.
        wide = args[0].dtype
        args = tree_map_only(Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, args)
        return func(*args, **kwargs).to(wide)
    return func(*args, **kwargs)


def _higher_order(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], fake: bool) -> Any:
    """Run flex_attention: its output has the shape of the queries and the width of the values."""
    if name != "flex_attention":
        raise NotImplementedError(f"the higher-order op {name} cannot be recorded")
    if not fake:
        with torch._C._EnableTorchFunction():  # it indexes its masks with tensors, in a function mode
            return func(*args, **kwargs)
    query, value = args[0].to("meta"), args[2]
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return out, lse, lse
