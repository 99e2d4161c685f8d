"""Writes the docstring of a program: what it does, how to use it, which attentions it leaves out.

In: the layout, its kinds of attention, the optimizers. Out: the docstring, including the quotes.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from quack_fx.layout import QKLayout
from quack_fx.train.program.kinds import Kind
from quack_fx.train.program.text import WIDTH

_LEFT_OUT = 6
"""Maximum number of entries in the docstring's list of attentions without QuacK."""

_MAKING = {
    "AdamW": "adamw = torch.optim.AdamW({}, lr=3e-4, weight_decay=0.1)",
    "Adam": "adam = torch.optim.Adam({}, lr=3e-4)",
    "SGD": "sgd = torch.optim.SGD({}, lr=0.1, momentum=0.9)",
    "Muon": "muon = torch.optim.Muon({}, lr=0.02)",
    "Lion": "lion = Lion({}, lr=1e-4, weight_decay=1.0)",
}


def about(layout: QKLayout, kinds: Sequence[Kind], title: str, optimizers: Sequence[str], strips: bool) -> str:
    """The docstring of a program."""
    name = " ".join(title.split()).replace("\\", "/").replace('"', "'")
    latent = [any(len(term.factors) > 2 for term in kind.terms) for kind in kinds]
    algorithm = "Algorithms 1 and 2" if len(set(latent)) == 2 else f"Algorithm {2 if any(latent) else 1}"
    given = ["model.parameters()"] if len(optimizers) == 1 else ["matrices", "others"]
    making = [_MAKING[kind].format(group) for kind, group in zip(optimizers, given, strict=False)]
    variables = ", ".join(line.partition(" =")[0] for line in making)
    left_out = _left_out(layout)
    lines = [
        *_fill(f'"""A training step for {name}: {" and ".join(optimizers) or "no optimizer"} with QuacK.'),
        "",
        *_fill(
            f"QuacK (arXiv 2511.21377, {algorithm}): the learning rate of each head's query and key rows is divided by "
            "the norms of the weights that they are multiplied with, relative to the start of training, so that "
            "attention logits change at the same pace however large the weights grow. quack-fx wrote this file from "
            "the model's graph; it needs only torch."
        ),
        "",
        *(["    strip_qk_norm(model)  # QuacK takes the place of its QK norms"] if strips else []),
        *(f"    {line}" for line in making),
        f"    train_step = TrainStep(model, {variables})",
        "    for batch in batches:",
        "        loss = train_step(*batch)",
        *(["", "Left out, with the plain learning rate:", *left_out] if left_out else []),
        '"""',
    ]
    return "\n".join(lines)


def _left_out(layout: QKLayout) -> list[str]:
    """Lines that list the attentions without QuacK; attentions with names that differ only in numbers share a line."""
    kept = "QK norm is kept, so the logits do not depend on the norms of these weights"
    entries = [(site.name, kept) for site in layout.sites if site.qk_norm]
    entries += [(skipped.name, skipped.reason) for skipped in layout.skipped]
    groups = Counter((re.sub(r"\d+", "*", name) or "the model itself", reason) for name, reason in entries)
    lines = []
    for (name, reason), count in groups.most_common(_LEFT_OUT):
        text = f"- {name}{f' ({count} times)' if count > 1 else ''}: {' '.join(reason.split())}"
        lines += _fill(text.replace("\\", "/").replace('"', "'"), subsequent_indent="  ")
    if len(groups) > _LEFT_OUT:
        lines.append(f"- and {sum(groups.values()) - sum(n for _, n in groups.most_common(_LEFT_OUT))} more")
    return lines


def _fill(text: str, **options: Any) -> list[str]:
    """A paragraph wrapped into lines."""
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False, **options)
