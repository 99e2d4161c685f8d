"""QK-Clip: scales heads with large logits down after the step.

In: a layout, and the largest logit of every query head since the last step. Out: the `Method` that scales weight rows
such that a head's products of queries and keys are multiplied by gamma, or a one-line error if it cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from quack_fx.errors import OptimizerError
from quack_fx.layout import AttentionSite, QKLayout
from quack_fx.layout.fit import layout_params
from quack_fx.train.program.kinds import Unit
from quack_fx.train.program.scaling import local
from quack_fx.train.rivals.method import Method
from quack_fx.train.units import Owners, nearest

if TYPE_CHECKING:
    from quack_fx.train.program.parts.quack import QuacK as Scaling


class QKClip(Method):
    """QK-Clip (Kimi K2, arXiv 2507.20534), a baseline of the QuacK paper: `method="qk-clip"`.

    The optimizer's step is not changed. After it, for each query head h with largest logit S_h since the last step,

        gamma_h = min(1, threshold / S_h)

    and rows are scaled such that every product of a query and a key of this head is multiplied by exactly gamma_h:

        MHA         q_h, k_h: sqrt(gamma_h) each
        GQA, MQA    q_h: gamma_h; the key head that several query heads share stays
        MLA         uq_h, uk_h: sqrt(gamma_h); qr_h: gamma_h; the shared kr, dq and dkv stay

    These cases follow from one rule. In each term of the logit, the rows next to the logits are scaled: those of the
    query chain and those of the key chain, by sqrt(gamma_h) each. If one of them is shared with other heads, it stays
    and the other is scaled by gamma_h. So the logits of one head never change another head. K2 treats MLA's kr like
    this; a shared key head of GQA is the same case: scaling it by the smallest gamma of its query heads would also clip
    the others, or their queries would have to grow to compensate. Joint attention and adapters follow the same rule. A
    bias is scaled with the rows of its projection; biases of down projections stay, as their weights do.

    S is the largest input of the softmax, signed, with mask, softcap and additive bias (see `MaxLogits`); only the
    product is scaled. A head is not clipped if its S is not finite.

    There is no state between steps: a run resumes from weights and optimizer only. A site that keeps a QK norm is left
    out, because its logits do not depend on the norms of its rows.

    Arguments:
        scaling: Has the rows of this rank.
        model: The model.
        layout: Its layout.
        threshold: Heads with logits above this value are scaled.

    Raises:
        OptimizerError: A head has no rows of its own in a term, or its terms need different powers of the same rows;
            or the rows to scale are frozen.
    """

    name: ClassVar[str] = "qk-clip"
    reads_logits: ClassVar[bool] = True

    def __init__(self, scaling: Scaling, model: nn.Module, layout: QKLayout, threshold: float) -> None:
        super().__init__(scaling)
        self.threshold = threshold
        params = layout_params(layout, model)
        owners = Owners(layout, params)
        self._axes = owners.axes
        # For each row of each parameter, the head that scales it and the exponent of that head's gamma (0: unchanged).
        self._head = {name: rows.clamp_min(0) for name, rows in owners.rows.items()}
        self._power = {name: torch.zeros(len(rows)) for name, rows in owners.rows.items()}
        for site, first in zip(layout.sites, owners.first, strict=True):
            for head in range(site.query_heads if not site.qk_norm else 0):
                for unit, power in _powers(site, head, owners, first + head).items():
                    for name in unit.names:
                        if not params[name].requires_grad:
                            raise OptimizerError(
                                f"method 'qk-clip' scales {name!r} of {site.name!r}, which is frozen "
                                "(requires_grad=False); train it, or use method='quack'"
                            )
                        for start, stop in unit.ranges:
                            self._power[name][start:stop] = power

    def after_step(self, held: Mapping[str, Tensor], largest: Tensor | None) -> None:
        """Scale the rows of heads with a largest logit above the threshold."""
        assert largest is not None
        too_large = largest.isfinite() & (largest > self.threshold)
        gamma = torch.where(too_large, self.threshold / largest, 1.0)
        shards = getattr(self.scaling, "held", None)
        for name, weight in held.items():
            head, power = self._head[name].to(gamma.device), self._power[name].to(gamma.device)
            scale = (gamma[head] ** power).to(weight.device)
            if shards is not None:
                scale = scale[shards[weight]]
            here = local(weight)
            shape = [-1 if dim == self._axes[name] else 1 for dim in range(here.dim())]
            here.mul_(scale.view(shape))


def _powers(site: AttentionSite, head: int, owners: Owners, number: int) -> dict[Unit, float]:
    """The exponents of gamma for the rows of a head (`number` in `owners`) that multiply each of its terms by gamma."""
    pairs = list(nearest(site, head))
    own = [tuple(unit is not None and owners.has(unit, number) for unit in pair) for pair in pairs]
    halves = [(0.5, 0.5) if query and key else (float(query), float(key)) for query, key in own]
    one_side = [[(1.0, 0.0)] * len(pairs), [(0.0, 1.0)] * len(pairs)]
    for ways in (halves, *one_side):
        found: dict[Unit, float] = {}
        for pair, mine, powers in zip(pairs, own, ways, strict=True):
            if sum(powers) != 1 or any(power and not has for power, has in zip(powers, mine, strict=True)):
                break
            if any(unit is not None and found.setdefault(unit, p) != p for unit, p in zip(pair, powers, strict=True)):
                break
        else:
            return {unit: power for unit, power in found.items() if power}
    raise OptimizerError(
        f"method 'qk-clip' cannot scale the logits of head {head} of {site.name!r} alone: the rows that make them "
        "serve other heads, too; use method='quack'"
    )
