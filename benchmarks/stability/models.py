"""The two models of the experiment: Qwen3-style with multi-head attention (one key head per query head), and MLA.

In: token ids `idx` [B, T] and `targets` [B, T]. Out: `(logits, loss)`. RMS norms before each layer, rotary embeddings,
SwiGLU, tied embeddings, no biases, and no QK norm, because it is one of the methods to compare.

Letters at the end of a tensor's name are its shape: B sequences, T positions, D model width, H heads, K head dimension
of queries and keys, N and R its parts without and with rotary embeddings, U head dimension of values, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        layers: Number of blocks.
        width: Model width.
        heads: Attention heads of a block.
        ffn_width: Hidden features of a feed-forward layer.
        q_latent: MLA: width of the query latent.
        kv_latent: MLA: width of the key-value latent.
        vocab_size: Size of the vocabulary; tokens are bytes.
    """

    layers: int
    width: int
    heads: int
    ffn_width: int
    q_latent: int
    kv_latent: int
    vocab_size: int = 256

    @property
    def head_dim(self) -> int:
        """Head dimension."""
        return self.width // self.heads


def rope_angles(positions: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, each [T, width / 2]."""
    pair = torch.arange(0, width, 2, device=device)
    angle = torch.arange(positions, device=device).unsqueeze(1) / (10_000.0 ** (pair / width))
    return angle.cos(), angle.sin()


def rotate(x_BHTR: Tensor) -> Tensor:
    """Rotate each pair of features (i, i + R / 2) by the angle of its position."""
    cos, sin = rope_angles(x_BHTR.shape[-2], x_BHTR.shape[-1], x_BHTR.device)
    a, b = x_BHTR.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTR.dtype)


class MultiHeadAttention(nn.Module):
    """Attention with separate queries, keys and values for each head (Alg. 1)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q, self.k, self.v, self.out = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(4))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Tokens [B, T, D] to tokens [B, T, D]."""
        q_BHTK, k_BHTK, v_BHTU = (
            layer(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y_BHTU = F.scaled_dot_product_attention(rotate(q_BHTK), rotate(k_BHTK), v_BHTU, is_causal=True)
        tokens_BTD: Tensor = self.out(y_BHTU.transpose(1, 2).flatten(-2))
        return tokens_BTD


class LatentAttention(nn.Module):
    """Attention with queries, keys and values projected up from low-dimensional latents (Alg. 2).

    Queries and keys have equally wide parts without and with rotary embeddings, together as wide as the values of a
    head, because torch's fused attention requires equal widths.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.part_dim, self.kv_latent = shape.heads, shape.head_dim // 2, shape.kv_latent
        self.q_down = nn.Linear(shape.width, shape.q_latent, bias=False)
        self.q_up = nn.Linear(shape.q_latent, shape.heads * 2 * self.part_dim, bias=False)
        self.kv_down = nn.Linear(shape.width, shape.kv_latent + self.part_dim, bias=False)
        self.kv_up = nn.Linear(shape.kv_latent, shape.heads * (self.part_dim + shape.head_dim), bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Tokens [B, T, D] to tokens [B, T, D]."""
        q_BHTK = self.q_up(self.q_down(x_BTD)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q_BHTN, q_BHTR = q_BHTK.chunk(2, dim=-1)
        latent, k_BTR = self.kv_down(x_BTD).split((self.kv_latent, self.part_dim), dim=-1)
        kv = self.kv_up(latent).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_BHTN, v_BHTU = kv.split((self.part_dim, kv.shape[-1] - self.part_dim), dim=-1)
        k_BHTR = rotate(k_BTR.unsqueeze(1)).expand(-1, self.heads, -1, -1)
        q_BHTK = torch.cat((q_BHTN, rotate(q_BHTR)), dim=-1)
        k_BHTK = torch.cat((k_BHTN, k_BHTR), dim=-1)
        y_BHTU = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTU, is_causal=True)
        tokens_BTD: Tensor = self.out(y_BHTU.transpose(1, 2).flatten(-2))
        return tokens_BTD


class SwiGLU(nn.Module):
    """Feed-forward layer with gated hidden features."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.ffn_width, bias=False)
        self.up = nn.Linear(shape.width, shape.ffn_width, bias=False)
        self.down = nn.Linear(shape.ffn_width, shape.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Tokens [B, T, D] to tokens [B, T, D]."""
        tokens_BTD: Tensor = self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return tokens_BTD


class Block(nn.Module):
    """Attention, then feed-forward, each after an RMS norm and added to the residual stream."""

    def __init__(self, shape: Shape, attention: Callable[[Shape], nn.Module]) -> None:
        super().__init__()
        self.attn_norm, self.attn = nn.RMSNorm(shape.width), attention(shape)
        self.ffn_norm, self.ffn = nn.RMSNorm(shape.width), SwiGLU(shape)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Tokens [B, T, D] to tokens [B, T, D]."""
        for norm, layer in ((self.attn_norm, self.attn), (self.ffn_norm, self.ffn)):
            x_BTD = x_BTD + layer(norm(x_BTD))
        return x_BTD


class Transformer(nn.Module):
    """The whole model, from embeddings to loss."""

    def __init__(self, shape: Shape, attention: Callable[[Shape], nn.Module]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.blocks = nn.ModuleList(Block(shape, attention) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # The spectral norm does not depend on the width; it equals that of std 0.02 at the paper's width 2,048.
                nn.init.normal_(module.weight, std=shape.width**-0.5)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Map token ids [B, T] and next tokens to logits [B, T, V] and the mean loss."""
        x_BTD = self.tokens(idx)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.norm(x_BTD), self.tokens.weight)
        return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets.flatten())


ATTENTIONS: dict[str, Callable[[Shape], nn.Module]] = {"mha": MultiHeadAttention, "mla": LatentAttention}
"""The attentions to compare, by name."""


def build(attention: str, shape: Shape, seed: int) -> Transformer:
    """A model with weights that depend only on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(shape, ATTENTIONS[attention])
