"""`varlen_attn`: sequences in a row attend in one op, which is found and, though no CPU runs it, proved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quack_fx import find_qk_pairs, verify_qk_pairs
from quack_fx.prove.opaque import written_out

varlen = pytest.importorskip("torch.nn.attention.varlen")

WIDTH, HEADS, KEY_HEADS, DIM = 24, 4, 2, 6


class Packed(nn.Module):
    """Two sequences of three and five tokens, grouped queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * KEY_HEADS * DIM, bias=False)
        self.register_buffer("ends", torch.tensor([0, 3, 8], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x).view(8, HEADS, DIM), *self.kv(x).view(8, 2, KEY_HEADS, DIM).unbind(1)
        options = {"window_size": (-1, 0), "scale": 0.25, "enable_gqa": True}
        out: Tensor = varlen.varlen_attn(q, k, v, self.ends, self.ends, 5, 5, **options)
        return out.flatten(1)


def test_found_and_proved() -> None:
    model = Packed()
    layout = find_qk_pairs(model, torch.randn(8, WIDTH))
    (site,) = layout.sites
    assert (site.kind, site.query_heads, site.key_heads, site.head_dim) == ("gqa", HEADS, KEY_HEADS, DIM)
    assert site.logit_scale == 0.25
    assert [b.param for b in site.query] == ["q.weight"]
    assert site.key[0].heads == (((0, DIM),), ((DIM, 2 * DIM),))
    assert verify_qk_pairs(model, layout, torch.randn(8, WIDTH)).complete


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (1, 0), (1, 1)])
def test_written_out_it_is_attention_of_each_sequence(window: tuple[int, int]) -> None:
    lengths = [(2, 4), (3, 3), (1, 2)]
    queries = [torch.randn(t, HEADS, DIM, dtype=torch.float64) for t, _ in lengths]
    keys, values = ([torch.randn(s, KEY_HEADS, DIM, dtype=torch.float64) for _, s in lengths] for _ in "kv")
    ends = [torch.tensor([0, *ns]).cumsum(0).int() for ns in zip(*lengths, strict=True)]
    func = written_out(torch.ops.torch_attn._varlen_attn.default, ())
    assert func is not None
    packed = (torch.cat(queries), torch.cat(keys), torch.cat(values))
    out, *_ = func(*packed, *ends, 3, 4, scale=0.3, window_size=list(window), enable_gqa=True)
    for q, k, v, one in zip(queries, keys, values, out.split([t for t, _ in lengths]), strict=True):
        later = torch.arange(len(k)) - (torch.arange(len(q))[:, None] + len(k) - len(q))
        seen = (later <= window[1] if window[1] >= 0 else later == later) & (
            -later <= window[0] if window[0] >= 0 else later == later
        )
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(one.transpose(0, 1), expected, rtol=1e-12, atol=1e-12)
