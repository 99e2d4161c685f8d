"""The norms of a site against the evidence.

In: the evidence about a site. Out: the number of norms confirmed; `VerifyError` for the first claim that is wrong.

Behind a norm the logits do not depend on the size of the weights before it (Euler's rule: the gradient of the operand
along the product is zero), and where the mean is taken away as well, the gradients of the features sum to zero. How
many features share a statistic is how many go into one. Here, and here alone, statistics carry gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quack_fx.layout import Norm, Side
from quack_fx.verify.evidence import CannotTell, Evidence, Part
from quack_fx.verify.heads import SIDES
from quack_fx.verify.replay import Replay

_BLIND = 1e-2
"""Below this part of the whole, what an operand owes to the size of its weights is a norm's epsilon."""

_SHORT, _BLIND_WHEN_SHORT = 0.1, 0.3
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
        norms = _norms(evidence, part, side, (evidence.live(part, side), part.lower[side]), wanted | tolerated, _BLIND)
        if norms:  # what cuts long vectors down is a norm of those alone
            norms &= _norms(evidence, part, side, evidence.shrunk(part, side, _SHORT), norms, _BLIND_WHEN_SHORT)
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
    value, factors = part.operand[side].value, part.factors[side]
    live, frozen = replays
    outs = [factor.result for factor in factors]
    inputs = {op: op.inputs[0] for factor in factors for op in factor.norms}
    blind = [True] * len(factors)
    together, saturated, less_mean = True, [True] * len(factors), dict.fromkeys(inputs, True)
    for _ in range(3):  # without a norm, one seed may happen to show none of the size
        seed = live[value].detach() * (0.5 + evidence.noise(part.operand[side]).abs())
        arrived, usual = (
            live.gradients_at(value, seed, [*outs, *inputs.values()]),
            frozen.gradients_at(value, seed, outs),
        )
        gains = [arrived[out] * live[out].detach() if out in arrived else torch.zeros(()) for out in outs]
        sizes = [(usual[out] * live[out].detach()).abs().sum() if out in usual else torch.zeros(()) for out in outs]
        whole = torch.stack([gain.sum() for gain in gains]).sum()
        together &= bool(whole.abs() < limit * torch.stack(sizes).sum())
        for i, (gain, size) in enumerate(zip(gains, sizes, strict=True)):
            blind[i] &= bool(gain.sum().abs() < limit * size)
            saturated[i] &= bool(gain.abs().sum() < limit * size)
        for op, source in inputs.items():
            less_mean[op] &= source in arrived and _sums_to_zero(arrived[source])
    found: dict[int, bool] = {}
    for i, factor in enumerate(factors):
        # One norm over what several products make is blind to all of them together.
        if not (blind[i] or together):
            continue
        if not factor.norms:
            raise CannotTell(
                f"its {side} side does not depend on the size of {min(factor.params)!r}, yet passes no norm"
            )
        for op in sorted(factor.norms, key=lambda op: op.index):
            width = op.inputs[0].tensor.numel() // max(1, op.outputs[-1].tensor.numel())
            # Two features less their mean, or one, leave nothing but a sign: there is no gradient to go by.
            unclear = saturated[i] or width <= 2
            found.setdefault(width, (width, True) in expected if unclear else less_mean[op])
    return set(found.items())


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
