"""Adds QK norms to the modules of a model: an `nn.RMSNorm` after each projection of queries and keys.

In: a model and its layout. Out: an `InsertReport`. A norm is a submodule (`q_norm`, `k_norm`) of the module that holds
the projection's weight, and a forward hook of that module calls it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from quack_fx.errors import StripError
from quack_fx.find import Pairs, attentions_of, pairs_of
from quack_fx.layout import SIDES, AttentionSite, Norm, QKLayout, Side, WeightBlock
from quack_fx.qk_norm.call import Inputs, call_of
from quack_fx.qk_norm.report import InsertReport, Left, LeftSite


class NormHeads:
    """Forward hook of a projection that normalises some of its features, head by head.

    Arguments:
        name: Name of the norm, a submodule of the projection.
        weight: Name of the projection's weight.
        rows: Features of each head, [heads, head_dim].
        axis: Axis of the output that counts features.
    """

    def __init__(self, name: str, weight: str, rows: Tensor, axis: int) -> None:
        self.name, self.weight, self.rows, self.axis = name, weight, rows, axis
        self._slice = _slice(rows)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The output with these features normalised."""
        if output.is_nested:  # jagged layout: sequences of different lengths, concatenated
            values = self._normed(module, output.values())
            return torch.nested.nested_tensor_from_jagged(values, output.offsets(), output.lengths())  # type: ignore[attr-defined]
        return self._normed(module, output)

    def _normed(self, module: nn.Module, output: Tensor) -> Tensor:
        norm, x = module.get_submodule(self.name), output.movedim(self.axis, -1)
        if self._slice is not None:  # cheaper than indexing
            start, stop = self._slice
            heads = norm(x[..., start:stop].unflatten(-1, self.rows.shape)).flatten(-2)
            put = torch.cat((x[..., :start], heads.to(x.dtype), x[..., stop:]), -1)
        else:
            rows = self.rows.to(output.device)
            put = x.index_copy(-1, rows.flatten(), norm(x[..., rows]).flatten(-2))
        return put.movedim(-1, self.axis)


def _slice(rows: Tensor) -> tuple[int, int] | None:
    """Start and stop of the features of all heads if these are contiguous, else None."""
    in_order = rows[rows[:, 0].argsort()]
    start = int(in_order[0, 0])
    stop = start + rows.numel()
    return (start, stop) if torch.equal(in_order.flatten(), torch.arange(start, stop)) else None


def insert_in_modules(model: nn.Module, layout: QKLayout, eps: float, inputs: Inputs | None) -> InsertReport:
    """Add norms after the projections of queries and keys, in place.

    Raises:
        StripError: The layout names a parameter that the model does not have.
    """
    left: list[LeftSite] = []
    norms: dict[int, tuple[Norm, ...]] = {}
    hooks: dict[str, NormHeads] = {}
    several = any(len(site.query) > 1 or len(site.key) > 1 for site in layout.sites)
    streams = _sides_of_streams(model, inputs) if several and inputs is not None else set()
    for place, site in enumerate(layout.sites):
        try:
            planned = _planned(model, site, hooks, streams)
        except Left as reason:
            left.append(LeftSite(site.name, str(reason)))
            continue
        hooks.update({name: hook for _, name, hook in planned})
        norms[place] = tuple(Norm(side, "rms", site.head_dim, name, f"{name}.weight") for side, name, _ in planned)
    undo = ExitStack()
    for hook in hooks.values():
        _put_in(model, hook, eps, undo)
    sites = tuple(replace(s, qk_norm=norms[i]) if i in norms else s for i, s in enumerate(layout.sites))
    return InsertReport(tuple(hooks), tuple(left), replace(layout, sites=sites), model, undo.close)


def _sides_of_streams(model: nn.Module, inputs: Inputs) -> set[tuple[Pairs, Side]]:
    """Attentions and sides where one projection makes all features of a token.

    If such a side has several projections, these belong to different kinds of tokens (joint attention). Otherwise,
    several projections are summed (low-rank adapters) or concatenated (MLA).
    """
    found: set[tuple[Pairs, Side]] = set()
    for _, site, heads in attentions_of(model, *call_of(inputs)).understood():
        for side, of_heads in zip(SIDES, (heads.query, heads.key), strict=True):
            if all(len({name for rows in vector for name, _ in rows}) == 1 for head in of_heads for vector in head):
                found.add((pairs_of(site), side))
    return found


