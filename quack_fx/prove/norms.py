"""Checks the norms of a site against the evidence.

In: the evidence about a site. Out: the number of norms confirmed; `VerifyError` for the first wrong claim.

After a norm, the logits do not depend on the size of the weights before it: the gradient along the projection's result
is zero (Euler's theorem for homogeneous functions). If the norm also subtracts the mean, the gradients of its input
features sum to zero. The width of a norm is the number of features that share a statistic. Statistics carry gradients
in this file only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from quack_fx.layout import SIDES, Norm, Side
from quack_fx.prove.evidence import CannotTell, Evidence, Part
from quack_fx.prove.replay import Replay
from quack_fx.prove.tape import Op

_BLIND = 1e-2
"""A dependence on the norm of the weights that is smaller than this fraction comes from the norm's epsilon."""

_LONG = 3000.0
"""Length of long test vectors: an epsilon or a bias is negligible beside it, even if features cancel."""

_SHORT, _BLIND_WHEN_SHORT = 0.2, 0.3
"""Length of short test vectors, which tell a norm from a clip; a norm's epsilon matters more there."""


def check_norms(evidence: Evidence) -> int:
    """Check that QK norms, and norms between factors, are exactly where they are claimed.

    Returns:
        Number of comparisons.

    Raises:
        VerifyError: A norm is missing, does not exist, or has another kind or width.
    """
    for side in SIDES:
        claimed = [norm for norm in evidence.site.qk_norm if norm.side == side]
        # In evaluation mode, a batch norm has constant statistics: it is linear, and no gradient shows it.
        if all(norm.kind in ("rms", "l2", "layer") for norm in claimed):
            _check_qk_norm(evidence, side, claimed)
        for norm in claimed:
            _check_names(evidence, side, norm, claimed)
        _check_latent_norm(evidence, side)
    return 2 * len(SIDES)


def _check_qk_norm(evidence: Evidence, side: Side, claimed: list[Norm]) -> None:
    latent = [norm for norm in evidence.site.latent_norm if norm.side == side] if _absorbed(evidence, side) else []
    if latent and claimed:
        raise evidence.error(f"its {side} side is the latent itself: a norm of it is a latent norm, and no QK norm")
    wanted, tolerated = ({(norm.width, norm.kind == "layer") for norm in norms} for norms in (claimed, latent))
    found: set[tuple[int, bool]] = set()
    for part in evidence.parts:
        found |= _norms(evidence, part, side, wanted | tolerated) - (tolerated - wanted)
    if found and not wanted:
        raise evidence.error(f"its {side} side passes a norm, so its logits do not depend on the size of the weights")
    if wanted and not found:
        raise evidence.error(
            f"its {side} side is said to pass a norm, but its logits depend on the size of the weights"
        )
    if found != wanted:
        raise evidence.error(f"its {side} side passes {_spell(found)}, the layout claims {_spell(wanted)}")


def _absorbed(evidence: Evidence, side: Side) -> bool:
    """Whether the keys' up projection is applied to the queries, which are then multiplied with the latent itself."""
    return side == "key" and any(block.role == "uk" for block in evidence.blocks["query"])


def _norms(evidence: Evidence, part: Part, side: Side, expected: set[tuple[int, bool]]) -> set[tuple[int, bool]]:
    """The width of each norm from the nearest projections to the logits, and whether it subtracts the mean.

    Where no gradient can decide, those of `expected` are assumed.
    """
    ops = sorted({op for factor in part.around[side] for op in factor.norms}, key=lambda op: op.index)
    long, short = _Probe(evidence, part, side, _LONG), _Probe(evidence, part, side, _SHORT)
    normed = torch.zeros_like(part.operand[side].value.tensor, dtype=torch.bool)
    found: dict[int, bool] = {}
    for op in ops:
        # A norm may cover only some of the features or tokens.
        positions = long.positions(op)
        normed |= positions
        # Clipping acts as a norm on long vectors only.
        if not long.is_blind(positions, _BLIND) or not short.is_blind(positions, _BLIND_WHEN_SHORT):
            continue
        width = op.inputs[0].tensor.numel() // max(1, op.outputs[-1].tensor.numel())
        # Of one feature, or two minus their mean, the norm leaves only the sign, without a gradient.
        unclear = width <= 2 or long.is_saturated(positions)
        found.setdefault(width, (width, True) in expected if unclear else long.takes_the_mean(positions, op))
    if long.is_blind(~normed, _BLIND):
        names = {name for factor in part.around[side] for name in factor.params}
        raise CannotTell(f"its {side} side does not depend on the size of {min(names)!r}, yet passes no norm")
    return set(found.items())


