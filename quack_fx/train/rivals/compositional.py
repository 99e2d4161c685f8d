"""The per-head learning rate of Compositional Muon.

In: the scales of a program, a model and its layout. Out: the `Method` that scales query and key rows by the isotropic
rule, or a one-line error if it does not support the layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from quack_fx.errors import OptimizerError
from quack_fx.layout import AttentionSite, QKLayout
from quack_fx.train.program.kinds import Unit
from quack_fx.train.rivals.method import Method
from quack_fx.train.units import by_block, in_a_row, places_of

if TYPE_CHECKING:
    from quack_fx.train.program.parts.quack import QuacK as Scaling

_DAMPING = 1e-2
"""Lambda, as in published descriptions of the method."""


class Compositional(Method):
    """The isotropic rule of Compositional Muon (Keigwin et al., Tilde Research, 2026): `method="compositional"`.

    Compositional Muon bounds the change of the product of queries and keys, half of it for each side: the gradient of
    one side is multiplied with the inverse square root of the other side's Gram matrix, before and after
    orthogonalisation. If that matrix is close to a multiple of the identity, it reduces to one number per head, which
    has no effect before orthogonalisation:

        lr(W_Q^h) = tau * lr / 2 * (||W_K^h||^2 / d + 0.01)^(-1/2)
        lr(W_K^h) = tau * lr / 2 * (||W_Q^h||^2 / d + 0.01)^(-1/2)

    Norms are Frobenius norms; d is the number of rows of a head. A bias is a column of its weight, as in QuacK.

    It is the published method closest to QuacK. QuacK divides by the partner's norm relative to its initial norm; this
    method divides by the norm itself. Therefore learning rates depend on the initialisation from the first step, `tau`
    is not relative to the learning rate of the other weights, and 0.01 bounds the rate if the partner is zero. The
    original also orthogonalises the gradient of each head separately and treats values and outputs in the same way;
    here the given optimizer computes the update, and only queries and keys are scaled.

    The formula needs heads with one query and one key projection of their own: grouped queries, latent and joint
    attention, and adapters are refused.

    Source: https://blog.tilderesearch.com/blog/compositional-muon (half-split budget, isotropic whitening on both
    sides).

    Arguments:
        scaling: Norms and rows of the model's heads.
        model: The model.
        layout: Its layout.

    Raises:
        OptimizerError: A head's logits are not the product of two blocks of rows that no other head uses.
    """

    name: ClassVar[str] = "compositional"
    uses_tau: ClassVar[bool] = True

    def __init__(self, scaling: Scaling, model: nn.Module, layout: QKLayout) -> None:
        super().__init__(scaling)
        layout, places = places_of(layout, model)
        partner: dict[int, int] = {}
        for site in layout.sites:
            if site.terms and not site.qk_norm:
                for query, key in _pairs(site, places):
                    if partner.setdefault(query, key) != key or partner.setdefault(key, query) != query:
                        raise OptimizerError(_not_for(site, "rows that several heads use"))
        self._partner = torch.tensor([partner[place] for place in range(len(partner))])

    def block_scales(self) -> list[list[Tensor]]:
        """Learning-rate scale of every head for the current weights, [attentions, heads] by kind and block."""
        norms = self.scaling.norms()
        row = in_a_row(norms)
        partner = row[self._partner.to(row.device)]
        tau = self.scaling.tau
        return [
            [
                tau / 2 * (norm.square() / index.shape[-1] + _DAMPING).rsqrt()
                for norm, (index, *_) in zip(blocks, rows, strict=True)
            ]
            for blocks, rows in zip(by_block(partner, norms), self.scaling.rows, strict=True)
        ]


def _pairs(site: AttentionSite, places: Mapping[Unit, int]) -> list[tuple[int, int]]:
    """Indices of the query rows and the key rows of each head of a site."""
    if len(site.terms) != 1 or (len(site.terms[0].query), len(site.terms[0].key)) != (1, 1):
        raise OptimizerError(_not_for(site, f"{site.kind.upper()} with several factors or terms"))
    terms = (term for head in range(site.query_heads) for term in site.head_terms(head))
    return [(places[Unit.of(*query)], places[Unit.of(*key)]) for query, key in terms]


def _not_for(site: AttentionSite, what: str) -> str:
    return (
        f"method 'compositional' is for heads with one query and one key projection of their own, and {site.name!r} "
        f"has {what}; use method='quack'"
    )
