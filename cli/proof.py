"""DOOR: what `verify` and `inspect --verify` share: the proof of a finding, on the model or on a small copy of it.

In: a finding. Out: a `VerifyReport` about the finding's own sites, and what it was made on, in words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .common import Finding

if TYPE_CHECKING:
    from quack_fx.verify import VerifyReport


def prove(finding: Finding, say: Callable[[str], None]) -> tuple[VerifyReport, str]:
    """Prove a finding by gradients.

    Arguments:
        finding: The target and its layout.
        say: Called with a few words before what takes time.

    Returns:
        The report, and what it was made on: "a copy with random weights".

    Raises:
        VerifyError: A claim is wrong.
        CannotRun: There is nothing to prove on.
    """
    from quack_fx.verify import verify_qk_pairs

    target = finding.target
    say(f"proving {len(finding.layout.sites)} attentions on random weights")
    return verify_qk_pairs(target.model, finding.layout, *target.args, **target.kwargs), "a copy with random weights"
