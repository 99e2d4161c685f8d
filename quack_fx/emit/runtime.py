"""USER: what follows the table in an emitted file: heads, the optimizer's arithmetic, its update, the training step.

In: the features of the table, the chosen optimizer. Out: classes and functions as source, one text each, and the
imports that they need.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence, Set

from quack_fx.emit import template
from quack_fx.emit.library import definition
from quack_fx.emit.optimizers import Choice
from quack_fx.emit.template import render

_PIECES = (
    ("factors/rule.py", "norm_dtype"),
    ("factors/rule.py", "square_rows"),
    ("factors/tables.py", "_by_length"),
    ("factors/tables.py", "_term_tables"),
    ("step/pieces.py", "Piece"),
    ("step/pieces.py", "Spans"),
    ("step/pieces.py", "cut"),
    ("step/pieces.py", "_edges"),
    ("step/pieces.py", "_runs"),
    ("step/pieces.py", "_pieces"),
    ("step/pieces.py", "_evened"),
    ("step/pieces.py", "_spans"),
    ("step/pieces.py", "_pattern"),
    ("step/pieces.py", "_padded"),
)
"""How weights are cut into heads."""

_UPDATE = (
    ("step/loops.py", "_most"),
    ("step/loops.py", "_few"),
    ("step/loops.py", "_changed"),
    ("step/loops.py", "_unless"),
    ("step/loss.py", "own_code"),
    ("step/update.py", "numbers_of"),
    ("step/update.py", "_like"),
    ("step/update.py", "_clip"),
    ("step/update.py", "gradients"),
    ("step/update.py", "all_finite"),
    ("step/update.py", "_exact"),
)
"""What an update of any optimizer needs."""


def contents(chosen: Choice, strips: bool) -> list[str]:
    """What is in the file, a line each."""
    rules = ", ".join(kind.rule for kind in chosen.kinds)
    classes = ", ".join(f"QuacK{kind.name}" for kind in chosen.kinds)
    parts = {
        "logit_products": "the table: which rows of which weights are multiplied in the logits",
        **({"strip_qk_norm": "takes the QK norms out"} if strips else {}),
        "Heads": "the rule: norms of the rows of every head, and the scales that follow from them",
        "cut": "weights cut into pieces in which every head is one long row of numbers",
        rules: "the arithmetic of the optimizer",
        "make_loop": "what is compiled: weights and state are changed, and the new norms left behind",
        classes: "the optimizers" if chosen.several else "the optimizer",
        "compile_train_step": "loss, backward and update of one batch",
    }
    width = max(map(len, parts))
    return [f"    {name:{width}}  {text}" for name, text in parts.items()]


def runtime(features: Set[str], chosen: Choice, tau: float) -> Iterator[str]:
    """The classes and functions, in order.

    Arguments:
        features: What the table makes use of, see `template.py`.
        chosen: The optimizer.
        tau: Default of its `tau`.
    """
    features = features | ({"several"} if chosen.several else set())
    rules = " | ".join(kind.rule for kind in chosen.kinds)
    values = {"__TAU__": repr(float(tau)), "__RULE__": rules, "FactorPlan": "Heads", "UpdateRule": rules}

    def filled(text: str) -> str:
        return re.sub("|".join(values), lambda found: values[found[0]], text)

    yield render(template.BLOCKS, features)
    if "norms" in features:
        yield render(template.NORMS, features)
    yield render(template.HEADS, features)
    yield _constants("step/pieces.py", "_LONGEST_PATTERN", "_NO_UNIT", "_SPAN", "_Run")
    yield from (filled(definition(*name)) for name in _PIECES)
    yield _constants("step/rules/rule.py", "Group", "State", "Flags", "Tensors")
    yield definition("step/rules/rule.py", "Gate")
    for kind in chosen.kinds:
        yield kind.rule_source(directions=chosen.several)
    yield from dict.fromkeys(definition(*name) for kind in chosen.kinds for name in kind.helpers)
    yield definition("step/rules/rule.py", "add_zeros")
    yield _constants("step/loops.py", "_APART", "_MOST")
    yield filled(render(template.LOOPS, features))
    yield from (filled(definition(*name)) for name in _UPDATE)
    taken = definition("step/loops.py", "Loops._taken")
    yield filled(render(template.STEP, features)).replace("__TAKEN__", taken)
    for kind in chosen.kinds:
        values |= {"__NAME__": kind.name, "__RULE__": kind.rule, "__LR__": kind.lr}
        yield filled(render(template.LION if kind.own else template.OPTIMIZER, features))
    yield render(template.TRAIN, features)


def _constants(module: str, *names: str) -> str:
    """Constants, one below the other."""
    texts = [definition(module, name) for name in names]
    return ("\n\n" if any("\n" in text for text in texts) else "\n").join(texts)


_IMPORTS = {
    "functools": ("functools",),
    "math": ("math",),
    "types": ("types",),
    "collections": ("defaultdict",),
    "collections.abc": ("Callable", "Iterator", "Mapping", "Sequence"),
    "dataclasses": ("dataclass", "replace"),
    "itertools": ("pairwise",),
    "typing": ("Any", "NamedTuple"),
}


def imports(code: Sequence[str]) -> str:
    """The import lines that some code needs."""
    used = set(re.findall(r"\w+", "\n".join(code)))
    plain = [f"import {module}" for module in _IMPORTS if module in used and _IMPORTS[module] == (module,)]
    named = {module: sorted(used.intersection(names)) for module, names in _IMPORTS.items() if names != (module,)}
    lines = [f"from {module} import {', '.join(names)}" for module, names in named.items() if names]
    torch = ["import torch", "from torch import Tensor, nn"]
    if "_zeropower_via_newtonschulz" in used:
        torch.append("from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz")
    return "\n".join(("from __future__ import annotations", "", *plain, *lines, "", *torch))
