"""Layers of timm that other models are built of, written out, with the same parameters under the same names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def to_2tuple(x: Any) -> tuple[Any, ...]:
    """`timm.layers.to_2tuple`: a pair."""
    return tuple(x) if isinstance(x, Iterable) and not isinstance(x, str) else (x, x)


trunc_normal_ = nn.init.trunc_normal_


def lecun_normal_(tensor: Tensor) -> Tensor:
    """`timm.layers.lecun_normal_`."""
    return nn.init.trunc_normal_(tensor, std=(1 / tensor.shape[1]) ** 0.5 / 0.87962566103423978)


def refuse(what: str, options: Mapping[str, Any], without: Iterable[str]) -> None:
    """Refuse options of a class of timm's that change the result and have no stand-in."""
    for option in without:
        if options.get(option):
            raise NotImplementedError(f"timm's {what} with {option} has no stand-in; install timm")


def register_model(function: Any) -> Any:
    """`timm.models.register_model`: returns the factory."""
    return function


class DropPath(nn.Module):
    """`timm.layers.DropPath`: drops branches at random while training; here it drops none."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        return x


class PatchEmbed(nn.Module):
    """`timm.layers.PatchEmbed`: [B, C, H, W] -> [B, patches, D]."""

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: Any = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Any = None,
        flatten: bool = True,
        bias: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.grid_size = tuple(size // patch for size, patch in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches, self.flatten = self.grid_size[0] * self.grid_size[1], flatten
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Patches of an image as tokens."""
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2) if self.flatten else x)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """`timm.layers.Mlp`."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Any = nn.GELU,
        norm_layer: Any = None,
        bias: bool = True,
        drop: Any = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        refuse("Mlp", kwargs, ["use_conv"])
        hidden = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden, bias=bias)
        self.act = act_layer()
        self.norm = norm_layer(hidden) if norm_layer else nn.Identity()
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Two linear layers."""
        return self.fc2(self.norm(self.act(self.fc1(x))))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """`timm.models.vision_transformer.Attention`: [B, N, D] -> [B, N, D], with one weight for q, k and v."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Any = nn.LayerNorm,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        refuse("Attention", kwargs, ("qk_scale", "scale_norm", "dim_out", "gate"))
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.fused_attn = self.head_dim**-0.5, True
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Self-attention over the tokens."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """`timm.models.vision_transformer.Block`: attention and an MLP, with pre-norms and residuals."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Any = nn.GELU,
        norm_layer: Any = nn.LayerNorm,
        mlp_layer: Any = Mlp,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if init_values or kwargs.get("qk_scale"):
            raise NotImplementedError("timm's Block with init_values or qk_scale has no stand-in; install timm")
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm, norm_layer=norm_layer)
        self.norm2 = norm_layer(dim)
        self.mlp = mlp_layer(dim, int(dim * mlp_ratio), act_layer=act_layer)

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]
