"""Names of packages for GPUs that have a known meaning, and what stands in for each.

In: a dotted name, by whatever path of the package it is imported. Out: what stands in for it, or None. A name is told
by its package and its last part, since packages move their functions about between versions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.targets.world import attention, flash_attn, rotations, timm_vit, vision
from quack_fx.targets.world.block_masks import BlockDiagonalCausalMask, BlockDiagonalMask
from quack_fx.targets.world.fields import Fields, Loader
from quack_fx.targets.world.inert import Inert, StandInUsed


def meaning(name: str) -> Any:
    """What stands in for a dotted name; None where it has no meaning that is known here."""
    package, last = name.split(".")[0], name.rsplit(".", 1)[-1]
    return _KNOWN.get(package, {}).get(last)


class _Kernel:
    """A Triton kernel: it can be made anywhere, and be run nowhere."""

    def __init__(self, function: Any) -> None:
        self.__name__ = getattr(function, "__name__", "kernel")
        self.__wrapped__ = function

    def __getitem__(self, grid: Any) -> Any:
        raise StandInUsed(f"triton (kernel {self.__name__})")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise StandInUsed(f"triton (kernel {self.__name__})")


def _kernel(*args: Any, **kwargs: Any) -> Any:
    """`triton.jit`, with or without arguments, and decorators around it."""
    return _Kernel(args[0]) if len(args) == 1 and not kwargs and callable(args[0]) else _Kernel


def _around_kernel(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    """`triton.autotune` and `triton.heuristics`: decorators that are called with options."""
    return lambda kernel: kernel


class ParallelLinear(nn.Linear):
    """A linear layer that is split over the ranks of a group, on the only rank."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *args: Any, dtype: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)


class ParallelEmbedding(nn.Embedding):
    """An embedding that is split over the ranks of a group, on the only rank."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx=kwargs.get("padding_idx"))


class PairedLinear(ParallelLinear):
    """Megatron's, which gives back a bias to be added later beside its output."""

    def forward(self, input: Tensor) -> Any:
        """The output, with the bias added, and no bias."""
        return super().forward(input), None


class RMSNorm(nn.RMSNorm):
    """A fused RMS norm with whatever options its package gives it."""

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, elementwise_affine: Any = True, *args: Any, **kwargs: Any
    ) -> None:
        _check_plain(kwargs)
        super().__init__(normalized_shape, eps=eps, elementwise_affine=elementwise_affine is not False)


class LayerNorm(nn.LayerNorm):
    """A fused layer norm with whatever options its package gives it."""

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, elementwise_affine: Any = True, *args: Any, **kwargs: Any
    ) -> None:
        _check_plain(kwargs)
        super().__init__(normalized_shape, eps=eps, elementwise_affine=elementwise_affine is not False)


def _check_plain(options: dict[str, Any]) -> None:
    """Refuse norms whose weight is not what multiplies."""
    if options.get("zero_centered_gamma"):
        raise NotImplementedError("a norm with zero_centered_gamma has no stand-in")


class SwiGLU(nn.Module):
    """A gated layer: two linear layers side by side, packed into one or not, and one behind them."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        *,
        _pack_weights: bool = True,
    ) -> None:
        super().__init__()
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias) if _pack_weights else None
        self.w1 = None if _pack_weights else nn.Linear(in_features, hidden_features, bias=bias)
        self.w2 = None if _pack_weights else nn.Linear(in_features, hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        if self.w1 is None or self.w2 is None:
            assert self.w12 is not None
            gate, value = self.w12(x).chunk(2, -1)
        else:
            gate, value = self.w1(x), self.w2(x)
        out: Tensor = self.w3(nn.functional.silu(gate) * value)
        return out


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """A fused cross-entropy; options that torch does not know are left out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        known = inspect.signature(nn.CrossEntropyLoss).parameters
        super().__init__(**{n: v for n, v in kwargs.items() if n in known})


