"""Check a layout against a model, resolve its parameter names and count its weights.

In: a `QKLayout` and a model, plain or wrapped. Out: a dict from layout name to parameter, or a one-line error that
names the mismatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from quack_fx.errors import LayoutError
from quack_fx.layout.sites import QKLayout, Range, WeightBlock, merged, with_parameters

if TYPE_CHECKING:
    from torch import nn

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""Segments that torch.compile and activation checkpointing insert anywhere in parameter names."""


def check_layout(layout: QKLayout, model: nn.Module) -> None:
    """Raise if a layout does not fit a model.

    Raises:
        LayoutError: Under the same conditions as `layout_params`.

    Example:
        >>> check_layout(find_qk_pairs(model, tokens), model)
    """
    layout_params(layout, model)


def layout_params(layout: QKLayout, model: nn.Module) -> dict[str, nn.Parameter]:
    """Look up every parameter that a layout names.

    Both the model and the model the layout was found on may be wrapped: name segments added by torch.compile,
    activation checkpointing and DistributedDataParallel are ignored on both sides.

    Arguments:
        layout: The layout.
        model: The model it was found on, or the same model wrapped, sharded or loaded elsewhere.

    Returns:
        The parameter and bias of every block, keyed by their names in the layout.

    Raises:
        LayoutError: A parameter is missing or empty, an axis, range or bias does not fit its shape, two names refer to
            the same tensor, a name is ambiguous, or FSDP1 has flattened the model.
    """
    given = dict(model.named_parameters(remove_duplicate=False))
    if any(name.rpartition(".")[2].startswith("_flat_param") for name in given) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    ):
        raise LayoutError(
            "model is wrapped in FullyShardedDataParallel (FSDP1), which flattens weights into _flat_param and loses "
            "their rows; shard it with torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    bare = _inside(given)
    params: dict[str, nn.Parameter] = {}
    for site in layout.sites:
        for _, block in site.blocks():
            for name in filter(None, (block.param, block.bias)):
                if name not in params:
                    params[name] = _find(name, given, bare, site.name)
            _check_block(block, params, site.name)
    seen: dict[int, str] = {}
    for name, param in params.items():
        if seen.setdefault(id(param), name) != name:
            raise LayoutError(
                f"layout names {seen[id(param)]!r} and {name!r}, which are one tied tensor in this model; "
                "find the pairs again on the model as it is trained"
            )
    return params


def qk_count(layout: QKLayout, shapes: Mapping[str, Sequence[int]]) -> int:
    """Count the weight and bias elements in the layout's blocks, each element once.

    Arguments:
        layout: The layout.
        shapes: Parameter shapes by name. A parameter that is missing here counts as empty.
    """
    rows: dict[tuple[str, int], set[Range]] = {}
    for site in layout.sites:
        for _, block in site.blocks():
            ranges = {r for head in block.heads for r in head}
            rows.setdefault((block.param, block.axis), set()).update(ranges)
            if block.bias:
                rows.setdefault((block.bias, 0), set()).update(ranges)
    total = 0
    for (param, axis), ranges in rows.items():
        shape = shapes.get(param, ())
        if axis < len(shape) and shape[axis]:
            count = sum(stop - start for start, stop in merged(ranges))
            total += count * (math.prod(shape) // shape[axis])
    return total


def without_wrappers(layout: QKLayout) -> QKLayout:
    """Return the layout with wrapper segments removed from its parameter names."""
    return _renamed(layout, bare_name)


def with_bare_names(layout: QKLayout, model: nn.Module) -> tuple[QKLayout, dict[str, nn.Parameter]]:
    """Rename a layout's parameters to their bare names in a model: those a training program uses.

    Arguments:
        layout: The layout.
        model: The model it was found on, or the same model wrapped or sharded.

    Returns:
        The layout, with `bare_name` applied to the parameter names of this model, and its parameters by bare name.

    Raises:
        LayoutError: Under the same conditions as `layout_params`, or if two parameters share a bare name.
    """
    params, given = layout_params(layout, model), dict(model.named_parameters(remove_duplicate=False))
    known = given | {bare_name(name): param for name, param in given.items()}
    names: dict[str, str] = {}
    for name, param in params.items():
        mine = [bare_name(own) for own, other in given.items() if other is param]
        if not (found := [own for own in mine if known[own] is param]):
            raise LayoutError(
                f"another parameter is called {mine[0]!r} without its wrappers, as {name!r} of the layout is; "
                "rename the attribute 'module' of this model"
            )
        names[name] = name if name in found else found[0]
    return _renamed(layout, names.__getitem__), {names[name]: param for name, param in params.items()}


def _renamed(layout: QKLayout, rename: Callable[[str], str]) -> QKLayout:
    return replace(layout, sites=tuple(with_parameters(site, rename) for site in layout.sites))


def bare_name(name: str) -> str:
    """Remove wrapper segments from a parameter name."""
    path = [segment for segment in name.split(".") if segment not in _WRAPPERS]
    return ".".join(path[1:] if path[0] == "module" else path)  # DistributedDataParallel wraps at the root only


def _inside(given: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Parameters by name without wrapper segments, and without a leading `module` if every name has one."""
    names = {name: [part for part in name.split(".") if part not in _WRAPPERS] for name in given}
    wrapped = all(path[0] == "module" for path in names.values())
    return {".".join(path[wrapped:]): given[name] for name, path in names.items()}


def _find(name: str, given: Mapping[str, nn.Parameter], bare: Mapping[str, nn.Parameter], site: str) -> nn.Parameter:
    """Resolve a layout name, which may come from the wrapped model or from the model inside."""
    found = given.get(name), bare.get(name)
    if found[0] is not None and found[1] is not None and found[0] is not found[1]:
        raise LayoutError(
            f"site {site!r} of the layout names {name!r}, which is one parameter of this model and another one of its "
            "'module'; use the layout with the model inside"
        )
    meant = next((param for param in (*found, bare.get(bare_name(name))) if param is not None), None)
    if meant is not None:
        return meant
    close = get_close_matches(name, given, n=1)
    hint = f" (closest: {close[0]!r})" if close else ""
    raise LayoutError(
        f"site {site!r} of the layout names {name!r}, which is no parameter of this model{hint}; "
        "find the pairs again on this model"
    )


def _check_block(block: WeightBlock, params: Mapping[str, nn.Parameter], site: str) -> None:
    """Raise if a block's axis, ranges or bias do not fit the shapes of its parameters."""
    where = f"site {site!r} of the layout"
    shape = tuple(params[block.param].shape)
    again = "find the pairs again on this model"
    if 0 in shape:
        raise LayoutError(
            f"{where} has rows of {block.param!r}, which is empty here, as ZeRO-3 leaves weights; use FSDP2 "
            "(fully_shard), or another way to train that keeps the shapes of weights"
        )
    if not 0 <= block.axis < len(shape):
        raise LayoutError(
            f"{where} has rows along axis {block.axis} of {block.param!r}, whose shape is {shape}; {again}"
        )
    for start, stop in (r for ranges in block.heads for r in ranges):
        if not 0 <= start < stop <= shape[block.axis]:
            raise LayoutError(
                f"{where} has the rows [{start}, {stop}] along axis {block.axis} of {block.param!r}, "
                f"whose shape is {shape}; {again}"
            )
    # A bias may be shorter than the weight (BEiT: the query rows of a fused weight) or longer (MultiheadAttention: one
    # bias for three weights), but it needs an entry for each row of the block.
    if block.bias is None:
        return
    entries = max((stop for ranges in block.heads for _, stop in ranges), default=0)
    length = next(iter(params[block.bias].shape), 0)
    if length < entries:
        raise LayoutError(
            f"{where} pairs {block.param!r} with the bias {block.bias!r} of shape {tuple(params[block.bias].shape)}; "
            f"need {entries} entries; {again}"
        )
