"""The report of a proof: which sites were proved and which could not be decided.

In: plain values. Out: `VerifyReport`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SiteProof:
    """A site whose claims were all confirmed.

    Attributes:
        name: Name of the site.
        heads: Number of query heads, each checked on both sides.
        attentions: Number of softmaxes on which the claims were checked; more than one for a shared layer.
        checks: Number of comparisons made.
    """

    name: str
    heads: int
    attentions: int
    checks: int


@dataclass(frozen=True, slots=True)
class NotProved:
    """A site that gradients can neither prove nor refute, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was proved about a layout.

    Attributes:
        proved: Sites whose claims were all confirmed.
        not_proved: Sites that could not be decided, with reasons.
    """

    proved: tuple[SiteProof, ...]
    not_proved: tuple[NotProved, ...]

    @property
    def complete(self) -> bool:
        """Whether every site was proved."""
        return not self.not_proved

    @property
    def checks(self) -> int:
        """Number of comparisons made."""
        return sum(proof.checks for proof in self.proved)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)
