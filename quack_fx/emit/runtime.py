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
    ("factors/rule.py", "norm_dtype", "square_rows"),
    ("factors/tables.py", "_by_length", "_term_tables"),
    ("step/pieces.py", "_LONGEST_PATTERN", "_NO_UNIT", "_SPAN", "_Run", "Piece", "Spans", "cut", "_edges", "_runs"),
    ("step/pieces.py", "_pieces", "_evened", "_spans", "_pattern", "_padded"),
)
"""How weights are cut into heads."""

_UPDATE = (
    ("step/compiling.py", "_ON_GPU", "Compiler", "own_code"),
    ("step/gradients.py", "gradients", "_like", "look_at", "all_finite", "_clip"),
    ("step/masters.py", "MASTER", "_HALF", "Masters", "weight_of", "_writes"),
    ("optim.py", "state_keys"),
    ("step/heads.py", "SQUARES_KEY", "Scaling", "Heads", "_exact", "unit_scales", "span_scales"),
    ("step/views.py", "Kind", "View", "Views", "_Cut"),
    ("step/loops.py", "_APART", "_MOST", "_TOGETHER", "Job", "_Work", "Rows", "Tables", "Call", "Loops", "_Loop"),
    ("step/loops.py", "_alike", "_most", "_few", "_looks"),
    ("step/loops.py", "make_loop", "wide", "meet", "change", "_with_sums_after", "_unless"),
    ("errors.py", "first_line"),
    ("step/update.py", "Update", "Turn", "_Plan", "numbers_of", "_make_measure"),
)
"""What an update of any optimizer needs: modules, and names in each."""


def contents(chosen: Choice, strips: bool) -> list[str]:
    """What is in the file, a line each."""
    rules = ", ".join(kind.rule for kind in chosen.kinds)
    classes = ", ".join(f"QuacK{kind.name}" for kind in chosen.kinds)
    parts = {
        "logit_products": "the table: which rows of which weights are multiplied in the logits",
        **({"strip_qk_norm": "takes the QK norms out"} if strips else {}),
        "QuacK": "the rule: what follows from the norms of the rows of every head",
        "cut": "weights cut into pieces in which every head is one long row of numbers",
        rules: "the arithmetic of the optimizer",
        "Heads": "the norms that a step leaves to the next, and the scales that follow from them",
        "make_loop": "what is compiled: weights and state are changed, and the new norms left behind",
        "Update": "all of that, in order",
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
    values = {"__TAU__": repr(float(tau)), "__RULE__": rules, "UpdateRule": rules} | _RENAMED

    def filled(text: str) -> str:
        return re.sub("|".join(values), lambda found: values[found[0]], text)

    yield render(template.BLOCKS, features)
    if "norms" in features:
        yield render(template.NORMS, features)
    factors = definition("factors/tables.py", "PlanTables.factors")
    yield filled(render(template.HEADS, features)).replace("__FACTORS__", factors)
    yield from map(filled, _all_of(_PIECES))
    yield from _all_of([("step/rules/rule.py", "Group", "State", "Flags", "Tensors", "Gate")])
    for kind in chosen.kinds:
        yield kind.rule_source()
    yield from dict.fromkeys(definition(*name) for kind in chosen.kinds for name in kind.helpers)
    yield definition("step/rules/rule.py", "add_zeros")
    yield from map(filled, _all_of(_UPDATE))
    yield filled(render(template.STEP, features))
    for kind in chosen.kinds:
        values |= {"__NAME__": kind.name, "__RULE__": kind.rule, "__LR__": kind.lr}
        yield filled(render(template.LION if kind.own else template.OPTIMIZER, features))
    yield render(template.TRAIN, features)


_RENAMED = {"FactorPlan": "Plan", "PlanTables": "Rule", "OptimizerError": "ValueError"}
"""Names of the library that are others in the file."""


def _all_of(listed: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Definitions by module and names; constants that stand together in one text."""
    for module, *names in listed:
        lines: list[str] = []
        for text in (definition(module, name) for name in names):
            if text.startswith(("class ", "def ", "@")):
                if lines:
                    yield _together(lines)
                    lines = []
                yield text
            else:
                lines.append(text)
        if lines:
            yield _together(lines)


def _together(constants: Sequence[str]) -> str:
    """Constants, one below the other."""
    return ("\n\n" if any("\n" in text for text in constants) else "\n").join(constants)


_IMPORTS = {
    "math": ("math",),
    "operator": ("operator",),
    "types": ("types",),
    "warnings": ("warnings",),
    "collections": ("defaultdict",),
    "collections.abc": ("Callable", "Iterable", "Iterator", "Mapping", "Sequence"),
    "dataclasses": ("dataclass", "replace"),
    "itertools": ("pairwise",),
    "typing": ("Any", "Literal", "NamedTuple"),
}


def imports(code: Sequence[str]) -> str:
    """The import lines that some code needs."""
    used = set(re.findall(r"\w+", "\n".join(code)))
    plain = [f"import {module}" for module in _IMPORTS if module in used and _IMPORTS[module] == (module,)]
    named = {module: sorted(used.intersection(names)) for module, names in _IMPORTS.items() if names != (module,)}
    lines = [f"from {module} import {', '.join(names)}" for module, names in named.items() if names]
    torch = [
        "import torch",
        "from torch import Tensor, nn",
        "from torch._dynamo.exc import BackendCompilerFailed",
        "from torch.optim import Optimizer",
    ]
    if "_zeropower_via_newtonschulz" in used:
        torch.append("from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz")
    return "\n".join(("from __future__ import annotations", "", *plain, *lines, "", *torch))
