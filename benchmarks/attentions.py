"""Small models with four kinds of attention, for runs on several ranks.

In: a kind of attention and its sizes (divisible by the number of ranks or not). Out: a model with two such layers and a
linear layer on top, and the tensor parallel plan of a layer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from mla import MLAConfig, MultiHeadLatentAttention, rope_angles


class Sizes(NamedTuple):
    """Sizes of a model: width, query heads, key heads, head dimension."""

    width: int
    heads: int
    key_heads: int
    dim: int


EVEN = Sizes(16, 8, 4, 4)
"""Divisible by 2 and 4: no head is split between ranks."""

ODD = Sizes(11, 6, 3, 5)
"""Ranks hold unequal numbers of rows, and heads are split between ranks."""


class GQA(nn.Module):
    """Attention with separate projections for queries, keys and values; several query heads share a key head.

    The forward infers the number of heads that this rank holds.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.dim = sizes.dim
        self.q = nn.Linear(sizes.width, sizes.heads * sizes.dim)
        self.k = nn.Linear(sizes.width, sizes.key_heads * sizes.dim, bias=False)
        self.v = nn.Linear(sizes.width, sizes.key_heads * sizes.dim, bias=False)
        self.out = nn.Linear(sizes.heads * sizes.dim, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, width] to tokens."""
        q, k, v = (p(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MHA(GQA):
    """GQA with one key head for each query head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes._replace(key_heads=sizes.heads))


class Fused(nn.Module):
    """Attention with one fused projection, ordered by head: query, key and value of each head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.dim = sizes.dim
        self.qkv = nn.Linear(sizes.width, sizes.heads * 3 * sizes.dim, bias=False)
        self.out = nn.Linear(sizes.heads * sizes.dim, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, width] to tokens."""
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, (-1, 3, self.dim)).unbind(3))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLA(nn.Module):
    """Multi-head latent attention from examples/mla.py."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width, heads, _, dim = sizes
        self.config = MLAConfig(
            width=width, heads=heads, q_latent=width - 2, kv_latent=width - 4, nope_width=dim, rope_width=4,
            value_width=dim,
        )  # fmt: skip
        self.attn = MultiHeadLatentAttention(self.config)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, width] to tokens."""
        return self.attn(x, *rope_angles(x.shape[1], self.config, x.device))  # type: ignore[no-any-return]


KINDS: dict[str, type[nn.Module]] = {"MHA": MHA, "GQA": GQA, "fused": Fused, "MLA": MLA}
"""The attentions, by name."""


def tensor_parallel_plan(layer: nn.Module) -> dict[str, ParallelStyle]:
    """The tensor parallel plan of a layer: sharded by heads; for MLA, with its shared key, only weights are sharded."""
    if isinstance(layer, MLA):
        return {f"attn.{name}": ColwiseParallel(output_layouts=Replicate()) for name in ("q_up", "kv_up")}
    into = (name for name, child in layer.named_children() if isinstance(child, nn.Linear) and name != "out")
    return {**{name: ColwiseParallel() for name in into}, "out": RowwiseParallel()}


class Model(nn.Module):
    """Two layers of attention, each with a residual, and a linear layer on top."""

    def __init__(self, kind: str, sizes: Sizes) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(KINDS[kind](sizes) for _ in range(2))
        self.head = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, width] to tokens."""
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)  # type: ignore[no-any-return]