class Registry:
    """A table of classes by name, filled by decorators."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._classes: dict[str, Any] = {}

    def register_module(self, name: Any = None, force: bool = False, module: Any = None, **kwargs: Any) -> Any:
        """Note a class, or give a decorator that does."""
        if module is None and callable(name):
            name, module = None, name
        if module is None:
            return lambda decorated: self.register_module(name, force, decorated)
        for known in name if isinstance(name, list | tuple) else [name or module.__name__]:
            self._classes[known] = module
        return module

    register = register_module

    def get(self, name: str) -> Any:
        """The class of a name, or None."""
        return self._classes.get(name)

    __getitem__ = get

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def build(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """An object of the class that a config names, made with its other fields."""
        given = {**kwargs.get("default_args", {}), **cfg}
        kind = given.pop("type")
        return (self._classes[kind] if isinstance(kind, str) else kind)(**given)


class _Truncated:
    """`scipy.stats.truncnorm`, by which layers draw their first weights: all of them zero here."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Truncated:
        """With bounds of its own."""
        return self

    def rvs(self, *args: Any, size: Any = 1, **kwargs: Any) -> Any:
        """Numbers, as many as asked for."""
        return torch.zeros(size).numpy()

    def std(self, *args: Any, **kwargs: Any) -> float:
        """The spread of a whole normal."""
        return 1.0


class LightningModule(nn.Module):
    """A LightningModule as far as a model's constructor and forward need one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
        """Keep the constructor's arguments as `self.hparams`."""
        frame = inspect.currentframe()
        given = frame.f_back.f_locals if frame is not None and frame.f_back is not None else {}
        kept = {n: v for n, v in given.items() if n not in ("self", "__class__")}
        self.hparams = SimpleNamespace(**kept)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing."""

    log_dict = log

    @property
    def device(self) -> Any:
        """Where the parameters are."""
        return next(self.parameters()).device


def _one(*args: Any, **kwargs: Any) -> int:
    return 1


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _yes(*args: Any, **kwargs: Any) -> bool:
    return True


def _same(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a collective of one rank gives back."""
    return x


def _group(*args: Any, **kwargs: Any) -> Any:
    return Inert("the model-parallel group")


