"""The two models of the experiment: multi-head attention as in Qwen3 (all heads have keys of their own), and MLA.

In: token ids `idx` [B, T] and `targets` [B, T]. Out: `(logits, loss)`. RMS norms before each block, rotary positions,
SwiGLU, tied embeddings, no biases, and no QK norm: that is one of the methods to compare.

Letters at the end of a tensor's name are its shape: B sequences, T positions, D model width, H heads, K width of a
head's queries and keys, N and R their parts without and with rotary positions, U width of a head's values,
V vocabulary.
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
        width: Features of a token.
        heads: Attention heads of a block.
        ffn_width: Hidden features of a feed-forward layer.
        q_latent: MLA: features that the queries are made of.
        kv_latent: MLA: features that keys and values are made of.
        vocab_size: Number of different tokens; bytes.
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
        """Features of a head."""
        return self.width // self.heads


def rope_angles(positions: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of every position and pair of features, each [T, width / 2]."""
    pair = torch.arange(0, width, 2, device=device)
    angle = torch.arange(positions, device=device).unsqueeze(1) / (10_000.0 ** (pair / width))
    return angle.cos(), angle.sin()


def rotate(x_BHTR: Tensor) -> Tensor:
    """Rotate each pair (i, i + R / 2) of features by the angle of the position."""
    cos, sin = rope_angles(x_BHTR.shape[-2], x_BHTR.shape[-1], x_BHTR.device)
    a, b = x_BHTR.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTR.dtype)


class MultiHeadAttention(nn.Module):
    """Attention whose heads each have queries, keys and values of their own (Alg. 1)."""

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
    """Attention whose queries, and whose keys and values, come out of narrow latents (Alg. 2).

    The parts of queries and keys without and with rotary positions are equally wide, and together as wide as a head's
    values: torch's fused attention takes no other.
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
    """Feed-forward layer whose hidden features are gated."""

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
    """Attention, then feed-forward, each behind an RMS norm and added to the residual stream."""

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
    """The whole model, embeddings to loss."""

    def __init__(self, shape: Shape, attention: Callable[[Shape], nn.Module]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.blocks = nn.ModuleList(Block(shape, attention) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # The spectral norm is the same at every width: that of the customary 0.02 at the paper's 2,048.
                nn.init.normal_(module.weight, std=shape.width**-0.5)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, T] and the ones that follow, to their logits [B, T, V] and the mean loss."""
        x_BTD = self.tokens(idx)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.norm(x_BTD), self.tokens.weight)
        return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets.flatten())


ATTENTIONS: dict[str, Callable[[Shape], nn.Module]] = {"mha": MultiHeadAttention, "mla": LatentAttention}
"""The attentions that are compared, by name."""


def build(attention: str, shape: Shape, seed: int) -> Transformer:
    """A model with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(shape, ATTENTIONS[attention])
