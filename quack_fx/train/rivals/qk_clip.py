"""QK-Clip: heads whose logits have become too large are scaled down after the step.

In: a layout, and the largest logit of every query head since the last step. Out: the `Method` that scales weight rows
so that the products of queries and keys of a head become gamma times as large, or one line on why it cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from quack_fx.errors import OptimizerError
from quack_fx.layout import AttentionSite, QKLayout
from quack_fx.layout.fit import layout_params
from quack_fx.train.owners import Owners, Unit, nearest
from quack_fx.train.program.scaling import local
from quack_fx.train.rivals.method import Method

if TYPE_CHECKING:
    from quack_fx.train.program.parts.quack import QuacK as Scaling

_Powers = dict[Unit, float]
"""The power of gamma that the rows of a head are multiplied with."""


class QKClip(Method):
    """QK-Clip (Kimi K2, arXiv 2507.20534), a baseline of the QuacK paper: `method="qk-clip"`.

    The optimizer steps as without it. Then, for each query head h with the largest logit S_h since the last step,

        gamma_h = min(1, threshold / S_h)

    and rows are scaled so that every product of a query and a key of this head becomes exactly gamma_h times as large:

        MHA         q_h, k_h: sqrt(gamma_h) each
        GQA, MQA    q_h: gamma_h; the key head that several query heads share stays
        MLA         uq_h, uk_h: sqrt(gamma_h); qr_h: gamma_h; the shared kr, dq and dkv stay

    It is one rule: in each term of the logit the rows next to the logits are scaled, those of the query chain and those
    of the key chain; where one of the two serves other heads as well, it stays and the other one takes all. So no head
    is changed by the logits of another. K2 does this with MLA's kr, and a key head of GQA is the same case: scaled by
    the smallest gamma of its query heads, it would clip the other ones, too, or make their queries larger to make up
    for that. Joint attention and adapters follow the same rule. The bias of a projection belongs to its rows; those of
    down projections stay, as their weights do.

    S is the largest number that goes into the softmax, with its sign, mask, softcap and additive bias in it (see
    `MaxLogits`); what is scaled is the product alone. A head whose S is not finite is not clipped.

    Nothing is kept between steps, so that there is nothing to save: a run resumes from weights and optimizer alone. A
    site that keeps a QK norm is left out, since its logits do not depend on the size of its rows.

    Arguments:
        scaling: Where the rows of this rank are.
        model: The model.
        layout: Its layout.
        threshold: The largest logit that is left alone.

    Raises:
        OptimizerError: A head has no rows of its own in a term, or its terms ask for different powers of the same rows;
            the rows to scale are frozen; `threshold` is not a positive number.
    """

    name: ClassVar[str] = "qk-clip"
    reads_logits: ClassVar[bool] = True

    def __init__(self, scaling: Scaling, model: nn.Module, layout: QKLayout, threshold: float) -> None:
        super().__init__(scaling)
        self.threshold = threshold
        params = layout_params(layout, model)
        axes = {name: 0 for name in params} | {b.param: b.axis for site in layout.sites for _, b in site.blocks()}
        owners = Owners(layout, {name: param.shape[axes[name]] for name, param in params.items()})
        self._axes = axes
        # For each parameter the head that scales a row, and the power of its gamma; what stays has the power 0.
        self._head = {name: rows.clamp_min(0) for name, rows in owners.rows.items()}
        self._power = {name: torch.zeros(len(rows)) for name, rows in owners.rows.items()}
        for site, first in zip(layout.sites, owners.first, strict=True):
            for head in range(site.query_heads if not site.qk_norm else 0):
                for unit, power in _powers(site, head, owners, first + head).items():
                    for name, _ in unit.names:
                        if not params[name].requires_grad:
                            raise OptimizerError(
                                f"method 'qk-clip' scales {name!r} of {site.name!r}, which is frozen "
                                "(requires_grad=False); train it, or use method='quack'"
                            )
                        for start, stop in unit.ranges:
                            self._power[name][start:stop] = power

    def after_step(self, held: Mapping[str, Tensor], largest: Tensor | None) -> None:
        """Scale the rows of heads whose largest logit is above the threshold."""
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


def _powers(site: AttentionSite, head: int, owners: Owners, number: int) -> _Powers:
    """The powers of gamma for the rows of a head, such that each of its terms becomes gamma times as large.

    Arguments:
        site: The attention.
        head: The head in it.
        owners: The head that each row belongs to.
        number: The head's number in `owners`.
    """
    pairs = list(nearest(site, head))
    own = [tuple(unit is not None and owners.has(unit, number) for unit in pair) for pair in pairs]
    halves = [(0.5, 0.5) if query and key else (float(query), float(key)) for query, key in own]
    one_side = [[(1.0, 0.0)] * len(pairs), [(0.0, 1.0)] * len(pairs)]
    for ways in (halves, *one_side):
        found: _Powers = {}
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
