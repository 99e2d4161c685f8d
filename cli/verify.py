"""`quack-fx verify TARGET`: proof of a layout by gradients on random weights.

In: a target, and optionally a layout to check instead of the one that is found. Out: on stdout, what was proved. Exit
status 1 if a claim is wrong or undecided, or there is no attention.
"""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from .common import find, note, nothing_to, progress, show
from .options import BuildOption, DebugOption, InputsOption, LayoutOption, TargetArgument
from .proof import prove


def verify(
    target: TargetArgument,
    layout: LayoutOption = None,
    build: BuildOption = None,
    inputs: InputsOption = None,
    debug: DebugOption = False,
) -> int:
    """Prove by gradients that each head's logits depend on exactly the rows that were found."""
    finding = find(target, build, inputs, layout)
    if nothing_to("verify", finding):
        return 1
    with progress() as say:
        report, where = prove(finding, say)
    from quack_fx.report.groups import by_reason, group_names

    checks = {proof.name: proof.checks for proof in report.proved}
    table = Table.grid(padding=(0, 2))
    for pattern, names in group_names(checks):
        total = sum(checks[name] for name in names)
        table.add_row("proved", Text(pattern), f"x{len(names)}" if len(names) > 1 else "", f"{total:,} checks")
    for reason, groups in by_reason((entry.name, entry.reason) for entry in report.not_proved):
        for pattern, names in groups:
            table.add_row("not decided", Text(pattern), f"x{len(names)}" if len(names) > 1 else "", Text(reason))
    show(table, Text(f"on {where}"))
    if not report.complete:
        note(f"{len(report.not_proved)} of {len(finding.layout.sites)} attentions could not be decided")
        return 1
    return 0
