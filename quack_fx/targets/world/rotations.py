"""Rotations, computed with torch: the rotary embedding extension of flash-attn, and quaternions of pytorch3d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def apply_rotary(x1: Tensor, x2: Tensor, cos: Tensor, sin: Tensor, out1: Tensor, out2: Tensor, conj: bool) -> None:
    """Rotate pairs of features, backwards with `conj`. The outputs may be the inputs."""
    if conj:
        sin = -sin
    first, second = x1 * cos - x2 * sin, x1 * sin + x2 * cos
    out1.copy_(first)
    out2.copy_(second)


def quaternion_to_matrix(quaternions: Tensor) -> Tensor:
    """Rotation matrices of quaternions, real part first, of any norm."""
    r, i, j, k = torch.unbind(quaternions, -1)
    two_s = 2.0 / (quaternions * quaternions).sum(-1)
    rows = (
        1 - two_s * (j * j + k * k), two_s * (i * j - k * r), two_s * (i * k + j * r),
        two_s * (i * j + k * r), 1 - two_s * (i * i + k * k), two_s * (j * k - i * r),
        two_s * (i * k - j * r), two_s * (j * k + i * r), 1 - two_s * (i * i + j * j),
    )  # fmt: skip
    return torch.stack(rows, -1).reshape(*quaternions.shape[:-1], 3, 3)


def quaternion_raw_multiply(a: Tensor, b: Tensor) -> Tensor:
    """Products of quaternions."""
    (aw, ax, ay, az), (bw, bx, by, bz) = torch.unbind(a, -1), torch.unbind(b, -1)
    parts = (
        aw * bw - ax * bx - ay * by - az * bz,
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
    )
    return torch.stack(parts, -1)


def quaternion_multiply(a: Tensor, b: Tensor) -> Tensor:
    """Products of rotations, as quaternions with a nonnegative real part."""
    product = quaternion_raw_multiply(a, b)
    return torch.where(product[..., :1] < 0, -product, product)


def quaternion_invert(quaternion: Tensor) -> Tensor:
    """Quaternions of the inverse rotations."""
    return torch.cat((quaternion[..., :1], -quaternion[..., 1:]), -1)


def quaternion_apply(quaternion: Tensor, point: Tensor) -> Tensor:
    """Points, rotated."""
    real = torch.zeros_like(point[..., :1])
    rotated = quaternion_raw_multiply(quaternion, torch.cat((real, point), -1))
    return quaternion_raw_multiply(rotated, quaternion_invert(quaternion))[..., 1:]


def apply_rotary_emb(
    freqs: Tensor, t: Tensor, start_index: int = 0, scale: float = 1.0, seq_dim: int = -2, **kwargs: Any
) -> Tensor:
    """`rotary_embedding_torch.apply_rotary_emb`: rotate neighbouring pairs of features by angles [tokens, width]."""
    width, tokens = freqs.shape[-1], t.shape[seq_dim]
    freqs = freqs[-tokens:] if freqs.dim() == 2 else freqs
    freqs = freqs.unsqueeze(1) if seq_dim == -3 and freqs.dim() == 2 else freqs
    before, turned, after = t.split([start_index, width, t.shape[-1] - start_index - width], dim=-1)
    even, odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    quarter = torch.stack((-odd, even), dim=-1).flatten(-2)
    return torch.cat((before, turned * freqs.cos() * scale + quarter * freqs.sin() * scale, after), dim=-1)


class RotaryEmbedding(nn.Module):
    """`rotary_embedding_torch.RotaryEmbedding` for text, without the decay of xPos."""

    def __init__(self, dim: int, *args: Any, theta: float = 10000.0, **kwargs: Any) -> None:
        super().__init__()
        if (
            kwargs.get("use_xpos")
            or kwargs.get("custom_freqs") is not None
            or kwargs.get("freqs_for", "lang") != "lang"
        ):
            raise NotImplementedError(
                "rotary_embedding_torch has no stand-in for xPos, pixels or frequencies of your own"
            )
        angles = 1.0 / theta ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim)
        self.freqs = nn.Parameter(angles, requires_grad=bool(kwargs.get("learned_freq", False)))

    def forward(self, t: Tensor | int, seq_len: int | None = None, offset: int = 0, **kwargs: Any) -> Tensor:
        """Angles [..., width] of positions, or of the first so many."""
        positions = t if isinstance(t, Tensor) else torch.arange(t)
        return ((positions + offset)[..., None].float() * self.freqs).repeat_interleave(2, dim=-1)

    def rotate_queries_or_keys(
        self, t: Tensor, seq_dim: int | None = None, offset: int = 0, scale: Any = None, **kwargs: Any
    ) -> Tensor:
        """Rotate queries or keys, [..., tokens, width]."""
        axis = -2 if seq_dim is None else seq_dim if seq_dim < 0 else seq_dim - t.dim()
        return apply_rotary_emb(self(t.shape[axis], offset=offset), t, seq_dim=axis)

    def rotate_queries_with_cached_keys(
        self, q: Tensor, k: Tensor, seq_dim: int | None = None, offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Rotate the last queries and all keys."""
        axis = -2 if seq_dim is None else seq_dim
        past = k.shape[axis] - q.shape[axis] + offset
        return self.rotate_queries_or_keys(q, axis, past), self.rotate_queries_or_keys(k, axis, offset)
