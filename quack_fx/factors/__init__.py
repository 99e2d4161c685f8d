"""USER: from a layout and the weights to one learning-rate factor per head (the one rule).

In: a `QKLayout` and the model's parameters. Out: `FactorPlan`, plain data that says which rows are one *unit* and which
units are multiplied in the logits; `unit_norms`, the norm of every unit; `factors`, what the rule makes of the norms.

A unit is one head's rows of one parameter, together with the same entries of its bias. Equal units are one: the key
head that several query heads read, the down projection that all heads of an MLA read, the layer that runs twice. The
logits of a head are a sum of terms, each a product of units, and

    factor(unit) = min over the terms that contain it of  1 / product of the norms of the other units of that term

which is Algorithm 1 (multi-head attention) and Algorithm 2 (MLA) of "Controlling changes to attention logits"
(arXiv 2511.21377), and says what to do for grouped queries, shared layers, joint attention and low-rank branches. The
learning rate of a unit is scaled by `tau * factor / factor at the start of training`. Rows that lie in several units
which are not equal (two sites cut one parameter differently) get the smallest of their units' scales, as the rule's min
would give them.

What runs in a training step is gathers, sums and products over a few flat tensors, whatever the number of heads: no
loop over units, no sync, and the same result bit for bit every time it runs.
"""

from __future__ import annotations

from quack_fx.factors.fit import check_layout, layout_params
from quack_fx.factors.plan import FactorPlan, Unit
from quack_fx.factors.rule import (
    NormName,
    check_norm_name,
    check_norms,
    factors,
    norm_dtype,
    plan_params,
    row_squares,
    square_rows,
    unit_norms,
)
from quack_fx.factors.tables import PlanTables, Strip

__all__ = [
    "FactorPlan",
    "NormName",
    "PlanTables",
    "Strip",
    "Unit",
    "check_layout",
    "check_norm_name",
    "check_norms",
    "factors",
    "layout_params",
    "norm_dtype",
    "plan_params",
    "row_squares",
    "square_rows",
    "unit_norms",
]
