"""A language model with multi-head latent attention (MLA), as in DeepSeek-V3.

In: token ids `idx` [B, T] and, for training, `targets` [B, T]. Out: `(logits, loss)`; the loss is None without targets.

    quack-fx inspect examples/mla.py

Queries are projected up from one latent vector per position, keys and values from another. The logit of a head is a sum
of two products: content, q_nope . k_nope, both projected up from latents; and position, q_rope . k_rope, with one
rotated key for all heads. At inference, only the key-value latent and the rotated key need to be cached.

Letters at the end of a tensor's name are its shape: B sequences, T positions, D model width, H heads, N content width
of a head, R rotated width of a head, K = N + R, U value width of a head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class MLAConfig:
    """Sizes of the model; the defaults are for bytes as tokens and train in about a minute on two CPU cores."""

    vocab_size: int = 256
    context: int = 128
    layers: int = 4
    width: int = 192
    ffn_width: int = 512
    heads: int = 6
    q_latent: int = 96
    kv_latent: int = 64
    nope_width: int = 32
    rope_width: int = 16
    value_width: int = 32
    rope_base: float = 10_000.0


def rope_angles(length: int, config: MLAConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotation, [T, R/2] each."""
    half = config.rope_width // 2
    frequency = config.rope_base ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x_BHTR: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + R/2) of each head by the angle of their position."""
    first, second = x_BHTR.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x_BHTR.dtype)


class MultiHeadLatentAttention(nn.Module):
    """Causal attention with low-rank queries, keys and values, and separate rotary features."""

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.config = config
        head_width = config.nope_width + config.rope_width
        self.q_down = nn.Linear(config.width, config.q_latent, bias=False)
        self.q_norm = nn.RMSNorm(config.q_latent)
        self.q_up = nn.Linear(config.q_latent, config.heads * head_width, bias=False)
        self.kv_down = nn.Linear(config.width, config.kv_latent + config.rope_width, bias=False)
        self.kv_norm = nn.RMSNorm(config.kv_latent)
        self.kv_up = nn.Linear(config.kv_latent, config.heads * (config.nope_width + config.value_width), bias=False)
        self.out = nn.Linear(config.heads * config.value_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.config
        q_BHTK = self.q_up(self.q_norm(self.q_down(x_BTD))).unflatten(-1, (c.heads, -1)).transpose(1, 2)
        q_nope_BHTN, q_rope_BHTR = q_BHTK.split((c.nope_width, c.rope_width), dim=-1)

        latent, k_rope_BTR = self.kv_down(x_BTD).split((c.kv_latent, c.rope_width), dim=-1)
        kv = self.kv_up(self.kv_norm(latent)).unflatten(-1, (c.heads, -1)).transpose(1, 2)
        k_nope_BHTN, v_BHTU = kv.split((c.nope_width, c.value_width), dim=-1)
        k_rope_BHTR = rotate(k_rope_BTR.unsqueeze(1), cos, sin).expand(-1, c.heads, -1, -1)

        q_BHTK = torch.cat((q_nope_BHTN, rotate(q_rope_BHTR, cos, sin)), dim=-1)
        k_BHTK = torch.cat((k_nope_BHTN, k_rope_BHTR), dim=-1)
        y_BHTU = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTU, is_causal=True)
        return self.out(y_BHTU.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """Feed-forward layer with gated hidden features."""

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.ffn_width, bias=False)
        self.up = nn.Linear(config.width, config.ffn_width, bias=False)
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """Attention, then feed-forward, each after an RMS norm and added to the residual stream."""

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.width)
        self.attn = MultiHeadLatentAttention(config)
        self.ffn_norm = nn.RMSNorm(config.width)
        self.ffn = SwiGLU(config)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), cos, sin)
        return x_BTD + self.ffn(self.ffn_norm(x_BTD))


class MLATransformer(nn.Module):
    """The whole model, from embeddings to loss."""

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        # Computed here rather than stored in a buffer, so a model built on the meta device needs no initialisation.
        cos, sin = rope_angles(idx.shape[1], self.config, idx.device)
        x_BTD = self.tokens(idx)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos, sin)
        logits_BTV = self.head(self.norm(x_BTD))
        if targets is None:
            return logits_BTV, None
        return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten())
