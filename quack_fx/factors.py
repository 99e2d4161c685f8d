"""USER: from a layout and the weights to one learning-rate factor per head (the one rule).

In: a `QKLayout` and the model's parameters. Out: `FactorPlan`, plain data that says which rows are one *unit* and which
units are multiplied in the logits; `unit_norms`, the norm of every unit; `factors`, what the rule makes of the norms.

A unit is one head's rows of one parameter, together with the same entries of its bias. Equal units are one: the key
head that several query heads read, the down projection that all heads of an MLA read, the layer that runs twice. The
logits of a head are a sum of terms, each a product of units, and

    factor(unit) = min over the terms that contain it of  1 / product of the norms of the other units of that term

which is Algorithm 1 (multi-head attention) and Algorithm 2 (MLA) of "Controlling changes to attention logits"
(arXiv 2511.21377), and says what to do for grouped queries, shared layers, joint attention and low-rank branches. The
learning rate of a unit is scaled by `tau * factor / factor at the start of training`. Rows that lie in several units
which are not equal (two sites cut one parameter differently) get the smallest of their units' scales, as the rule's min
would give them.

What runs in a training step is gathers, sums and products over a few flat tensors, whatever the number of heads: no
loop over units, no sync, and the same result bit for bit every time it runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from quack_fx.errors import FactorError, LayoutError
from quack_fx.layout import QKLayout, Ranges, WeightBlock

NormName = Literal["frobenius", "spectral"]

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""Path segments that torch.compile and activation checkpointing put into names of parameters, anywhere in the path."""


@dataclass(frozen=True)
class Unit:
    """One head's rows of one parameter, and the same entries of its bias.

    Attributes:
        param: Name of the parameter.
        axis: Axis that counts output features.
        ranges: Half-open ranges along `axis`, sorted, none touching the next.
        bias: Name of the bias whose entries (along its first axis) belong to the unit, or None.

    Example:
        >>> str(Unit("attn.q.weight", 0, ((0, 64),), "attn.q.bias"))
        'attn.q.weight[0:64]'
    """

    param: str
    axis: int
    ranges: Ranges
    bias: str | None

    @classmethod
    def of(cls, block: WeightBlock, ranges: Ranges) -> Unit:
        """Unit that these ranges of a block make; the same rows in another order make the same unit."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(ranges):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return cls(block.param, block.axis, tuple(merged), block.bias)

    def parts(self) -> Iterator[tuple[str, int]]:
        """The tensors that hold the unit, as (name, axis): the parameter, then the bias if there is one."""
        yield self.param, self.axis
        if self.bias is not None:
            yield self.bias, 0

    def rows(self) -> Iterator[int]:
        """The row numbers of the unit."""
        for start, stop in self.ranges:
            yield from range(start, stop)

    def __str__(self) -> str:
        rows = ",".join(f"{start}:{stop}" for start, stop in self.ranges)
        return f"{self.param}[{':, ' * self.axis}{rows}]"


@dataclass(frozen=True)
class FactorPlan:
    """The one rule as plain data: the units of a layout, and which of them are multiplied in the logits.

    Attributes:
        units: All units, in the order in which norms and factors stand in their tensors.
        terms: Each distinct product in the logits as indices into `units`; a unit that stands twice is there twice.
        left_out: Names of the sites that keep a QK norm. Their logits do not depend on the norms of the weights, so
            QuacK leaves them alone.

    Example:
        >>> plan = FactorPlan.from_layout(layout)
        >>> norms = unit_norms(plan, dict(model.named_parameters()))
        >>> factors(plan, norms)  # one factor for each of plan.units
    """

    units: tuple[Unit, ...]
    terms: tuple[tuple[int, ...], ...]
    left_out: tuple[str, ...]

    @classmethod
    def from_layout(cls, layout: QKLayout) -> FactorPlan:
        """The plan of a layout.

        Raises:
            LayoutError: A parameter counts output features along one axis here and along another there.
        """
        index: dict[Unit, int] = {}
        terms: dict[tuple[int, ...], None] = {}  # a set that keeps its order
        left_out = []
        for site in layout.sites:
            if site.qk_norm:
                left_out.append(site.name)
                continue
            for head in range(site.query_heads):
                for product in site.head_terms(head):
                    units = (Unit.of(block, ranges) for block, ranges in product)
                    terms.setdefault(tuple(index.setdefault(unit, len(index)) for unit in units))
        axes: dict[str, int] = {}
        for name, axis in (part for unit in index for part in unit.parts()):
            if axes.setdefault(name, axis) != axis:
                raise LayoutError(
                    f"layout counts the output features of {name!r} along axis {axes[name]} and along axis {axis}; "
                    "one parameter can have head rows along one axis only"
                )
        return cls(tuple(index), tuple(terms), tuple(left_out))

    def tables(self, device: torch.device) -> PlanTables:
        """Index tensors of the plan on a device, made once."""
        if device not in self._tables:
            self._tables[device] = PlanTables.of(self).to(device)
        return self._tables[device]

    @cached_property
    def _tables(self) -> dict[torch.device, PlanTables]:
        return {}


@dataclass(frozen=True)
class Strip:
    """The stretch of one tensor from the first to the last row that belongs to a unit.

    The rows of all strips of a plan, one strip after the other, are its *flat rows*.

    Attributes:
        name: Name of the parameter or bias.
        axis: Axis that counts its rows.
        start: First row.
        stop: One past the last row.
        offset: Place of the first row among the flat rows.
    """

    name: str
    axis: int
    start: int
    stop: int
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The strip of a tensor, rows first; a view."""
        return tensor.detach().narrow(self.axis, self.start, self.stop - self.start).movedim(self.axis, 0)


