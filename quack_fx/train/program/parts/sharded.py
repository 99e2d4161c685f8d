"""Weights that are sharded over ranks: FSDP2, tensor parallel, both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(weight: Tensor, axis: int) -> Tensor:
    """Indices of the rows of a weight that this rank holds, wholly or in part, int64 [rows here]."""
    rows = torch.arange(weight.shape[axis], device=weight.device)
    if not isinstance(weight, DTensor):
        return rows
    for dim, placement in enumerate(weight.placements):
        if placement.is_partial():
            raise ValueError(f"a weight is placed as {placement}; it can be sharded or replicated")
        if getattr(placement, "dim", None) == axis:
            ranks, rank = weight.device_mesh.size(dim), weight.device_mesh.get_local_rank(dim)
            # FSDP2 over tensor parallel shards each tensor-parallel shard; split_factor is their number.
            shards = rows.chunk(getattr(placement, "split_factor", 1))
            chunks = [shard.chunk(ranks) for shard in shards]
            rows = torch.cat([own[rank] if rank < len(own) else rows[:0] for own in chunks])
    return rows


def meshes_of(weights: Iterable[Tensor]) -> list[DeviceMesh]:
    """The meshes that some weights are sharded over."""
    return list(dict.fromkeys(weight.device_mesh for weight in weights if isinstance(weight, DTensor)))


def spread(
    norms: list[Tensor], weights: list[Tensor], held: Mapping[Tensor, Tensor], axis: int, meshes: list[DeviceMesh]
) -> list[Tensor]:
    """This rank's row norms in tensors for all rows, [1 + meshes, rows]; only one rank counts a replica.

    Index 0 is for weights that are not sharded, to which other ranks add nothing.
    """
    found = []
    for own, weight in zip(norms, weights, strict=True):
        everywhere, level, counts = own.new_zeros(1 + len(meshes), weight.shape[axis]), 0, True
        if isinstance(weight, DTensor):
            level, mesh = 1 + meshes.index(weight.device_mesh), weight.device_mesh
            copies = [dim for dim, placement in enumerate(weight.placements) if placement.is_replicate()]
            counts = all(mesh.get_local_rank(dim) == 0 for dim in copies)
        if counts:
            everywhere[level, held[weight]] = own
        found.append(everywhere)
    return found


def add_up(squares: Sequence[list[Tensor]], meshes: Sequence[DeviceMesh], exact: torch.dtype) -> None:
    """Sum the squared norms over ranks, in place: [1 + meshes, attentions, heads] each become [attentions, heads].

    They are sent as `exact`, the dtype of the weights. If a mesh has all ranks, one all_reduce is enough: each copy of
    a smaller mesh (FSDP2's, for weights without tensor parallel) adds its share. Otherwise there is one for each axis
    of each mesh.
    """
    if not squares:
        return
    total, *sharded = torch.cat([x.flatten(1) for own in squares for x in own], 1)
    world = torch.distributed.get_world_size() if meshes else 1
    messages: list[tuple[Tensor, list[Any]]]
    if any(mesh.size() == world for mesh in meshes):
        shares = [part * (mesh.size() / world) for mesh, part in zip(meshes, sharded, strict=True)]
        messages = [(torch.stack(shares).sum(0).to(exact), [None])]
    else:
        messages = [(part.to(exact), mesh.get_all_groups()) for mesh, part in zip(meshes, sharded, strict=True)]
    for part, groups in messages:
        for group in groups:
            torch.distributed.all_reduce(part, group=group)
        total = total + part.double()
    each = iter(torch.split(total, [x[0].numel() for own in squares for x in own]))
    for own in squares:
        own[:] = [next(each).view(x.shape[1:]) for x in own]


def norms_of(grads: Sequence[Tensor], exact: torch.dtype) -> list[Tensor]:
    """The norm of the gradients on each mesh, and of those on none; their norm is the total norm."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    norms = (torch.stack([torch.linalg.vector_norm(g, dtype=exact) for g in own]) for own in by_mesh.values())
    totals = [torch.linalg.vector_norm(own) for own in norms]
    return [total.full_tensor() if isinstance(total, DTensor) else total for total in totals]
