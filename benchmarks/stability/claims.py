"""Compares claims of the paper (arXiv 2511.21377, section 4) with these runs.

In: a panel. Out: for each claim, whether it holds in the panel, and the numbers that show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from benchmarks.stability.grid import METHODS, Method
from benchmarks.stability.summary import CLOSE, Panel, Spread

Verdict = Literal["holds", "does not hold", "cannot tell"]

_LEVEL = 0.05
"""Ratios of logits up to 1 plus this are level: where all methods train alike, they differ by rounding."""

_NONE, _NORM = Method("none"), Method("qk-norm")
_QUACKS = [method for method in METHODS if method.kind == "quack"]
_CLIPS = [method for method in METHODS if method.kind == "qk-clip"]
_CONSTANTS = [method for method in METHODS if method.kind == "constant"]


@dataclass(frozen=True)
class Answer:
    """Whether a claim holds in a panel, and the numbers."""

    verdict: Verdict
    numbers: str


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        text: The claim in our own words.
        test: The condition that is tested.
        attentions: The attentions that the claim is about.
        answer: Tests the claim for a panel.
    """

    text: str
    test: str
    attentions: Sequence[str]
    answer: Callable[[Panel], Answer]


def _alike(panel: Panel) -> Answer:
    lr = panel.lrs[0]
    losses = {m: panel.point(m, lr).loss.mean for m in (_NONE, Method("quack"), _NORM, *_CLIPS)}
    low, high = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    return Answer(
        _verdict(losses[high] - losses[low] <= CLOSE), f"{_at(panel, low, lr)}, {_at(panel, high, lr)}, at {lr:g}"
    )


def _steady(panel: Panel, methods: Sequence[Method]) -> Answer:
    """Whether the best of some methods beats "none" at the largest learning rate and never diverged."""
    lr = panel.lrs[-1]
    best = _best(panel, methods, lr)
    numbers = f"{_at(panel, best, lr)}, {_at(panel, _NONE, lr)}, at {lr:g}"
    if any(panel.point(best, own).diverged for own in panel.lrs):
        return Answer("does not hold", numbers)
    if panel.point(_NONE, lr).diverged:
        return Answer("holds", numbers)
    return Answer(_below(panel.difference(best, _NONE, lambda _: lr)), numbers)


def _clip_behind(panel: Panel) -> Answer:
    lr = panel.lrs[-1]
    clip, quack = _best(panel, _CLIPS, lr), _best(panel, _QUACKS, lr)
    numbers = f"{_at(panel, clip, lr)}, {_at(panel, quack, lr)}, at {lr:g}"
    if panel.point(clip, lr).diverged:
        return Answer("holds", numbers)
    return Answer(_below(panel.difference(quack, clip, lambda _: lr)), numbers)


def _near_norm(panel: Panel) -> Answer:
    quack = _best(panel, _QUACKS)
    difference = panel.difference(quack, _NORM, panel.best)
    return Answer(_verdict(difference.mean <= CLOSE), f"{quack.name}: {difference:+.3f} against {_NORM.name}")


def _best_of_all(panel: Panel) -> Answer:
    quack = _best(panel, _QUACKS)
    others = [method for method in panel.methods if method.kind != "quack"]
    differences = {other: panel.difference(quack, other, panel.best) for other in others}
    nearest = max((o for o in others if differences[o].seeds), key=lambda o: differences[o].mean)
    return Answer(_below(differences[nearest]), f"{quack.name}: {differences[nearest]:+.3f} against {nearest.name}")


def _constant_worse(panel: Panel) -> Answer:
    quack, constant = _best(panel, _QUACKS), _best(panel, _CONSTANTS)
    difference, same_tau = (
        panel.difference(one, constant, panel.best) for one in (quack, Method("quack", constant.tau))
    )
    numbers = f"{quack.name}: {difference:+.3f}, quack {constant.tau:g}: {same_tau:+.3f} against {constant.name}"
    return Answer(_below(difference), numbers)


