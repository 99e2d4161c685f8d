"""DOOR: `quack-fx verify TARGET`: proof of a layout by gradients on real numbers.

In: a target and, maybe, a layout to check instead of the one that is found. Out: on stdout what was proved. Exit status
1 where a claim is wrong, where one could not be decided, and where there is no attention.
"""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from .common import (
    BuildOption,
    DebugOption,
    InputsOption,
    LayoutOption,
    TargetArgument,
    find,
    note,
    progress,
    show,
)


def verify(
    target: TargetArgument,
    layout: LayoutOption = None,
    build: BuildOption = None,
    inputs: InputsOption = None,
    debug: DebugOption = False,
) -> int:
    """Prove by gradients that each head's logits depend on exactly the rows that were found."""
    finding = find(target, build, inputs, layout)
    if not finding.layout.sites:
        note(f"no attention found in {finding.facts.title}: nothing to verify")
        return 1
    from quack_fx.verify import verify_qk_pairs

    with progress() as say:
        say(f"proving {len(finding.layout.sites)} attentions on random weights")
        report = verify_qk_pairs(finding.target.model, finding.layout, *finding.target.args, **finding.target.kwargs)
    from quack_fx.report.groups import group_names

    checks = {proof.name: proof.checks for proof in report.proved}
    table = Table.grid(padding=(0, 2))
    for pattern, names in group_names(checks):
        total = sum(checks[name] for name in names)
        table.add_row("proved", Text(pattern), f"x{len(names)}" if len(names) > 1 else "", f"{total:,} checks")
    for entry in report.not_proved:
        table.add_row("not decided", Text(entry.name or "(root)"), "", Text(entry.reason))
    show(table)
    if not report.complete:
        note(f"{len(report.not_proved)} of {len(finding.layout.sites)} attentions could not be decided")
        return 1
    return 0