@dataclass(frozen=True)
class PlanTables:
    """Index tensors of a plan; what a training step needs of it, free of python objects per unit.

    Attributes:
        strips: The strips, in the order of their flat rows.
        buckets: Units of equal size together; for each size, the flat rows of its units, int64 [units, size].
        order: Place of each unit among the units of all buckets, int64 [n_units].
        members: Unit at each place of each term, n_units where the term is shorter, int64 [terms, longest].
        others: Units at the other places of the term, padded likewise, int64 [terms, longest, longest - 1].
        owners: Units that contain each flat row, n_units for a row of none, int64 [rows, most units of one row].
    """

    strips: tuple[Strip, ...]
    buckets: tuple[Tensor, ...]
    order: Tensor
    members: Tensor
    others: Tensor
    owners: Tensor

    @classmethod
    def of(cls, plan: FactorPlan) -> PlanTables:
        """Tables of a plan, on the CPU."""
        hulls: dict[tuple[str, int], tuple[int, int]] = {}
        for unit in plan.units:
            for part in unit.parts():
                start, stop = hulls.get(part, unit.ranges[0])
                hulls[part] = min(start, unit.ranges[0][0]), max(stop, unit.ranges[-1][1])
        strips: dict[tuple[str, int], Strip] = {}
        n_rows = 0
        for part, (start, stop) in hulls.items():
            strips[part] = Strip(*part, start, stop, offset=n_rows)
            n_rows += stop - start

        flat: list[Tensor] = []  # flat rows of each unit
        by_size: defaultdict[int, list[int]] = defaultdict(list)
        for i, unit in enumerate(plan.units):
            shifts = [strips[part].offset - strips[part].start for part in unit.parts()]
            flat.append(torch.cat([torch.arange(a + by, b + by) for by in shifts for a, b in unit.ranges]))
            by_size[len(flat[i])].append(i)
        order = torch.empty(len(flat), dtype=torch.int64)
        order[[i for bucket in by_size.values() for i in bucket]] = torch.arange(len(flat))

        members, others = _term_tables(plan)
        return cls(
            strips=tuple(strips.values()),
            buckets=tuple(torch.stack([flat[i] for i in bucket]) for bucket in by_size.values()),
            order=order,
            members=members,
            others=others,
            owners=_owners(flat, n_rows),
        )

    def to(self, device: torch.device) -> PlanTables:
        """The same tables on a device."""
        return PlanTables(
            self.strips,
            tuple(bucket.to(device) for bucket in self.buckets),
            *(table.to(device) for table in (self.order, self.members, self.others, self.owners)),
        )

    def sum_rows(self, rows: Tensor) -> Tensor:
        """Sum of a value of the flat rows over each unit: [..., rows] -> [..., n_units].

        Gathers and sums instead of scattering: the order of additions, and so the result, never changes.
        """
        if not self.buckets:
            return rows
        return torch.cat([rows[..., bucket].sum(-1) for bucket in self.buckets], -1)[..., self.order]

    def spread(self, scales: Tensor) -> Tensor:
        """Scale of each flat row, the smallest of its units' scales, 1 for a row of none: [n_units] -> [rows]."""
        return torch.cat([scales, scales.new_ones(1)])[self.owners].amin(-1)


def _term_tables(plan: FactorPlan) -> tuple[Tensor, Tensor]:
    """`members` and `others` of `PlanTables`."""
    longest = max(map(len, plan.terms), default=1)
    padded = [[*term, *[len(plan.units)] * (longest - len(term))] for term in plan.terms]
    members = torch.tensor(padded, dtype=torch.int64).view(len(plan.terms), longest)
    elsewhere = torch.tensor([[j for j in range(longest) if j != i] for i in range(longest)], dtype=torch.int64)
    return members, members[:, elsewhere]


def _owners(flat: list[Tensor], n_rows: int) -> Tensor:
    """`owners` of `PlanTables` from the flat rows of each unit."""
    if not flat:
        return torch.empty(0, 1, dtype=torch.int64)
    rows, by_row = torch.cat(flat).sort(stable=True)
    units = torch.arange(len(flat)).repeat_interleave(torch.tensor(list(map(len, flat))))[by_row]
    counts = rows.bincount(minlength=n_rows)
    firsts = counts.cumsum(0) - counts
    # a row with fewer units than another names one of its own again, which changes no minimum
    owners = torch.full((n_rows,), len(flat)).index_put((rows,), units)[:, None].repeat(1, int(counts.max()))
    owners[rows, torch.arange(len(rows)) - firsts[rows]] = units
    return owners


