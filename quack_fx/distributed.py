"""USER: norms of blocks whose rows live on several ranks, and which rows live on this one.

In: the index tables of a plan, and parameters, some or all of them DTensors (FSDP2's `fully_shard`, tensor parallel,
both). Out: for every strip of rows its part on this rank; and the norms of all units, the same on every rank.

A rank adds up the squares of the rows, or pieces of rows, that it holds into one flat vector over all units, and one
all_reduce over the mesh makes the norms. So a shard may end inside a head, and a row may be cut, at the price of a few
kilobytes of traffic a step. Where a mesh dimension replicates a tensor, only the first rank along it counts.

Plain tensors are the case of one rank; nothing of torch.distributed is imported for them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from quack_fx.errors import LayoutError
from quack_fx.factors import FactorPlan, NormName, Strip, check_norm_name, norm_dtype, square_rows, unit_norms

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, also one that is replicated. Imports nothing."""
    module = sys.modules.get("torch.distributed.tensor")  # there is no DTensor before somebody imports it
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory; call it under no_grad."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@dataclass(frozen=True)
class LocalStrip:
    """The rows of a strip that live on this rank.

    Attributes:
        tensor: The parameter or bias, plain or DTensor.
        strip: Where the rows stand in the local tensor.
        flat: Where they stand among the plan's flat rows: a slice where they are neighbours, else int64 [rows].
    """

    tensor: Tensor
    strip: Strip
    flat: slice | Tensor

    def rows(self) -> Tensor:
        """The rows on this rank, rows first; a view that writes through to the parameter."""
        return self.strip.of(local(self.tensor))

    @classmethod
    def of(cls, strip: Strip, tensor: Tensor) -> LocalStrip:
        """The part of a strip that lives on this rank; it may have no rows.

        Raises:
            LayoutError: The tensor is sharded in a way that is not known here.
        """
        if not is_sharded(tensor):
            return cls(tensor, strip, slice(strip.offset, strip.offset + strip.stop - strip.start))
        held = _held_rows(strip, tensor)
        here = local(tensor.detach()).shape[strip.axis]
        if len(held) != here:
            raise LayoutError(
                f"{strip.name!r} is placed as {tensor.placements}, which should leave {len(held)} rows on this rank, "
                f"not {here}; QuacK reads tensors that Shard and Replicate place"
            )
        inside = torch.nonzero((held >= strip.start) & (held < strip.stop)).flatten()
        first = int(inside[0]) if len(inside) else 0  # rows on a rank are in order, so those of a strip are neighbours
        flat = held[inside] - strip.start + strip.offset
        where = replace(strip, start=first, stop=first + len(inside))
        if len(flat) and int(flat[-1]) - int(flat[0]) + 1 != len(flat):
            return cls(tensor, where, flat.to(tensor.device))
        begin = int(flat[0]) if len(flat) else 0
        return cls(tensor, where, slice(begin, begin + len(flat)))


def _held_rows(strip: Strip, tensor: DTensor) -> Tensor:
    """Numbers of the rows of the whole tensor that this rank holds, from the placements alone, int64 [rows].

    A mesh dimension that shards the axis splits what the dimensions before it left, as `torch.chunk` does. The one
    private thing read is `split_factor` of `_StridedShard`, FSDP2's placement over a tensor-parallel one: the rows are
    then cut into that many stretches first, and each stretch is split.
    """
    rows = torch.arange(tensor.shape[strip.axis])
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate() or getattr(placement, "dim", None) not in (None, strip.axis):
            continue
        if placement.is_partial() or not hasattr(placement, "dim"):
            raise LayoutError(
                f"{strip.name!r} is placed as {placement}; QuacK reads tensors that Shard and Replicate place"
            )
        stretches = rows.chunk(getattr(placement, "split_factor", 1))
        ranks, rank = tensor.device_mesh.size(dim), tensor.device_mesh.get_local_rank(dim)
        rows = torch.cat([_chunk(stretch, ranks, rank) for stretch in stretches])
    return rows


def _chunk(rows: Tensor, n: int, i: int) -> Tensor:
    """Chunk `i` of `n`, as `torch.chunk` cuts; empty where there are fewer."""
    chunks = rows.chunk(n)
    return chunks[i] if i < len(chunks) else rows[:0]


class UnitNorms:
    """Norms of all units of a plan, wherever their rows live; the same on every rank.

    Made once, called before every step. Where parameters are DTensors a call is a collective: every rank must make it.

    Arguments:
        plan: The plan of a layout.
        params: Its parameters by name.
        norm: "frobenius" or "spectral"; the spectral norm gathers every sharded parameter whole.

    Raises:
        FactorError: `norm` is neither.
        LayoutError: A parameter is sharded in a way that is not known here.

    Example:
        >>> norms = UnitNorms(plan, params)
        >>> norms()  # [n_units], again before every step
    """

    def __init__(self, plan: FactorPlan, params: Mapping[str, Tensor], norm: NormName = "frobenius") -> None:
        self._plan = plan
        self._params = params
        self._norm = check_norm_name(norm)
        sharded = [p for p in params.values() if is_sharded(p)]
        self._sharded = bool(sharded)
        if not sharded:
            return
        self._dtype = norm_dtype(params)
        self._tables = plan.tables(sharded[0].device)
        self._meshes = list(dict.fromkeys(p.device_mesh for p in sharded))
        strips = [LocalStrip.of(strip, params[strip.name]) for strip in self._tables.strips]
        self._counted = [(self._level(strip.tensor), strip) for strip in strips if _counts(strip.tensor)]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Norm of every unit, [n_units]."""
        if not self._sharded:
            return unit_norms(self._plan, self._params, self._norm)
        if self._norm == "spectral":
            whole = {name: p.full_tensor() if is_sharded(p) else p for name, p in self._params.items()}
            return unit_norms(self._plan, whole, self._norm)
        return self._reduced()

    def _reduced(self) -> Tensor:
        """Frobenius norms from the rows of all ranks: one vector of sums for each mesh, and one for plain tensors."""
        device = self._tables.order.device
        rows = torch.zeros(1 + len(self._meshes), len(self._tables.owners), dtype=self._dtype, device=device)
        for level, strip in self._counted:
            rows[level, strip.flat] = square_rows(strip.rows(), self._dtype).to(device)
        sums = self._tables.sum_rows(rows)  # [1 + meshes, n_units]
        for on_mesh, mesh in zip(sums[1:], self._meshes, strict=True):
            for dim in range(mesh.ndim):
                torch.distributed.all_reduce(on_mesh, group=mesh.get_group(dim))
        return sums.sum(0).sqrt()

    def _level(self, tensor: Tensor) -> int:
        """Row of the sums that a tensor goes into: 0 for a plain one, else one for each mesh."""
        return 1 + self._meshes.index(tensor.device_mesh) if is_sharded(tensor) else 0


def _counts(tensor: Tensor) -> bool:
    """Whether this rank adds what it holds of a tensor: the first one does where a mesh dimension replicates it."""
    if not is_sharded(tensor):
        return True
    mesh = tensor.device_mesh
    return all(mesh.get_local_rank(d) == 0 for d, placement in enumerate(tensor.placements) if placement.is_replicate())
