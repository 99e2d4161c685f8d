"""Weights of which each rank holds a part: FSDP2, tensor parallel, both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(weight: Tensor, axis: int) -> Tensor:
    """Numbers of the rows of a weight that this rank holds, or has a part of, int64 [rows here]."""
    rows = torch.arange(weight.shape[axis], device=weight.device)
    if not isinstance(weight, DTensor):
        return rows
    for dim, placement in enumerate(weight.placements):
        if placement.is_partial():
            raise ValueError(f"a weight is placed as {placement}; it can be sharded or replicated")
        if getattr(placement, "dim", None) == axis:
            ranks, rank = weight.device_mesh.size(dim), weight.device_mesh.get_local_rank(dim)
            # FSDP2 over a tensor-parallel axis cuts each of that axis' stretches: its placement says how many.
            stretches = rows.chunk(getattr(placement, "split_factor", 1))
            chunks = [stretch.chunk(ranks) for stretch in stretches]
            rows = torch.cat([own[rank] if rank < len(own) else rows[:0] for own in chunks])
    return rows


def is_first(weight: Tensor) -> bool:
    """Whether this rank counts what it holds of a weight: of ranks that hold the same the first one does."""
    if not isinstance(weight, DTensor):
        return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    mesh = weight.device_mesh
    return all(mesh.get_local_rank(d) == 0 for d, placement in enumerate(weight.placements) if placement.is_replicate())


def add_up(squares: Sequence[list[Tensor]], weight: Tensor) -> None:
    """Add the squared norms of all ranks, in place: one collective."""
    if isinstance(weight, DTensor):
        everything = torch.cat([x.flatten() for own in squares for x in own])
        for dim in range(weight.device_mesh.ndim):
            torch.distributed.all_reduce(everything, group=weight.device_mesh.get_group(dim))
        sums = iter(everything.split([x.numel() for own in squares for x in own]))
        for own in squares:
            own[:] = [next(sums).view_as(x) for x in own]
