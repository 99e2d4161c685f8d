"""Find the layers of a model that differ only in the values of their weights.

In: a model. Out: its `EqualGroup`s: siblings (the layers of a stack) whose module trees have the same classes,
parameter shapes and attributes. Attributes that do differ (a layer index, a window size) are listed: whether they
matter shows only when a layer runs, so `layers.py` watches whether they are read.
"""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST_GROUP = 16
"""Smallest group worth checking, since the first two layers and the last one are always recorded."""

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, enum.Enum, type)
# State of nn.Module itself. Parameters, buffers and children are compared separately.
_INTERNAL = frozenset(vars(nn.Module()))

AttributePath = tuple[str, str]
"""An attribute of a submodule: the submodule's name relative to the layer, and the attribute's name."""


@dataclass(eq=False)
class EqualGroup:
    """Layers that differ only in the values of their weights and in the attributes `differing`.

    Attributes:
        members: The layers, in the order in which their parent holds them.
        trees: All modules of each layer; corresponding modules have the same index.
        differing: Attributes that differ between members.
    """

    members: list[nn.Module]
    trees: dict[nn.Module, list[nn.Module]]
    differing: set[AttributePath] = field(default_factory=set)


def equal_groups(model: nn.Module) -> Iterator[EqualGroup]:
    """Yield groups of equal layers, outermost first. A layer is in at most one group."""
    taken: set[nn.Module] = set()
    for parent in model.modules():
        if parent in taken or len(parent._modules) < SMALLEST_GROUP:
            continue
        by_form: dict[object, list[nn.Module]] = {}
        for child in dict.fromkeys(parent.children()):
            if child._modules and (form := _form(child)) is not None:
                by_form.setdefault(form, []).append(child)
        for members in by_form.values():
            if len(members) >= SMALLEST_GROUP:
                trees = {member: list(member.modules()) for member in members}
                taken.update(*trees.values())
                paths = [path for path, _ in members[0].named_modules()]
                group = EqualGroup(members, trees)
                for member in members[1:]:
                    group.differing |= _differing(paths, trees[members[0]], trees[member])
                # Reads of an attribute cannot be watched if the class has an attribute of the same name.
                if not any(_in_class(members[0], path) for path in group.differing):
                    yield group


def renamed(like: list[nn.Module], layer: list[nn.Module], names: dict[int, str]) -> dict[str, str] | None:
    """Map the name of each tensor and module of `like` to the name of its counterpart in `layer`.

    Arguments:
        like: All modules of a layer.
        layer: All modules of another layer in the same group.
        names: Names in the model of parameters, buffers and modules, by `id`.

    Returns:
        The map, or None if the two layers share tensors or modules differently.
    """
    found: dict[str, str] = {}
    for ours, theirs in zip(_contents(like), _contents(layer), strict=True):
        a, b = names.get(id(ours)), names.get(id(theirs))
        if (a is None) != (b is None) or (a is not None and found.setdefault(a, b) != b):  # type: ignore[arg-type]
            return None
    return found if len(set(found.values())) == len(found) else None


def _contents(modules: list[nn.Module]) -> Iterator[Any]:
    for module in modules:
        yield module
        yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def _form(module: nn.Module) -> object | None:
    """Key that is the same for equal layers; None if hooks or an attribute change the module's forward."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return None
    children = tuple((name, None if c is None else _form(c)) for name, c in module._modules.items())
    if any(form is None and module._modules[name] is not None for name, form in children):
        return None
    tensors = tuple((n, _tensor_form(t)) for n, t in (*module._parameters.items(), *module._buffers.items()))
    return (type(module), module.training, tensors, children)


def _tensor_form(tensor: Tensor | None) -> object:
    if tensor is None:
        return None
    stride = tensor.stride() if tensor.layout == torch.strided else None
    return (type(tensor), tensor.shape, tensor.dtype, tensor.device, stride, tensor.requires_grad)


def _differing(paths: list[str], first: list[nn.Module], other: list[nn.Module]) -> set[AttributePath]:
    """Attributes, including buffers, whose values differ between two layers of the same form."""
    pairs = {id(a): b for a, b in zip(first, other, strict=False)}
    found: set[AttributePath] = set()
    for path, a, b in zip(paths, first, other, strict=False):
        ours, theirs = vars(a), vars(b)
        for name in ours.keys() | theirs.keys():
            if name not in _INTERNAL and not (
                name in ours and name in theirs and _same(ours[name], theirs[name], pairs)
            ):
                found.add((path, name))
        for name, buffer in a._buffers.items():
            if buffer is not None and not _same_numbers(buffer, b._buffers[name]):
                found.add((path, name))
    return found


def _same_numbers(a: Tensor, b: Tensor | None) -> bool:
    # Meta tensors have no values that a forward could read.
    return b is not None and (a is b or a.is_meta or torch.equal(a, b))


def _same(a: Any, b: Any, pairs: dict[int, nn.Module]) -> bool:
    """Whether no code can tell two attribute values apart. Objects of unknown classes must be identical."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return bool(a == b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y, pairs) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key], pairs) for key in a)
    if isinstance(a, nn.Module):
        return pairs.get(id(a)) is b
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__ and pairs.get(id(a.__self__)) is b.__self__
    if isinstance(a, functools.partial):
        return _same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), pairs)
    return False


def _in_class(layer: nn.Module, attribute: AttributePath) -> bool:
    """Whether removing the attribute from the instance is impossible or would uncover a class attribute."""
    path, name = attribute
    module = layer.get_submodule(path)
    return name not in vars(module) or hasattr(type(module), name)
