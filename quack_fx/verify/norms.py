"""The norms of a site against the evidence.

In: the evidence about a site. Out: the number of norms confirmed; `VerifyError` for the first claim that is wrong.

Behind a norm the logits do not depend on the size of the weights before it (Euler's rule: the gradient of the operand
along the product is zero), and where the mean is taken away as well, the gradients of the features sum to zero. How
many features share a statistic is how many go into one. Here, and here alone, statistics carry gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quack_fx.layout import Norm, Side
from quack_fx.verify.evidence import CannotTell, Evidence, Part
from quack_fx.verify.graph import Factor
from quack_fx.verify.heads import SIDES, Operand
from quack_fx.verify.replay import Replay
from quack_fx.verify.tape import Op

_BLIND = 1e-2
"""Below this part of the whole, what an operand owes to the size of its weights is a norm's epsilon."""

_LONG = 30.0
"""The length to which vectors are drawn out: an epsilon is nothing beside it, even where features cancel."""

_SHORT, _BLIND_WHEN_SHORT = 0.2, 0.3
"""The length to which vectors are cut, to tell a norm from a clip; a norm's epsilon counts for more there."""


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
            _check_names(evidence, side, norm, claimed)
        _check_latent_norm(evidence, side)
    return 2 * len(SIDES)


def _check_qk_norm(evidence: Evidence, side: Side, claimed: list[Norm]) -> None:
    latent = [norm for norm in evidence.site.latent_norm if norm.side == side] if _absorbed(evidence, side) else []
    wanted, tolerated = ({(norm.width, norm.kind == "layer") for norm in norms} for norms in (claimed, latent))
    found: set[tuple[int, bool]] = set()
    for part in evidence.parts:
        norms = _norms(evidence, part, side, evidence.from_results(part, side, _LONG), wanted | tolerated, _BLIND)
        if norms:  # what cuts long vectors down is a norm of those alone
            norms &= _norms(evidence, part, side, evidence.from_results(part, side, _SHORT), norms, _BLIND_WHEN_SHORT)
        found |= norms - (tolerated - wanted)
    if found and not wanted:
        raise evidence.error(f"its {side} side passes a norm, so its logits do not depend on the size of the weights")
    if wanted and not found:
        raise evidence.error(
            f"its {side} side is said to pass a norm, but its logits depend on the size of the weights"
        )
    if found != wanted:
        raise evidence.error(f"its {side} side passes {_spell(found)}, the layout claims {_spell(wanted)}")


def _absorbed(evidence: Evidence, side: Side) -> bool:
    """Whether the keys' up projection is multiplied to the queries: what those meet is then the latent itself."""
    return side == "key" and any(block.role == "uk" for block in evidence.blocks["query"])


def _norms(
    evidence: Evidence,
    part: Part,
    side: Side,
    replays: tuple[Replay, Replay],
    expected: set[tuple[int, bool]],
    limit: float,
) -> set[tuple[int, bool]]:
    """Widths of the norms between the nearest products and the logits, and whether each takes the mean away.

    Arguments:
        evidence: The evidence.
        part: The logit product.
        side: The side.
        replays: The slice that makes the operand, with statistics that carry gradients, and with constant ones.
        expected: Norms taken for granted where no gradient tells.
        limit: Part of the whole below which what an operand owes to the size of its weights is nothing.
    """
    operand, factors = part.operand[side], part.around[side]
    ops = sorted({op for factor in factors for op in factor.norms}, key=lambda op: op.index)
    normed = torch.zeros_like(operand.value.tensor, dtype=torch.bool)
    found: dict[int, bool] = {}
    for op in ops:
        # A norm may be over some of the features alone, or over those of some of the tokens.
        noise = torch.randn(op.out.tensor.shape, generator=evidence.generator).to(op.out.tensor)
        places = replays[0].changes(operand.value, {op.out: noise}) != 0
        normed |= places
        if not bool(places.any()):
            continue
        seen = _seen(evidence, operand, replays, factors, places, op, limit)
        if not seen.blind:
            continue
        width = op.inputs[0].tensor.numel() // max(1, op.outputs[-1].tensor.numel())
        # Two features less their mean, or one, leave nothing but a sign: there is no gradient to go by.
        unclear = seen.saturated or width <= 2
        found.setdefault(width, (width, True) in expected if unclear else seen.less_mean)
    if not bool(normed.all()) and _seen(evidence, operand, replays, factors, ~normed, None, limit).blind:
        names = {name for factor in factors for name in factor.params}
        raise CannotTell(f"its {side} side does not depend on the size of {min(names)!r}, yet passes no norm")
    return set(found.items())


@dataclass(frozen=True)
class _Seen:
    """What seeds on some places of an operand show.

    Attributes:
        blind: The places do not depend on the size of what the products with weights make.
        saturated: Nor on anything else of it.
        less_mean: The gradients of the features that go into a norm sum to zero.
    """

    blind: bool
    saturated: bool
    less_mean: bool


def _seen(
    evidence: Evidence,
    operand: Operand,
    replays: tuple[Replay, Replay],
    factors: Sequence[Factor],
    places: Tensor,
    norm: Op | None,
    limit: float,
) -> _Seen:
    """Seed some places of an operand and look at what arrives at the nearest products, and before a norm."""
    live, frozen = replays
    value, outs = operand.value, [factor.result for factor in factors]
    inputs = [] if norm is None else [norm.inputs[0]]
    blind, saturated, less_mean = True, True, True
    # What larger results would make of the operand without a norm: a seed along it sees every change of size.
    growth = frozen.changes(value, {out: frozen.start(out).detach() for out in outs}) * places
    for _ in range(3):  # without a norm, one seed may happen to show none of the size
        seed = growth * (0.5 + evidence.noise(operand).abs())
        arrived, usual = live.gradients_at(value, seed, [*outs, *inputs]), frozen.gradients_at(value, seed, outs)
        gains = [arrived[out] * live.start(out).detach() for out in outs if out in arrived]
        size = sum(float((usual[out] * live.start(out).detach()).abs().sum()) for out in outs if out in usual)
        blind &= abs(sum(float(gain.sum()) for gain in gains)) < limit * size
        saturated &= sum(float(gain.abs().sum()) for gain in gains) < limit * size
        less_mean &= all(source in arrived and _sums_to_zero(arrived[source]) for source in inputs)
    return _Seen(blind, saturated, less_mean)


def _sums_to_zero(gradient: Tensor) -> bool:
    return bool(gradient.sum().abs() < 1e-4 * gradient.abs().sum())


def _check_names(evidence: Evidence, side: Side, norm: Norm, claimed: list[Norm]) -> None:
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
        # Tied stacks are one site with several calls, each with norm modules of its own.
        elsewhere = evidence.site.calls > 1 and norm.module in evidence.graph.tape.ran
        if norm.module not in ran and not (elsewhere and any(other.module in ran for other in claimed)):
            raise evidence.error(f"{norm.module!r} is said to normalise its {side} side, but no norm runs there")


def _check_latent_norm(evidence: Evidence, side: Side) -> None:
    """A norm stands between two factors exactly where one is claimed."""
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
