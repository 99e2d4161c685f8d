"""Nested tensors: attention over sequences of different lengths gives the same numbers written out, and is found."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quack_fx.find import find_qk_pairs
from quack_fx.graph.forward.jagged import JaggedWrittenOut
from quack_fx.prove import verify_qk_pairs

HEADS, DIM, WIDTH = 3, 4, 10
LENGTHS = (5, 2, 7)


class Jagged(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * DIM) for _ in range(3))
        self.norm = nn.LayerNorm(DIM)
        self.causal = causal

    def forward(self, *sequences: Tensor) -> Tensor:
        x = torch.nested.nested_tensor(list(sequences), layout=torch.jagged)
        q, k, v = (one(x).unflatten(-1, (HEADS, DIM)) for one in (self.q, self.k, self.v))
        heads = (y.transpose(1, 2) for y in (self.norm(q), k, v))
        return F.scaled_dot_product_attention(*heads, is_causal=self.causal).transpose(1, 2).flatten(-2)


def sequences() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, WIDTH) for n in LENGTHS]


@pytest.mark.parametrize("causal", [False, True])
def test_written_out_is_attention_of_each_sequence(causal: bool) -> None:
    model, given = Jagged(causal).double(), [x.double() for x in sequences()]
    with torch.no_grad(), JaggedWrittenOut():
        made = model(*given)
    for x, rows in zip(given, made.unbind(), strict=True):
        q, k, v = (one(x).unflatten(-1, (HEADS, DIM)).transpose(0, 1) for one in (model.q, model.k, model.v))
        alone = F.scaled_dot_product_attention(model.norm(q), k, v, is_causal=causal)
        torch.testing.assert_close(rows, alone.transpose(0, 1).flatten(-2))


def test_found_and_proved() -> None:
    model, given = Jagged(), sequences()
    layout = find_qk_pairs(model, *given)
    (site,) = layout.sites
    rows = tuple(((DIM * h, DIM * h + DIM),) for h in range(HEADS))
    assert [(b.param, b.heads, b.bias) for b in (*site.query, *site.key)] == [
        ("q.weight", rows, "q.bias"),
        ("k.weight", rows, "k.bias"),
    ]
    assert [(n.side, n.kind, n.module) for n in site.qk_norm] == [("query", "layer", "norm")] and not layout.skipped
    assert verify_qk_pairs(model, layout, *given).complete
