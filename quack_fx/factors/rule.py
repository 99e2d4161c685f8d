"""From the weights to one factor per unit: the norms, and the one rule.

In: a `FactorPlan` and the parameters. Out: norms and factors, flat tensors with one entry per unit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from quack_fx.errors import FactorError, LayoutError
from quack_fx.factors.plan import FactorPlan, Unit
from quack_fx.factors.tables import Strip
from quack_fx.layout import QKLayout

NormName = Literal["frobenius", "spectral"]


def plan_params(plan: FactorPlan, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that a plan has units in, out of more."""
    return {name: params[name] for unit in plan.units for name, _ in unit.parts()}


def norm_dtype(params: Mapping[str, Tensor]) -> torch.dtype:
    """Type that norms are computed in: float64 if a parameter has it, else float32."""
    return torch.float64 if any(p.dtype == torch.float64 for p in params.values()) else torch.float32


def check_norm_name(norm: str) -> NormName:
    """The name of a norm, if it is one.

    Raises:
        FactorError: It is none of those known here.
    """
    if norm not in get_args(NormName):
        raise FactorError(f"norm {norm!r} is not one of {', '.join(get_args(NormName))}")
    return cast(NormName, norm)


def square_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared norm of each row, summed up in `dtype` without a copy of the weights: [rows, ...] -> [rows]."""
    if rows.dim() == 1:
        return rows.to(dtype).square()
    norms: Tensor = torch.linalg.vector_norm(rows, dim=tuple(range(1, rows.dim())), dtype=dtype)
    return norms.square()


@torch.no_grad()
def row_squares(strips: tuple[Strip, ...], params: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Squared norm of each flat row of whole parameters: [rows], on the device of the first strip."""
    device = params[strips[0].name].device
    return torch.cat([square_rows(strip.of(params[strip.name]), dtype).to(device) for strip in strips])


@torch.no_grad()
def unit_norms(plan: FactorPlan, params: Mapping[str, Tensor], norm: NormName = "frobenius") -> Tensor:
    """Norm of every unit, over weight rows and bias entries together (a bias is one more column of its block).

    Arguments:
        plan: The plan of a layout.
        params: Parameters by the names that the layout uses, whole (sharded ones: `quack_fx.distributed`).
        norm: "frobenius", or "spectral": the largest singular value, by an eigenvalue problem per unit that is many
            times slower and, on a GPU, waits for the device.

    Returns:
        [n_units], float32 or, if any parameter is float64, float64, on the device of the first unit's parameter.

    Raises:
        FactorError: `norm` is neither.

    Example:
        >>> unit_norms(FactorPlan.from_layout(layout), dict(model.named_parameters()))
    """
    check_norm_name(norm)
    params = plan_params(plan, params)
    if not params:
        return torch.empty(0)
    if norm == "spectral":
        return _spectral_norms(plan, params)
    tables = plan.tables(params[plan.units[0].param].device)
    return tables.sum_rows(row_squares(tables.strips, params, norm_dtype(params))).sqrt()


def _spectral_norms(plan: FactorPlan, params: Mapping[str, Tensor]) -> Tensor:
    """Largest singular value of every unit, from the smaller Gram matrix of its rows; one batch for each tensor."""
    batches: defaultdict[tuple[str, int, str | None, int], list[int]] = defaultdict(list)
    for i, unit in enumerate(plan.units):
        batches[unit.param, unit.axis, unit.bias, len(list(unit.rows()))].append(i)
    first = params[plan.units[0].param]
    norms = torch.empty(len(plan.units), dtype=norm_dtype(params), device=first.device)
    for (param, axis, bias, size), units in batches.items():
        index = torch.tensor([row for i in units for row in plan.units[i].rows()], device=params[param].device)
        columns = [params[param].detach().index_select(axis, index).movedim(axis, 0)]
        if bias is not None:
            columns.append(params[bias].detach()[index])
        blocks = torch.cat([c.to(norms.dtype).reshape(len(units), size, -1) for c in columns], -1)
        wide = blocks if blocks.shape[1] <= blocks.shape[2] else blocks.mT
        top = torch.linalg.eigvalsh(wide @ wide.mT)[:, -1]
        norms[torch.tensor(units, device=norms.device)] = top.clamp_min(0).sqrt().to(norms.device)
    return norms


def factors(plan: FactorPlan, norms: Tensor) -> Tensor:
    """Learning-rate factor of every unit: the one rule (module docstring; Alg. 1 and Alg. 2).

    Arguments:
        plan: The plan of a layout.
        norms: [n_units], as `unit_norms` returns it. `check_norms` refuses what cannot be divided by.

    Returns:
        [n_units], type and device of `norms`.

    Example:
        >>> factor = factors(plan, unit_norms(plan, params))
    """
    return plan.tables(norms.device).factors(norms)


def check_norms(layout: QKLayout, plan: FactorPlan, norms: Tensor) -> None:
    """Refuse norms that no factor can be made of. Waits for the device: for the start of training, not for every step.

    Raises:
        FactorError: A unit's norm is zero, infinite or not a number; the message names its site, head and rows.
    """
    bad = torch.nonzero((norms <= 0) | ~norms.isfinite()).flatten().tolist()
    if not bad:
        return
    unit = plan.units[bad[0]]
    what = f"{_place(layout, unit)}: rows {unit} have norm {norms[bad[0]].item():g}"
    more = f" (so have {len(bad) - 1} more)" if len(bad) > 1 else ""
    raise FactorError(
        f"{what}{more}; QuacK divides by the norms that it starts from, so initialise these weights with finite, "
        "nonzero values first, or take the site out of the layout"
    )


def _place(layout: QKLayout, unit: Unit) -> str:
    """Where a unit stands in a layout, for messages: the first site, role and head that have it."""
    for site in layout.sites:
        for _, block in site.blocks():
            for head, ranges in enumerate(block.heads):
                if ranges and Unit.of(block, ranges) == unit:
                    return f"site {site.name!r}, {block.role} head {head}"
    raise LayoutError(f"rows {unit} stand in no site of the layout")