_FLASH = {
    "flash_attn_func": flash_attn.flash_attn_func,
    "flash_attn_qkvpacked_func": flash_attn.flash_attn_qkvpacked_func,
    "flash_attn_kvpacked_func": flash_attn.flash_attn_kvpacked_func,
    "flash_attn_varlen_func": flash_attn.flash_attn_varlen_func,
    "flash_attn_varlen_qkvpacked_func": flash_attn.flash_attn_varlen_qkvpacked_func,
    "flash_attn_varlen_kvpacked_func": flash_attn.flash_attn_varlen_kvpacked_func,
    "flash_attn_unpadded_func": flash_attn.flash_attn_varlen_func,
    "flash_attn_unpadded_qkvpacked_func": flash_attn.flash_attn_varlen_qkvpacked_func,
    "flash_attn_unpadded_kvpacked_func": flash_attn.flash_attn_varlen_kvpacked_func,
    "flash_attn_with_kvcache": flash_attn.flash_attn_with_kvcache,
    "FlashAttention": flash_attn.FlashAttention,
    "FlashSelfAttention": flash_attn.FlashSelfAttention,
    "FlashCrossAttention": flash_attn.FlashCrossAttention,
    "unpad_input": flash_attn.unpad_input,
    "pad_input": flash_attn.pad_input,
    "index_first_axis": flash_attn.index_first_axis,
    "apply_rotary_emb": flash_attn.apply_rotary_emb,
    "apply_rotary_emb_func": flash_attn.apply_rotary_emb,
    "RMSNorm": RMSNorm,
    "CrossEntropyLoss": CrossEntropyLoss,
}
_NORMS = {
    "FusedLayerNorm": LayerNorm,
    "MixedFusedLayerNorm": LayerNorm,
    "FusedRMSNorm": RMSNorm,
    "MixedFusedRMSNorm": RMSNorm,
    "FastLayerNorm": LayerNorm,
}
_FLASH_3 = _FLASH | {
    "flash_attn_func": flash_attn.flash_attn_3_func,
    "flash_attn_varlen_func": flash_attn.flash_attn_3_varlen_func,
}
_PARALLEL = {
    "ColumnParallelLinear": ParallelLinear,
    "RowParallelLinear": ParallelLinear,
    "ParallelEmbedding": ParallelEmbedding,
    "VocabParallelEmbedding": ParallelEmbedding,
    "get_model_parallel_world_size": _one,
    "get_model_parallel_rank": _zero,
    "get_model_parallel_src_rank": _zero,
    "get_model_parallel_group": _group,
    "get_data_parallel_world_size": _one,
    "get_data_parallel_rank": _zero,
    "get_tensor_model_parallel_world_size": _one,
    "get_tensor_model_parallel_rank": _zero,
    "model_parallel_is_initialized": _yes,
    "copy_to_model_parallel_region": _same,
    "gather_from_model_parallel_region": _same,
    "reduce_from_model_parallel_region": _same,
    "scatter_to_model_parallel_region": _same,
}
_TIMM = {
    "DropPath": vision.DropPath,
    "to_2tuple": vision.to_2tuple,
    "trunc_normal_": vision.trunc_normal_,
    "lecun_normal_": vision.lecun_normal_,
    "register_model": vision.register_model,
    "PatchEmbed": vision.PatchEmbed,
    "Mlp": vision.Mlp,
    "Attention": vision.Attention,
    "Block": vision.Block,
    "VisionTransformer": timm_vit.VisionTransformer,
    "create_model": timm_vit.create_model,
}
_FIELDS: dict[str, Any] = {
    name: Fields for name in ("ConfigDict", "FrozenConfigDict", "EasyDict", "DictConfig", "CfgNode", "Munch")
}
_FIELDS |= {name: Fields for name in ("Dict", "AttrDict", "DefaultMunch", "Box")} | {"OmegaConf": Loader}
_HOLDERS = ("ml_collections", "omegaconf", "easydict", "addict", "munch", "attrdict", "box", "yacs", "fvcore", "mmcv")
_REGISTRY = {"Registry": Registry}
_LIGHTNING = {"LightningModule": LightningModule}
_KNOWN: dict[str, dict[str, Any]] = {
    "flash_attn": _FLASH,
    "flash_attn_interface": _FLASH_3,
    "flash_attn_2_cuda": {},
    "xformers": {
        "memory_efficient_attention": attention.memory_efficient_attention,
        "LowerTriangularMask": attention.LowerTriangularMask,
        "LowerTriangularFromBottomRightMask": attention.LowerTriangularFromBottomRightMask,
        "BlockDiagonalMask": BlockDiagonalMask,
        "BlockDiagonalCausalMask": BlockDiagonalCausalMask,
        "SwiGLU": SwiGLU,
    },
    "sageattention": {"sageattn": attention.sageattn},
    "rotary_emb": {"apply_rotary": rotations.apply_rotary},
    "pytorch3d": {n: getattr(rotations, n) for n in dir(rotations) if n.startswith("quaternion_")},
    "apex": _NORMS,
    "fairscale": _PARALLEL,
    "megatron": _PARALLEL | {"ColumnParallelLinear": PairedLinear, "RowParallelLinear": PairedLinear},
    "transformer_engine": {"Linear": ParallelLinear, "LayerNorm": LayerNorm, "RMSNorm": RMSNorm},
    "timm": _TIMM,
    "torchvision": {"_is_tracing": lambda: False},
    "triton": {"jit": _kernel, "autotune": _around_kernel, "heuristics": _around_kernel},
    **dict.fromkeys(("mmcv", "mmengine", "mmdet", "mmseg", "fvcore", "detectron2"), _REGISTRY),
    "pytorch_lightning": _LIGHTNING,
    "lightning": _LIGHTNING,
    **dict.fromkeys(_HOLDERS, _FIELDS | _REGISTRY),
    "scipy": {"truncnorm": _Truncated()},
}
