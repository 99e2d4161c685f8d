"""The inputs that layers take: ids for an Embedding, features for a Linear, images for a convolution.

`evidence` gives those of the layers that an argument is passed to; `before` inverts the view ops between the two.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.targets.inputs.uses import Taken, Use
from quack_fx.targets.inputs.values import Array, Size, numbers

_SIDES = ("img_size", "image_size", "input_size")


def taken_by(module: nn.Module, model: nn.Module) -> Iterator[Array]:
    """Inputs that a layer takes, by its type or by the attributes with its width; `model` has the sizes of images."""
    shapes: list[tuple[Size, ...]] = []
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield Array("ids", ("B", "T"), module.num_embeddings)
    elif isinstance(module, nn.Conv1d):
        shapes = [("B", module.in_channels, length) for length in ("T", 64, 1024)]
    elif isinstance(module, nn.Conv2d):
        shapes = [("B", module.in_channels, side, side) for side in sides(model, module)]
    elif isinstance(module, nn.Conv3d):
        frames = max(4, int(module.kernel_size[0]))
        shapes = [("B", module.in_channels, frames, side, side) for side in sides(model, module)]
    elif isinstance(width := _width(module), int):
        patch = math.isqrt(width // 3)
        takes_patches = width == 3 * patch**2 and patch > 1
        shapes = [("B", 3, side, side) for side in declared_sides(model)] if takes_patches else []
        shapes += [("B", "T", width), ("B", width)]
    dtype = _dtype(module, model) if shapes else torch.float32
    yield from (Array("float", shape, dtype=dtype) for shape in shapes)


def _width(module: nn.Module) -> Any:
    """Number of input features of a Linear, a norm or an attention; None for other layers."""
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple) and shape:
        return shape[-1]
    return next((v for a in ("in_features", "embed_dim") if isinstance(v := getattr(module, a, None), int)), None)


def _dtype(module: nn.Module, model: nn.Module) -> torch.dtype:
    for source in (module, model):
        weight = next((p for p in source.parameters() if p.is_floating_point()), None)
        if weight is not None:
            # Weights of one byte are quantized, their inputs are not.
            return weight.dtype if weight.element_size() > 1 else torch.float32
    return torch.float32


def any_layer(model: nn.Module, limit: int) -> list[Array]:
    """The inputs of all layers of a model, in order, without repeats."""
    found: dict[tuple[Any, ...], Array] = {}
    for module in model.modules():
        for array in taken_by(module, model):
            same_ids = (array.kind, array.high) if array.kind == "ids" else (array.kind, array.shape)
            found.setdefault(same_ids, array)
        if len(found) > limit:
            break
    return list(found.values())


WIDEST = 1 << 20
"""The widest token that is tried for a parameter of the model itself. Wider ones are tables, such as a vocabulary."""


def own_parameters(model: nn.Module) -> list[Array]:
    """Inputs for a model that multiplies with parameters of its own: axes may count features, and rows may be ids."""
    dtype = _dtype(model, model)
    found: list[Array] = []
    for rows, columns in [p.shape for p in model.parameters() if p.dim() == 2 and min(p.shape) > 1][:2]:
        found += [Array("float", ("B", "T", n), dtype=dtype) for n in dict.fromkeys((rows, columns)) if n <= WIDEST]
        found.append(Array("ids", ("B", "T"), rows))
    return found


def evidence(use: Use, model: nn.Module) -> list[Array]:
    """Inputs for an argument, by the layers that it is passed to."""
    found: list[Array] = []
    highest = [a.high for t in use.taken for a in _of(t, model) if a.kind == "ids"]
    for taken in use.taken:
        for array in _of(taken, model):
            if not _may_be_image(array, taken):
                continue
            shape = before(array, taken.views, use)
            if shape is not None:
                array = replace(array, shape=shape)
                found.append(replace(array, high=min(highest)) if array.kind == "ids" else array)
    if found and found[0].kind == "float" and len(found[0].shape) == 3 and isinstance(found[0].shape[1], int):
        layer = use.taken[0].by
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 1:  # spectrograms of 80 mel bins, as one channel
            found.insert(0, replace(found[0], shape=("B", 64, 80)))
    return list(dict.fromkeys(found))


def _may_be_image(array: Array, taken: Taken) -> bool:
    """Whether an argument may be an image: where the layer takes tokens, only if it is reshaped into patches before."""
    takes_tokens = isinstance(taken.by, nn.Module) and _width(taken.by) is not None
    reshaped = any(step in ("reshape", "einops") for step, *_ in taken.views)
    return len(array.shape) != 4 or not takes_tokens or reshaped


def _of(taken: Taken, model: nn.Module) -> list[Array]:
    """Inputs that a layer takes, or a matrix that is used like one."""
    by = taken.by
    if isinstance(by, Tensor):
        if taken.how == "rows":
            return [Array("ids", ("B", "T"), by.shape[0])]
        dtype = by.dtype if by.is_floating_point() else torch.float32
        width = by.shape[-2 if taken.how == "matrix" else -1]
        return [Array("float", ("B", "T", width), dtype=dtype), Array("float", ("B", width), dtype=dtype)]
    if "mask" in taken.how:
        padding = "padding" in taken.how
        return [Array("padding" if padding else "bool", ("B", "T") if padding else ("T", "T"))]
    if taken.how in ("hx", "output_size", "offsets") or (isinstance(by, nn.RNNBase) and taken.how != "input"):
        return []
    if isinstance(by, nn.RNNBase):
        width = by.input_size
    elif isinstance(by, nn.Bilinear):
        width = by.in1_features if taken.how == "input1" else by.in2_features
    elif isinstance(by, nn.MultiheadAttention):
        width = {"key": by.kdim, "value": by.vdim}.get(taken.how, by.embed_dim)
    else:
        layers = by.modules() if type(by).forward.__module__.startswith("torch.nn.modules.transformer") else [by]
        return next((found for layer in layers if (found := list(taken_by(layer, model)))), [])
    return [Array("float", ("B", "T", width), dtype=_dtype(by, model))]


def before(array: Array, views: tuple[tuple[Any, ...], ...], use: Use) -> tuple[Size, ...] | None:
    """The shape of an argument that these view ops turn into `array`; None where they cannot."""
    shape: list[Size] = list(array.shape)
    last = shape[-1]
    if array.kind == "ids" and any(step[0] == "drop" for step in views):
        shape = ["B"]  # one column of a table: an id for each sequence
    for number, (step, *given) in reversed(list(enumerate(views))):
        if step == "reshape":
            return with_rank(array, list(array.shape), use.rank)
        if step == "einops":
            made = _before_einops(shape, *given)
            if made is None:
                return None
            shape = made
        if step == "swap":
            a, b = given
            if not all(-len(shape) <= axis < len(shape) for axis in given):
                return None
            shape[a], shape[b] = shape[b], shape[a]
        elif step == "permute":
            if len(given[0]) != len(shape):
                return None
            moved = list(shape)
            for to, origin in enumerate(given[0]):
                moved[origin] = shape[to]
            shape = moved
        elif step == "new":
            axis = given[0] if given[0] >= 0 else len(shape) + given[0]
            if not 0 <= axis < len(shape):
                return None
            is_features = array.kind == "float" and number == len(views) - 1 and axis == len(shape) - 1
            if is_features and last != 1:
                return None
            if not is_features and shape[axis] == last and isinstance(last, int) and last > 1:
                return None
            if array.kind == "float" and last == 1 and axis < len(shape) - 1 and isinstance(shape[axis], str) and axis:
                return None  # the new axis is that of the one feature
            del shape[axis]
        elif step == "drop":
            axis = given[0] if given[0] >= 0 else len(shape) + 1 + given[0]
            if not 0 <= axis <= len(shape):
                return None
            count = _fields(use, number, given[0])
            shape.insert(axis, count if count > 1 else "T")
    return with_rank(array, shape, use.rank)


def _before_einops(shape: list[Size], pattern: str, lengths: tuple[tuple[str, int], ...]) -> list[Size] | None:
    """The shape that einops' rearrange turns into `shape`; axes of unknown size get the number of tokens."""
    left, right = (
        [re.findall(r"\w+", axis) for axis in re.findall(r"\([^)]*\)|\S+", side)] for side in pattern.split("->")
    )
    if len(right) != len(shape):
        return None
    known: dict[str, Size] = {"1": 1, **dict(lengths)}
    for names, size in zip(right, shape, strict=True):
        unknown = [name for name in names if name not in known]
        if len(names) == 1:
            known.setdefault(names[0], size)
        elif isinstance(size, int) and len(unknown) == 1:
            others = math.prod(numbers(known[name] for name in names if name in known))
            if size % others:
                return None
            known[unknown[0]] = size // others
    made: list[Size] = []
    for names in left:
        sizes: list[Size] = [known.get(name, "T") for name in names]
        made.append(sizes[0] if len(sizes) == 1 else math.prod(numbers(sizes)))
    return made


