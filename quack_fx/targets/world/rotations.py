"""Rotations, computed with torch: the rotary embedding extension of flash-attn, and quaternions of pytorch3d."""

from __future__ import annotations

import torch
from torch import Tensor


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
