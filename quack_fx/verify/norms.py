"""The norms of a site against the evidence.

In: the evidence about a site. Out: the number of norms confirmed; `VerifyError` for the first claim that is wrong.

A norm shows in three ways, none of which asks how it is written. The logits do not depend on the size of the weights
before it (Euler's rule: the gradient of the operand along those weights is zero). A seed on one feature reaches as many
rows as share a statistic. And where the mean is taken away, the gradients of those rows sum to zero. Here, and here
alone, statistics carry gradients.
"""

from __future__ import annotations

import torch

from quack_fx.layout import Norm, Side
from quack_fx.verify.evidence import Evidence, Part
from quack_fx.verify.graph import Factor
from quack_fx.verify.heads import SIDES

_BLIND = 1e-2
"""Below this part of the whole, what an operand owes to the size of its weights is a norm's epsilon."""


def check_norms(evidence: Evidence) -> int:
    """QK norms are where they are claimed and nowhere else, and so are norms between factors.

    Returns:
        Number of comparisons.

    Raises:
        VerifyError: A norm is missing, is not there, or is of another kind or width.
    """
    for side in SIDES:
        claimed = [norm for norm in evidence.site.qk_norm if norm.side == side]
        # A batch norm's statistics are constants outside training: it is linear there, and no gradient shows it.
        if all(norm.kind in ("rms", "l2", "layer") for norm in claimed):
            _check_qk_norm(evidence, side, claimed)
        for norm in claimed:
            _check_names(evidence, side, norm)
        _check_latent_norm(evidence, side)
    return 2 * len(SIDES)


def _check_qk_norm(evidence: Evidence, side: Side, claimed: list[Norm]) -> None:
    found = {
        shape
        for part in evidence.parts
        for factor in part.factors[side]
        if (shape := _shape_of_norm(evidence, part, side, factor)) is not None
    }
    wanted = {(norm.width, norm.kind == "layer") for norm in claimed}
    if found and not wanted:
        raise evidence.error(f"its {side} side passes a norm, so its logits do not depend on the size of the weights")
    if wanted and not found:
        raise evidence.error(
            f"its {side} side is said to pass a norm, but its logits depend on the size of the weights"
        )
    if found != wanted:
        raise evidence.error(f"its {side} side passes {_spell(found)}, the layout claims {_spell(wanted)}")


def _shape_of_norm(evidence: Evidence, part: Part, side: Side, factor: Factor) -> tuple[int, bool] | None:
    """Width of the norm between a product and the logits, and whether it takes the mean away; None without a norm."""
    operand = part.operand[side]
    live = evidence.slice(part, side, frozen=False)
    value, out = operand.value, factor.product.op.out
    # Near the operand itself, so that without a norm nothing cancels; not equal, for a unit vector is blind to that.
    seed = live[value].detach() * (0.5 + evidence.noise(operand).abs())
    arrived = live.gradients_at(value, seed, [out]).get(out)
    if arrived is None:
        return None
    own = arrived * live[out].detach()
    if own.sum().abs() > _BLIND * own.abs().sum():
        return None
    cut, labels = evidence.reading
    places = evidence.upper.places(cut, labels, 0, [operand])[0].movedim(operand.axis, -1).squeeze(-1).nonzero()
    features = range(value.tensor.shape[operand.axis])
    for place in (places[0], places[-1], *places[1:-1]):
        for feature in features:
            # What shares a statistic with one feature of one position receives a gradient from it.
            one = torch.zeros_like(seed)
            one.movedim(operand.axis, -1)[*place, feature] = 1.0
            reached = live.gradients_at(value, one, [out]).get(out)
            if reached is not None and reached.any():
                without_mean = bool(reached.sum().abs() < _BLIND * reached.abs().sum())
                return int(reached.count_nonzero()), without_mean
    return None


def _check_names(evidence: Evidence, side: Side, norm: Norm) -> None:
    """The module that is said to compute a norm computes one on this side, and its gain is on the way."""
    if norm.weight is not None:
        reached: set[str] = set()
        for part in evidence.parts:
            operand = part.operand[side]
            reached |= part.lower[side].gradients(operand.value, evidence.noise(operand)).keys()
        if norm.weight not in reached:
            raise evidence.error(f"{norm.weight!r} is said to scale its {side} side, which it does not reach")
    if norm.module is not None:
        ran = {module for part in evidence.parts for f in part.factors[side] for op in f.norms for module in op.modules}
        if norm.module not in ran:
            raise evidence.error(f"{norm.module!r} is said to normalise its {side} side, but no norm runs there")


def _check_latent_norm(evidence: Evidence, side: Side) -> None:
    """A norm stands between two factors exactly where one is claimed."""
    claimed = [norm for norm in evidence.site.latent_norm if norm.side == side]
    found = {
        module
        for part in evidence.parts
        for factor in part.followed[side]
        if factor not in part.factors[side]
        for op in factor.norms
        for module in op.modules
    }
    if bool(claimed) != bool(found):
        says = "claims a norm between them" if claimed else "claims none"
        raise evidence.error(
            f"{side} side: {'a' if found else 'no'} norm stands between its factors, the layout {says}"
        )
    for norm in claimed:
        if norm.module is not None and norm.module not in found:
            raise evidence.error(f"{norm.module!r} is said to normalise its latent {side} side, but no norm runs there")


def _spell(shapes: set[tuple[int, bool]]) -> str:
    return ", ".join(
        f"a norm of {width} features {'with' if mean else 'without'} their mean" for width, mean in sorted(shapes)
    )
