"""Makes sure that ranks which train one model take the same steps.

In: a model that is replicated (DistributedDataParallel) or sharded (DTensors) across ranks. Out: a one-line error on
every rank if the ranks were given different arguments; a decision of all ranks on whether a step is skipped.

Only process groups that the model itself uses take part, so other pipeline stages are not involved.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from quack_fx.errors import LayoutError, OptimizerError, QuackError, first_line
from quack_fx.layout import QKLayout
from quack_fx.layout.fit import layout_params, without_wrappers
from quack_fx.train.program.scaling import is_sharded

Groups = dict[Any, torch.device]
"""Process groups, each with the device of its messages."""


def check_ranks(
    model: nn.Module, layout: QKLayout, tau: float | Tensor, norm: str, optimizers: Iterable[Optimizer]
) -> bool:
    """Raise on every rank if layouts, tau or norms differ between ranks; sends one small message per group.

    Arguments:
        model: The model of this rank.
        layout: Its layout; only the fields that QuacK uses are compared.
        tau: The tau given on this rank.
        norm: The norm given on this rank.
        optimizers: The optimizers of this rank.

    Returns:
        Whether an optimizer on any rank holds query or key weights that QuacK scales; False on a single rank.

    Raises:
        LayoutError: The layouts differ, or the layout does not fit the model of another rank.
        OptimizerError: Tau, the norm or the method differ, or not all ranks call this function.
    """
    groups = groups_of(model)
    if not groups:
        return False
    sites = without_wrappers(layout).sites
    used = [(s.name, s.query, s.key, s.terms, s.head_map, bool(s.qk_norm)) for s in sites]
    number = float(tau) if isinstance(tau, int | float | Tensor) else float("nan")
    # Positive doubles have the same order as their bits.
    (bits,) = struct.unpack("q", struct.pack("d", number))
    hold, misfit = _hold(optimizers, model, layout)
    ours = [len(sites), _digest(used), bits, _digest(norm), hold, misfit]
    numbers = torch.tensor([*ours, *(-n for n in ours)])
    try:
        for group, device in groups.items():
            there = numbers.to(device)
            dist.all_reduce(there, op=dist.ReduceOp.MAX, group=group)
            numbers = there.cpu()
    except RuntimeError as error:
        raise OptimizerError(
            f"not every rank that trains this model attaches QuacK, at the same place ({first_line(error)})"
        ) from error
    most, least = numbers[: len(ours)].tolist(), [-n for n in numbers[len(ours) :].tolist()]
    if most[:2] != least[:2]:
        how_many = f"{least[0]} sites to {most[0]}" if most[0] != least[0] else f"{most[0]} sites on each"
        raise LayoutError(
            f"the ranks that train this model were given different layouts ({how_many}); find the pairs on one of them "
            "and send the others its layout.to_dict()"
        )
    if most[5] != misfit:
        raise LayoutError("the layout does not fit the model of another rank, which says why; build the same on all")
    if most[2] != least[2]:
        low, high = (struct.unpack("d", struct.pack("q", n))[0] for n in (least[2], most[2]))
        raise OptimizerError(f"the ranks that train this model were given tau from {low} to {high}; give all the same")
    if most[3] != least[3]:
        raise OptimizerError("the ranks that train this model were given different norms or methods; give all the same")
    return bool(most[4])


def groups_that_differ(model: nn.Module) -> Groups:
    """The groups in which the total gradient norm may differ between ranks.

    If all weights are sharded over one mesh, it is summed over that mesh and equal on all ranks.
    """
    meshes = {p.device_mesh if is_sharded(p) else None for p in model.parameters()}  # type: ignore[attr-defined]
    return groups_of(model) if len(meshes) > 1 else {}


def everywhere(finite: Tensor | None, groups: Groups) -> Tensor | None:
    """Minimum of `finite` over the ranks of the groups: 1 if it is 1 on all; None (steps are never skipped) stays."""
    if finite is not None:
        for group in groups:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=group)
    return finite


def groups_of(model: nn.Module) -> Groups:
    """The process groups with several ranks that a model uses, in the same order on every rank."""
    if not dist.is_available() or not dist.is_initialized():
        return {}
    groups: Groups = {}
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            groups.setdefault(module.process_group, next(module.parameters()).device)
    for mesh in dict.fromkeys(p.device_mesh for p in model.parameters() if is_sharded(p)):  # type: ignore[attr-defined]
        for dim in range(mesh.ndim):
            groups.setdefault(mesh.get_group(dim), torch.device(mesh.device_type))
    return {group: device for group, device in groups.items() if dist.get_world_size(group) > 1}


def _hold(optimizers: Iterable[Optimizer], model: nn.Module, layout: QKLayout) -> tuple[int, int]:
    """Two flags, 0 or 1: the optimizers hold a weight that QuacK scales; the layout does not fit the model."""
    scaled = replace(layout, sites=tuple(site for site in layout.sites if not site.qk_norm))
    try:
        known = set(map(id, layout_params(scaled, model).values()))
    except QuackError:  # refused only after the ranks have communicated, so that none hangs
        return 1, 1
    held = (p for o in optimizers for group in getattr(o, "param_groups", ()) for p in group["params"])
    return int(any(id(p) in known for p in held)), 0


def _digest(value: object) -> int:
    """An integer hash of a value that fits int64, also when negated."""
    return int.from_bytes(blake2b(repr(value).encode(), digest_size=8).digest()) >> 2