def plan_params(plan: FactorPlan, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that a plan has units in, out of more."""
    return {name: params[name] for unit in plan.units for name, _ in unit.parts()}


def norm_dtype(params: Mapping[str, Tensor]) -> torch.dtype:
    """Type that norms are computed in: float64 if a parameter has it, else float32."""
    return torch.float64 if any(p.dtype == torch.float64 for p in params.values()) else torch.float32


@torch.no_grad()
def row_squares(strips: tuple[Strip, ...], params: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Squared norm of each flat row, of the weights of one process: [rows] on the device of the first strip."""
    squares: list[Tensor] = []
    for strip in strips:
        rows = strip.of(params[strip.name])
        norms = torch.linalg.vector_norm(rows, dim=tuple(range(1, rows.dim())), dtype=dtype) if rows.dim() > 1 else rows
        squares.append(norms.to(squares[0].device if squares else norms.device, dtype).square())
    return torch.cat(squares) if squares else torch.empty(0, dtype=dtype)


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
    if norm not in get_args(NormName):
        raise FactorError(f"norm {norm!r} is not one of {', '.join(get_args(NormName))}")
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
        blocks = params[param].detach().index_select(axis, index).movedim(axis, 0).reshape(len(units), size, -1)
        if bias is not None:
            entries = params[bias].detach()[index].reshape(len(units), size, -1)
            blocks = torch.cat([blocks.to(norms.dtype), entries.to(norms.dtype)], -1)
        wide = blocks.to(norms.dtype) if blocks.shape[1] <= blocks.shape[2] else blocks.to(norms.dtype).mT
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
    tables = plan.tables(norms.device)
    products = torch.cat([norms, norms.new_ones(1)])[tables.others].prod(-1)
    largest = norms.new_zeros(len(plan.units) + 1)
    largest = largest.scatter_reduce(0, tables.members.flatten(), products.flatten(), "amax")
    return largest[:-1].reciprocal()


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


def check_layout(layout: QKLayout, model: nn.Module) -> None:
    """Refuse a layout that does not fit a model.

    Raises:
        LayoutError: As `layout_params`.

    Example:
        >>> check_layout(find_qk_pairs(model, tokens), model)
    """
    layout_params(layout, model)


def layout_params(layout: QKLayout, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that a layout names, by the layout's names.

    The layout and the model may differ in wrapping: the names that torch.compile, activation checkpointing and
    DistributedDataParallel add are seen through, on both sides.

    Arguments:
        layout: The layout.
        model: The model it was found on, or the same model wrapped, sharded or loaded elsewhere.

    Returns:
        Every parameter and bias of every block.

    Raises:
        LayoutError: A parameter is missing, an axis, range or bias does not fit its shape, two names are one tensor,
            or the model is flattened by FSDP1.
    """
    given = dict(model.named_parameters(remove_duplicate=False))
    if any(name.rpartition(".")[2].startswith("_flat_param") for name in given) or any(
        type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
    ):
        raise LayoutError(
            "model is wrapped in FullyShardedDataParallel (FSDP1), which flattens weights into _flat_param and loses "
            "their rows; shard it with torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    bare = {_bare(name): param for name, param in given.items()}
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


def _bare(name: str) -> str:
    """Name of a parameter without the segments that wrappers add."""
    path = [segment for segment in name.split(".") if segment not in _WRAPPERS]
    return ".".join(path[1:] if path[0] == "module" else path)  # DistributedDataParallel wraps at the root only


def _find(name: str, given: Mapping[str, nn.Parameter], bare: Mapping[str, nn.Parameter], site: str) -> nn.Parameter:
    """The parameter that a layout means by a name."""
    if name in given:
        return given[name]
    if _bare(name) in bare:
        return bare[_bare(name)]
    close = get_close_matches(name, given, n=1)
    hint = f" (closest: {close[0]!r})" if close else ""
    raise LayoutError(
        f"site {site!r} of the layout names {name!r}, which is no parameter of this model{hint}; "
        "find the pairs again on this model"
    )


def _check_block(block: WeightBlock, params: Mapping[str, nn.Parameter], site: str) -> None:
    """Refuse a block whose axis, ranges or bias do not fit the shapes of its parameters."""
    where = f"site {site!r} of the layout"
    shape = tuple(params[block.param].shape)
    again = "find the pairs again on this model"
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
    if block.bias is not None and tuple(params[block.bias].shape[:1]) != (shape[block.axis],):
        raise LayoutError(
            f"{where} pairs {block.param!r} with the bias {block.bias!r} of shape {tuple(params[block.bias].shape)}; "
            f"need {shape[block.axis]} entries; {again}"
        )
