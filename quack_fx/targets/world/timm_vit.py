"""timm's vision transformer, which other models use or derive from, written out, with the same names of parameters."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.targets.world.vision import Block, PatchEmbed, refuse

_WITHOUT = ("init_values", "reg_tokens", "pre_norm", "no_embed_class", "dynamic_img_size", "fc_norm", "pos_embed")
"""Arguments that change the result and have no stand-in."""


class VisionTransformer(nn.Module):
    """`timm.models.vision_transformer.VisionTransformer`: [B, C, H, W] -> [B, classes]."""

    def __init__(
        self,
        img_size: Any = 224,
        patch_size: Any = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Any = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        class_token: bool = True,
        distilled: bool = False,
        drop_rate: float = 0.0,
        embed_layer: Any = PatchEmbed,
        norm_layer: Any = None,
        act_layer: Any = None,
        block_fn: Any = Block,
        representation_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        refuse("VisionTransformer", kwargs, _WITHOUT)
        norm, act = norm_layer or nn.LayerNorm, act_layer or nn.GELU
        self.num_classes, self.num_features, self.embed_dim = num_classes, embed_dim, embed_dim
        self.global_pool, self.num_tokens = global_pool, int(class_token) + int(distilled)
        self.num_prefix_tokens = self.num_tokens
        self.patch_embed = embed_layer(img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        count = self.patch_embed.num_patches + self.num_tokens
        self.pos_embed = nn.Parameter(torch.randn(1, count, embed_dim) * 0.02)
        self.pos_drop = nn.Dropout(drop_rate)
        made = [
            block_fn(dim=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm,
                     act_layer=act, **({"qk_norm": True} if qk_norm else {}))
            for _ in range(depth)
        ]  # fmt: skip
        self.blocks = nn.Sequential(*made)
        self.norm = norm(embed_dim)
        width = representation_size or embed_dim
        self.pre_logits: nn.Module = nn.Identity()
        if representation_size:
            self.pre_logits = nn.Sequential(nn.Linear(embed_dim, width), nn.Tanh())
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.head_dist = nn.Linear(embed_dim, num_classes) if distilled and num_classes else None

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a layer; subclasses apply it to layers of their own."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)

    init_weights = _init_weights

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add class tokens and positions to the patches."""
        front = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        return self.pos_drop(torch.cat([*front, x], 1) + self.pos_embed)  # type: ignore[no-any-return]

    def forward_features(self, x: Tensor) -> Tensor:
        """The tokens after the last block."""
        return self.norm(self.blocks(self._pos_embed(self.patch_embed(x))))  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Scores of the classes, from one token or from the mean of all."""
        if self.head_dist is not None:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        pooled = x[:, self.num_tokens :].mean(1) if self.global_pool == "avg" else x[:, 0]
        return self.pre_logits(pooled) if pre_logits else self.head(self.pre_logits(pooled))

    def forward(self, x: Tensor) -> Any:
        """Scores of the classes; `forward_features` of a subclass may pool the tokens already."""
        features = self.forward_features(x)
        return self.forward_head(features) if features.dim() == 3 else self.head(features)


_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}
_NAMES = re.compile(r"(vit_|vit_deit_|deit_)(tiny|small|base|large)_(distilled_)?patch(\d+)_(\d+)(\.\w+)?")


def create_model(model_name: str, pretrained: Any = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model` for plain vision transformers; no weights are downloaded."""
    name = _NAMES.fullmatch(model_name)
    if name is None or (name[1] == "vit_" and name[2] == "small"):
        raise NotImplementedError(f"timm's model {model_name!r} has no stand-in; install timm")
    width, depth, heads = _SIZES[name[2]]
    sizes = {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": int(name[4])}
    known = {"img_size": int(name[5]), "distilled": bool(name[3]), **sizes}
    return VisionTransformer(**{**known, **{n: v for n, v in kwargs.items() if v is not None}})