def _fields(use: Use, number: int, axis: int) -> int:
    """Least size of an axis that the forward indexes with constants, as it does with columns of a table."""
    steps = [views[number] for views in use.steps if len(views) > number and views[number][:2] == ("drop", axis)]
    return max((step[2] + 1 if step[2] >= 0 else -step[2] for step in steps), default=1)


def with_rank(array: Array, shape: list[Size], rank: int | None) -> tuple[Size, ...] | None:
    """A shape with the rank that the forward requires, by adding or dropping axes of tokens; None if impossible."""
    if rank is None or rank == len(shape):
        return tuple(shape)
    if array.kind == "ids":
        return ("T",) if rank == 1 else ("B", *[3] * (rank - 2), "T") if rank else ()
    if len(array.shape) > 3:  # an image: add an axis of frames, or drop a single channel
        if rank == len(shape) + 1:
            return (shape[0], 4, *shape[1:])
        return (shape[0], *shape[2:]) if rank == len(shape) - 1 and shape[1] == 1 else None
    if rank > len(shape):
        extra = rank - len(shape)
        return (*shape[:1], *["T"] * extra, *shape[1:])
    return (*shape[:1], *shape[len(shape) - rank + 1 :]) if rank else None


def sides(model: nn.Module, conv: nn.Conv2d | nn.Conv3d) -> list[int]:
    """Side lengths of a square image: declared ones, those that fit learned positions, and common ones."""
    stride = conv.stride[-1]
    learned = []
    for parameter in model.parameters():
        if parameter.dim() in (2, 3) and parameter.shape[-1] == conv.out_channels:
            for extra in (0, 1):  # with a class token
                count = parameter.shape[-2] - extra
                if count > 1 and math.isqrt(count) ** 2 == count:
                    learned.append(math.isqrt(count) * int(stride))
    return list(dict.fromkeys([*declared_sides(model), *learned, 32, 224, 64]))


def declared_sides(model: nn.Module) -> list[int]:
    """Image sizes that modules declare."""
    found = []
    for module in itertools.islice(model.modules(), 8):
        for name in _SIDES:
            size = getattr(module, name, None) or getattr(getattr(module, "config", None), name, None)
            size = size[0] if isinstance(size, tuple | list) and size else size
            if isinstance(size, int):
                found.append(size)
    return found