class _Probe:
    """Seeds on an operand computed from results of projections, a head's vectors of a given length, and the gradients
    at these vectors."""

    def __init__(self, evidence: Evidence, part: Part, side: Side, length: float) -> None:
        self._evidence, self._operand = evidence, part.operand[side]
        self._outs = [factor.result for factor in part.around[side]]
        self._length, self._part, self._side = length, part, side

    @cached_property
    def _replays(self) -> tuple[Replay, Replay]:
        return self._evidence.from_results(self._part, self._side, self._length)

    @cached_property
    def _growth(self) -> Tensor:
        """The operand's change if the results grow and statistics are constant; a seed that shows changes of size."""
        fixed = self._replays[1]
        return fixed.changes(self._operand.value, {out: fixed.start(out).detach() for out in self._outs})

    def positions(self, norm: Op) -> Tensor:
        """Mask of the elements of the operand that depend on a norm's statistic."""
        # Bounded away from zero: among ten million normal numbers one may be zero, and large models have as many.
        noise = (0.5 + torch.rand(norm.out.tensor.shape, generator=self._evidence.generator)).to(norm.out.tensor)
        return self._replays[0].changes(self._operand.value, {norm.out: noise}) != 0

    def is_blind(self, positions: Tensor, limit: float) -> bool:
        """Whether the operand at some positions does not depend on the size of the projections' results."""
        return bool(positions.any()) and all(
            abs(sum(float(gain.sum()) for gain in self._gains(seed))) < limit * float((seed * self._growth).sum())
            for seed in self._seeds(positions)
        )

    def is_saturated(self, positions: Tensor) -> bool:
        """Whether the operand at some positions does not depend on the projections' results at all."""
        return all(
            sum(float(gain.abs().sum()) for gain in self._gains(seed)) < _BLIND * float((seed * self._growth).sum())
            for seed in self._seeds(positions)
        )

    def takes_the_mean(self, positions: Tensor, norm: Op) -> bool:
        """Whether a norm subtracts the mean: the gradients of its input features sum to zero."""
        live, source, statistic = self._replays[0], norm.inputs[0], norm.outputs[-1].tensor
        found = [live.gradients_at(self._operand.value, seed, [source]) for seed in self._seeds(positions)]
        return all(source in arrived and sums_to_zero(arrived[source], statistic.shape) for arrived in found)

    def _seeds(self, positions: Tensor) -> Iterator[Tensor]:
        for _ in range(3):  # a single seed may miss the dependence on the size by chance
            yield self._growth * (0.5 + self._evidence.noise(self._operand).abs()) * positions

    def _gains(self, seed: Tensor) -> list[Tensor]:
        """For a seed, the gradient of each element of the results times that element."""
        live = self._replays[0]
        arrived = live.gradients_at(self._operand.value, seed, self._outs)
        return [arrived[out] * live.start(out).detach() for out in self._outs if out in arrived]


def sums_to_zero(gradient: Tensor, statistic: Sequence[int]) -> bool:
    """Whether the gradients of the features that share a statistic sum to zero.

    The median over statistics decides: if features are nearly equal, rounding is as large as their differences. If the
    shape of the statistic does not show which features share one, the sum is over all features.
    """
    told = len(statistic) == gradient.dim()
    told = told and all(n in (1, size) for n, size in zip(statistic, gradient.shape, strict=True))
    shape = statistic if told else [1] * gradient.dim()
    sums, sizes = gradient.sum_to_size(*shape).abs(), gradient.abs().sum_to_size(*shape)
    return bool((sums[sizes > 0] / sizes[sizes > 0]).median() < 1e-4)


def _check_names(evidence: Evidence, side: Side, norm: Norm, claimed: list[Norm]) -> None:
    """Check that the claimed module computes a norm on this side, and that the claimed gain is applied."""
    both_sides = norm.module in {other.module for other in evidence.site.qk_norm if other.side != side}
    ran = {
        module
        for part in evidence.parts
        for op in {op for factor in part.factors[side] for op in factor.norms}
        if not both_sides
        or _Probe(evidence, part, side, _LONG).positions(op).any()  # queries and keys may share a tensor
        for module in op.modules
    }
    # Layers with tied weights are one site with several calls, each of which may have its own norm modules.
    elsewhere = evidence.site.calls > 1 and norm.module in evidence.graph.tape.ran and norm.module not in ran
    if norm.weight is not None and not (elsewhere and _reads(evidence, norm.module, norm.weight)):
        reached: set[str] = set()
        for part in evidence.parts:
            operand = part.operand[side]
            arrived = part.lower[side].gradients(operand.value, evidence.noise(operand))
            reached |= {name for name, gradient in arrived.items() if gradient.any()}
        if norm.weight not in reached and evidence.site.calls > 1 and norm.module is None:
            raise CannotTell(
                f"{norm.weight!r} is said to scale its {side} side, which it does not in each of its calls"
            )
        if norm.weight not in reached:
            raise evidence.error(f"{norm.weight!r} is said to scale its {side} side, which it does not reach")
    excused = elsewhere and any(other.module in ran for other in claimed)
    if norm.module is not None and norm.module not in ran and not excused:
        raise evidence.error(f"{norm.module!r} is said to normalise its {side} side, but no norm runs there")


def _reads(evidence: Evidence, module: str | None, param: str) -> bool:
    return any(module in op.modules and any(v.param == param for v in op.inputs) for op in evidence.graph.tape.ops)


def _check_latent_norm(evidence: Evidence, side: Side) -> None:
    """Check that a norm stands between two factors exactly where one is claimed."""
    claimed = [norm for norm in evidence.site.latent_norm if norm.side == side]
    found = {
        module
        for part in evidence.parts
        for factor in part.followed[side]
        if factor not in part.factors[side] or _absorbed(evidence, side)
        for op in factor.norms
        for module in op.modules
    }
    if bool(claimed) != bool(found):
        says = "claims a norm between them" if claimed else "claims none"
        raise evidence.error(
            f"{side} side: {'a' if found else 'no'} norm stands between its factors, the layout {says}"
        )
    for norm in claimed:
        elsewhere = evidence.site.calls > 1 and norm.module in evidence.graph.tape.ran
        if norm.module is not None and norm.module not in found and not (elsewhere and found):
            raise evidence.error(f"{norm.module!r} is said to normalise its latent {side} side, but no norm runs there")


def _spell(shapes: set[tuple[int, bool]]) -> str:
    return ", ".join(
        f"a norm of {width} features {'less' if mean else 'with'} their mean" for width, mean in sorted(shapes)
    )
