"""A GPT: learned positions, pre-norm blocks, one fused projection for queries, keys and values, tied embeddings.

In: token ids `idx` [B, T] and, for training, `targets` [B, T]. Out: `(logits, loss)`; without targets, the loss is None
and the logits are only those of the last position, as needed for sampling.

    quack-fx inspect examples/gpt.py

Letters at the end of a tensor's name are its shape: B sequences, T positions, D model width, H heads, K width of one
head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class GPTConfig:
    """Sizes of the model; the defaults are for bytes as tokens and train on a laptop."""

    vocab_size: int = 256
    context: int = 128
    layers: int = 4
    heads: int = 6
    width: int = 192
    bias: bool = True
    dropout: float = 0.0


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"width {config.width} does not divide into {config.heads} heads")
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.proj = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            part_BTD.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part_BTD in self.qkv(x_BTD).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, dropout_p=dropout, is_causal=True)
        y_BTD = y_BHTK.transpose(1, 2).flatten(-2)
        return F.dropout(self.proj(y_BTD), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.down = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x_BTD), approximate="tanh")))


class Block(nn.Module):
    """Attention, then MLP, each after a layer norm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD))
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GPT(nn.Module):
    """The whole model, from embeddings to loss."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            # Layers that write into the residual stream start smaller, so that it does not grow with depth.
            writes = any(module in (block.attn.proj, block.mlp.down) for block in self.blocks)
            nn.init.normal_(module.weight, std=0.02 / (2 * self.config.layers) ** 0.5 if writes else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        length = idx.shape[1]
        if length > self.config.context:
            raise ValueError(f"sequence of {length} tokens is longer than the context of {self.config.context}")
        x_BTD = self.dropout(self.tokens(idx) + self.positions(torch.arange(length, device=idx.device)))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = self.norm(x_BTD)
        if targets is None:
            return self.head(x_BTD[:, -1:]), None
        logits_BTV = self.head(x_BTD)
        return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten())
