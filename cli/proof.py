"""The proof of a finding, for `verify` and `inspect --verify`.

In: a finding. Out: a `VerifyReport` about its sites, and a description of the model that the proof ran on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from quack_fx.errors import TargetError

from .common import Finding

if TYPE_CHECKING:
    from quack_fx.prove import VerifyReport
    from quack_fx.targets import Target


def prove(finding: Finding, say: Callable[[str], None]) -> tuple[VerifyReport, str]:
    """Prove a finding by gradients.

    If a model is too large to copy but has a config, a smaller model of the same structure is proved instead, and the
    result carries over to attentions of the same form.

    Returns:
        The report, and the model that it ran on: "a copy with random weights".

    Raises:
        VerifyError: A claim is wrong.
        CannotRun: The model cannot run, or is too large and has no smaller one.
    """
    from quack_fx.prove import TooLarge, carried_over, verify_qk_pairs
    from quack_fx.prove.copy import SIZE_LIMIT

    target = finding.target
    say(f"proving {len(finding.layout.sites)} attentions on random weights")
    fits = sum(p.numel() for p in target.model.parameters()) <= SIZE_LIMIT
    model = target.with_numbers() if fits else target.model
    try:
        report = verify_qk_pairs(model, finding.layout, *target.args, **target.kwargs)
        return report, "a copy with random weights"
    except TooLarge:
        small = _small(target, say)
        if small is None:
            raise
    from quack_fx.find import find_qk_pairs

    other, size = small
    say(f"proving on a copy of {size}")
    layout = find_qk_pairs(other.model, *other.args, **other.kwargs)
    report = verify_qk_pairs(other.model, layout, *other.args, **other.kwargs)
    return carried_over(finding.layout, layout, report), f"a copy of {size}"


def _small(target: Target, say: Callable[[str], None]) -> tuple[Target, str] | None:
    """A smaller model of the same structure as a target's, and a description of its size; None if there is none."""
    from quack_fx.targets import settle
    from quack_fx.targets.adapters import adapt

    adapted = adapt(target.source)
    if adapted is None or adapted.smaller is None:
        return None
    for small, size in adapted.smaller():
        with suppress(TargetError):  # try the next, larger one
            return settle([small.recipe], small.namespace, None, True, say, examples=small.examples), size
    return None