_Planned = tuple[Side, str, NormHeads]
"""Side, name and hook of a norm."""


def _planned(
    model: nn.Module, site: AttentionSite, hooks: dict[str, NormHeads], streams: set[tuple[Pairs, Side]]
) -> list[_Planned]:
    """The norms of a site."""
    if site.qk_norm:
        raise Left("it has a QK norm")
    planned: list[_Planned] = []
    for side, block in site.blocks():
        together = len(getattr(site, side))
        if together > 1 and (pairs_of(site), side) not in streams:
            raise Left(
                f"its {side} heads are put together from {together} weights; put the norm into a graph of the model, "
                "or give inputs=(...) if these are kinds of tokens"
            )
        name, hook = _plan(model, site, side, block)
        if name in hooks and not torch.equal(hooks[name].rows, hook.rows):
            raise Left(f"another attention reads other heads of {name.rpartition('.')[0]!r}")
        planned.append((side, name, hook))
    for (one, query, q_hook), (other, key, k_hook) in combinations(planned, 2):
        same = query.rpartition(".")[0] == key.rpartition(".")[0]
        if one != other and same and bool(torch.isin(q_hook.rows, k_hook.rows).any()):
            raise Left("its queries and keys are the same features")
    return planned


def _plan(model: nn.Module, site: AttentionSite, side: Side, block: WeightBlock) -> tuple[str, NormHeads]:
    """Name and hook of the norm for one projection."""
    owner, _, weight = block.param.rpartition(".")
    try:
        module, parameter = model.get_submodule(owner), model.get_parameter(block.param)
    except AttributeError:
        raise StripError(
            f"the layout names the parameter {block.param!r}, which {type(model).__name__} does not have; "
            "find the pairs again on this model"
        ) from None
    rows = [[row for start, stop in ranges for row in range(start, stop)] for ranges in block.heads]
    if any(len(row) != site.head_dim for row in rows):
        raise Left(f"its {side} heads do not have {site.head_dim} features each")
    distinct = list(dict.fromkeys(map(tuple, rows)))
    axis = _feature_axis(module, weight, block, parameter)
    if axis is None:
        raise Left(
            f"{block.param!r} is not the weight of a module that multiplies with it; "
            "put the norm into a graph of the model"
        )
    name = "q_norm" if side == "query" else "k_norm"
    modules = list(_sharing(model, parameter))
    if any(hasattr(one, name) for one in modules):
        raise Left(f"{owner!r} already has a {name!r}")
    if any(_feature_axis(one, weight, block, parameter) != axis for one in modules):
        raise Left(f"its {side} projection {block.param!r} is tied to a module of another kind")
    return f"{owner}.{name}".removeprefix("."), NormHeads(name, block.param, torch.tensor(distinct), axis)


def _sharing(model: nn.Module, parameter: nn.Parameter) -> Iterator[nn.Module]:
    """The modules that hold a parameter, each once."""
    for module in model.modules():
        if any(own is parameter for own in module.parameters(recurse=False)):
            yield module


@torch.no_grad()
def _feature_axis(module: nn.Module, weight: str, block: WeightBlock, parameter: Tensor) -> int | None:
    """Axis of a projection's output that counts features; None if the module is not a projection."""
    if getattr(module, weight, None) is None or len(list(module.children())) > 0:
        return None
    if isinstance(module, _ConvNd):
        return 1
    if isinstance(module, nn.Linear) and block.axis == 0:
        return -1
    if parameter.dim() != 2:
        return None
    # A linear layer of another library (Conv1D of transformers) maps one width to the other.
    width = parameter.shape[1 - block.axis]
    try:
        made = module(torch.zeros(2, 3, width, dtype=parameter.dtype, device=parameter.device))
    except Exception:
        return None
    return -1 if isinstance(made, Tensor) and made.shape == (2, 3, parameter.shape[block.axis]) else None


def _put_in(model: nn.Module, hook: NormHeads, eps: float, undo: ExitStack) -> None:
    """Add a norm and its hook to all modules that share the weight, and to `undo` what removes them."""
    like = model.get_parameter(hook.weight)
    modules = list(_sharing(model, like))
    norm = nn.RMSNorm(hook.rows.shape[1], eps=eps, device=like.device, dtype=like.dtype).train(modules[0].training)
    for module in modules:
        module.add_module(hook.name, norm)
        undo.callback(delattr, module, hook.name)
        undo.callback(module.register_forward_hook(hook).remove)