def _lower(panel: Panel, what: Literal["largest", "change"]) -> Answer:
    """Whether logits, or their changes, are with QuacK (tau 1) at no learning rate above those of "none"."""
    quack, ratios = Method("quack"), dict[float, float]()
    for lr in panel.lrs:
        points = [panel.point(method, lr) for method in (quack, _NONE)]
        own, none = (point.largest if what == "largest" else point.change.mean for point in points)
        ratios[lr] = own / none
    numbers = ", ".join(f"{ratio:.3g} times at {lr:g}" for lr, ratio in ratios.items() if ratio == ratio)
    return Answer(_verdict(not any(ratio > 1 + _LEVEL for ratio in ratios.values())), numbers)


CLAIMS = (
    Claim(
        "At a small learning rate all methods are alike",
        f"lowest and highest loss of none, quack 1, qk-norm and qk-clip at the smallest rate; at most {CLOSE} apart",
        ("mha", "mla"),
        _alike,
    ),
    Claim(
        "At a large one QuacK is stable", "the best τ against none", ("mha", "mla"), partial(_steady, methods=_QUACKS)
    ),
    Claim("So is QK norm", "against none", ("mha", "mla"), partial(_steady, methods=[_NORM])),
    Claim("QK clip is not", "the best threshold is worse than QuacK's best τ", ("mha", "mla"), _clip_behind),
    Claim(
        "MHA: QuacK is close to QK norm",
        f"at most {CLOSE} above it, each at its best learning rate and τ",
        ("mha",),
        _near_norm,
    ),
    Claim("MLA: QuacK is best", "lower than the next, each at its best learning rate and τ", ("mla",), _best_of_all),
    Claim(
        "A constant factor on all query and key weights is worse",
        "each at its best learning rate and τ",
        ("mha", "mla"),
        _constant_worse,
    ),
    Claim(
        "QuacK keeps logits low",
        f"largest logit of quack 1 over that of none; at most {1 + _LEVEL:g} at each learning rate",
        ("mha", "mla"),
        partial(_lower, what="largest"),
    ),
    Claim(
        "QuacK keeps their changes low",
        f"mean change of quack 1 over that of none; at most {1 + _LEVEL:g} at each learning rate",
        ("mha", "mla"),
        partial(_lower, what="change"),
    ),
)
"""In the paper's order."""


def can_answer(panel: Panel) -> bool:
    """Whether a panel has runs of all methods at several learning rates, and at least one point with two seeds."""
    methods = [method for method in METHODS if method.fits(panel.attention, panel.optimizer)]
    whole = all(panel.point(method, lr).records for method in methods for lr in panel.lrs)
    return whole and len(panel.lrs) > 1 and panel.seeds > 1


def answers(panel: Panel) -> Iterator[tuple[Claim, Answer]]:
    """The claims about a panel's attention, each with its answer."""
    for claim in CLAIMS:
        if panel.attention in claim.attentions:
            yield claim, claim.answer(panel)


def _best(panel: Panel, methods: Sequence[Method], lr: float | None = None) -> Method:
    """The method with the lowest mean loss, at `lr` or each at its best learning rate; diverged methods come last."""

    def loss(method: Method) -> float:
        at = panel.best(method) if lr is None else lr
        point = None if at is None else panel.point(method, at)
        return point.loss.mean if point and point.loss.seeds and not point.diverged else float("inf")

    return min(methods, key=loss)


def _below(difference: Spread) -> Verdict:
    """Whether a difference of losses is negative by more than two standard deviations over seeds."""
    if difference.deviation is None or abs(difference.mean) <= 2 * difference.deviation:
        return "cannot tell"
    return _verdict(difference.mean < 0)


def _verdict(holds: bool) -> Verdict:
    return "holds" if holds else "does not hold"


def _at(panel: Panel, method: Method, lr: float) -> str:
    return f"{method.name} {panel.point(method, lr)}"
